"""Where the time goes from the launcher's start to the first step: the line of real runs through DeepSpeed's launcher.

    python -m benchmarks.bench_start --model SmolLM2-135M-Instruct       # a CPU
    python -m benchmarks.bench_start --device cuda                       # 1.27 B random weights in a .pth

The reference store is filled before, by launch/precompute_ref.py. Each start makes one step, with nothing held out and
no samples: what evaluations and answers take depends on how many a run has.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.bench_foretold import write_pairs
from benchmarks.measure import RESULTS, record, table
from benchmarks.quiet import CoreWatch
from benchmarks.workload import TOKENIZER, start_model
from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.pretraining.weights import save_weights

_LINE = re.compile(r"start to the first step: ([\d.]+) s \(([^)]*)\)")


@dataclass(frozen=True)
class BenchStart:
    """What is started."""

    model: str = ""  # a model that a run may start from; "": random weights of `shape` in a .pth
    shape: Literal["tiny", "36m", "1.3b", "llama-3.2-1b"] = "1.3b"  # of these
    pairs: int = 64  # that the run has
    batch_size: int = 8  # pairs a micro-batch
    rounds: int = 3  # starts; the first reads files that may not be in memory
    device: Literal["cpu", "cuda"] = "cpu"  # where the run computes
    results: str = RESULTS  # file to append the table to; "": only print


def main(bench: BenchStart) -> None:
    """The store, then the starts, then the table."""
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), bench.model
        if not model:
            found = start_model(bench.shape, "", 0, torch.device(bench.device))
            model = str(folder / "start.pth")
            save_weights(model, found.state_dict, found.config, {})
            del found
        write_pairs(folder / "pairs.jsonl", "middle", bench.pairs)
        settings = {
            "model_path": model,
            "rlhf_dataset_path": str(folder / "pairs.jsonl"),
            "device": bench.device,
            "val_share": 0.0,
            "batch_size": bench.batch_size,
            "grad_accum_steps": 1,
            "epochs": 1,
            "n_samples": 0,
            "max_steps": 1,
            "warmup_iterations": 0,
            **({} if bench.model else {"tokenize_path": TOKENIZER}),
            **{key: str(folder / key) for key in ("ckpt_dir", "ref_cache_dir", "log_dir")},
        }
        (folder / "config.json").write_text(json.dumps(settings))
        launched(folder, "precompute_ref.py")
        starts, noise = [], CoreWatch()
        for number in range(1, bench.rounds + 1):
            starts.append(phases(launched(folder, "train_dpo.py", "--run_name", f"start{number}")))
            print(f"start {number}: {starts[-1]}", flush=True)
    what = bench.model or f"{bench.shape}, random weights in a .pth"
    body = f"{what}; seconds, others meanwhile: {noise.share()}\n\n{report(starts)}"
    command = shlex.join(["python", "-m", "benchmarks.bench_start", *sys.argv[1:]])
    record("A start", command, body, torch.device(bench.device), bench.results)


def launched(folder: Path, script: str, *flags: str) -> str:
    """What a job through the launcher says. UserError where it fails."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"]
    command = [*launcher, root_path("launch", script), "--config", str(folder / "config.json"), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise UserError(f"{script} failed with status {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def phases(said: str) -> dict[str, float]:
    """Seconds by phase, and of all, in a run's log."""
    line = _LINE.search(said)
    if not line:
        raise UserError("expected a line that says where the start's time went, found none in the run's log")
    found = {"all": float(line[1])}
    for part in line[2].split(", "):
        name, _, seconds = part.rpartition(" ")
        found[name] = float(seconds)
    return found


def report(starts: list[dict[str, float]]) -> str:
    """A row a start, and their medians."""
    names = list(dict.fromkeys(name for start in starts for name in start))
    rows = [["start", *names]]
    for number, start in enumerate(starts, 1):
        rows.append([str(number), *(f"{start.get(name, 0.0):.1f}" for name in names)])
    middle = [statistics.median(start.get(name, 0.0) for start in starts) for name in names]
    return table([*rows, ["median", *(f"{seconds:.1f}" for seconds in middle)]])


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchStart, description=__doc__))
    except UserError as problem:
        sys.exit(f"error: {problem}")
