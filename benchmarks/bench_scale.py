"""What more ranks, communication settings, offload and recomputation cost: one rank, then several on this machine.

    python -m benchmarks.bench_scale

Every rank has the same micro-batches in both parts and, on a CPU, the same threads, so a step of several ranks lasts
as long as one of a single rank if communication is free. Steps of all settings take turns; medians are shown.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from benchmarks.measure import RESULTS, record, table
from benchmarks.rank_jobs import run_ranks
from simple_llama.cluster.distributed import Ranks, barrier, close_ranks, init_ranks, leave
from simple_llama.common.paths import root_path
from simple_llama.ops.machine import peak_memory_gb, synchronize
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss


@dataclass(frozen=True)
class Bench:
    """Sizes of the measurement."""

    ranks: int = 2  # processes of the second part: one a GPU, or sharing the cores
    steps: int = 5  # measured optimizer steps of each setting, after one that warms up
    pairs: int = 8  # pairs per micro-batch per rank
    accumulate: int = 4  # micro-batches per optimizer step
    prompt: int = 210  # tokens that both chats of a pair share: the mean of HH-RLHF in our chat format
    chosen: int = 43  # scored tokens of a chosen answer, the same
    rejected: int = 54  # scored tokens of a rejected answer, the same
    width: int = 512  # of the model
    layers: int = 8  # of the model
    heads: int = 8  # of the model
    vocabulary: int = 8192  # of the model
    device: str = "auto"  # auto: cuda where there is one
    threads: int = 0  # CPU threads of a rank in both parts; 0: cores / ranks
    settings: tuple[str, ...] = ()  # names of those to measure; none: all
    results: str = RESULTS  # file that the tables are appended to; "": only print
    worker: str = ""  # job file of a rank that this script has started


@dataclass(frozen=True)
class Setting:
    """A DeepSpeed JSON of ours with changes, and settings of DPOConfig."""

    file: str = "zero2_bf16"  # of ds_configs/
    top: dict[str, Any] = field(default_factory=dict)  # changes beside its ZeRO section
    zero: dict[str, Any] = field(default_factory=dict)  # changes in its ZeRO section
    ours: dict[str, Any] = field(default_factory=dict)  # fields of DPOConfig


SHIPPED = "zero2_bf16"
SETTINGS = {
    SHIPPED: Setting(),  # overlap_comm, buckets of 5e7, fp32 communication
    "overlap_comm off": Setting(zero={"overlap_comm": False}),
    "buckets of 5e6": Setting(zero={"reduce_bucket_size": 5_000_000}),
    "communication bf16": Setting(top={"communication_data_type": "bf16"}),
    "reduce_once": Setting(ours={"reduce_once": True}),
    "reduce_once, bf16": Setting(top={"communication_data_type": "bf16"}, ours={"reduce_once": True}),
    "offload": Setting(file="zero2_offload"),
    "recomputation": Setting(ours={"activation_checkpointing": True}),
}
WITH_MEMORY = (SHIPPED, "reduce_once", "offload", "recomputation")


class Job(NamedTuple):
    """What the processes of one start do."""

    world: int
    names: tuple[str, ...]  # of SETTINGS
    steps: int


@dataclass
class Measured:
    """One setting on rank 0."""

    seconds: list[float] = field(default_factory=list)  # of each step
    sent_mb: float = 0.0  # by a rank, a step (10^6 bytes)
    communicating_s: float = 0.0  # a step, mean
    peak_gb: float = 0.0  # of the whole process so far

    @property
    def step_s(self) -> float:
        return statistics.median(self.seconds)


def main(bench: Bench) -> None:
    """All parts, one after the other, then the tables."""
    names = bench.settings or tuple(SETTINGS)
    if unknown := set(names) - SETTINGS.keys():
        raise SystemExit(f"settings: expected some of {', '.join(SETTINGS)}, found {', '.join(sorted(unknown))}")
    if bench.device != "cpu" and 0 < torch.cuda.device_count() < bench.ranks:
        bench = replace(bench, ranks=torch.cuda.device_count())  # a rank needs a GPU of its own
        print(f"only {bench.ranks} GPUs: both parts have so many ranks at most", file=sys.stderr, flush=True)
    one = run_job(bench, Job(1, names, bench.steps))
    many = run_job(bench, Job(bench.ranks, names, bench.steps))
    memory = {}
    for name in names:
        if name in WITH_MEMORY:  # a process each, since a process's peak never falls
            memory |= run_job(bench, Job(bench.ranks, (name,), 1))
    device = torch.device("cuda" if bench.device != "cpu" and torch.cuda.is_available() else "cpu")
    body = "\n\n".join([described(bench), speed_table(bench, one, many), memory_table(bench, memory)])
    command = shlex.join(["python", "-m", "benchmarks.bench_scale", *sys.argv[1:]])
    record(f"One rank and {bench.ranks}", command, body, device, bench.results)


# === Processes ===


def run_job(bench: Bench, job: Job) -> dict[str, Measured]:
    """Starts `world` processes of this script and waits; gives what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({"bench": asdict(bench), "job": job._asdict()}))
        run_ranks("benchmarks.bench_scale", ["--worker", str(path)], job.world)
        found = json.loads((Path(folder) / "found.json").read_text())
    return {name: Measured(**numbers) for name, numbers in found.items()}


