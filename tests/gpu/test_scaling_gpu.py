"""On GPUs: communication that costs nothing alone, and is beside the computation between two; a trace with kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_kernels import overlap, read_trace
from tiny_job import ROOT, free_port, make_job, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_one_gpu_with_and_without_one_reduction_a_step(tmp_path: Path) -> None:
    """Six steps, nccl with one rank: DeepSpeed exchanges nothing, which takes no time; the same losses to 1e-3; steps 2
    and 3 of the second run are traced with their kernels."""
    job = make_job(tmp_path)
    settings = {**job.settings, "device": "cuda", "reference": "online", "n_samples": 0}
    settings["deepspeed_config"] = str(ROOT / "ds_configs" / "zero2_bf16.json")
    run_ranks("launch/train_dpo.py", {**settings, "run_name": "each"}, world=1)
    flags = ("--reduce_once", "--profile_steps", "2", "3")
    run_ranks("launch/train_dpo.py", {**settings, "run_name": "once"}, world=1, flags=flags)
    for name in ("each", "once"):
        assert job.curve("perf/comm_mb", name) == job.curve("perf/comm_time_s", name) == [0.0] * 6
    assert job.curve("loss", "once") == pytest.approx(job.curve("loss", "each"), abs=1e-3)
    [path] = (job.folder / "runs" / "once" / "profile").iterdir()
    assert read_trace(path).steps == 2


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_exchange_gradients_while_they_compute(tmp_path: Path) -> None:
    """A model of 8 layers of width 512, 25 M weights in buckets of 2 M: all of a rank's reductions but the last can go
    on beside the backward pass, so at least a tenth of their time must, of each rank, and more than twice as much as
    without `overlap_comm`. The same losses of the first two steps to 1e-2."""
    job = make_job(tmp_path, n_embd=512, n_layers=8, n_heads=8)
    shares: dict[str, list[float]] = {}
    for name, beside in (("beside", True), ("after", False)):
        found = json.loads((ROOT / "ds_configs" / "zero2_bf16.json").read_text())
        found["zero_optimization"] |= {"overlap_comm": beside, "reduce_bucket_size": 2_000_000}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
        settings = {**job.settings, "device": "cuda", "reference": "online", "n_samples": 0, "run_name": name}
        settings |= {"batch_size": 10, "grad_accum_steps": 1}  # step 3 is the second epoch's first, of 20 pairs
        settings["deepspeed_config"] = str(tmp_path / f"{name}.json")
        run_ranks("launch/train_dpo.py", settings, 2, free_port(), flags=("--profile_steps", "3", "3"))
        traces = sorted((job.folder / "runs" / name / "profile").iterdir())
        assert len(traces) == 2
        shares[name] = [overlap(read_trace(path).kernels).share for path in traces]
    assert min(shares["beside"]) >= 0.1 and min(shares["beside"]) > 2 * max(shares["after"]), shares
    assert job.curve("loss", "beside")[:2] == pytest.approx(job.curve("loss", "after")[:2], abs=1e-2)
