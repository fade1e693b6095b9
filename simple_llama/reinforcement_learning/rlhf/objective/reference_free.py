"""Losses without a reference (no pass, no store), each a pure function of `Scores` with its equation and paper.

    p = log pi of an answer over all scored tokens     m = p / its scored tokens     w chosen, l rejected

Shapes: B pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores, margin, token_means


def sft_loss(scores: Scores) -> torch.Tensor:
    """-m_w: negative log-likelihood of the chosen answer, a mean over its tokens, and then over pairs.

    Each pair counts alike, whatever its length and company. TRL (1.16) takes the mean over all chosen tokens of a
    micro-batch, so that long answers count more, and a pair as its micro-batch has it; for one pair, or answers of one
    length, the same.
    """
    return -token_means(scores.logps_B2, scores)[:, 0]


def simpo_loss(scores: Scores, *, beta: float = 2.0, gamma: float = 1.0) -> torch.Tensor:
    """-log sigmoid(beta (m_w - m_l) - gamma): SimPO, Eq. 6, arXiv:2405.14734; gamma is the margin that is asked for.
    The same in TRL (1.16), experimental.cpo with loss_type simpo and cpo_alpha 0."""
    return -F.logsigmoid(beta * margin(token_means(scores.logps_B2, scores)) - gamma)


def orpo_loss(scores: Scores, *, beta: float = 0.1) -> torch.Tensor:
    """-m_w - beta log sigmoid(o_w - o_l), o = log(P / (1 - P)) = m - log(1 - e^m) with P = e^m: ORPO, Eq. 6 and 7,
    arXiv:2403.07691; beta is its lambda.

    1 - e^m is made without cancellation near 0 and 1, for m up to minus the spacing of numbers at 1: an answer of which
    the model is certain has finite odds. TRL (1.16, experimental.orpo) takes the likelihood over all chosen tokens of a
    micro-batch and over its prompts' tokens too.
    """
    means_B2 = token_means(scores.logps_B2, scores)
    log_p_B2 = means_B2.clamp(max=-torch.finfo(means_B2.dtype).eps)
    odds_B2 = log_p_B2 - _log1mexp(log_p_B2)
    return -means_B2[:, 0] - beta * F.logsigmoid(margin(odds_B2))


def cpo_loss(scores: Scores, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta (p_w - p_l)) - e log sigmoid(-beta (p_w - p_l)): CPO, Eq. 3, arXiv:2401.08417, whose
    likelihood term is nll_weight here, of the mean token, 1 by default. TRL (1.16, experimental.cpo) takes it over
    all chosen tokens of a micro-batch, otherwise the same."""
    x_B = beta * margin(scores.logps_B2)
    return -(1 - label_smoothing) * F.logsigmoid(x_B) - label_smoothing * F.logsigmoid(-x_B)


def slic_loss(scores: Scores, *, gamma: float = 1.0) -> torch.Tensor:
    """max(0, gamma - p_w + p_l): SLiC-HF's rank calibration, arXiv:2305.10425, its delta being gamma. Its
    regulariser is nll_weight here, of the mean token of the chosen answer. Not in TRL, whose hinge is of log-ratios."""
    return F.relu(gamma - margin(scores.logps_B2))


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x < 0, by the form that does not cancel (Maechler 2012)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
