"""Times a whole optimizer step of ours against TRL's DPOTrainer on the same weights, pairs and pairs a step.

    python -m benchmarks.bench_train                    # a CPU: HH-RLHF and two synthetic mixes, 36 M weights
    python -m benchmarks.bench_train --device cuda --shape 1.3b --settings bf16 autocast

A step is everything: making the batch, forward, backward, ZeRO-2's reduction (one rank), clip, AdamW. References are
precomputed on both sides. All trainers live in one process and take turns step by step. First of all both sides must
agree in fp32 on log-probs, loss and every gradient.

TRL (needs the packages of benchmarks/requirements.txt) computes in three ways: bf16 (weights and AdamW in bf16),
autocast (its default bf16=True: fp32 weights) and fp32; each with the faster of its two attention implementations.
The shape llama-3.2-1b has the sizes of that model, but as many key heads as query heads and an untied head.
"""

from __future__ import annotations

import gc
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks import train_report
from benchmarks.agreement import check_agreement
from benchmarks.kept import KEPT
from benchmarks.measure import MOST_AGAIN, RESULTS, gemm_flops, interleaved, peaks_gib, profile_shares, record
from benchmarks.ours import EngineTrainer, PlainTrainer, Trainer, micro_batches, new_store, reference_pass
from benchmarks.peers import ATTENTIONS, Peer, SteppedPeer, TrlSettings
from benchmarks.train_report import MixResult
from benchmarks.workload import HH_DATA, PACKS, make_pairs, mixes_at_hand, pairs_for_rows, start_model
from simple_llama.cluster.distributed import Ranks, close_ranks, init_ranks
from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.ops.machine import peak_memory_gb, synchronize
from simple_llama.pretraining.weights import WeightsFile, build_model
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.objective.cost import useful_flops

ROWS_ON_CUDA = 16384  # packed rows of a micro-batch of ours, at least
BETA, RATE, BETAS, CLIP = 0.1, 1e-7, (0.9, 0.95), 1.0  # of both sides; a tiny rate keeps the weights as they are


@dataclass(frozen=True)
class BenchTrain:
    """What is measured, on what."""

    # === Work ===
    mixes: tuple[
        Literal["hh", "short", "long", "uf-71-169", "uf-200-300"], ...
    ] = ()  # (): hh, short, long; CUDA: hh and both uf
    shape: Literal["tiny", "36m", "1.3b", "llama-3.2-1b"] = "36m"  # of a model with random weights
    model_path: str = ""  # a .pth to take the weights from instead
    data: str = HH_DATA  # HH-RLHF file of the mix hh
    batch_size: int = 0  # pairs a micro-batch; 0: 8, on CUDA a multiple of 8 with 16,384 packed rows or more
    accumulate: int = 1  # micro-batches a step
    seed: int = 0  # of weights and pairs

    # === TRL ===
    settings: tuple[Literal["bf16", "autocast", "fp32"], ...] = ("bf16", "autocast", "fp32")  # (): ours alone
    peer_batch_size: int = (
        0  # pairs a micro-batch of TRL and of ours unshared, a divisor of ours; 0: as ours, on CUDA 8
    )
    agreement_pairs: int = 4  # pairs of the check before all

    # === Measurement ===
    rounds: int = 7  # rounds after one warm-up; each times one step of every trainer
    threads: int = 2  # CPU threads
    device: Literal["cpu", "cuda"] = "cpu"  # where all compute
    minutes: float = 0.0  # after which no other measurement begins; 0: all are made
    results: str = RESULTS  # file to append the outcome to; "": only print


