"""Large data: what a start costs that finds its tokens, how much memory it takes, and an epoch's walk over all pairs.

    python -m benchmarks.bench_data                          # pairs made in tokens, 10^4 to 10^7
    python -m benchmarks.bench_data --sizes 300000 --json    # made as a .jsonl file, end to end

Pairs are synthetic, with the lengths of HH-RLHF. Each measurement runs in a process of its own, so that its memory is
its own: RssAnon is what it has for itself, beside mapped files. A walk packs every micro-batch of an epoch; with
`--limit_gb` its process runs in a memory cgroup of that size (v1 or v2, root).
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks import measure
from simple_llama.common.paths import package_path
from simple_llama.dataset.data_blocks import Block
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchConfig, BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.find_pairs import TokenCache
from simple_llama.reinforcement_learning.rlhf.data.merge_blocks import BlockPairs, merge
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PLACE, PairSet
from simple_llama.reinforcement_learning.rlhf.data.token_shards import FoundPairs, ReadBlock, TokenShards

BLOCK = 50_000  # pairs of a made-up shard: about what 64 MiB of JSON have
PREFIX, CHOSEN, REJECTED = 210, 43, 54  # tokens: HH-RLHF's means in our chat format
BATCH = BatchConfig(batch_size=16, grad_accum_steps=4)


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    sizes: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7)  # pairs
    json: bool = False  # as a .jsonl file that is tokenized, not in tokens
    kills: int = 0  # with json: SIGKILLs of a start that tokenizes, each at another moment
    limit_gb: float = 0.0  # memory of the process that walks; 0: no limit
    results: str = measure.RESULTS  # file that the tables are appended to; "": only print
    folder: str = ""  # where the data are made; empty: a temporary folder
    task: str = ""  # for the processes that this one starts


def main(bench: Bench) -> None:
    """Measures all sizes and shows the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(bench.folder or temporary)
        rows = [_measured(replace(bench, sizes=(size,), folder=str(folder / str(size)))) for size in bench.sizes]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[f"{size:,}", *(row.get(name, "") for name in names)] for size, row in zip(bench.sizes, rows, strict=True)]
    kind = "as a .jsonl file" if bench.json else "made in tokens"
    command = f"python -m benchmarks.bench_data {shlex.join(sys.argv[1:])}".strip()
    text = measure.table([["pairs", *names], *cells])
    measure.record(f"Large data, {kind}", command, text, torch.device("cpu"), bench.results)


def _measured(bench: Bench) -> dict[str, str]:
    """A row of the table."""
    found: dict[str, str] = {}
    for task in ("json", "cold", "warm", "walk") if bench.json else ("tokens", "warm", "walk"):
        found |= _child(bench, task)
    if bench.json and bench.kills:
        shutil.copytree(Path(bench.folder, "cache"), Path(bench.folder, "uncut"))
        found |= _killed(bench, float(found["first start (s)"]))
    return found | (_child(bench, "append") if bench.json else {})


def _child(bench: Bench, task: str) -> dict[str, str]:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.bench_data", "--sizes", str(bench.sizes[0]), f"--task={task}"]
    command += [f"--folder={bench.folder}", f"--limit_gb={bench.limit_gb}", *(["--json"] if bench.json else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _killed(bench: Bench, seconds: float) -> dict[str, str]:
    """Kills starts that tokenize, each at another moment, each going on with what those before it left; compares what
    is there at the end, and whenever one was not killed, with what one start made, and begins anew then."""
    cut = Path(bench.folder, "cut")
    command = [sys.executable, "-m", "benchmarks.bench_data", "--json", "--sizes", str(bench.sizes[0])]
    command += [f"--folder={bench.folder}", "--task=cut"]
    rng, killed, same = random.Random(0), 0, True
    while killed < bench.kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.1, 0.6) * seconds)
            same = same and _are_equal(bench)
            shutil.rmtree(cut)
        except subprocess.TimeoutExpired:
            killed += 1
            process.send_signal(signal.SIGKILL)
            process.wait()
    subprocess.run(command, check=True, capture_output=True)
    return {"kills": f"{killed}", "files equal": "yes" if same and _are_equal(bench) else "no"}


