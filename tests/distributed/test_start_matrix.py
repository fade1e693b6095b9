"""The first step of some losses on two ranks, beside a plain model that computes it apart on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from plain_cells import plain_cells
from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from start_cells import Cell, make_ranked_job, make_weighted_job
from tiny_job import ROOT, free_port, run_ranks

pytestmark = pytest.mark.dist
ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"), ("here",))
SOME = ("sigmoid", "sft", "aot", "orpo")
LORA = {"lora_rank": 4, "lora_alpha": 8.0}


class Case(NamedTuple):
    """A ds_configs file, how near the two are, what differs from the settings, and the losses."""

    file: str
    tolerance: float
    changes: dict[str, Any]
    losses: tuple[str, ...] = SOME

    @property
    def given(self) -> dict[str, Any]:
        """All that differs from the settings."""
        return {**self.changes, "deepspeed_config": str(ROOT / "ds_configs" / f"{self.file}.json")}


def cases_of(grouped: dict[str, Any]) -> dict[str, Case]:
    """What is compared; `grouped` names records with four answers."""
    return {
        "fp32": Case("zero2_fp32", 1e-5, {}),
        "bf16, ZeRO-2": Case("zero2_bf16", 2e-2, {}),
        "bf16, ZeRO-3": Case("zero3_bf16", 2e-2, {}),
        "adapters in fp32": Case("zero2_fp32", 1e-5, LORA),
        "adapters in bf16, ZeRO-2": Case("zero2_bf16", 2e-2, LORA),
        "adapters in bf16, ZeRO-3": Case("zero3_bf16", 2e-2, LORA),
        "groups in fp32": Case("zero2_fp32", 1e-5, grouped),
        "groups in bf16, ZeRO-3": Case("zero3_bf16", 2e-2, grouped),
        "means of prompts": Case("zero2_fp32", 1e-5, {**grouped, "group_weight": "prompt"}),
        "rankings": Case("zero2_fp32", 1e-5, {**grouped, "pairs": "adjacent"}, ("plackett_luce",)),
        "WPO in fp32": Case("zero2_fp32", 1e-5, {"weighting": "wpo"}, ("sigmoid",)),
        "WPO of adapters in bf16, ZeRO-3": Case("zero3_bf16", 2e-2, {"weighting": "wpo", **LORA}, ("sigmoid",)),
        "LD-DPO of adapters in fp32": Case("zero2_fp32", 1e-5, {"ld_alpha": 0.5, **LORA}, ("sigmoid",)),
        "LD-DPO in bf16, ZeRO-3": Case("zero3_bf16", 2e-2, {"ld_alpha": 0.5}, ("sigmoid",)),
    }


def test_a_first_step_on_two_ranks(tmp_path: Path) -> None:
    """Loss and gradient's norm, at the start and after a step, of 2 pairs or records a rank."""
    job, ranked = make_weighted_job(tmp_path), make_ranked_job(tmp_path / "ranked")
    settings = {**job.settings, "reference": "online", "grad_accum_steps": 2, "max_lr": 2e-4, "min_lr": 0.0}
    cases = cases_of({"rlhf_dataset_path": ranked.settings["rlhf_dataset_path"]})
    given = json.dumps({name: (case.losses, case.given) for name, case in cases.items()})
    two = {**settings, "grad_accum_steps": 1}
    run_ranks("tests/start_cells.py", two, world=2, port=free_port(), flags=(given,))
    found = json.loads((tmp_path / "checkpoints" / "cells.json").read_text())
    for name, case in cases.items():
        expected = plain_cells(DPOConfig(**{**settings, **case.given}), case.losses, ALONE)
        for loss in case.losses:
            cell = Cell(*found[name][loss])
            assert cell == pytest.approx(expected[loss], rel=case.tolerance, abs=1e-5), (name, loss)
            assert cell.norm > 1e-3 and abs(cell.loss_after - cell.loss) > 1e-5, (name, loss)
