"""What `--dry_run` foretells beside what the run then takes: memory of a rank and time of a step, over many settings.

python -m benchmarks.bench_foretold [--only 0:6]

Each configuration is a start model with random weights and synthetic pairs, a dry run with --probe (whose report has
the arithmetic too), then the run itself with its reference pass, evaluations and save. All ranks are forked from a
process that has imported what they import, which saves most of a bench's time. Memory is the largest resident set of a
rank up to its end, as the system counts it; the time of a step that of the run's metrics.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from benchmarks.measure import machine, table
from benchmarks.workload import TOKENIZER
from simple_llama.common.paths import root_path
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import save_weights

STEPS, MICRO_BATCHES = 4, 6  # of a run, at least


@dataclass(frozen=True)
class Bench:
    """What is run."""

    only: str = ""  # FIRST:END of the configurations; "": all
    results: str = root_path("runs", "foretold.json")  # where the numbers of all calls are kept
    most_s: float = 0.0  # begin no configuration after so many seconds, and pass over those that are kept; 0: all
    table: bool = False  # make the table of what is there, and run nothing


class Size(NamedTuple):
    """A model's."""

    width: int
    layers: int
    heads: int


SIZES = {
    "4m": Size(192, 4, 4),
    "18m": Size(384, 6, 6),
    "34m": Size(512, 8, 8),
    "86m": Size(768, 10, 12),
}
SCRIPT = "simple_llama/reinforcement_learning/rlhf/apply_dpo.py"
MIXES = {"short": (24, 48), "middle": (120, 80), "long": (500, 160), "uneven": (0, 0)}  # words of prompt and answers


class Case(NamedTuple):
    """A configuration."""

    size: str
    mix: str
    batch_size: int
    grad_accum_steps: int
    ranks: int = 1
    deepspeed: str = "zero2_bf16"  # of ds_configs/
    zero: Mapping[str, Any] = {}  # changes in its ZeRO section
    ours: Mapping[str, Any] = {}  # more of our settings

    def __str__(self) -> str:
        changes = [f"{key}={value}" for key, value in {**self.zero, **self.ours}.items()]
        parts = [self.size, self.deepspeed, self.mix, f"{self.batch_size} x {self.grad_accum_steps} x {self.ranks}"]
        return ", ".join(parts + changes)


CASES = (
    # one rank, bf16: sizes, batches, lengths
    Case("4m", "short", 2, 2),
    Case("4m", "middle", 8, 1),
    Case("18m", "short", 4, 2),
    Case("18m", "middle", 2, 2),
    Case("18m", "long", 2, 2),
    Case("34m", "short", 1, 1),
    Case("34m", "short", 1, 4),
    Case("34m", "middle", 4, 2),
    Case("34m", "long", 2, 2),
    Case("34m", "uneven", 2, 4),
    Case("86m", "short", 2, 2),
    Case("86m", "middle", 2, 1),
    # one rank, fp32
    Case("4m", "middle", 4, 2, deepspeed="zero2_fp32"),
    Case("18m", "short", 1, 4, deepspeed="zero2_fp32"),
    Case("18m", "short", 4, 2, deepspeed="zero2_fp32"),
    Case("18m", "middle", 4, 2, deepspeed="zero2_fp32"),
    Case("34m", "middle", 2, 1, deepspeed="zero2_fp32"),
    # one rank: recomputation, offload, losses, decay, the reference in memory, ZeRO-3
    Case("34m", "middle", 4, 2, ours={"activation_checkpointing": True}),
    Case("18m", "long", 4, 1, deepspeed="zero2_fp32", ours={"activation_checkpointing": True}),
    Case("18m", "short", 4, 2, deepspeed="zero2_offload"),
    Case("34m", "short", 2, 2, deepspeed="zero2_offload"),
    Case("18m", "short", 4, 2, ours={"loss_type": "ipo"}),
    Case("34m", "short", 2, 2, deepspeed="zero2_fp32", ours={"loss_type": "hinge", "weight_decay": 0.1}),
    Case("34m", "short", 2, 2, ours={"reference": "online"}),
    Case("34m", "short", 2, 2, deepspeed="zero3_bf16"),
    # two ranks
    Case("18m", "short", 2, 2, 2),
    Case("34m", "short", 2, 2, 2),
    Case("34m", "short", 2, 2, 2, ours={"reduce_once": True}),
    Case("34m", "middle", 2, 1, 2),
    Case("18m", "short", 2, 2, 2, deepspeed="zero3_bf16"),
    Case("34m", "middle", 2, 1, 2, deepspeed="zero3_bf16"),
    Case("18m", "long", 1, 2, 2, deepspeed="zero3_bf16", ours={"activation_checkpointing": True}),
    Case("18m", "short", 2, 2, 2, deepspeed="zero2_fp32"),
    Case("34m", "short", 2, 2, 2, deepspeed="zero2_offload"),
    Case("86m", "short", 1, 2, 2),
    Case("18m", "uneven", 2, 2, 2, deepspeed="zero2_fp32", ours={"loss_type": "ipo"}),
)


