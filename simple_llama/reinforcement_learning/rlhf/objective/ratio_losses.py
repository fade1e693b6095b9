"""Losses that compare the policy with its reference, each a pure function of `Scores` with its equation and paper.

    r_w, r_l = log pi / pi_ref of the chosen and the rejected answer     d = f'(e^r_w) - f'(e^r_l)

over all scored tokens; d = r_w - r_l with the reverse KL, which is DPO's. Shapes: B pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from simple_llama.reinforcement_learning.rlhf.objective.scores import (
    Scores,
    divergence_margin,
    divergence_scores,
    log_ratios,
    margin,
    smoothed_loss,
    token_means,
)

_KL = "reverse_kl"

# === Of the margin ===


def sigmoid_loss(
    scores: Scores,
    *,
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    f_divergence: str = _KL,
    f_alpha: float = 0.5,
) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d); e is the assumed share of swapped labels.

    e = 0: DPO, Eq. 7, arXiv:2305.18290. e > 0: conservative DPO, Mitchell 2023, "A note on DPO with noisy preferences",
    as in the original code, OpenRLHF and LLaMA-Factory; TRL (1.16) ignores its label_smoothing with sigmoid.
    """
    return smoothed_loss(beta * divergence_margin(scores, f_divergence, f_alpha), label_smoothing)


def hinge_loss(scores: Scores, *, beta: float = 0.5, f_divergence: str = _KL, f_alpha: float = 0.5) -> torch.Tensor:
    """max(0, 1 - beta d): SLiC's hinge on the log-ratio margin, arXiv:2305.10425 and arXiv:2309.06657. The same in TRL
    (1.16)."""
    return F.relu(1 - beta * divergence_margin(scores, f_divergence, f_alpha))


def ipo_loss(scores: Scores, *, beta: float = 0.5, f_divergence: str = _KL, f_alpha: float = 0.5) -> torch.Tensor:
    """(d - 1 / (2 beta))^2: Eq. 17, arXiv:2310.12036; its tau is beta.

    d is of sums over the scored tokens, as printed, in the original code and in OpenRLHF. TRL, LLaMA-Factory and
    ms-swift take d of means, so a beta does not carry over: with n scored tokens on both sides their loss at beta is
    ours at beta / n, divided by n^2. Theirs is `ipo_norm` here.
    """
    return (divergence_margin(scores, f_divergence, f_alpha) - 1 / (2 * beta)) ** 2


def ipo_norm_loss(scores: Scores, *, beta: float = 0.1, f_divergence: str = _KL, f_alpha: float = 0.5) -> torch.Tensor:
    """(d' - 1 / (2 beta))^2, where d' is d of means over the scored tokens: the `ipo` of TRL (1.16), whose authors have
    it from the authors of arXiv:2310.12036."""
    means_B2 = token_means(divergence_scores(scores, f_divergence, f_alpha), scores)
    return (margin(means_B2) - 1 / (2 * beta)) ** 2


def robust_loss(
    scores: Scores,
    *,
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    f_divergence: str = _KL,
    f_alpha: float = 0.5,
) -> torch.Tensor:
    """(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e): rDPO, arXiv:2403.00409.

    Its mean over labels that are swapped with probability e is the loss of the true ones; it may be negative. The same
    in TRL (1.16).
    """
    d_B = divergence_margin(scores, f_divergence, f_alpha)
    right_B, swapped_B = F.logsigmoid(beta * d_B), F.logsigmoid(-beta * d_B)
    return (label_smoothing * swapped_B - (1 - label_smoothing) * right_B) / (1 - 2 * label_smoothing)


def sigmoid_norm_loss(
    scores: Scores, *, beta: float = 0.5, f_divergence: str = _KL, f_alpha: float = 0.5
) -> torch.Tensor:
    """-log sigmoid(beta d'), where d' is d of means over the scored tokens: length-normalised DPO, Tulu 3,
    arXiv:2411.15124, Sec. 5. The same in TRL (1.16)."""
    return -F.logsigmoid(beta * margin(token_means(divergence_scores(scores, f_divergence, f_alpha), scores)))


