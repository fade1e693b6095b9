"""Losses that couple the pairs of a step, each a pure function of the `Scores` of all of them, with equation and paper.

    r_w, r_l = log pi / pi_ref of the chosen and the rejected answer     x_(i) = the i-th smallest x of all pairs

They sort: AOT asks that the margins (or rewards) of the policy lie beyond those it is compared with as distributions,
quantile by quantile, not pair by pair. Shapes: B pairs.
"""

from __future__ import annotations

import torch

from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores, log_ratios, margin, smoothed_loss


def aot_loss(scores: Scores, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta D_i) - e log sigmoid(-beta D_i), D_i = (p_w - p_l)_(i) - (q_w - q_l)_(i), where p and q
    are log pi and log pi_ref: paired AOT, arXiv:2406.05882: the policy's margins dominate the reference's.

    Pair by pair it would be sigmoid; here the i-th smallest margin of the policy, over all pairs of the optimizer step,
    meets the i-th smallest of the reference. A pair has the loss that its margin has. The same in TRL (1.16), of the
    pairs of a micro-batch of one rank.
    """
    assert scores.ref_B2 is not None
    policy_B, places_B = margin(scores.logps_B2).sort()
    reference_B, _ = margin(scores.ref_B2).sort()
    return smoothed_loss(beta * (policy_B - reference_B), label_smoothing)[places_B.argsort()]


def aot_unpaired_loss(scores: Scores, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta D_i) - e log sigmoid(-beta D_i), D_i = (r_w)_(i) - (r_l)_(i): unpaired AOT,
    arXiv:2406.05882: rewards of chosen answers dominate those of rejected ones, whatever prompts they answer.

    A pair has the loss that its chosen answer has. The same in TRL (1.16), of the pairs of a micro-batch of one rank.
    """
    ratios_B2 = log_ratios(scores)
    chosen_B, places_B = ratios_B2[:, 0].sort()
    rejected_B, _ = ratios_B2[:, 1].sort()
    return smoothed_loss(beta * (chosen_B - rejected_B), label_smoothing)[places_B.argsort()]
