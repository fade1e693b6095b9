"""The preference loss of a run: which of `losses`, and with which options."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss with its settings. Raises UserError for a setting out of range, or one that the loss would ignore."""

    loss_type: str = "sigmoid"
    beta: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            raise UserError(f"loss_type: expected one of {', '.join(LOSSES)}; found {self.loss_type!r}")
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta: expected a finite number above 0, found {self.beta!r}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing: expected at least 0 and below 0.5, found {self.label_smoothing!r}")
        if self.label_smoothing > 0 and self.loss_type != "sigmoid":
            raise UserError(
                f"label_smoothing: expected 0 with loss_type {self.loss_type!r}, which ignores it, "
                f"found {self.label_smoothing}; use loss_type 'sigmoid' or leave it out"
            )

    def __call__(self, logps_B2: torch.Tensor, ref_logps_B2: torch.Tensor) -> torch.Tensor:
        """Loss (B,) of each pair from fp32 log-prob sums of the policy and of the reference."""
        ratios_B2 = logps_B2 - ref_logps_B2
        options = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return LOSSES[self.loss_type](ratios_B2[:, 0] - ratios_B2[:, 1], beta=self.beta, **options)

    def rewards(self, logps_B2: torch.Tensor, ref_logps_B2: torch.Tensor) -> torch.Tensor:
        """Implicit rewards (B, 2): beta * log(pi / pi_ref), Sec. 4 of arXiv:2305.18290."""
        return self.beta * (logps_B2 - ref_logps_B2)


def step0_loss(loss_type: str, beta: float, label_smoothing: float) -> float:
    """The loss of any pair while the policy is the reference (margin 0): what the first step must show."""
    loss = PreferenceLoss(loss_type, beta, label_smoothing)
    equal_12 = torch.zeros(1, 2, dtype=torch.float64)
    return loss(equal_12, equal_12).item()
