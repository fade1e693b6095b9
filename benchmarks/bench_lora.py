"""What LoRA takes beside full tuning, by real runs: memory of a rank, foretold and taken, pairs/s, sizes on disk.

    python -m benchmarks.bench_lora --model SmolLM2-135M-Instruct.Q4_1.gguf

Each way is a dry run and then the run itself, in processes of their own, over one reference store: the second way finds
all pairs there. Memory is the largest resident set of the rank up to its end, as its metrics have it, which is what the
dry run's arithmetic foretells; pairs/s that of the median step, the first one left out.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from benchmarks.measure import RESULTS, record, table
from simple_llama.common.paths import package_path, root_path

_MODULE = "benchmarks.bench_lora"
_SCRIPT = "simple_llama/reinforcement_learning/rlhf/apply_dpo.py"
_SUM = re.compile(r"^sum +([\d.]+) GiB", re.MULTILINE)


@dataclass(frozen=True)
class BenchLora:
    """What is measured, on what."""

    # === Work ===
    model: str  # what --model_path takes
    data: str = package_path("reinforcement_learning", "rl_dataset", "curated_safety.json")  # a JSON list of pairs
    pairs: int = 112  # of its first records
    max_seq_len: int = 128  # pairs with longer chats are left out
    batch_size: int = 8  # pairs a micro-batch
    grad_accum_steps: int = 2
    rank: int = 16  # of the adapters
    alpha: float = 32.0
    targets: str = "q,k,v,o,w1,w2,w3"

    # === Measurement ===
    results: str = RESULTS  # file to append the outcome to; "": only print


class Taken(NamedTuple):
    """What a way took."""

    trained: int  # weights
    foretold_gib: float
    peak_gib: float
    pairs_s: float
    losses: list[float]  # of each step
    state_mib: float


def main(bench: BenchLora) -> None:
    """Both ways, then the record."""
    started = time.perf_counter()
    lora = {"lora_rank": bench.rank, "lora_alpha": bench.alpha, "lora_targets": bench.targets, "max_lr": 2e-4}
    ways = {"full": {"max_lr": 2e-5}, f"LoRA, rank {bench.rank}": lora}
    with tempfile.TemporaryDirectory() as folder:
        records = json.loads(Path(bench.data).read_text())[: bench.pairs]
        (Path(folder) / "pairs.json").write_text(json.dumps(records))
        found = {way: measure(settings_of(bench, folder, number, more), folder) for number, (way, more) in
                 enumerate(ways.items())}  # fmt: skip
    body = f"{setup(bench)}\n\n{rows_of(found)}\n\n{time.perf_counter() - started:.0f} s in all"
    command = shlex.join(["python", "-m", _MODULE, *sys.argv[1:]])
    record(f"LoRA beside full tuning, {Path(bench.model).name}", command, body, torch.device("cpu"), bench.results)


def settings_of(bench: BenchLora, folder: str, number: int, more: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run on one rank, in bf16."""
    return {
        "model_path": str(Path(bench.model).absolute()),
        "rlhf_dataset_path": f"{folder}/pairs.json",
        "deepspeed_config": root_path("ds_configs", "zero2_bf16.json"),
        "ref_cache_dir": f"{folder}/ref_cache",
        "ckpt_dir": f"{folder}/checkpoints",
        "log_dir": f"{folder}/runs",
        "run_name": f"way{number}",
        "device": "cpu",
        "val_share": 0.1,
        "max_seq_len": bench.max_seq_len,
        "batch_size": bench.batch_size,
        "grad_accum_steps": bench.grad_accum_steps,
        "epochs": 1,
        "beta": 0.1,
        "warmup_iterations": 1,
        "log_interval": 1,
        "eval_interval": 0,
        "n_samples": 0,
        **more,
    }


def measure(settings: dict[str, Any], folder: str) -> Taken:
    """A dry run, then the run."""
    config = Path(folder) / "settings.json"
    config.write_text(json.dumps(settings))
    told = started([f"--config={config}", "--dry_run"])
    [foretold] = _SUM.findall(told)
    started([f"--config={config}"])
    run = str(settings["run_name"])
    lines = [json.loads(line) for line in (Path(folder) / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    shards = sorted((Path(folder) / "checkpoints" / run / "state").glob("*/rank_*.safetensors"))
    size = shards[-1].stat().st_size
    return Taken(
        trained=round(size / 12),
        foretold_gib=float(foretold),
        peak_gib=max(line["perf/peak_memory_gb"] for line in steps),
        pairs_s=statistics.median(line["perf/pairs_per_second"] for line in steps[1:]),
        losses=[line["loss"] for line in steps],
        state_mib=size / 2**20,
    )


def started(arguments: list[str]) -> str:
    """What the command says. SystemExit where it fails."""
    command = [sys.executable, _SCRIPT, *arguments]
    done = subprocess.run(command, cwd=root_path(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def setup(bench: BenchLora) -> str:
    """What is common to both, in words."""
    return (
        f"{bench.pairs} records, chats of at most {bench.max_seq_len} tokens; {bench.batch_size} x "
        f"{bench.grad_accum_steps} pairs a step on one rank; bf16, masters and moments fp32; adapters beside "
        f"{bench.targets}."
    )


def rows_of(found: dict[str, Taken]) -> str:
    """The table."""
    head = ["", "weights trained", "GiB foretold", "GiB taken", "pairs/s", "state, MiB", "loss of each step"]
    rows = [
        [
            way,
            f"{taken.trained / 1e6:.1f} M",
            f"{taken.foretold_gib:.2f}",
            f"{taken.peak_gib:.2f} ({100 * (taken.foretold_gib / taken.peak_gib - 1):+.0f} %)",
            f"{taken.pairs_s:.2f}",
            f"{taken.state_mib:.0f}",
            ", ".join(f"{loss:.4f}" for loss in taken.losses),
        ]
        for way, taken in found.items()
    ]
    return table([head, *rows])


if __name__ == "__main__":
    main(tyro.cli(BenchLora, description=__doc__))
