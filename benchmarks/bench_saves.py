"""What a save costs a run: its main thread's wait, when state and export are there, slower steps meanwhile.

python -m benchmarks.bench_saves --model FOLDER_OR_FILE [--ranks 2]

Runs on the shipped pairs without a reference, that save every `interval` steps: by turns with saves that are waited
for and with saves in the background, each in processes of its own. The first save of a run takes its memory, the last
one is waited for at the run's end: both are shown apart.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import demo, measure
from benchmarks.quiet import CoreWatch
from benchmarks.rank_jobs import run_ranks
from simple_llama.cluster.distributed import init_ranks, leave
from simple_llama.common.paths import root_path
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine import checkpoint
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.run.saves import Saves
from simple_llama.reinforcement_learning.rlhf.run.training_run import TrainingRun

_WAYS = {"waited for": False, "in the background": True}
_MODULE = "benchmarks.bench_saves"


@dataclass(frozen=True)
class Bench:
    """What is run."""

    model: str  # what the runs start from
    ranks: int = 2
    interval: int = 6  # steps from save to save
    saves: int = 4  # of a run
    rounds: int = 2  # runs a way
    deepspeed: str = "zero2_bf16"  # of ds_configs/
    results: str = measure.RESULTS  # file that the results are appended to; empty: only printed
    worker: str = ""  # of a rank: its settings and where its times go


def settings_of(bench: Bench, folder: Path, background: bool) -> dict[str, Any]:
    """Of a run."""
    own = {key: str(folder / key) for key in ("ckpt_dir", "ref_cache_dir", "log_dir")}
    return {
        **demo.REAL,
        **own,
        "model_path": str(Path(bench.model).absolute()),
        "deepspeed_config": root_path("ds_configs", f"{bench.deepspeed}.json"),
        "loss_type": "simpo",
        "beta": 2.0,
        "val_share": 0.02,
        "n_samples": 0,
        "batch_size": 2,
        "epochs": 20,
        "max_steps": bench.interval * bench.saves,
        "save_interval": bench.interval,
        "keep_exports": 1,
        "save_in_background": background,
    }


class Clock:
    """When what happened on rank 0, in seconds of one clock."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def note(self, what: str) -> None:
        """Now."""
        self.seen.setdefault(what, []).append(time.perf_counter())

    def around(self, owner: Any, name: str, what: str) -> None:
        """Notes each call of a function, when it begins and when it has ended."""
        original: Callable[..., Any] = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.note(f"{what} begins")
            found = original(*args, **kwargs)
            self.note(f"{what} ends")
            return found

        setattr(owner, name, noted)


def work(settings: str) -> None:
    """A rank of a run; rank 0 leaves its times."""
    told = json.loads(Path(settings).read_text())
    config, clock = DPOConfig(**told["settings"]), Clock()
    ranks = init_ranks(config.device)
    clock.around(TrainingRun, "save", "save")
    clock.around(TrainingRun, "made", "step")
    clock.around(Saves, "_export", "export")
    clock.around(Saves, "wait", "wait")
    clock.around(checkpoint, "publish_state", "publish")
    train(config, load_inputs(config, ranks, ref_cache_dir=config.ref_cache_dir), ranks)
    if ranks.is_main:
        Path(told["times"]).write_text(json.dumps(clock.seen))
    leave(0)


def run(bench: Bench, background: bool) -> dict[str, list[float]]:
    """Trains; gives the seconds of each of its saves and steps."""
    with tempfile.TemporaryDirectory(dir=root_path("runs") if Path(root_path("runs")).exists() else None) as temporary:
        folder = Path(temporary)
        told = {"settings": settings_of(bench, folder, background), "times": str(folder / "times.json")}
        (folder / "run.json").write_text(json.dumps(told))
        run_ranks(_MODULE, ["--model", bench.model, "--worker", str(folder / "run.json")], bench.ranks)
        seen = json.loads((folder / "times.json").read_text())
        lines = map(json.loads, (folder / "log_dir" / "demo" / "metrics.jsonl").read_text().splitlines())
        steps = [line["perf/step_time_s"] for line in lines if "perf/step_time_s" in line]
    begins, exported = seen["save begins"], seen["export ends"]
    spans = list(zip(seen["save ends"], exported, strict=True))
    found = {
        "wait": [end - begin for begin, end in zip(begins, seen["save ends"], strict=True)],
        "published": [there - begin for begin, there in zip(begins, seen["publish ends"], strict=True)],
        "exported": [there - begin for begin, there in zip(begins, exported, strict=True)],
        "end": [seen["wait ends"][-1] - seen["save ends"][-1]],
        "beside": [],
        "alone": [],
    }
    for end, seconds in list(zip(seen["step ends"], steps, strict=True))[2:]:  # the first ones warm up
        beside = any(end - seconds < last and end > first for first, last in spans)
        found["beside" if beside else "alone"].append(seconds)
    return found


def row(name: str, runs: list[dict[str, list[float]]]) -> list[str]:
    """A way's row of the table: medians over its runs."""

    def of(what: str, some: slice = slice(None)) -> str:
        numbers = [number for one in runs for number in one[what][some]]
        return f"{statistics.median(numbers):.2f}" if numbers else "-"

    later = slice(1, -1)
    waits = [of("wait", slice(1)), of("wait", later), of("end")]
    return [name, *waits, of("published", later), of("exported", later), of("alone"), of("beside")]


def main(bench: Bench) -> None:
    """All runs; prints and appends the table."""
    if bench.worker:
        work(bench.worker)
    watch = CoreWatch()
    runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in _WAYS}
    for _ in range(bench.rounds):
        for name, background in _WAYS.items():
            runs[name].append(run(bench, background))
            print(name, {what: [round(s, 3) for s in found] for what, found in runs[name][-1].items()}, file=sys.stderr)
    head = [
        "saves",
        "main thread's wait, 1st",
        "later",
        "at the end",
        "state there",
        "export there",
        "a step",
        "beside",
    ]
    body = measure.table([head, *(row(name, found) for name, found in runs.items())])
    about = f"{Path(bench.model).name}, {bench.deepspeed}, {bench.ranks} ranks; seconds, medians over saves and runs"
    command = shlex.join(["python", "-m", _MODULE, *sys.argv[1:]])
    every = f"a save every {bench.interval} steps, {bench.saves} a run, {bench.rounds} runs a way"
    notes = f"{about}; {every}; others meanwhile: {watch.share()}"
    measure.record("The wait for a save", command, f"{notes}\n\n{body}", torch.device("cpu"), bench.results)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
