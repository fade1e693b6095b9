"""Memory of a training process on a CPU over 300 steps, by how many compiled GEMMs oneDNN and ATen may keep.

python -m benchmarks.bench_growth

The demo's model and settings on the shipped pairs, one rank, started as a person would; memory and times are those of
the run's own metrics. `--capacities`: what both caches may keep; 0 is the libraries' own 1,024; as shipped: -1.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import demo, measure
from benchmarks.workload import start_model
from simple_llama.common.paths import root_path
from simple_llama.pretraining.weights import save_weights

SCRIPTS = ("launch/precompute_ref.py", "launch/train_dpo.py")
BOUNDS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
LIBRARIES_OWN = 1024
EARLY = 20  # steps after which memory should stay level


@dataclass(frozen=True)
class Bench:
    """What is run."""

    capacities: tuple[int, ...] = (0, 8, 16, 32, 64, 128, -1)
    configs: tuple[str, ...] = ("zero2_bf16", "zero2_fp32")  # DeepSpeed settings of ours
    epochs: int = 8  # of 38 steps
    shape: str = "tiny"  # of the model, which has random weights
    results: str = measure.RESULTS  # file that the results are appended to; empty: only printed


def environment(capacity: int) -> dict[str, str]:
    """This process's, with that bound, or as a person's who has set none."""
    ours = {name: value for name, value in os.environ.items() if name not in BOUNDS}
    return ours if capacity < 0 else {**ours, **dict.fromkeys(BOUNDS, str(capacity or LIBRARIES_OWN))}


def run(folder: Path, bench: Bench, config: str, capacity: int) -> list[dict[str, float]]:
    """Trains with that bound; gives the metrics of each step."""
    name = f"{config}_{capacity}"
    settings: dict[str, Any] = {
        **demo.TINY,
        "model_path": str(folder / "start.pth"),
        "deepspeed_config": root_path("ds_configs", f"{config}.json"),
        "run_name": name,
        "epochs": bench.epochs,
        "eval_interval": 0,
        "n_samples": 0,
        **{key: str(folder / key) for key in ("ckpt_dir", "ref_cache_dir", "log_dir")},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for script in SCRIPTS:
        command = [sys.executable, script, "--config", str(folder / "config.json")]
        subprocess.run(command, cwd=root_path(), env=environment(capacity), check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "log_dir" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "perf/step_time_s" in line]


def row(capacity: int, lines: list[dict[str, float]]) -> list[str]:
    """A run's row of the table."""
    gib = [line["perf/peak_memory_gb"] for line in lines]
    name = {0: f"{LIBRARIES_OWN:,} (the libraries' own)", -1: "as shipped"}.get(capacity, str(capacity))
    times = [1e3 * line["perf/step_time_s"] for line in lines[EARLY:]]
    growth = gib[-1] / gib[EARLY - 1] - 1
    spread = " to ".join(f"{time:.0f}" for time in statistics.quantiles(times, n=10)[::8])
    cells = [f"{gib[0]:.2f}", f"{gib[EARLY - 1]:.2f}", f"{gib[-1]:.2f}", f"{growth:.0%}"]
    return [name, *cells, f"{statistics.median(times):.0f} ({spread})"]


def main(bench: Bench) -> None:
    """All runs; prints and appends a table for each DeepSpeed setting."""
    start = start_model(bench.shape, "", seed=0)
    tables = []
    for config in bench.configs:
        rows = [["GEMMs kept", "GiB, step 1", f"step {EARLY}", "last step", "growth", "ms a step (1st to 9th decile)"]]
        for capacity in bench.capacities:
            with tempfile.TemporaryDirectory() as temporary:
                save_weights(Path(temporary) / "start.pth", start.state_dict, start.config, {})
                lines = run(Path(temporary), bench, config, capacity)
            rows.append(row(capacity, lines))
            print(config, *rows[-1], file=sys.stderr, flush=True)
        tables.append(f"{config}, {len(lines)} steps:\n\n{measure.table(rows)}")
    command = shlex.join(["python", "-m", "benchmarks.bench_growth", *sys.argv[1:]])
    measure.record("Memory over 300 steps", command, "\n\n".join(tables), torch.device("cpu"), bench.results)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
