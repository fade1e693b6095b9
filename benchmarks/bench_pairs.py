"""Costs of many pairs: what a step's plan, a dry run and the start of training take, and the memory of a pair.

python -m benchmarks.bench_pairs

Pairs are synthetic, with the lengths of HH-RLHF; their tokens do not matter and are not made. Each size runs in a
process of its own, so that its memory is its own.
"""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks import measure
from simple_llama.common.paths import root_path
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PLACE, PairSet
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id

SHARD = 1 << 20  # records of a made-up store's shard
TITLES = {
    "draw": "an epoch's order, drawn once (ms)",
    "first": "`BatchPlan.step`, the epoch's first (ms)",
    "step": "`BatchPlan.step`, later ones (ms)",
    "dry": "`--dry_run` beyond reading the data (s)",
    "open": "start of training: opening the store (s)",
    "find": "start of training: finding every pair's log-probs (s)",
    "plan": "start of training: the plan (s)",
    "bytes": "bytes of ours a pair, beside its tokens",
    "rss": "memory that all of this took at most (MiB)",
}


@dataclass(frozen=True)
class Bench:
    """Sizes of the measurement."""

    pairs: tuple[int, ...] = (10**3, 10**5, 10**6, 10**7)
    one: bool = False  # measure the first size in this process, and print it as JSON
    results: str = measure.RESULTS  # file that the results are appended to; empty: only printed


def synthetic(count: int) -> PairSet:
    """Pairs with lengths as those of HH-RLHF, random digests and no tokens."""
    rng = np.random.default_rng(0)
    places, keys = np.zeros(count, PLACE), np.zeros(count, KEY)
    for name, median in (("prefix", 90), ("chosen", 60), ("rejected", 60)):
        places[name] = np.clip(rng.lognormal(np.log(median), 0.7, count), 2, 2000)
    places["record"] = np.arange(1, count + 1)
    keys["digest"] = np.frombuffer(rng.bytes(16 * count), "V16")
    keys["counts"] = np.stack((places["chosen"], places["rejected"]), 1) - 1
    return PairSet(np.zeros(0, np.int32), keys, places, ("synthetic.jsonl",))


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident_mib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def dry_run_part(pairs: PairSet, plan: BatchPlan) -> tuple[int, int]:
    """What `--dry_run` asks of pairs and plan: sums of tokens, and the largest micro-batch's rows."""
    tokens = sum(int(lengths.sum(dtype=np.int64)) for lengths in (plan.rows, pairs.chosen_len, pairs.rejected_len))
    return tokens, int(plan.rows[list(plan.largest_micro_batch())].sum())


def measure_size(count: int) -> dict[str, float]:
    """All costs of one number of pairs."""
    before = resident_mib()
    pairs = synthetic(count)

    def plan() -> BatchPlan:
        return BatchPlan(pairs.rows, seed=42, world_size=8, batch_size=16, grad_accum_steps=8)

    ours = plan()
    found: dict[str, float] = {"draw": 1e3 * seconds(lambda: plan().shuffle(0))}
    found["first"] = 1e3 * seconds(lambda: ours.step(0))
    steps = [seconds(lambda index=index: ours.step(index % ours.steps_per_epoch)) for index in range(1, 22)]
    found["step"] = 1e3 * sorted(steps)[len(steps) // 2]
    found["dry"] = seconds(lambda: dry_run_part(pairs, plan()))
    reference = reference_id("bench", "bench", {})
    with tempfile.TemporaryDirectory() as folder:
        store = RefStore.open(folder, reference)
        with store.writer(every_pairs=SHARD, every_s=1e9) as writer:
            for start in range(0, count, SHARD):
                part = pairs.keys[start : start + SHARD]
                writer.add(part, np.full((len(part), 2), -1.0, np.float32))
        del store, writer
        opened: list[RefStore] = []
        found["open"] = seconds(lambda: opened.append(RefStore.open(folder, reference, make=False)))
        found["find"] = seconds(lambda: opened[0].content_digest(pairs.keys))
    found["plan"] = seconds(lambda: plan().step(0))
    found["bytes"] = pairs.nbytes / count
    found["rss"] = resident_mib() - before
    return found


def main(bench: Bench) -> None:
    """Measures each size in a process of its own; prints and appends the table."""
    if bench.one:
        print(json.dumps(measure_size(bench.pairs[0])))
        return
    found: list[dict[str, float]] = []
    for count in bench.pairs:
        command = [sys.executable, "-m", "benchmarks.bench_pairs", "--one", "--pairs", str(count)]
        done = subprocess.run(command, cwd=root_path(), capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    rows: list[Any] = [["", *(f"{count:,} pairs" for count in bench.pairs)]]
    for name, title in TITLES.items():
        rows.append([title, *(f"{column[name]:.4g}" for column in found)])
    command_line = shlex.join(["python", "-m", "benchmarks.bench_pairs", *sys.argv[1:]])
    body = measure.table(rows) + "\n\nA step has 1,024 pairs (8 ranks of 8 micro-batches of 16)."
    measure.record("Costs of many pairs", command_line, body, torch.device("cpu"), bench.results)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