def main(bench: BenchTrain) -> None:
    """Agreement, then every mix, then the record."""
    started = time.perf_counter()
    command = shlex.join(["python", "-m", "benchmarks.bench_train", *sys.argv[1:]])
    KEPT.begin(command, bench.results, bench.minutes)
    ranks = init_ranks(bench.device)
    torch.set_num_threads(bench.threads)  # init_ranks takes all cores
    start = start_model(bench.shape, bench.model_path, bench.seed, ranks.device)
    default = ("hh", "uf-71-169", "uf-200-300") if bench.device == "cuda" else ("hh", "short", "long")
    mixes = bench.mixes or mixes_at_hand(default, bench.data)
    notes = []
    if bench.settings:
        pairs = make_pairs(mixes[0], bench.agreement_pairs, start.architecture.vocab_size, bench.seed, bench.data)
        notes.append(check_agreement(start, pairs, trl_settings("fp32", len(pairs), 1), ranks.device))
        KEPT.keep("agreement", found=notes[-1])
    with tempfile.TemporaryDirectory() as folder:
        ours = our_trainers(bench, start, ranks, folder)
        results: list[MixResult] = []
        for mix in mixes:
            if results and KEPT.is_over():
                notes.append(f"- {mix}: not measured, the bench's time was over")
            else:
                results.append(measure_mix(bench, mix, start, ours, ranks, folder))
    rates = {dtype: gemm_flops(dtype, ranks.device) for dtype in (torch.bfloat16, torch.float32)}
    for result in results:
        result.gemm_flops = rates
    notes.append(
        f"peak of the whole process {peak_memory_gb(ranks.device):.2f} GiB, {time.perf_counter() - started:.0f} s"
    )
    body = train_report.body(results, ranks.device) + "\n\n" + "\n".join(notes)
    record(f"A training step, {start.path.name}", command, body, ranks.device, bench.results)
    close_ranks()


def trl_settings(numerics: str, batch_size: int, accumulate: int) -> TrlSettings:
    """TRL's share of the common settings."""
    return TrlSettings(numerics, batch_size, accumulate, BETA, RATE, BETAS, CLIP)


def our_trainers(bench: BenchTrain, start: WeightsFile, ranks: Ranks, folder: str) -> dict[str, Trainer]:
    """Ours in bf16 with and without DeepSpeed, and in fp32 where TRL is measured in it."""
    kinds: dict[str, tuple[type[Trainer], str]] = {
        "bf16": (EngineTrainer, "zero2_bf16.json"),
        "bf16 plain loop": (PlainTrainer, "zero2_bf16.json"),
    }
    if "fp32" in bench.settings:
        kinds["fp32"] = (EngineTrainer, "zero2_fp32.json")

    def make(kind: type[Trainer], ds_config: str) -> Trainer:
        config = DPOConfig(
            deepspeed_config=root_path("ds_configs", ds_config),
            grad_accum_steps=bench.accumulate,
            beta=BETA,
            max_lr=RATE,
            min_lr=RATE,
            beta1=BETAS[0],
            beta2=BETAS[1],
            max_grad_norm=CLIP,
        )
        return kind(start, config, new_store(folder, ds_config), ranks)

    return {name: make(*kind) for name, kind in kinds.items()}