def exo_pair_loss(
    scores: Scores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence: str = _KL,
    f_alpha: float = 0.5,
) -> torch.Tensor:
    """q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e) with q = sigmoid(beta d): EXO-pref, Eq. 16,
    arXiv:2402.00856, the KL from the pair's softmax to labels smoothed by e > 0. The same in TRL (1.16), but for its
    log e in fp32."""
    x_B = beta * divergence_margin(scores, f_divergence, f_alpha)
    right_B = torch.sigmoid(x_B) * (F.logsigmoid(x_B) - math.log1p(-label_smoothing))
    return right_B + torch.sigmoid(-x_B) * (F.logsigmoid(-x_B) - math.log(label_smoothing))


def discopop_loss(
    scores: Scores,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    f_divergence: str = _KL,
    f_alpha: float = 0.5,
) -> torch.Tensor:
    """-(1 - m) log sigmoid(x) + m e^-x with x = beta d, m = sigmoid(x / tau): log-ratio modulated loss, Eq. 5,
    arXiv:2406.08414.

    m e^-x is made as e^(log m - x), which is at most 1 for tau <= 1; as printed it is 0 times infinity for x far below
    0, in TRL (1.16) too, otherwise the same.
    """
    x_B = beta * divergence_margin(scores, f_divergence, f_alpha)
    exponential_B = torch.exp(F.logsigmoid(x_B / discopop_tau) - x_B)
    return exponential_B - torch.sigmoid(-x_B / discopop_tau) * F.logsigmoid(x_B)


def dpop_loss(scores: Scores, *, beta: float = 0.3, dpop_lambda: float = 50.0) -> torch.Tensor:
    """-log sigmoid(beta (r_w - r_l - lambda max(0, -r_w))): DPO-Positive, arXiv:2402.13228 (Smaug): an answer
    that becomes less likely than it was costs, although the margin grows. Not in TRL."""
    ratios_B2 = log_ratios(scores)
    return -F.logsigmoid(beta * (margin(ratios_B2) - dpop_lambda * F.relu(-ratios_B2[:, 0])))


def rdpo_loss(scores: Scores, *, beta: float = 0.1, length_penalty: float = 0.01) -> torch.Tensor:
    """-log sigmoid(beta (r_w - r_l) + alpha (|y_w| - |y_l|)): R-DPO, arXiv:2403.19159, for scored tokens |y|; alpha is
    length_penalty, nats a token. A longer chosen answer needs less margin, a longer rejected one more. Not in TRL."""
    ratios_B2 = log_ratios(scores)
    assert scores.counts_B2 is not None
    longer_B = margin(scores.counts_B2).to(ratios_B2.dtype)
    return -F.logsigmoid(beta * margin(ratios_B2) + length_penalty * longer_B)


def rpo_gap_loss(scores: Scores, *, beta: float = 0.2, gap_scale: float = 1.0) -> torch.Tensor:
    """s log(s / q) + (1 - s) log((1 - s) / (1 - q)) with q = sigmoid(beta (r_w - r_l)), s = sigmoid(eta g):
    reward-aware RPO with the KL as its distance, Nemotron-4 340B, arXiv:2406.11704, Sec. 3.3.2; g is the pair's gap,
    the reward of the chosen answer less that of the rejected one, and eta gap_scale.

    A pair is pulled to the margin that its rewards ask for, and no further. `rpo_bwd_kl` of NeMo-Aligner and NeMo-RL,
    with their defaults. Not in TRL, whose rpo_alpha was an NLL term.
    """
    assert scores.gaps_B is not None
    x_B, wanted_B = beta * margin(log_ratios(scores)), gap_scale * scores.gaps_B
    right_B = torch.sigmoid(wanted_B) * (F.logsigmoid(wanted_B) - F.logsigmoid(x_B))
    return right_B + torch.sigmoid(-wanted_B) * (F.logsigmoid(-wanted_B) - F.logsigmoid(-x_B))


