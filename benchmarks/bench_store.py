"""What a reference store costs at a start: opening it, looking up every pair, and the memory that stays taken.

python -m benchmarks.bench_store

A store of made-up records, as a pass leaves it (shards of 512) and merged by `launch/store.py merge`. Each number is of
a process of its own. Anonymous memory (RssAnon) is what the store adds to the process: pages of mapped files are the
kernel's, which takes them back where memory is short.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from benchmarks import measure
from simple_llama.common.paths import root_path
from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY
from simple_llama.reinforcement_learning.rlhf.reference.merge import merge
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id
from simple_llama.reinforcement_learning.rlhf.reference.shards import as_records, merged, to_shard

PER_SHARD = 512  # the default of ref_flush_pairs
REFERENCE = reference_id("bench", "bench", {})
FEW, BATCH, BATCHES = (
    10_000,
    32,
    200,
)  # pairs of a run on a part of the store; of a micro-batch; of those that are timed
TITLES = {
    "shards": "shards",
    "open": "opening it (s)",
    "find": "finding every pair's sums (s)",
    "anon": "RssAnon that stays, opened and asked (MiB)",
    "few": f"a run of {FEW:,} of its pairs: opening and finding (s)",
    "read": "RssFile of that run (MiB)",
    "batch": f"a micro-batch of {BATCH} pairs (us)",
    "merge": "merging (s)",
    "merge_peak": "peak RSS of merging (MiB)",
}


@dataclass(frozen=True)
class Bench:
    """Sizes of the measurement."""

    entries: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7)
    one: Literal["", "start", "few", "merge"] = ""  # measure the first size in this process, and print it as JSON
    folder: str = ""  # of the store that is measured, for --one
    results: str = measure.RESULTS  # file that the results are appended to; empty: only printed


def keys_of(count: int) -> np.ndarray:
    """Random digests, lengths as those of HH-RLHF."""
    rng, keys = np.random.default_rng(0), np.zeros(count, KEY)
    keys["digest"] = np.frombuffer(rng.bytes(16 * count), "V16")
    keys["counts"] = np.clip(rng.lognormal(np.log(60), 0.7, (count, 2)), 2, 2000)
    return keys


def fill(folder: Path, count: int) -> None:
    """Writes the shards of a pass, without its waits for the disk."""
    store, keys = RefStore.open(folder, REFERENCE), keys_of(count)
    for start in range(0, count, PER_SHARD):
        part = keys[start : start + PER_SHARD]
        sums_B2 = -part["counts"].astype(np.float32)
        name, data = to_shard(merged([as_records(part, sums_B2)]), store.reference_digest)
        (store.folder / name).write_bytes(data)


def memory_mib(kind: str) -> float:
    """RssAnon, RssFile or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_start(bench: Bench) -> dict[str, float]:
    """A start that looks up every pair, then micro-batches."""
    count, keys = bench.entries[0], keys_of(bench.entries[0])
    before, opened = memory_mib("RssAnon"), list[RefStore]()
    found = {"open": seconds(lambda: opened.append(RefStore.open(bench.folder, REFERENCE, make=False)))}
    found["find"] = seconds(lambda: opened[0].content_digest(keys))
    found["anon"] = memory_mib("RssAnon") - before
    rng = np.random.default_rng(1)
    batches = [keys[rng.integers(0, count, BATCH)] for _ in range(BATCHES)]
    found["batch"] = 1e6 / BATCHES * seconds(lambda: [opened[0].lookup(batch) for batch in batches])
    found["shards"] = len([*opened[0].folder.glob("*.npy")])
    return found


def measure_few(bench: Bench) -> dict[str, float]:
    """A start that looks up a part of the store."""
    keys, before = keys_of(bench.entries[0])[:FEW].copy(), memory_mib("RssFile")
    opened = list[RefStore]()
    took = seconds(lambda: opened.append(RefStore.open(bench.folder, REFERENCE, make=False)))
    took += seconds(lambda: opened[0].content_digest(keys))
    return {"few": took, "read": memory_mib("RssFile") - before}


def measure_merge(bench: Bench) -> dict[str, float]:
    """The merge itself."""
    [folder] = Path(bench.folder).iterdir()
    return {"merge": seconds(lambda: merge(folder)), "merge_peak": memory_mib("VmHWM")}


def in_a_process(count: int, folder: str, one: str) -> dict[str, float]:
    """A measurement that shares no memory with others."""
    words = ["--one", one, "--entries", str(count), "--folder", folder]
    command = [sys.executable, "-m", "benchmarks.bench_store", *words]
    done = subprocess.run(command, cwd=root_path(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def both_ways(count: int) -> tuple[dict[str, float], dict[str, float]]:
    """All numbers of a store of one size, as a pass leaves it and merged."""
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), count)
        plain = in_a_process(count, folder, "start") | in_a_process(count, folder, "few")
        plain |= in_a_process(count, folder, "merge")
        return plain, in_a_process(count, folder, "start") | in_a_process(count, folder, "few")


def _shown(value: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(bench: Bench) -> None:
    """Measures each size; prints and appends the table."""
    if bench.one:
        measured = {"start": measure_start, "few": measure_few, "merge": measure_merge}[bench.one](bench)
        print(json.dumps(measured))
        return
    columns = [column for count in bench.entries for column in both_ways(count)]
    heads = [f"{count:,} {form}" for count in bench.entries for form in ("as passed", "merged")]
    rows: list[Any] = [["", *heads]]
    for name, title in TITLES.items():
        rows.append([title, *(_shown(column[name]) if name in column else "" for column in columns)])
    command_line = shlex.join(["python", "-m", "benchmarks.bench_store", *sys.argv[1:]])
    measure.record(
        "The reference store at a start", command_line, measure.table(rows), torch.device("cpu"), bench.results
    )


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
