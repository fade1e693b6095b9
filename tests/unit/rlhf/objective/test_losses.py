"""Every loss against the textbook, which is written apart: value and gradient, and what the textbook cannot do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.textbook_losses import FORMULAS, value_and_gradient
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import EXPONENT_LIMIT, Scores

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
DIVERGED = [name for name, loss in LOSSES.items() if "f_divergence" in loss.defaults]
# a loss, with options that are not its defaults
VARIANTS: list[PreferenceLoss] = [
    *(PreferenceLoss(name) for name in LOSSES),
    *(PreferenceLoss(name, f_divergence=divergence) for name in DIVERGED for divergence in DIVERGENCES[1:]),
    *(PreferenceLoss(name, 0.3, 0.2) for name, loss in LOSSES.items() if "label_smoothing" in loss.defaults),
    PreferenceLoss("sigmoid", 2.0, nll_weight=0.2),
    PreferenceLoss("robust", 0.3, 0.4, f_divergence="alpha", f_alpha=0.25),
    PreferenceLoss("simpo", 1.0, gamma=0.3),
    PreferenceLoss("slic", gamma=4.0, nll_weight=0.5),
    PreferenceLoss("discopop", 0.05, discopop_tau=0.5),
    PreferenceLoss("dpop", 0.1, dpop_lambda=5.0),
    PreferenceLoss("rdpo", 0.1, length_penalty=0.5),
    PreferenceLoss("sigmoid:0.8,bco_pair:0.2,sft:1", 0.1),
    PreferenceLoss("orpo:2,hinge:0.5", 0.1),
]


def random_scores(pairs: int) -> Scores:
    """Answers of 1 to 40 tokens of about 2 nats, fp64, and log-ratios of about 3 nats."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(1, 41, (pairs, 2), generator=generator)
    ref = -counts * (0.5 + 3 * torch.rand(pairs, 2, dtype=torch.float64, generator=generator))
    moved = 3 * torch.randn(pairs, 2, dtype=torch.float64, generator=generator)
    return Scores(torch.minimum(ref + moved, -0.05 * counts), ref, counts)


def slopes(loss: PreferenceLoss, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (B,) and their gradient (B, 2) by the policy's sums."""
    logps = scores.logps_B2.clone().requires_grad_()
    losses = loss(replace(scores, logps_B2=logps))
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    return losses.detach(), gradient


def test_the_textbook_has_each_loss() -> None:
    """And no other."""
    assert FORMULAS.keys() == LOSSES.keys()


@pytest.mark.parametrize("loss", VARIANTS, ids=str)
def test_a_loss_is_that_of_the_textbook(loss: PreferenceLoss) -> None:
    """Value and gradient of 64 random pairs to 1e-10, relative where they are above 1; all but a few whose textbook
    overflows (discopop with the forward KL)."""
    scores = random_scores(64)
    assert scores.ref_B2 is not None and scores.counts_B2 is not None
    losses, gradient = slopes(loss, scores)
    sums = zip(*(part.tolist() for part in (scores.logps_B2, scores.ref_B2, scores.counts_B2)), strict=True)
    compared = 0
    for place, (logps, ref, counts) in enumerate(sums):
        value, both = value_and_gradient(loss.loss_type, (*logps, *ref, *counts), loss.own_options())
        if not math.isfinite(value + sum(both)):
            continue
        compared += 1
        assert losses[place].item() == pytest.approx(value, rel=1e-10, abs=1e-10)
        assert gradient[place].tolist() == pytest.approx(both, rel=1e-10, abs=1e-10)
    assert compared >= 56


@pytest.mark.parametrize("loss", VARIANTS, ids=str)
@pytest.mark.parametrize("chosen", [-1000.0, 0.0, 1000.0])
@pytest.mark.parametrize("rejected", [-1000.0, 0.0, 1000.0])
def test_extreme_log_ratios_stay_finite(loss: PreferenceLoss, chosen: float, rejected: float) -> None:
    """fp32 log-ratios of +-1000 on each side, of answers of 1 and of 300 tokens: finite loss and gradient. Sums of
    2,000 nats, or of 0: an answer that is certain."""
    ref = torch.tensor([[-1000.0, -1000.0], [-1000.0, -1000.0]])
    logps = ref + torch.tensor([chosen, rejected])
    losses, gradient = slopes(loss, Scores(logps, ref, torch.tensor([[1, 1], [300, 300]])))
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert gradient.isfinite().all() and (gradient.double() ** 2).isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "discopop"])
def test_a_hopeless_pair_still_pulls(loss_type: Any, divergence: Any) -> None:
    """Log-ratios of -1000 and 1000, fp32: where the textbook's exponential ends at infinity, there is a slope."""
    loss = PreferenceLoss(loss_type, 0.5, f_divergence=divergence)
    losses, gradient = slopes(loss, Scores(torch.tensor([[-1000.0, 1000.0]]), torch.zeros(1, 2)))
    assert losses.item() >= 400 and gradient[0, 0] <= -0.25


def test_the_bound_lies_beyond_what_is_near_the_textbook() -> None:
    """1 - e^-r is exact down to r = -30, goes on from there without a step in value or slope, and falls on."""
    loss = PreferenceLoss("hinge", 1.0, f_divergence="forward_kl")
    places = [[-EXPONENT_LIMIT + 1e-9, 0.0], [-EXPONENT_LIMIT, 0.0], [-EXPONENT_LIMIT - 1e-9, 0.0]]
    ratios = torch.tensor([*places, [-EXPONENT_LIMIT - 1, 0.0]], dtype=torch.float64)
    losses, gradient = slopes(loss, Scores(ratios, torch.zeros_like(ratios)))
    value = value_and_gradient("hinge", (-EXPONENT_LIMIT, 0.0, 0.0, 0.0, 1, 1), loss.own_options())
    assert losses[:3].tolist() == pytest.approx([value[0]] * 3, rel=1e-8)
    assert gradient[:, 0].tolist() == pytest.approx([value[1][0]] * 4, rel=1e-8)
    assert losses[3].item() == pytest.approx(2 * value[0], rel=1e-8)
