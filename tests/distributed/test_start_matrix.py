"""The first step of some losses on two ranks, beside a plain model that computes it apart on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plain_cells import plain_cells
from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from start_cells import make_weighted_job
from tiny_job import ROOT, free_port, run_ranks

pytestmark = pytest.mark.dist
SOME = ("sigmoid", "sft", "aot", "orpo")
TOLERANCE = {"zero2_fp32": 1e-5, "zero2_bf16": 2e-2, "zero3_bf16": 2e-2}


def test_some_losses_on_two_ranks(tmp_path: Path) -> None:
    """Loss and gradient's norm, at the start and after a step, of 2 pairs a rank: 1e-5 in fp32, 2e-2 in bf16."""
    settings = {**make_weighted_job(tmp_path).settings, "reference": "online", "grad_accum_steps": 2}
    paths = {name: str(ROOT / "ds_configs" / f"{name}.json") for name in TOLERANCE}
    flags = (":".join(paths.values()), ",".join(SOME))
    two = {**settings, "grad_accum_steps": 1}
    run_ranks("tests/start_cells.py", two, world=2, port=free_port(), flags=flags)
    found = json.loads((tmp_path / "checkpoints" / "cells.json").read_text())
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), ("here",))
    for name, tolerance in TOLERANCE.items():
        plain = plain_cells(DPOConfig(**{**settings, "deepspeed_config": paths[name]}), SOME, ranks)
        for loss in SOME:
            assert found[paths[name]][loss] == pytest.approx(list(plain[loss]), rel=tolerance), (name, loss)
