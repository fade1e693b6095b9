"""On a GPU: time in communication by events, a trace with kernels, and one reduction a step with its own stream."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tiny_job import ROOT, make_job, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_one_gpu_with_and_without_one_reduction_a_step(tmp_path: Path) -> None:
    """Six steps, nccl with one rank: its collectives send nothing but take time; the same losses to 1e-3; steps 2 and 3
    of the second run are traced with their kernels."""
    job = make_job(tmp_path)
    settings = {**job.settings, "device": "cuda", "reference": "online", "n_samples": 0}
    settings["deepspeed_config"] = str(ROOT / "ds_configs" / "zero2_bf16.json")
    run_ranks("launch/train_dpo.py", {**settings, "run_name": "each"}, world=1)
    flags = ("--reduce_once", "--profile_steps", "2", "3")
    run_ranks("launch/train_dpo.py", {**settings, "run_name": "once"}, world=1, flags=flags)
    for name in ("each", "once"):
        assert job.curve("perf/comm_mb", name) == [0.0] * 6
        assert all(0 < seconds < 60 for seconds in job.curve("perf/comm_time_s", name))
    assert job.curve("loss", "once") == pytest.approx(job.curve("loss", "each"), abs=1e-3)
    [path] = (job.folder / "runs" / "once" / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