def _are_equal(bench: Bench) -> bool:
    """Whether starts that were killed left the shards that one start made, all of them, and no other."""
    whole, cut = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.arr")}
        for folder in (Path(bench.folder, "uncut"), Path(bench.folder, "cut"))
    )
    return bool(whole) and whole == cut


# === Tasks of the processes ===


def run_task(bench: Bench) -> None:
    """What a process that was started for it measures, as a line of JSON."""
    folder, size = Path(bench.folder), bench.sizes[0]
    if bench.task == "tokens":
        found = {"set made (s)": _timed(lambda: _open_tokens(folder, size, make=True))}
    elif bench.task == "json":
        found = _make_json(folder, size)
    elif bench.task in ("cold", "append", "cut"):
        if bench.task == "append":
            with open(folder / "pairs.jsonl", "a", encoding="utf-8") as file:
                file.write(_line(random.Random(1), _words()))
        cache = folder / ("cut" if bench.task == "cut" else "cache")
        name = "start after a line more (s)" if bench.task == "append" else "first start (s)"
        found = {name: _timed(lambda: _open_json(folder, cache))}
    else:
        found = _started(bench, folder, size)
    print(json.dumps(found))


def _started(bench: Bench, folder: Path, size: int) -> dict[str, str]:
    """Of a start that finds its tokens: how long to the first micro-batch, and what memory; with "walk" of an epoch."""
    if bench.task == "walk" and bench.limit_gb:
        _limit_memory(int(bench.limit_gb * 2**30))
    before, begun = _memory("RssAnon"), time.perf_counter()
    pairs = _open_json(folder, folder / "cache") if bench.json else _open_tokens(folder, size)
    plan = BatchPlan.of(pairs, BATCH, seed=0, world_size=1)
    first = plan.step(0)[0][0]
    PairBatch.pack([pairs[i] for i in first])
    seconds = time.perf_counter() - begun
    if bench.task == "warm":
        steps = [_seconds(lambda i=i: plan.step(i)) for i in range(1, 50)]
        return {
            "start to the first micro-batch (s)": f"{seconds:.2f}",
            "RssAnon for it (MiB)": f"{_memory('RssAnon') - before:.0f}",
            "RSS (MiB)": f"{_memory('VmRSS'):.0f}",
            "a later `BatchPlan.step` (ms)": f"{1000 * float(np.median(steps)):.2f}",
            "bytes a pair beside tokens": f"{_bytes_a_pair(folder, size):.1f}",
        }
    begun, seen = time.perf_counter(), np.zeros(len(pairs), np.int8)
    for index in range(plan.steps_per_epoch):
        for micro_batch in plan.step(index)[0]:
            PairBatch.pack([pairs[i] for i in micro_batch])
            seen[list(micro_batch)] += 1
    assert (seen == 1).all(), "each pair once"
    limit = f" in {bench.limit_gb:g} GiB" if bench.limit_gb else ""
    return {
        f"epoch's walk{limit} (s)": f"{time.perf_counter() - begun:.0f}",
        "RssAnon after it (MiB)": f"{_memory('RssAnon'):.0f}",
    }


def _open_tokens(folder: Path, size: int, make: bool = False) -> PairSet:
    """The made-up pairs, from their shards; with `make` the shards are written first."""
    shards, blocks = TokenShards(folder / "cache", {"bench": size}), []
    for first in range(0, size, BLOCK):
        count = min(BLOCK, size - first)
        block = Block(str(folder / "pairs.jsonl"), first, 1, first + 1, count, f"{first:032x}")
        if make:
            shards.add(block, "", _made_up(first, count))
        arrays = shards.shard(block)
        assert arrays is not None
        blocks.append(BlockPairs(block.file, block.first, False, *arrays))

    def together() -> FoundPairs:
        merged = merge(blocks, False)
        assert merged is not None and len(merged.pairs) == size
        counts = merged.count, merged.extra_keys, merged.spelled, merged.unknown
        return FoundPairs(merged.pairs, merged.shares, size, *counts, "")

    found = shards.kept("all", blocks, together)
    assert found is not None
    return found.pairs


