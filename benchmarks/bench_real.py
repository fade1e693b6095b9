"""Trains a model of Hugging Face's form, a real one, with ours and with TRL on the same pairs: pairs/s, peak memory.

    python -m benchmarks.bench_real --model SmolLM2-135M-Instruct

The folder's own chat template makes the token ids of both; launch/export.py makes a folder of a .gguf. Ours is what a
run does: DeepSpeed ZeRO-2, bf16 with fp32 masters. TRL (benchmarks/requirements.txt) computes in bf16 (weights and
AdamW too) and under autocast (fp32 weights), on several processes under DDP. References are computed once, by ours in
bf16, and given to all; a single process of TRL's makes its own reference pass before, to be timed.

Each way is started by itself, makes a step that is not counted and some that are, and ends: its memory is its own, from
its start on, with every page that two of its processes share counted once (PSS). The ways take turns, round after
round; a turn in which others had much of the cores is made again. A step is all from one update to the next, for one
process or several the same pairs on the same cores. The losses say that all train on the same thing: the first is ln 2.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro

from benchmarks.measure import MOST_AGAIN, RESULTS, PeakMemory, gemm_flops, record, table
from benchmarks.ours import EngineTrainer, micro_batches, new_store, reference_pass
from benchmarks.peers import TrlSettings, train_folder
from benchmarks.quiet import CoreWatch
from benchmarks.rank_jobs import run_ranks
from benchmarks.workload import pack_shared, shares_prompt
from simple_llama.cluster.distributed import barrier, close_ranks, init_ranks, leave
from simple_llama.common.errors import UserError
from simple_llama.common.paths import package_path, root_path
from simple_llama.finetune.chat_config import ChatConfig, own_chat
from simple_llama.interop.adapted_start import adapted
from simple_llama.interop.open_start import open_start
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import build_model
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore

BETA, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0  # of both sides
OURS, REFERENCE = "ours", "reference"
_MODULE = "benchmarks.bench_real"


@dataclass(frozen=True)
class BenchReal:
    """What is measured, on what."""

    # === Work ===
    model: str  # folder of a model in Hugging Face's form, with its tokenizer and chat template
    data: str = package_path("reinforcement_learning", "rl_dataset")  # pairs, as DPOConfig takes them
    max_tokens: int = 512  # pairs with longer chats are left out
    pairs_per_step: int = 16  # of all processes together
    batch_size: int = 8  # pairs a micro-batch of a process
    rows: int = 0  # of a micro-batch of ours, at most, in place of batch_size pairs; 0: as many as these have
    rate: float = 2e-5  # learning rate, constant
    lora_rank: int = 0  # adapters of this rank beside all layers of a block, in ours and (peft) in TRL; 0: all weights
    lora_alpha: float = 32.0

    # === TRL ===
    settings: tuple[Literal["bf16", "autocast", "fp32"], ...] = ("bf16", "autocast")  # (): ours alone
    attention: Literal["sdpa", "eager"] = "sdpa"  # TRL's

    # === Measurement ===
    processes: tuple[int, ...] = (1, 2)  # that train together
    cores: int = 2  # shared by all processes of a way
    steps: int = 3  # that are counted, after one that warms up
    rounds: int = 2  # turns of every way
    results: str = RESULTS  # file to append the outcome to; "": only print
    worker: str = ""  # job file of a process that this script has started


class Way(NamedTuple):
    """Who trains, on how many processes."""

    name: str  # OURS, or one of TRL's settings
    world: int

    def __str__(self) -> str:
        trainer = {OURS: "ours, bf16", REFERENCE: "the reference pass"}.get(self.name, f"TRL, {self.name}")
        return f"{trainer}, {self.world} {'process' if self.world == 1 else 'processes'}"


@dataclass
class Measured:
    """A process of a way, or all of a way's turns."""

    seconds: list[float] = field(default_factory=list)  # of each counted step
    losses: list[float] = field(default_factory=list)  # of each step of a turn
    useful: list[float] = field(default_factory=list)  # FLOPs of each counted step, of all processes; ours alone
    gemm: float = 0.0  # best FLOP/s of bf16 GEMMs, of all processes at once; ours alone
    passed: float = 0.0  # seconds of the reference pass over all pairs; 0: none was made
    peak_gib: float = 0.0  # most memory of all processes of a turn
    noisy: int = 0  # turns that count and were not quiet