# === Of each side ===


def plackett_luce_loss(scores: Scores, *, beta: float = 0.1) -> torch.Tensor:
    """log sum over j >= k of exp(beta r_j), less beta r_k: how surely answer k is the best of those from its rank on;
    the sum over a record's pairs (k, k + 1) is -log of the ranking's probability, Eq. 20 of arXiv:2305.18290 (A.3).

    A record of K answers, best first, is K - 1 pairs of neighbours in rank: pair k has the term of answer k. With two
    answers this is sigmoid at the same beta. Pairs of a record stand together in their order; `pairs adjacent` makes
    them.
    """
    assert scores.groups_B is not None
    chosen_B, rejected_B = (beta * log_ratios(scores)).unbind(1)
    groups_B = scores.groups_B
    is_last_B = F.pad(groups_B[1:] != groups_B[:-1], (0, 1), value=True)
    rests_B = torch.where(is_last_B, torch.logaddexp(chosen_B, rejected_B), chosen_B)
    reach = 1  # pairs that a sum has; it doubles, and no host has to know how long records are
    while reach < len(rests_B):
        joined_B = torch.logaddexp(rests_B[:-reach], rests_B[reach:])
        same_B = groups_B[reach:] == groups_B[:-reach]
        rests_B = torch.cat([torch.where(same_B, joined_B, rests_B[:-reach]), rests_B[-reach:]])
        reach *= 2
    return rests_B - chosen_B


def nca_pair_loss(scores: Scores, *, beta: float = 0.1) -> torch.Tensor:
    """-log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2: NCA for a pair,
    arXiv:2402.05369. The same in TRL (1.16)."""
    rewards_B2 = beta * log_ratios(scores)
    return -F.logsigmoid(rewards_B2[:, 0]) - 0.5 * F.logsigmoid(-rewards_B2).sum(dim=1)


def bco_pair_loss(scores: Scores, *, beta: float = 0.1) -> torch.Tensor:
    """-log sigmoid(beta r_w) - log sigmoid(-beta r_l): BCO, arXiv:2404.04656, without its shift delta.

    delta is a running mean of rewards, which a resumed run would have to keep: it is 0 here and in TRL (1.16);
    LLaMA-Factory and ms-swift have it.
    """
    rewards_B2 = beta * log_ratios(scores)
    return -F.logsigmoid(rewards_B2[:, 0]) - F.logsigmoid(-rewards_B2[:, 1])


def sppo_hard_loss(scores: Scores, *, beta: float = 0.1) -> torch.Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: SPPO, Eq. 4.7 of arXiv:2405.00675 with the label as the win
    rate. The same in TRL (1.16)."""
    ratios_B2 = log_ratios(scores)
    return (ratios_B2[:, 0] - 0.5 / beta) ** 2 + (ratios_B2[:, 1] + 0.5 / beta) ** 2


def apo_zero_loss(scores: Scores, *, beta: float = 0.1) -> torch.Tensor:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l): APO-zero, Eq. 7, arXiv:2408.06266, for chosen answers that are better
    than the model's. It saturates: an answer that is far off has no pull. The same in TRL (1.16)."""
    rewards_B2 = beta * log_ratios(scores)
    return torch.sigmoid(-rewards_B2[:, 0]) + torch.sigmoid(rewards_B2[:, 1])


def apo_down_loss(scores: Scores, *, beta: float = 0.1) -> torch.Tensor:
    """sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)): APO-down, Eq. 8, arXiv:2408.06266, for chosen answers that are
    worse than the model's. The same in TRL (1.16)."""
    rewards_B2 = beta * log_ratios(scores)
    return torch.sigmoid(rewards_B2[:, 0]) + torch.sigmoid(-margin(rewards_B2))
