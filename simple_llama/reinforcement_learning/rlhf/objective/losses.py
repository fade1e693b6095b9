"""Preference losses: pure functions of the margin d between a pair's two log-ratios.

    d = (log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected))

All log-probs are sums over the answer's tokens (nats). Shapes: B pairs; column 0 is chosen, column 1 rejected.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sigmoid_loss(margin: torch.Tensor, *, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d); e is the assumed share of swapped labels.

    e = 0: DPO, Eq. 7, arXiv:2305.18290. e > 0: conservative DPO, Mitchell 2023, "A note on DPO with noisy preferences".
    """
    if label_smoothing == 0:
        return -F.logsigmoid(beta * margin)
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def hinge_loss(margin: torch.Tensor, *, beta: float) -> torch.Tensor:
    """max(0, 1 - beta d): SLiC's hinge on the log-ratio margin, arXiv:2305.10425 and arXiv:2309.06657."""
    return F.relu(1 - beta * margin)


def ipo_loss(margin: torch.Tensor, *, beta: float) -> torch.Tensor:
    """(d - 1 / (2 beta))^2: Eq. 17, arXiv:2310.12036; its tau is beta. d is of sums, as printed, not token averages."""
    return (margin - 1 / (2 * beta)) ** 2


LOSSES = {"sigmoid": sigmoid_loss, "hinge": hinge_loss, "ipo": ipo_loss}
