"""Learning rate by optimizer step: linear warm-up, then half a cosine (arXiv:1608.03983, Eq. 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from simple_llama.common.errors import UserError
from simple_llama.common.settings import Bounds, Count, CountOrNone, Settings


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """How long a run is, and its learning rate on the way."""

    # === Schedule ===
    epochs: Count = 3  # passes over the pairs
    warmup_iterations: CountOrNone = 50  # optimizer steps from 0 to max_lr
    max_lr: Annotated[float, Bounds(0.0, 1.0, above=True)] = 5e-7  # peak learning rate
    min_lr: Annotated[float, Bounds(0.0, 1.0)] = 1e-7  # learning rate at the end of the cosine

    def check_rules(self) -> None:
        """UserError where the cosine would rise."""
        if self.min_lr > self.max_lr:
            raise UserError(f"min_lr: expected at most max_lr ({self.max_lr}), found {self.min_lr}")


def learning_rate(step: int, total_steps: int, warmup_steps: int, max_lr: float, min_lr: float) -> float:
    """Rate of optimizer step `step` (from 0). The last warm-up step has `max_lr`, the last step of all `min_lr`."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / max(total_steps - warmup_steps, 1)
    return min_lr + 0.5 * (max_lr - min_lr) * (1.0 + math.cos(math.pi * min(progress, 1.0)))