def work(path: Path) -> None:
    """A rank: an engine for each setting, then rounds of one step each. Rank 0 writes what it found."""
    given = json.loads(path.read_text())
    bench, job = Bench(**given["bench"]), Job(**given["job"])
    ranks = init_ranks(bench.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(bench.threads or max(1, cores // bench.ranks))
    batches = [batch.to(ranks.device) for batch in make_batches(bench)]
    engines = {name: make_engine(bench, SETTINGS[name], path.parent, ranks) for name in job.names}
    ref_logps = [next(iter(engines.values())).logps(batch) for batch in batches]  # the start model: margins are 0
    found = {name: Measured() for name in job.names}
    for round_ in range(job.steps + 1):
        for name, engine in engines.items():
            barrier(ranks)
            synchronize(ranks.device)
            engine.communication.reset()
            start = time.perf_counter()
            make_step(bench, engine, batches, ref_logps)
            synchronize(ranks.device)
            if round_:
                found[name].seconds.append(time.perf_counter() - start)
                engine.communication.settle(wait=True)
                found[name].sent_mb += engine.communication.sent_bytes / 1e6 / job.steps
                found[name].communicating_s += engine.communication.seconds / job.steps
                found[name].peak_gb = peak_memory_gb(ranks.device)
    if ranks.is_main:
        numbers = {name: asdict(measured) for name, measured in found.items()}
        (path.parent / "found.json").write_text(json.dumps(numbers))
    barrier(ranks)
    close_ranks()


# === A step ===


def make_batches(bench: Bench) -> list[PairBatch]:
    """The micro-batches of a step, the same on every rank."""
    random = np.random.default_rng(0)
    batches = []
    for _ in range(bench.accumulate):
        pairs = []
        for _ in range(bench.pairs):
            prompt, chosen, rejected = (
                random.integers(bench.vocabulary, size=size).tolist()
                for size in (bench.prompt, bench.chosen, bench.rejected)
            )
            pairs.append(TokenizedPair.from_chats(prompt + chosen, bench.chosen, prompt + rejected, bench.rejected))
        batches.append(PairBatch.pack(pairs))
    return batches


def make_model(bench: Bench) -> LLaMaTransformer:
    """The model, with random weights."""
    rows = bench.prompt + max(bench.chosen, bench.rejected)
    config = TrainingConfig(
        n_embd=bench.width,
        n_layers=bench.layers,
        n_heads=bench.heads,
        max_seq_len=rows,
        batch_size=1,
        tokens_per_update=rows,
    )
    return LLaMaTransformer(Architecture.of(config, bench.vocabulary))


def make_engine(bench: Bench, setting: Setting, folder: Path, ranks: Ranks) -> Engine:
    """Random weights of the same seed under a setting."""
    settings = json.loads(Path(root_path("ds_configs", f"{setting.file}.json")).read_text())
    settings |= setting.top
    settings["zero_optimization"] |= setting.zero
    path = folder / f"rank{ranks.rank}.json"  # read at once
    path.write_text(json.dumps(settings))
    config = DPOConfig(
        deepspeed_config=str(path), batch_size=bench.pairs, grad_accum_steps=bench.accumulate, **setting.ours
    )
    torch.manual_seed(0)
    model = make_model(bench)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = model.to(device=ranks.device, dtype=torch.bfloat16)
    model.activation_checkpointing = config.activation_checkpointing
    return Engine(DPOPolicy(model, PreferenceLoss("sigmoid", config.beta, 0.0)), start, config, ranks)


def make_step(bench: Bench, engine: Engine, batches: Sequence[PairBatch], ref_logps: Sequence[torch.Tensor]) -> None:
    """One optimizer step, as training makes it; the weights hardly move."""
    weight = 1 / (bench.pairs * bench.accumulate)  # ranks / pairs of all ranks
    for place, (batch, ref_B2) in enumerate(zip(batches, ref_logps, strict=True)):
        engine.backward(batch, ref_B2, weight, last=place == len(batches) - 1)
    engine.step(1e-9)


# === Tables ===


def described(bench: Bench) -> str:
    """What was measured, in words."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make_model(bench).parameters())
    threads = bench.threads or "cores / ranks"
    return (
        f"{parameters / 1e6:.1f} M weights; a rank has {bench.accumulate} micro-batches of {bench.pairs} pairs a step "
        f"(prompt {bench.prompt}, answers {bench.chosen} and {bench.rejected} tokens), and on a CPU {threads} threads "
        f"in both parts. Medians of {bench.steps} steps, settings by turns. Efficiency: pairs/s of {bench.ranks} ranks "
        f"over {bench.ranks} times those of one under {SHIPPED} (a rank alone on a CPU has no buckets: there the first "
        f"four settings are one). Sent and communicating: of a rank, a step."
    )


def speed_table(bench: Bench, one: Mapping[str, Measured], many: Mapping[str, Measured]) -> str:
    """Speeds of both parts and what several ranks send."""
    pairs = bench.pairs * bench.accumulate
    head = ["setting", "1 rank: step", "pairs/s", f"{bench.ranks} ranks: step", "pairs/s", "efficiency"]
    rows = [[*head, "sent", "communicating"]]
    for name, alone in one.items():
        together = many[name]
        speeds = [f"{alone.step_s:.3f} s", f"{pairs / alone.step_s:.2f}"]
        speeds += [f"{together.step_s:.3f} s", f"{bench.ranks * pairs / together.step_s:.2f}"]
        rows.append(
            [
                name,
                *speeds,
                f"{one[SHIPPED].step_s / together.step_s:.0%}" if SHIPPED in one else "-",
                f"{together.sent_mb:.1f} MB",
                f"{together.communicating_s:.3f} s",
            ]
        )
    return table(rows)


def memory_table(bench: Bench, memory: Mapping[str, Measured]) -> str:
    """Peak memory of a process that does nothing else."""
    rows = [["setting", f"peak memory of a process, {bench.ranks} ranks"]]
    rows += [[name, f"{measured.peak_gb:.2f} GiB"] for name, measured in memory.items()]
    return table(rows)


if __name__ == "__main__":
    asked = tyro.cli(Bench, description=__doc__)
    if asked.worker:
        work(Path(asked.worker))
        leave(0)
    else:
        main(asked)
