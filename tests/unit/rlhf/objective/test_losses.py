"""Every loss against the textbook, which is written apart: value and gradient, and what the textbook cannot do."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from benchmarks.check_losses import DIVERGENCES, VARIANTS, errors, largest_error, slopes
from benchmarks.textbook_losses import COUPLED, FORMULAS, value_and_gradient
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import _EXPONENT_LIMIT, Scores


def test_the_textbook_has_each_loss() -> None:
    """And no other."""
    assert FORMULAS.keys() | COUPLED.keys() == LOSSES.keys()
    assert COUPLED.keys() == {name for name, loss in LOSSES.items() if loss.couples or "groups_B" in loss.reads}


@pytest.mark.parametrize("loss", VARIANTS, ids=str)
def test_a_loss_is_that_of_the_textbook(loss: PreferenceLoss) -> None:
    """Value and gradient of 64 random pairs to 1e-10, relative where they are above 1."""
    assert max(errors(loss)) <= 1e-10


def test_the_comparison_sees_a_difference() -> None:
    """By hand: 0.5 of 2, and 0.25 of 0.5, which is not above 1; NaN counts for nothing, unless it is frequent."""
    expected = torch.tensor([2.0, 0.5, 3.0])
    assert largest_error(torch.tensor([2.5, 0.5, 3.0]), expected) == 0.25
    assert largest_error(torch.tensor([2.0, 0.75, 3.0]), expected) == 0.25
    assert math.isnan(largest_error(torch.tensor([math.nan, 0.5, 3.0]), expected))
    value, (chosen, rejected) = value_and_gradient("ipo", (-1.0, -4.0, -2.0, -3.0, 1, 1), {"beta": 0.5})
    assert (value, chosen, rejected) == (1.0, 2.0, -2.0)  # (2 - 1)^2 and its slopes 2 (2 - 1)


@pytest.mark.parametrize("loss", VARIANTS, ids=str)
def test_extreme_log_ratios_stay_finite(loss: PreferenceLoss) -> None:
    """fp32 log-ratios of -1000, 0 and 1000 on each side, of answers of 1 and of 300 tokens: finite loss and gradient,
    whose square fp32 holds too, but for those of a squared divergence. Sums of 2,000 nats, and of 0: an answer that is
    certain."""
    grid = itertools.product((-1000.0, 0.0, 1000.0), (-1000.0, 0.0, 1000.0), (1, 300))
    chosen, rejected, counts = (torch.tensor(column) for column in zip(*grid, strict=True))
    ref = torch.full((18, 2), -1000.0)
    gaps = torch.tensor([-1000.0, 0.0, 1000.0]).repeat(6)
    logps, counts_B2 = ref + torch.stack([chosen, rejected], dim=1), torch.stack([counts, counts], dim=1)
    others = {"fronts_B2": 0.5 * logps, "ref_fronts_B2": 0.25 * ref, "squares_B2": -0.1 * counts_B2}
    scores = Scores(logps, ref, counts_B2, gaps_B=gaps, **others, groups_B=torch.arange(18) // 4)
    losses, gradient = slopes(loss, scores)
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    squared = loss.loss_type.startswith("ipo") and loss.f_divergence in ("forward_kl", "alpha")
    assert (gradient if squared else gradient**2).isfinite().all()


@pytest.mark.parametrize("divergence", ["reverse_kl", *DIVERGENCES])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "discopop"])
def test_a_hopeless_pair_still_pulls(loss_type: Any, divergence: Any) -> None:
    """Log-ratios of -1000 and 1000, fp32: where the textbook's exponential ends at infinity, there is a slope."""
    loss = PreferenceLoss(loss_type, 0.5, f_divergence=divergence)
    losses, gradient = slopes(loss, Scores(torch.tensor([[-1000.0, 1000.0]]), torch.zeros(1, 2)))
    assert losses.item() >= 400 and gradient[0, 0] <= -0.25


def test_the_bound_lies_beyond_what_is_near_the_textbook() -> None:
    """1 - e^-r is exact down to r = -30, goes on from there without a step in value or slope, and falls on."""
    loss = PreferenceLoss("hinge", 1.0, f_divergence="forward_kl")
    places = [[-_EXPONENT_LIMIT + 1e-9, 0.0], [-_EXPONENT_LIMIT, 0.0], [-_EXPONENT_LIMIT - 1e-9, 0.0]]
    ratios = torch.tensor([*places, [-_EXPONENT_LIMIT - 1, 0.0]], dtype=torch.float64)
    losses, gradient = slopes(loss, Scores(ratios, torch.zeros_like(ratios)))
    value = value_and_gradient("hinge", (-_EXPONENT_LIMIT, 0.0, 0.0, 0.0, 1, 1), loss.own_options())
    assert losses[:3].tolist() == pytest.approx([value[0]] * 3, rel=1e-8)
    assert gradient[:, 0].tolist() == pytest.approx([value[1][0]] * 4, rel=1e-8)
    assert losses[3].item() == pytest.approx(2 * value[0], rel=1e-8)
