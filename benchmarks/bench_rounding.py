"""How far log-prob sums of the same weights lie apart between kinds of CPU: for the bounds of `reference/audit.py`.

python -m benchmarks.bench_rounding --model demo/start.pth --data PAIRS

Each kind runs in a process of its own, which is told to do without some instructions, or to deal pairs to micro-batches
and threads otherwise. All are compared with the machine as it is.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks import measure
from simple_llama.cluster.distributed import init_ranks
from simple_llama.common.paths import package_path, root_path
from simple_llama.pretraining.weights import build_model
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import sweep
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.inputs import InputsConfig, load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps

# name: (pairs a micro-batch, threads, whether bf16 units are there, variables)
KINDS: dict[str, tuple[int, int, bool, dict[str, str]]] = {
    "as it is": (16, 2, True, {}),
    "as it is, again": (16, 2, True, {}),
    "a pair a micro-batch": (1, 2, True, {}),
    "one thread": (16, 1, True, {}),
    "oneDNN without tiles": (16, 2, True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "oneDNN without bf16 units": (16, 2, True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "no bf16 units": (16, 2, False, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "AVX2": (
        16,
        2,
        False,
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    ),
}


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    model: str = root_path("demo", "start.pth")  # whatever a run takes
    data: str = package_path("reinforcement_learning", "rl_dataset")  # preference pairs
    tokenizer: str = package_path("dataset", "bpe_8k.json")  # tokenizer JSON
    pairs: int = 1000  # of the data, at most
    kinds: tuple[str, ...] = tuple(KINDS)  # which, the first one is what the others are compared with
    save: str = ""  # in a process of its own: where its sums go, .npz
    results: str = measure.RESULTS  # file that the results are appended to; empty: only printed


def sums_of(bench: Bench, kind: str) -> dict[str, np.ndarray]:
    """Log-prob sums (N, 2) by dtype, and scored counts (N, 2), on a CPU of that kind."""
    size, threads, units, _ = KINDS[kind]
    torch.set_num_threads(threads)
    if not units:
        torch.cpu._is_avx512_bf16_supported = lambda: False  # what `machine.has_fast_bf16` asks
    config = InputsConfig(
        model_path=bench.model, rlhf_dataset_path=bench.data, tokenize_path=bench.tokenizer, val_share=0.0, seed=0
    )
    inputs = load_inputs(config, init_ranks("cpu"))
    pairs = inputs.data.train.select(slice(bench.pairs))
    found: dict[str, np.ndarray] = {"counts": pairs.keys["counts"]}
    for dtype in (torch.float32, torch.bfloat16):
        with inputs.start.reading() as start:
            model = build_model(start, dtype, "cpu")
        sums_N2 = np.zeros((len(pairs), 2), np.float32)
        for part in sweep(pairs.rows, size, 1)[0]:
            sums_N2[list(part)] = pair_logps(model, PairBatch.pack([pairs[i] for i in part])).numpy()
        found[str(dtype).removeprefix("torch.")] = sums_N2
    return found


def measured(bench: Bench, kind: str, folder: Path) -> Any:
    """`sums_of` in a process of its own."""
    path = folder / "sums.npz"
    given = {"model": bench.model, "data": bench.data, "tokenizer": bench.tokenizer, "pairs": bench.pairs}
    options = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "benchmarks.bench_rounding", *options, "--kinds", kind, "--save", str(path)]
    subprocess.run(command, cwd=root_path(), env={**os.environ, **KINDS[kind][3]}, check=True)
    with np.load(path) as found:
        return dict(found)


def main(bench: Bench) -> None:
    """Prints and appends a table of the largest differences from the first kind."""
    if bench.save:
        np.savez(bench.save, allow_pickle=False, **sums_of(bench, bench.kinds[0]))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = [measured(bench, kind, Path(folder)) for kind in bench.kinds]
    title = f"nats from '{bench.kinds[0]}', at most:"
    rows: list[Any] = [
        [title, *(f"{dtype}, {unit}" for dtype in ("fp32", "bf16") for unit in ("an answer", "a token"))]
    ]
    for kind, other in zip(bench.kinds[1:], found[1:], strict=True):
        row = [kind]
        for dtype in ("float32", "bfloat16"):
            apart_N2 = np.abs(other[dtype] - found[0][dtype])
            row += [f"{apart_N2.max():.2g}", f"{(apart_N2 / other['counts']).max():.2g}"]
        rows.append(row)
    body = measure.table(rows) + f"\n\n{len(found[0]['counts']):,} pairs of {Path(bench.data).name}."
    command_line = shlex.join(["python", "-m", "benchmarks.bench_rounding", *sys.argv[1:]])
    measure.record("Rounding of log-prob sums on other CPUs", command_line, body, torch.device("cpu"), bench.results)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
