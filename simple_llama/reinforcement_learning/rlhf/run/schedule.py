"""Learning rate by optimizer step: linear warm-up, then half a cosine (arXiv:1608.03983, Eq. 5)."""

from __future__ import annotations

import math


def learning_rate(step: int, total_steps: int, warmup_steps: int, max_lr: float, min_lr: float) -> float:
    """Rate of optimizer step `step` (from 0). The last warm-up step has `max_lr`, the last step of all `min_lr`."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / max(total_steps - warmup_steps, 1)
    return min_lr + 0.5 * (max_lr - min_lr) * (1.0 + math.cos(math.pi * min(progress, 1.0)))