def main(bench: BenchReal) -> None:
    """The reference once, then every way in turns, then the record."""
    started = time.perf_counter()
    check(bench)
    ways = [Way(name, world) for world in bench.processes for name in (OURS, *bench.settings)]
    found = {way: Measured() for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        reference = quiet_turn(bench, Way(REFERENCE, 1), folder).passed
        for _ in range(bench.rounds):
            for way in ways:
                turn = quiet_turn(bench, way, folder)
                found[way].seconds += turn.seconds
                found[way].useful += turn.useful
                found[way].losses = turn.losses
                found[way].noisy += turn.noisy
                found[way].gemm = max(found[way].gemm, turn.gemm)
                found[way].passed = turn.passed
                found[way].peak_gib = max(found[way].peak_gib, turn.peak_gib)
        described = (Path(folder) / "pairs.txt").read_text()
    words = f"{described} {setup(bench)}\n\n{speeds(bench, found)}\n\n{passes(bench, reference, found)}"
    body = f"{words}\n\n{time.perf_counter() - started:.0f} s in all"
    command = shlex.join(["python", "-m", _MODULE, *sys.argv[1:]])
    record(f"A real model, {Path(bench.model).name}", command, body, torch.device("cpu"), bench.results)


def check(bench: BenchReal) -> None:
    """UserError for sizes that do not fit together."""
    for world in bench.processes:
        if bench.pairs_per_step % (world * bench.batch_size):
            raise UserError(
                f"pairs_per_step: expected a multiple of {world} processes x batch_size {bench.batch_size}, found "
                f"{bench.pairs_per_step}"
            )


# === Processes ===


def quiet_turn(bench: BenchReal, way: Way, folder: str) -> Measured:
    """A turn of a way in which the machine was left to it; the last one that was made where none was so."""
    turn = Measured()
    for _ in range(MOST_AGAIN):
        watch, memory = CoreWatch(), PeakMemory()
        with memory:
            turn = together(run_job(bench, way, folder))
        share = watch.share()
        turn.peak_gib, turn.noisy = memory.peak_gib, int(not share.is_quiet)
        seconds = ", ".join(f"{second:.2f}" for second in turn.seconds)
        said = f"{seconds} s, {turn.peak_gib:.2f} GiB; {share.cpu:.0f} CPU s, {share}{'; not quiet' * turn.noisy}"
        print(f"{way}: {said}", flush=True)
        if not turn.noisy:
            break
    return turn


def run_job(bench: BenchReal, way: Way, folder: str) -> list[Measured]:
    """A turn of a way: what each of its processes found."""
    path = Path(folder) / "job.json"
    path.write_text(json.dumps({"bench": asdict(bench), "way": way._asdict()}))
    variables = {"OMP_NUM_THREADS": max(1, bench.cores // way.world)}
    run_ranks(_MODULE, ["--model", bench.model, "--worker", str(path)], way.world, variables)
    places = [Path(folder) / f"found{rank}.json" for rank in range(way.world)]
    return [Measured(**json.loads(place.read_text())) for place in places]


def together(parts: Sequence[Measured]) -> Measured:
    """All processes of a turn: the slowest of each step, the mean loss, the sum of the rates."""
    seconds = [max(step) for step in zip(*(part.seconds for part in parts), strict=True)]
    losses = [statistics.fmean(step) for step in zip(*(part.losses for part in parts), strict=True)]
    return Measured(seconds, losses, parts[0].useful, sum(part.gemm for part in parts), parts[0].passed)


def work(path: Path) -> None:
    """A process of a way: writes what it found beside the job."""
    given = json.loads(path.read_text())
    bench, way = BenchReal(**given["bench"]), Way(**given["way"])
    torch.set_num_threads(max(1, bench.cores // way.world))
    start = open_start(bench.model)
    steps = make_steps(bench, start)
    store = new_store(path.parent, "bench_real")
    ways: dict[str, Callable[[], Measured]] = {
        REFERENCE: lambda: fill_store(bench, start, steps, store, path.parent),
        OURS: lambda: train_ours(bench, way, start, steps, store),
    }
    found = ways.get(way.name, lambda: train_trl(bench, way, steps, store, path.parent))()
    (path.parent / f"found{os.environ['RANK']}.json").write_text(json.dumps(asdict(found)))


def make_steps(bench: BenchReal, start: StartModel) -> list[list[TokenizedPair]]:
    """The pairs of each step in the model's own chat format; UserError where there are too few.

    Pairs whose earlier answers differ too are left out: TRL's format has one prompt for both chats.
    """
    if start.own_tokenizer is None:
        raise UserError(f"{bench.model}: expected a model with its own tokenizer, found none")
    chat = own_chat(start.own_tokenizer, ChatConfig())
    loaded = RLDatasetLoader(bench.data, chat, bench.max_tokens, val_share=0.0, seed=0)
    pairs = [pair for pair in loaded.train if shares_prompt(pair)]
    size, count = bench.pairs_per_step, bench.steps + 1
    if len(pairs) < size * count:
        raise UserError(f"{bench.data}: expected {size * count} pairs with one prompt, found {len(pairs)}")
    order = np.random.default_rng(0).permutation(len(pairs))
    return [[pairs[i] for i in order[step * size : (step + 1) * size]] for step in range(count)]


# === Ways ===


def fill_store(
    bench: BenchReal, start: StartModel, steps: Sequence[list[TokenizedPair]], store: RefStore, folder: Path
) -> Measured:
    """The reference pass, and pairs.txt: what the pairs are, in words."""
    pairs = [pair for step in steps for pair in step]
    with start.reading() as loaded:
        model = build_model(loaded, torch.bfloat16, "cpu")
    started = time.perf_counter()
    reference_pass(model, store, pairs, bench.batch_size, torch.device("cpu"), flush_pairs=len(pairs))
    passed = time.perf_counter() - started
    weights = sum(parameter.numel() for parameter in model.parameters())
    lengths = [
        statistics.fmean(len(getattr(pair, part)) for pair in pairs) for part in ("prefix", "chosen", "rejected")
    ]
    longest = max(max(pair.chosen_len, pair.rejected_len) for pair in pairs)
    (folder / "pairs.txt").write_text(
        f"{weights / 1e6:.1f} M weights, {len(pairs)} pairs of {Path(bench.data).name}: prompt {lengths[0]:.0f}, "
        f"answers {lengths[1]:.0f} and {lengths[2]:.0f} tokens on average, the longest chat {longest}."
    )
    return Measured(passed=passed)


def train_ours(
    bench: BenchReal, way: Way, start: StartModel, steps: Sequence[list[TokenizedPair]], store: RefStore
) -> Measured:
    """Our run's own step; each process has its share of a step's pairs, dealt by rows as BatchPlan does."""
    ranks = init_ranks("cpu")
    torch.set_num_threads(max(1, bench.cores // way.world))  # init_ranks takes all cores
    parts = bench.pairs_per_step // (way.world * bench.batch_size)
    config = DPOConfig(
        deepspeed_config=root_path("ds_configs", "zero2_bf16.json"),
        batch_size=bench.batch_size,
        grad_accum_steps=parts,
        beta=BETA,
        max_lr=bench.rate,
        min_lr=bench.rate,
        beta1=BETAS[0],
        beta2=BETAS[1],
        max_grad_norm=CLIP,
        lora_rank=bench.lora_rank,
        lora_alpha=bench.lora_alpha,
        trainable="lora" if bench.lora_rank else "all",
    )
    start = adapted(start, config)
    with start.reading() as loaded:
        trainer = EngineTrainer(loaded, config, store, ranks)
    found, ends = Measured(), []
    for step in steps:
        trainer.step_of(hands_of(bench, step, way.world)[ranks.rank], pack_shared, way.world / len(step))
        barrier(ranks)
        ends.append(time.perf_counter())
        means = trainer.sums.means()
        found.losses.append(means["loss"])
        found.useful.append(means["useful_flops"])
        trainer.sums.reset()
    found.seconds, found.useful = np.diff(ends).tolist(), found.useful[1:]
    barrier(ranks)  # so that all multiply at once, as they did
    found.gemm = gemm_flops(torch.bfloat16, ranks.device)
    close_ranks()
    return found


def hands_of(bench: BenchReal, step: list[TokenizedPair], world: int) -> list[list[list[TokenizedPair]]]:
    """Each rank's micro-batches of a step of ours, dealt as BatchPlan does."""
    if bench.rows:
        pairs = -(-len(step) // world)
        plan = BatchPlan(np.array([pair.rows for pair in step]), 0, world, pairs, 1, most_rows=bench.rows)
        return [[[step[i] for i in micro] for micro in rank] for rank in plan.step(0)]
    dealt = micro_batches(step, bench.pairs_per_step // bench.batch_size)
    return [dealt[rank::world] for rank in range(world)]


def train_trl(
    bench: BenchReal, way: Way, steps: Sequence[list[TokenizedPair]], store: RefStore, folder: Path
) -> Measured:
    """TRL's `train()`, under DDP where there are several processes."""
    pairs = [pair for step in steps for pair in step]
    parts = bench.pairs_per_step // (way.world * bench.batch_size)
    lora: dict[str, Any] = {"lora_rank": bench.lora_rank, "lora_alpha": bench.lora_alpha}
    settings = TrlSettings(
        way.name, bench.batch_size, parts, BETA, bench.rate, BETAS, CLIP, attention=bench.attention, **lora
    )
    ref_logps_B2 = store.lookup(PairSet.of(pairs).keys)
    ends, losses, passed = train_folder(bench.model, pairs, ref_logps_B2, settings, str(folder / "trl"))
    means = [statistics.fmean(losses[step * parts : (step + 1) * parts]) for step in range(len(steps))]
    return Measured(np.diff(ends).tolist(), means, passed=passed)


# === Tables ===


def setup(bench: BenchReal) -> str:
    """What is common to all ways, in words."""
    lora = f"Adapters of rank {bench.lora_rank}, alpha {bench.lora_alpha:g}. " if bench.lora_rank else ""
    return (
        f"A step has {bench.pairs_per_step} pairs in micro-batches of {bench.batch_size}"
        f"{f' (ours: of at most {bench.rows} rows)' if bench.rows else ''} on {bench.cores} cores; "
        f"{bench.rounds} turns of {bench.steps} steps after one that warms up. {lora}Learning rate {bench.rate:g}, "
        f"beta {BETA}, references given; TRL with {bench.attention}. Ours over GEMMs: useful FLOP/s of the median step "
        "over the best bf16 GEMMs of all processes at once. Peak: of all processes together, from their start on, "
        "pages that they share once."
    )


def speeds(bench: BenchReal, found: Mapping[Way, Measured]) -> str:
    """Pairs/s from the median step, its spread, ours over each by round, peak memory, and the losses of the last
    turn."""
    head = ["", "pairs/s", "step, median (range)", "ours is faster by", "over GEMMs", "peak GiB", "loss of each step"]
    rows = [head]
    for way, measured in found.items():
        step, mine = statistics.median(measured.seconds), found[Way(OURS, way.world)].seconds
        faster = statistics.median(theirs / ours for theirs, ours in zip(measured.seconds, mine, strict=True))
        rates = [flops / second for flops, second in zip(measured.useful, measured.seconds, strict=False)]
        rows.append(
            [
                str(way) + f" ({measured.noisy} turns NOT QUIET)" * (measured.noisy > 0),
                f"{bench.pairs_per_step / step:.2f}",
                f"{step:.2f} s ({min(measured.seconds):.2f}-{max(measured.seconds):.2f})",
                "-" if way.name == OURS else f"{faster:.2f}x",
                f"{statistics.median(rates) / measured.gemm:.2f}" if rates else "-",
                f"{measured.peak_gib:.2f}",
                ", ".join(f"{loss:.4f}" for loss in measured.losses),
            ]
        )
    return table(rows)


def passes(bench: BenchReal, ours: float, found: Mapping[Way, Measured]) -> str:
    """The reference passes of single processes, in words; both in batches of `batch_size` pairs."""
    pairs = bench.pairs_per_step * (bench.steps + 1)
    said = [f"{pairs / ours:.2f} pairs/s of ours in bf16"]
    for way, measured in found.items():
        if measured.passed:
            said.append(f"{pairs / measured.passed:.2f} of {way} ({measured.passed / ours:.2f}x our time)")
    return f"The reference pass of {pairs} pairs, the first one of its process: {', '.join(said)}."


if __name__ == "__main__":
    asked = tyro.cli(BenchReal, description=__doc__)
    try:
        if not asked.worker:
            main(asked)
        else:
            work(Path(asked.worker))
            leave(0)
    except UserError as problem:
        sys.exit(f"error: {problem}")
