"""How long a run is, and its learning rate by optimizer step: linear warm-up, then a fall to `min_lr`, or none.

    cosine (arXiv:1608.03983, Eq. 5)    min_lr + (max_lr - min_lr) (1 + cos(pi t)) / 2
    linear                              min_lr + (max_lr - min_lr) (1 - t)
    constant                            max_lr

t is the share of the steps behind the warm-up that are done with this one: 1 at the last step of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.settings import WHOLE, Bounds, Count, CountOrNone, Settings

_WARMUP_ITERATIONS = 50  # where neither setting of the warm-up is given
_LEAST_RATE = 1e-7

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """How long a run is, and its learning rate on the way."""

    # === Schedule ===
    epochs: Count = 3  # passes over the pairs
    max_steps: Annotated[
        CountOrNone, Doc("optimizer steps after which the run ends, within an epoch too, as at its end; 0: with epochs")
    ] = 0
    schedule: Annotated[Schedule, Doc("how the rate goes from max_lr to min_lr; constant: it stays at max_lr")] = (
        "cosine"
    )
    warmup_iterations: Annotated[
        int | None,
        Bounds(0, WHOLE),
        Doc(f"optimizer steps from 0 to max_lr; {_WARMUP_ITERATIONS} where warmup_ratio is not given either"),
    ] = None
    warmup_ratio: Annotated[
        float | None, Bounds(0.0, 1.0), Doc("the same as a share of all steps, rounded up; in place of the other")
    ] = None
    max_lr: Annotated[float, Bounds(0.0, 1.0, above=True)] = 5e-7  # peak learning rate
    min_lr: Annotated[float, Bounds(0.0, 1.0)] = _LEAST_RATE  # learning rate at the last step

    def check_rules(self) -> None:
        """UserError where the rate would rise after the warm-up, or for a setting without effect."""
        if self.schedule == "constant":
            if self.min_lr not in (_LEAST_RATE, self.max_lr):
                raise UserError(
                    f"min_lr: expected none with schedule constant, which stays at max_lr, found {self.min_lr}; leave "
                    "it out, or take schedule linear or cosine"
                )
        elif self.min_lr > self.max_lr:
            raise UserError(f"min_lr: expected at most max_lr ({self.max_lr}), found {self.min_lr}")
        if self.warmup_iterations is not None and self.warmup_ratio is not None:
            raise UserError(
                f"warmup_ratio: expected one of warmup_iterations and warmup_ratio, found {self.warmup_iterations} and "
                f"{self.warmup_ratio}; leave one out, or take back what a file gives: --warmup_iterations None"
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        most = self.epochs * steps_per_epoch
        return min(most, self.max_steps) if self.max_steps else most

    def warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps of the warm-up in a run of so many."""
        if self.warmup_ratio is None:
            return _WARMUP_ITERATIONS if self.warmup_iterations is None else self.warmup_iterations
        return math.ceil(round(self.warmup_ratio * total_steps, 6))  # 0.07 * 100 is a little more than 7

    def rate(self, index: int, total_steps: int) -> float:
        """Rate of optimizer step `index` (from 0) in a run of so many."""
        warmup = self.warmup_steps(total_steps)
        return learning_rate(index, total_steps, warmup, self.max_lr, self.min_lr, self.schedule)

    def rates(self, total_steps: int) -> Iterator[float]:
        """The rates of all steps of a run of so many."""
        return (self.rate(index, total_steps) for index in range(total_steps))


SomeConfig = TypeVar("SomeConfig", bound=ScheduleConfig)


def with_warmup(config: SomeConfig) -> SomeConfig:
    """The same settings with the warm-up written out where none is given."""
    if config.warmup_iterations is None and config.warmup_ratio is None:
        return replace(config, warmup_iterations=_WARMUP_ITERATIONS)
    return config


def about_schedule(config: ScheduleConfig) -> str:
    """The rates in words."""
    if config.schedule == "constant":
        return f"constant at {config.max_lr:g} after the warm-up"
    return f"{config.schedule} from {config.max_lr:g} to {config.min_lr:g} after the warm-up"


def learning_rate(
    step: int, total_steps: int, warmup_steps: int, max_lr: float, min_lr: float, schedule: Schedule = "cosine"
) -> float:
    """Rate of optimizer step `step` (from 0). The last warm-up step has `max_lr`, the last step of all `min_lr`; of a
    constant schedule that has `max_lr` too."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return max_lr
    progress = min((step - warmup_steps + 1) / max(total_steps - warmup_steps, 1), 1.0)
    if schedule == "linear":
        return min_lr + (max_lr - min_lr) * (1.0 - progress)
    return min_lr + 0.5 * (max_lr - min_lr) * (1.0 + math.cos(math.pi * progress))