def settings_of(case: Case, folder: Path) -> dict[str, Any]:
    """Settings of a run; writes its start model, pairs and DeepSpeed JSON below `folder` where they are not yet."""
    steps = max(STEPS, -(-MICRO_BATCHES // case.grad_accum_steps))
    pairs = round(case.batch_size * case.grad_accum_steps * case.ranks * steps / 0.9)
    deepspeed = json.loads(Path(root_path("ds_configs", f"{case.deepspeed}.json")).read_text())
    deepspeed["zero_optimization"] |= case.zero
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    write_pairs(folder / "pairs.jsonl", case.mix, pairs)
    write_model(folder / "start.pth", SIZES[case.size])
    return {
        "model_path": str(folder / "start.pth"),
        "tokenize_path": TOKENIZER,
        "rlhf_dataset_path": str(folder / "pairs.jsonl"),
        "deepspeed_config": str(folder / "deepspeed.json"),
        "run_name": "run",
        "device": "cpu",
        "val_share": 0.1,
        "batch_size": case.batch_size,
        "grad_accum_steps": case.grad_accum_steps,
        "epochs": 1,
        "warmup_iterations": 1,
        "eval_interval": 0,
        "n_samples": 0,
        **{key: str(folder / key) for key in ("ckpt_dir", "ref_cache_dir", "log_dir")},
        **case.ours,
    }


def write_pairs(path: Path, mix: str, count: int) -> None:
    """Pairs of random words; an uneven mix has some that are ten times as long as others."""
    rng = np.random.default_rng(0)
    words = ["time", "people", "year", "way", "day", "man", "thing", "world", "life", "hand", "part", "child", "place"]

    def text(length: int) -> str:
        return " ".join(rng.choice(words, max(2, int(length * rng.uniform(0.6, 1.4)))))

    with path.open("w") as file:
        for number in range(count):
            prompt, answer = MIXES[mix] if mix != "uneven" else ((400, 150) if number % 8 == 0 else (30, 25))
            record = {"Template": ["CUSTOM"], "User": [f"{number} {text(prompt)}"]}
            record |= {"Accepted": [text(answer)], "Rejected": [text(answer)]}
            file.write(json.dumps(record) + "\n")


def write_model(path: Path, size: Size) -> None:
    """A start model with random weights, fp32."""
    config = TrainingConfig(n_embd=size.width, n_layers=size.layers, n_heads=size.heads, max_seq_len=2048)
    torch.manual_seed(0)
    vocabulary = load_tokenizer(TOKENIZER).get_vocab_size()
    save_weights(path, LLaMaTransformer(Architecture.of(config, vocabulary)).state_dict(), config, {})


# === Processes ===


def prepare() -> None:
    """Imports what ranks import, without computing: threads do not survive a fork."""
    for name in ("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "torch.utils.tensorboard"):
        importlib.import_module(name)
    importlib.import_module("simple_llama.reinforcement_learning.rlhf.apply_dpo")


def fork(work: Callable[[], object], output: Path) -> int:
    """The id of a child that does the work, what it says going to a file; it ends with 0, or 1 for an error."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(children: Sequence[int], output: Path) -> float:
    """GiB that the largest of the children had at most. SystemExit where one failed."""
    peak, failed = 0, False
    for child in children:
        _, status, usage = os.wait4(child, 0)
        peak, failed = max(peak, usage.ru_maxrss), failed or bool(status)
    if failed:
        raise SystemExit(output.read_text()[-4000:])
    return peak / 2**20


def start(settings: Path, ranks: int, flags: Sequence[str] = ()) -> tuple[str, float]:
    """(output of rank 0, GiB that the largest of the processes had at most) of the whole job on so many ranks."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]

    def run(rank: int) -> None:
        told: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if ranks > 1:
            os.environ.update({name: str(value) for name, value in told.items()})
        sys.argv = [SCRIPT, "--config", str(settings), *flags]
        runpy.run_path(root_path(SCRIPT), run_name="__main__")

    outputs = [settings.parent / f"output{rank}" for rank in range(ranks)]
    peak = wait([fork(partial(run, rank), output) for rank, output in enumerate(outputs)], outputs[0])
    return outputs[0].read_text(), peak


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """A dry run with its probe, then the run."""
    path, said = folder / "config.json", folder / "made"
    wait([fork(lambda: path.write_text(json.dumps(settings_of(case, folder))), said)], said)
    report, _ = start(path, case.ranks, ["--dry_run", "--probe"])
    _, peak_gib = start(path, case.ranks)
    lines = [json.loads(line) for line in (folder / "log_dir" / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["perf/step_time_s"] for line in lines if "perf/step_time_s" in line]
    full = seconds[1:-1] if len(seconds) > 3 else seconds[1:]  # the first one warms up, the last one may be short
    return {**foretold(report), "case": str(case), "peak_gib": peak_gib, "step_s": statistics.median(full)}


def foretold(report: str) -> dict[str, Any]:
    """The numbers of a dry run's report."""
    memory, seconds = report.split("== memory per rank ==")[1], report.split("== time ==")[1]
    [estimate] = re.findall(r"^sum +([\d.]+) GiB.*$", memory, re.MULTILINE)
    [probe] = re.findall(r"^probe +([\d.]+) GiB", memory, re.MULTILINE)
    [step] = re.findall(r"^a step ([\d.]+) s \(probe", seconds, re.MULTILINE)
    parts = "; ".join(line for line in memory.split("== time")[0].splitlines() if " GiB" in line)
    return {"estimate_gib": float(estimate), "probe_gib": float(probe), "probe_s": float(step), "parts": parts}


# === Table ===


def row(number: int, found: Mapping[str, Any]) -> list[str]:
    """A configuration's: measured, and how far what was foretold is from it."""
    memory, seconds = found["peak_gib"], found["step_s"]
    cells = [str(number), found["case"], f"{memory:.2f}"]
    cells += [f"{found[name]:.2f} ({found[name] / memory - 1:+.0%})" for name in ("estimate_gib", "probe_gib")]
    return [*cells, f"{seconds:.2f}", f"{found['probe_s']:.2f} ({found['probe_s'] / seconds - 1:+.0%})"]


def make_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of all that was measured, and how many lie within the bounds."""
    rows = [["", "configuration", "GiB", "by arithmetic", "by the probe", "s a step", "by the probe"]]
    rows += [row(int(number), one) for number, one in sorted(found.items(), key=lambda item: int(item[0]))]
    bounds = {"estimate_gib": ("peak_gib", 0.25), "probe_gib": ("peak_gib", 0.1), "probe_s": ("step_s", 0.2)}
    words = []
    for name, (measured, bound) in bounds.items():
        off = [abs(one[name] / one[measured] - 1) for one in found.values()]
        words.append(f"{name}: {sum(o <= bound for o in off)} of {len(off)} within {bound:.0%}, at most {max(off):.0%}")
    return f"{table(rows)}\n\n{'; '.join(words)}"


def main(bench: Bench) -> None:
    """Runs what is asked for, keeps the numbers, prints the table of all."""
    path = Path(bench.results)
    found = json.loads(path.read_text()) if path.exists() else {}
    first, _, end = bench.only.partition(":")
    numbers = range(int(first or 0), int(end or len(CASES))) if bench.only else range(len(CASES))
    began = time.monotonic()
    prepare()
    for number in () if bench.table else numbers:
        if bench.most_s and (str(number) in found or time.monotonic() - began > bench.most_s):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[str(number)] = measure(CASES[number], Path(folder))
        print(*row(number, found[str(number)]), file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))
    print(f"{machine(torch.device('cpu'))}\n\n{make_table(found)}")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