def _made_up(first: int, count: int) -> Any:
    """The arrays and facts of a block of pairs of one length."""

    rng, rows = np.random.default_rng(first), PREFIX + CHOSEN + REJECTED
    keys, places = np.zeros(count, KEY), np.zeros(count, PLACE)
    keys["digest"] = np.frombuffer(rng.bytes(16 * count), "V16")
    keys["counts"] = (CHOSEN, REJECTED)
    places["start"] = rows * np.arange(count)
    for name, value in (("prefix", PREFIX), ("chosen", CHOSEN), ("rejected", REJECTED)):
        places[name] = value
    places["record"] = 1 + np.arange(count)
    arrays = {
        "tokens": rng.integers(10, 8000, rows * count, dtype=np.uint16),
        "keys": keys,
        "places": places,
        "shares": rng.random(count),
        "swapped": np.frombuffer(rng.bytes(16 * count), "V16"),
        "odd": np.zeros(count, np.uint8),
    }
    none: dict[str, Any] = {"dropped": {}, "noticed": {}, "extra_keys": {}}
    return ReadBlock(arrays, {"total": count, **none, "spelled": [0, 0, 0], "formats": [], "faults": [0, [], ""]})


def _open_json(folder: Path, cache: Path) -> PairSet:
    """The pairs of the .jsonl file."""
    tokenizer = load_tokenizer(package_path("dataset", "bpe_8k.json"))
    path = folder / "pairs.jsonl"
    return RLDatasetLoader(path, tokenizer, 2048, val_share=0.0, seed=42, cache=TokenCache(cache)).train


def _make_json(folder: Path, size: int) -> dict[str, str]:
    """Writes the file; how long its different texts take to tokenize by `encode_batch_fast` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, words, texts = random.Random(0), _words(), []
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for _ in range(size):
            line = _line(rng, words)
            file.write(line)
            row = json.loads(line)
            texts += [row["User"][0], row["Accepted"][0], row["Rejected"][0]]
    tokenizer = load_tokenizer(package_path("dataset", "bpe_8k.json"))

    def alone() -> None:
        for start in range(0, len(texts), 2048):
            tokenizer.encode_batch_fast(texts[start : start + 2048], add_special_tokens=False)

    return {"`encode_batch_fast` alone (s)": _timed(alone)}


def _words() -> list[str]:
    """Words of the shipped pairs."""
    with open(package_path("reinforcement_learning", "rl_dataset", "curated_safety.json"), encoding="utf-8") as file:
        rows = json.load(file)
    texts = [str(text) for row in rows for key in ("User", "Accepted", "Rejected") for text in row[key]]
    return [word for text in texts for word in text.split()]


def _line(rng: random.Random, words: list[str]) -> str:
    """A record of about the mean lengths, with texts that stand nowhere else."""
    user, chosen, rejected = (" ".join([*rng.choices(words, k=k), f"{rng.randrange(10**9)}"]) for k in (110, 28, 36))
    row = {"Template": ["CUSTOM"], "User": [user], "Accepted": [chosen], "Rejected": [rejected]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _bytes_a_pair(folder: Path, size: int) -> float:
    """Of the set, which has all but the tokens."""
    return sum(path.stat().st_size for path in (folder / "cache").rglob("set-*.arr")) / size


def _memory(name: str) -> float:
    """A line of this process's status, MiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:")) / 1024


def _limit_memory(limit: int) -> None:
    """Puts this process into a memory cgroup of so many bytes."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"bench_data_{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(limit))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _seconds(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _timed(work: Any) -> str:
    """Seconds of a call, as a cell."""
    return f"{_seconds(work):.1f}"


if __name__ == "__main__":
    asked = tyro.cli(Bench, description=__doc__)
    run_task(asked) if asked.task else main(asked)
