"""A traced training run on one GPU through DeepSpeed's launcher, and the table of its kernels: `make profile-gpu`.

    python -m benchmarks.profile_gpu [--shape llama-3.2-1b]

Random weights, drawn on the GPU, and synthetic pairs; the reference is a second copy of the weights in memory. Nothing
stays: the trace is read and, with everything else, deleted, unless `--keep` names a folder.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.bench_foretold import write_pairs
from benchmarks.gpu_kernels import read_trace, report
from benchmarks.measure import RESULTS, record
from benchmarks.workload import TOKENIZER, start_model
from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.pretraining.weights import save_weights


@dataclass(frozen=True)
class ProfileGpu:
    """What is traced."""

    shape: Literal["tiny", "36m", "1.3b", "llama-3.2-1b"] = "1.3b"  # of a model with random weights
    batch_size: int = 64  # pairs a micro-batch
    accumulate: int = 2  # micro-batches a step
    first: int = 4  # step of the two that are traced; those before it warm up
    device: Literal["cpu", "cuda"] = "cuda"  # a CPU has no kernels: to try the run
    keep: str = ""  # folder for everything; "": one that is deleted
    results: str = RESULTS  # file to append the table to; "": only print


def main(wanted: ProfileGpu) -> None:
    """The run, then the table."""
    with _folder(wanted.keep) as folder:
        start = start_model(wanted.shape, "", 0, wanted.device)
        save_weights(folder / "start.pth", start.state_dict, start.config, {})
        del start
        torch.cuda.empty_cache()
        steps = wanted.first + 1
        write_pairs(folder / "pairs.jsonl", "middle", wanted.batch_size * wanted.accumulate * steps)
        settings = {
            "model_path": str(folder / "start.pth"),
            "tokenize_path": TOKENIZER,
            "rlhf_dataset_path": str(folder / "pairs.jsonl"),
            "device": wanted.device,
            "run_name": "profile",
            "reference": "online",
            "val_share": 0.0,
            "batch_size": wanted.batch_size,
            "grad_accum_steps": wanted.accumulate,
            "epochs": 1,
            "warmup_iterations": 1,
            "profile_steps": [wanted.first, steps],
            **{key: str(folder / key) for key in ("ckpt_dir", "ref_cache_dir", "log_dir")},
        }
        (folder / "config.json").write_text(json.dumps(settings))
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"]
        script = [root_path("launch", "train_dpo.py"), "--config", str(folder / "config.json")]
        if subprocess.run([*launcher, *script], check=False).returncode:
            raise UserError("the run failed, see above")
        [trace] = (folder / "log_dir" / "profile" / "profile").iterdir()
        size = f"{wanted.shape}, {wanted.accumulate} micro-batches of {wanted.batch_size} pairs a step."
        command = shlex.join(["python", "-m", "benchmarks.profile_gpu", *sys.argv[1:]])
        body = f"{size}\n\n{report(read_trace(trace))}"
        record("Kernels of a training step", command, body, torch.device(wanted.device), wanted.results)


@contextlib.contextmanager
def _folder(keep: str) -> Iterator[Path]:
    """The one that is to be kept, or one for the time being."""
    if keep:
        Path(keep).mkdir(parents=True)
        yield Path(keep).absolute()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    try:
        main(tyro.cli(ProfileGpu, description=__doc__))
    except UserError as problem:
        sys.exit(f"error: {problem}")
