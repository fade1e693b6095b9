"""The first step of every loss beside a plain model that computes it apart; two ranks: tests/distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plain_cells import plain_cells
from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES
from start_cells import Cell, cells, make_ranked_job, make_weighted_job
from tiny_job import ROOT, TinyJob

SOME = ("sigmoid", "sft", "aot", "orpo")
LORA = {"lora_rank": 4, "lora_alpha": 8.0}
# Adam's first step is the sign of a gradient, so that its rounding near 0 counts: 1e-4 of ipo's next loss at 1e-3.
SMALL = {"max_lr": 2e-4, "min_lr": 0.0}


def both(
    job: TinyJob, ranks: Ranks, name: str, losses: tuple[str, ...], **changes: Any
) -> dict[str, tuple[Cell, Cell]]:
    """Each loss's first step by the engine, and apart."""
    settings = {**job.settings, "reference": "online", "grad_accum_steps": 2, **changes}
    config = DPOConfig(**{**settings, "deepspeed_config": str(ROOT / "ds_configs" / f"{name}.json")})
    ours, plain = cells(config, losses, ranks), plain_cells(config, losses, ranks)
    return {loss: (ours[loss], plain[loss]) for loss in losses}


def test_all_losses_in_fp32(tmp_path: Path, ranks: Ranks) -> None:
    """Loss and gradient's norm, at the start and after a step that leaves the reference: 1e-5, relative above 1."""
    for loss, (ours, plain) in both(make_weighted_job(tmp_path), ranks, "zero2_fp32", tuple(LOSSES), **SMALL).items():
        assert ours == pytest.approx(plain, rel=1e-5, abs=1e-5), loss
        assert ours.norm > 1e-3 and abs(ours.loss_after - ours.loss) > 1e-4, loss


@pytest.mark.parametrize("changes", [{}, {"group_weight": "prompt", "group_prompts": True}], ids=["pair", "prompt"])
def test_all_losses_of_groups_in_fp32(tmp_path: Path, ranks: Ranks, changes: dict[str, Any]) -> None:
    """The same of records with four answers, each answer once: beside chats alone, padded."""
    ranked = {"plackett_luce": "adjacent"}
    losses = (*SOME, *ranked) if changes else tuple(LOSSES)
    job = make_ranked_job(tmp_path)
    changes = {**SMALL, **changes}
    found = both(job, ranks, "zero2_fp32", tuple(one for one in losses if one not in ranked), **changes)
    for loss, pairs in ranked.items():
        found |= both(job, ranks, "zero2_fp32", (loss,), pairs=pairs, **changes)
    assert len(found) == len(losses)
    for loss, (ours, plain) in found.items():
        assert ours == pytest.approx(plain, rel=1e-5, abs=1e-5), loss
        assert ours.norm > 1e-3 and abs(ours.loss_after - ours.loss) > 1e-4, loss


@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", ["zero2_bf16", "zero3_bf16"])
def test_some_losses_in_bf16(tmp_path: Path, ranks: Ranks, name: str, lora: dict[str, Any]) -> None:
    """2e-2, with whole weights and partitioned ones."""
    for loss, (ours, plain) in both(make_weighted_job(tmp_path), ranks, name, SOME, **lora).items():
        assert ours == pytest.approx(plain, rel=2e-2), loss


def test_some_losses_with_adapters_in_fp32(tmp_path: Path, ranks: Ranks) -> None:
    """1e-5: only adapters move, and the reference is the policy without them."""
    for loss, (ours, plain) in both(make_weighted_job(tmp_path), ranks, "zero2_fp32", SOME, **LORA).items():
        assert ours == pytest.approx(plain, rel=1e-5, abs=1e-5), loss
        assert ours.norm > 1e-3 and abs(ours.loss_after - ours.loss) > 1e-5, loss