def measure_mix(
    bench: BenchTrain, mix: str, start: WeightsFile, ours: dict[str, Trainer], ranks: Ranks, folder: str
) -> MixResult:
    """All trainers on the same steps of a mix, in turns."""
    gc.collect()  # trainers of the mix before, or of the check, that hold each other
    vocab, device = start.architecture.vocab_size, ranks.device
    batch_size, each = batch_sizes(bench, make_pairs(mix, 256, vocab, bench.seed, bench.data))
    parts = {"shared": bench.accumulate} | dict.fromkeys(("whole", "padded"), bench.accumulate * batch_size // each)
    per_step = batch_size * bench.accumulate
    # with a warm-up, those that are made again, one for memory and one that is profiled at the end
    count = bench.rounds + MOST_AGAIN + 3
    pairs = make_pairs(mix, per_step * count, vocab, bench.seed, bench.data)
    steps = [pairs[i * per_step : (i + 1) * per_step] for i in range(count)]
    fill_stores(start, ours, pairs, batch_size, device)

    ways: dict[str, Callable[[], None]] = {"ours bf16": stepper(ours["bf16"], "shared", steps, bench.accumulate)}
    for name in ("whole", "padded"):
        ways[f"ours bf16, {name}"] = stepper(ours["bf16"], name, steps, parts[name])
    ways["ours bf16, plain loop"] = stepper(ours["bf16 plain loop"], "shared", steps, bench.accumulate)
    if "fp32" in ours:
        ways["ours fp32"] = stepper(ours["fp32"], "shared", steps, bench.accumulate)
    peers, attention = {}, {}
    for numerics in bench.settings:
        peers[numerics] = trl_stepped(numerics, start, steps, each, ours, device, folder)
        attention[numerics] = faster_attention(peers[numerics], device)
        ways[f"TRL {numerics}"] = peers[numerics].step
        KEPT.keep(f"{mix}, TRL {numerics}", attention=attention[numerics])
    print(f"{mix}: {per_step} pairs a step", flush=True)
    seconds = interleaved(ways, bench.rounds, device)
    # before `peaks_gib` gives back what a step uses again
    profile = "not looked at" if KEPT.is_over() else profile_shares(ways["ours bf16"], device)
    memory = peaks_gib(ways, device)
    for peer in peers.values():
        peer.close()
    counted = [steps[1 + number] for number in seconds.rounds]
    flops = {name: step_flops(ours["bf16"], name, counted, parts[name]) for name in PACKS}
    return MixResult(mix, per_step, batch_size, each, mean_lengths(pairs), seconds, memory, flops, attention, profile)


def batch_sizes(bench: BenchTrain, sample: list[TokenizedPair]) -> tuple[int, int]:
    """Pairs a micro-batch: of ours, and of TRL and of ours unshared, which need more memory a pair."""
    on_cuda = bench.device == "cuda"
    enough = -(-pairs_for_rows(sample, ROWS_ON_CUDA) // 8) * 8
    ours = bench.batch_size or (enough if on_cuda else 8)
    each = bench.peer_batch_size or (min(8, ours) if on_cuda else ours)
    if ours % each:
        raise UserError(f"peer_batch_size: expected a divisor of batch_size {ours}, found {each}")
    return ours, each


def stepper(trainer: Trainer, pack: str, steps: Sequence[list[TokenizedPair]], count: int) -> Callable[[], None]:
    """Makes the next step at each call, of `count` micro-batches."""
    ahead = iter(steps)
    return lambda: trainer.step(next(ahead), PACKS[pack], count)


def fill_stores(
    start: WeightsFile, ours: dict[str, Trainer], pairs: list[TokenizedPair], batch_size: int, device: torch.device
) -> None:
    """The reference pass of each of our trainers' stores."""
    for trainer in ours.values():
        model = build_model(start, trainer.dtype, device)
        reference_pass(model, trainer.store, pairs, batch_size, device, flush_pairs=512)


def trl_stepped(
    numerics: str,
    start: WeightsFile,
    steps: Sequence[list[TokenizedPair]],
    each: int,
    ours: dict[str, Trainer],
    device: torch.device,
    folder: str,
) -> SteppedPeer:
    """TRL's trainer on the first step's pairs for `faster_attention`, then on all steps; reference: ours in bf16."""
    trials = 2 * len(ATTENTIONS[device.type])
    pairs = [pair for step in [*[steps[0]] * trials, *steps] for pair in step]
    settings = trl_settings(numerics, each, len(steps[0]) // each)
    ref_logps_B2 = ours["bf16"].store.lookup(PairSet.of(pairs).keys)
    return SteppedPeer(Peer(start, pairs, ref_logps_B2, settings, device, str(Path(folder) / "trl")))


def faster_attention(peer: SteppedPeer, device: torch.device) -> str:
    """Leaves the trainer with the faster of its attention implementations; says which."""
    seconds = {}
    for name in ATTENTIONS[device.type]:  # a cold step and a timed one
        peer.peer.set_attention(name)
        peer.step()
        synchronize(device)
        start = time.perf_counter()
        peer.step()
        synchronize(device)
        seconds[name] = time.perf_counter() - start
    best = min(seconds, key=lambda name: seconds[name])
    peer.peer.set_attention(best)
    return f"{best} ({', '.join(f'{name} {value:.2f} s' for name, value in seconds.items())})"


def step_flops(trainer: Trainer, pack: str, steps: Sequence[list[TokenizedPair]], count: int) -> list[float]:
    """FLOPs of each round's step when its batches are packed so: visible keys, and the head's scored rows only."""
    return [
        sum(
            useful_flops(trainer.size, trainer.model.architecture, PACKS[pack](part), backward=True)
            for part in micro_batches(step, count)
        )
        for step in steps
    ]


def mean_lengths(pairs: Sequence[TokenizedPair]) -> tuple[float, float, float]:
    """Mean tokens of prompts, chosen and rejected answers."""
    sums = [(len(pair.prefix), len(pair.chosen), len(pair.rejected)) for pair in pairs]
    prompt, chosen, rejected = (sum(column) / len(pairs) for column in zip(*sums, strict=True))
    return prompt, chosen, rejected


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchTrain, description=__doc__))
    except UserError as problem:
        sys.exit(f"error: {problem}")
