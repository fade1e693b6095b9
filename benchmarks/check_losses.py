"""What losses are compared on: made-up pairs, each loss with options that are not its defaults, slopes by autograd.

Shapes: B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.textbook_losses import coupled_values_and_gradients, value_and_gradient
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores

DIVERGENCES = ("forward_kl", "js", "alpha")
SUM = "sigmoid:0.8,bco_pair:0.2,sft:1"  # MPO's
_DIVERGED = [name for name, loss in LOSSES.items() if "f_divergence" in loss.defaults]
_COMPARED = [name for name, loss in LOSSES.items() if "ld_alpha" in loss.defaults]
_SMOOTHED = [name for name, loss in LOSSES.items() if "label_smoothing" in loss.defaults]
VARIANTS: Sequence[PreferenceLoss] = (
    *(PreferenceLoss(name) for name in LOSSES),
    *(PreferenceLoss(name, f_divergence=divergence) for name in _DIVERGED for divergence in DIVERGENCES),
    *(PreferenceLoss(name, 0.3, 0.2) for name in _SMOOTHED),
    PreferenceLoss("sigmoid", 2.0, nll_weight=0.2),
    PreferenceLoss("robust", 0.3, 0.4, f_divergence="alpha", f_alpha=0.25),
    PreferenceLoss("simpo", 1.0, gamma=0.3),
    PreferenceLoss("slic", gamma=4.0, nll_weight=0.5),
    PreferenceLoss("discopop", 0.05, discopop_tau=0.5),
    PreferenceLoss("dpop", 0.1, dpop_lambda=5.0),
    PreferenceLoss("rdpo", 0.1, length_penalty=0.5),
    PreferenceLoss("rpo_gap", 0.5, gap_scale=3.0),
    *(PreferenceLoss(name, ld_alpha=alpha) for name in _COMPARED for alpha in (0.0, 0.6)),
    *(PreferenceLoss(name, weighting="wpo") for name, loss in LOSSES.items() if "weighting" in loss.defaults),
    PreferenceLoss("sigmoid", 0.5, f_divergence="js", nll_weight=0.2, ld_alpha=0.3, weighting="wpo"),
    PreferenceLoss(SUM, 0.1),
    PreferenceLoss("orpo:2,hinge:0.5", 0.1),
    PreferenceLoss("aot:0.7,sigmoid:0.3", 0.2, nll_weight=0.1),
)


def random_scores(pairs: int) -> Scores:
    """Answers of 1 to 40 tokens of about 2 nats, fp64, log-ratios of about 3 nats, weights from 0.1 to 3, gaps of about
    2, more or less of a sum within the common length, and two or three pairs a record."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(1, 41, (pairs, 2), generator=generator)
    ref = -counts * (0.5 + 3 * torch.rand(pairs, 2, dtype=torch.float64, generator=generator))
    moved = 3 * torch.randn(pairs, 2, dtype=torch.float64, generator=generator)
    weights = 0.1 + 2.9 * torch.rand(pairs, dtype=torch.float64, generator=generator)
    gaps = 2 * torch.randn(pairs, dtype=torch.float64, generator=generator)
    logps, squares = torch.minimum(ref + moved, -0.05 * counts), -counts * torch.rand(pairs, 2, generator=generator)
    share = torch.rand(2, pairs, 2, dtype=torch.float64, generator=generator)
    share = torch.where(counts == counts.amin(dim=1, keepdim=True), 1.0, share)
    sums = share[0] * logps, share[1] * ref, squares.double()
    return Scores(logps, ref, counts, weights, gaps, *sums, groups_B=torch.arange(pairs) * 2 // 5)


def slopes(loss: PreferenceLoss, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (B,) and their gradient by the policy's sums, (B, 2), or (B, 4) with those over the common length."""
    names = [name for name in ("logps_B2", "fronts_B2") if getattr(scores, name) is not None]
    leaves = {name: getattr(scores, name).clone().requires_grad_() for name in names}
    losses = loss(replace(scores, **leaves))
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return losses.detach(), torch.cat(gradients, dim=1)


def textbook_slopes(loss: PreferenceLoss, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the textbook; NaN where a formula overflows."""
    assert scores.weights_B is not None and scores.gaps_B is not None
    parts = (scores.logps_B2, scores.ref_B2, scores.counts_B2, scores.gaps_B[:, None])
    others = (scores.fronts_B2, scores.ref_fronts_B2, scores.squares_B2)
    numbers = None if scores.groups_B is None else scores.groups_B[:, None]
    columns = [part.tolist() for part in (*parts, *others, numbers) if part is not None]
    options = loss.own_options()
    if loss.couples or "groups_B" in loss.reads:
        rows = [tuple(number for part in pair for number in part) for pair in zip(*columns, strict=True)]
        weights = scores.weights_B.tolist()
        values, slopes_of = coupled_values_and_gradients(loss.loss_type, rows, options, weights)
        gradient = torch.zeros(len(values), 2 if scores.fronts_B2 is None else 4, dtype=torch.float64)
        gradient[:, :2] = torch.tensor(slopes_of, dtype=torch.float64)
        return torch.tensor(values, dtype=torch.float64), gradient
    found = [
        value_and_gradient(loss.loss_type, tuple(number for part in pair for number in part), options, weight)
        for weight, *pair in zip(scores.weights_B.tolist(), *columns, strict=True)
    ]
    losses, gradients = zip(*found, strict=True)
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative where the expected number is above 1, of the numbers that both have; NaN where
    these are less than seven in eight."""
    both = found.isfinite() & expected.isfinite()
    if both.double().mean() < 7 / 8:
        return math.nan
    return float(((found - expected).abs() / expected.abs().clamp(min=1))[both].max())


def errors(loss: PreferenceLoss, pairs: int = 64) -> tuple[float, float]:
    """How far values and gradients of random pairs lie from the textbook's (`largest_error`)."""
    scores = random_scores(pairs)
    (value, gradient), (right, slope) = slopes(loss, scores), textbook_slopes(loss, scores)
    assert value.isfinite().all() and gradient.isfinite().all()
    return largest_error(value, right), largest_error(gradient, slope)
