"""Preference losses: pure functions of a batch's scores, each with its equation and paper.

    d = (log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected))

A loss takes `Scores` and its own options as keywords, and gives each pair's loss from the scores of that pair alone:
the head asks it for a few pairs at a time. To add one: write the function, and name it in `LOSSES` with the fields of
`Scores` that it reads. Shapes: B pairs; column 0 is chosen, column 1 rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from typing_extensions import Doc

from simple_llama.common.settings import Bounds

Beta = Annotated[float, Bounds(0, math.inf, above=True, below=True), Doc("strength of the pull towards the reference")]
LabelSmoothing = Annotated[
    float,
    Bounds(0, 0.5, below=True),
    Doc("assumed share of swapped labels, in [0, 0.5); counts with sigmoid too, where TRL ignores it"),
]


@dataclass(frozen=True)
class Scores:
    """What losses read of B pairs; a field that the data or the mode does not give is None."""

    logps_B2: torch.Tensor  # log-prob sums of the policy over the scored tokens (nats, fp32)
    ref_B2: torch.Tensor | None = None  # the same of the frozen reference
    counts_B2: torch.Tensor | None = None  # scored tokens


def log_ratios(scores: Scores) -> torch.Tensor:
    """log pi / pi_ref of each answer (B, 2)."""
    assert scores.ref_B2 is not None
    return scores.logps_B2 - scores.ref_B2


def _margin(scores: Scores) -> torch.Tensor:
    """d (B,), of sums over the scored tokens."""
    ratios_B2 = log_ratios(scores)
    return ratios_B2[:, 0] - ratios_B2[:, 1]


def sigmoid_loss(scores: Scores, *, beta: Beta, label_smoothing: LabelSmoothing = 0.0) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d); e is the assumed share of swapped labels.

    e = 0: DPO, Eq. 7, arXiv:2305.18290. e > 0: conservative DPO, Mitchell 2023, "A note on DPO with noisy preferences",
    as in the original code, OpenRLHF and LLaMA-Factory; TRL (1.16) ignores its label_smoothing with sigmoid.
    """
    d_B = _margin(scores)
    if label_smoothing == 0:
        return -F.logsigmoid(beta * d_B)
    return -(1 - label_smoothing) * F.logsigmoid(beta * d_B) - label_smoothing * F.logsigmoid(-beta * d_B)


def hinge_loss(scores: Scores, *, beta: Beta) -> torch.Tensor:
    """max(0, 1 - beta d): SLiC's hinge on the log-ratio margin, arXiv:2305.10425 and arXiv:2309.06657. The same in TRL
    (1.16)."""
    return F.relu(1 - beta * _margin(scores))


def ipo_loss(scores: Scores, *, beta: Beta) -> torch.Tensor:
    """(d - 1 / (2 beta))^2: Eq. 17, arXiv:2310.12036; its tau is beta.

    d is of sums over the scored tokens, as printed, in the original code and in OpenRLHF. TRL, LLaMA-Factory and
    ms-swift take d of means, so a beta does not carry over: with n scored tokens on both sides their loss at beta is
    ours at beta / n, divided by n^2.
    """
    return (_margin(scores) - 1 / (2 * beta)) ** 2


def robust_loss(scores: Scores, *, beta: Beta, label_smoothing: LabelSmoothing = 0.0) -> torch.Tensor:
    """(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e): rDPO, arXiv:2403.00409.

    Its mean over labels that are swapped with probability e is the loss of the true ones; it may be negative. The same
    in TRL (1.16).
    """
    d_B = _margin(scores)
    right_B, swapped_B = F.logsigmoid(beta * d_B), F.logsigmoid(-beta * d_B)
    return (label_smoothing * swapped_B - (1 - label_smoothing) * right_B) / (1 - 2 * label_smoothing)


def sigmoid_norm_loss(scores: Scores, *, beta: Beta) -> torch.Tensor:
    """-log sigmoid(beta d'), where d' is d of means over the scored tokens: length-normalised DPO, Tulu 3,
    arXiv:2411.15124, Sec. 5. The same in TRL (1.16)."""
    assert scores.counts_B2 is not None
    means_B2 = log_ratios(scores) / scores.counts_B2
    return -F.logsigmoid(beta * (means_B2[:, 0] - means_B2[:, 1]))


class Loss(NamedTuple):
    """A loss, and which fields of `Scores` it reads."""

    function: Callable[..., torch.Tensor]  # (scores, *, its options) -> losses_B
    reads: tuple[str, ...]


_RATIOS = ("logps_B2", "ref_B2")

LOSSES = {
    "sigmoid": Loss(sigmoid_loss, _RATIOS),
    "hinge": Loss(hinge_loss, _RATIOS),
    "ipo": Loss(ipo_loss, _RATIOS),
    "robust": Loss(robust_loss, _RATIOS),
    "sigmoid_norm": Loss(sigmoid_norm_loss, (*_RATIOS, "counts_B2")),
}
