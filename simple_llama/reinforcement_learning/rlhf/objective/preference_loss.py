"""The preference loss of a run: which of `losses`, with which options, and what it needs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.settings import Settings
from simple_llama.reinforcement_learning.rlhf.objective.losses import (
    LOSSES,
    Beta,
    LabelSmoothing,
    Loss,
    Scores,
    log_ratios,
)


@dataclass(frozen=True)
class LossConfig(Settings):
    """The options of all losses, written out; a test holds them against the losses' signatures."""

    # === Loss ===
    loss_type: Annotated[
        Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"],
        Doc("preference loss; ipo is of sums over the tokens, where TRL takes means"),
    ] = "sigmoid"
    beta: Beta = 0.5
    label_smoothing: LabelSmoothing = 0.0

    def check_rules(self) -> None:
        """UserError for a loss that does not exist, and for an option that the chosen loss does not have."""
        if self.loss_type not in LOSSES:
            raise UserError(f"loss_type: expected one of {', '.join(LOSSES)}; found {self.loss_type!r}")
        own = options(LOSSES[self.loss_type])
        for field in fields(LossConfig):
            value = getattr(self, field.name)
            if field.name not in ("loss_type", *own) and value != field.default:
                raise UserError(
                    f"{field.name}: expected {field.default:g} with loss_type {self.loss_type!r}, which ignores it, "
                    f"found {value}; use one of {', '.join(_with_option(field.name))} or leave it out"
                )


@dataclass(frozen=True)
class PreferenceLoss(LossConfig):
    """A loss with its options. Raises UserError for a value out of bounds, or an option that the loss would ignore."""

    @classmethod
    def of(cls, config: LossConfig) -> PreferenceLoss:
        """The loss that `config` describes."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(LossConfig)})

    def __call__(self, scores: Scores) -> torch.Tensor:
        """Loss (B,) of each pair."""
        loss = LOSSES[self.loss_type]
        return loss.function(scores, **{name: getattr(self, name) for name in options(loss)})

    def rewards(self, scores: Scores) -> torch.Tensor:
        """Implicit rewards (B, 2): beta * log(pi / pi_ref), Sec. 4 of arXiv:2305.18290."""
        return self.beta * log_ratios(scores)

    def require(self, given: Collection[str]) -> None:
        """UserError where the loss reads a field of `Scores` that is not `given`."""
        for name in LOSSES[self.loss_type].reads:
            if name not in given:
                raise UserError(f"loss_type {self.loss_type!r} reads {name}, which this run does not give")

    def at_start(self) -> float | None:
        """The loss of any pair while the policy is the reference (margin 0): what the first step must show.

        None for a loss that does not read the reference, whose first value depends on the pair.
        """
        if "ref_B2" not in LOSSES[self.loss_type].reads:
            return None
        equal_12 = torch.full((1, 2), -1.0, dtype=torch.float64)
        return self(Scores(equal_12, equal_12, torch.ones(1, 2, dtype=torch.int64))).item()


@functools.cache
def options(loss: Loss) -> tuple[str, ...]:
    """Names of a loss's own options: its keyword-only parameters."""
    parameters = inspect.signature(loss.function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def _with_option(name: str) -> list[str]:
    """The losses that have an option."""
    return [loss_type for loss_type, loss in LOSSES.items() if name in options(loss)]
