"""The whole job on a GPU: one rank under NCCL, in bf16, through the scripts that people start."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tiny_job import ROOT, make_job, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("changes", [{}, {"reduce_once": True}, {"activation_checkpointing": True}])
def test_reference_and_training(tmp_path: Path, changes: dict[str, object]) -> None:
    """Step 0 is ln 2, the loss falls, and a checkpoint comes out whose weights have moved."""
    job = make_job(tmp_path)
    settings = {
        **job.settings,
        "device": "cuda",
        "deepspeed_config": str(ROOT / "ds_configs" / "zero2_bf16.json"),
        "epochs": 4,
    }
    run_ranks("launch/precompute_ref.py", settings, 1)
    flags = tuple(f"--{name}" for name in changes)
    run_ranks("launch/train_dpo.py", settings, 1, flags=flags)
    losses = job.curve("loss")
    assert math.isclose(job.curve("eval_loss")[0], math.log(2), abs_tol=2e-2)
    assert losses[-1] < losses[0]
    start = torch.load(tmp_path / "start.pth", weights_only=False)["model_state_dict"]
    assert any(not torch.equal(tensor, start[name]) for name, tensor in job.weights().items())
    assert all(mfu > 0 for mfu in job.curve("perf/mfu"))
