"""Where a run stands at its last evaluation, in numbers that runs of other betas can be compared by.

Rewards are beta times log-ratios, so a margin is shown in nats (margin / beta), and so is the distance from the
reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from simple_llama.reinforcement_learning.rlhf.report.read_run import HeldOutPairs, RunFacts, value
from simple_llama.reinforcement_learning.rlhf.report.run_verdict import interval_of, log_ratio, margin_nats
from simple_llama.reinforcement_learning.rlhf.run.statistics import (
    Interval,
    mean_interval,
    share_interval,
)

_EVALUATED = {"eval_pairs", *(f"eval_rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected"))}
_FINGERPRINT = ("eval_logps/chosen", "eval_logps/rejected")  # at step 0, of the start model
_SAME_START = 1e-3  # relative: what other machines and dtypes make of the same model and pairs stays within
_CHOOSE_HELD_OUT = ("val_share", "seed", "validation_path")  # settings that say which pairs are held out


@dataclass(frozen=True)
class Standing:
    """A run, under the name that it is shown by."""

    label: str
    run: RunFacts

    @property
    def values(self) -> dict[str, float]:
        """The metrics of its last evaluation; none where it has made none."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def start(self) -> dict[str, float]:
        """The metrics before the first step; none where they are not recorded."""
        return next((values for values in self.evaluations if values["step"] == 0), {})

    @property
    def unfinished(self) -> str:
        """At which step it stands where it has not ended; empty otherwise."""
        if self.run.finished:
            return ""
        total = self._total_steps()
        return f"unfinished at step {self.run.steps}" + (f" of {total}" if total else "")

    def _total_steps(self) -> int | None:
        """Steps of the whole run, by the share of an epoch that a step is; None before the first one."""
        epochs, most = (self.run.settings.get(name) for name in ("epochs", "max_steps"))
        for record in reversed(self.intervals):
            if record.get("epoch", 0) > 0 and isinstance(epochs, int):
                total = round(record["step"] / record["epoch"] * epochs)
                return min(total, most) if most and isinstance(most, int) else total
        return None

    @cached_property
    def evaluations(self) -> list[dict[str, float]]:
        """Records of evaluations that have all numbers, in their order."""
        found = [_numbers(record) for record in self.run.evaluations]
        return [
            numbers
            for numbers in found
            if numbers.keys() >= _EVALUATED
            and 0 <= numbers["eval_rewards/accuracies"] <= 1
            and numbers["eval_pairs"] >= 1
        ]

    @cached_property
    def intervals(self) -> list[dict[str, float]]:
        """Records of training between two lines, in their order."""
        return [_numbers(record) for record in self.run.intervals]

    def count_warnings(self, level: str) -> int:
        """How many warnings of a level it gave."""
        return sum(found == level for found, _, _ in self.run.warnings)

    @property
    def pairs(self) -> int:
        """Its held-out pairs."""
        return round(self.values.get("eval_pairs", 0))

    @property
    def by_pair(self) -> HeldOutPairs | None:
        """The held-out pairs one by one, of two prompts or more, where they were written at the last evaluation."""
        found = self.run.held_out
        if not found or found.step != self.values.get("step") or len(found.origins) != self.pairs:
            return None
        return found if self.groups_N.any() else None

    @cached_property
    def groups_N(self) -> np.ndarray:
        """Which held-out pairs answer one prompt; each its own where that was not written."""
        assert self.run.held_out
        return self.run.held_out.groups_N

    @property
    def right(self) -> float:
        """Its accuracy; 0 without held-out pairs."""
        return self.values.get("eval_rewards/accuracies", 0.0)

    @property
    def accuracy(self) -> Interval | None:
        """With Wilson's interval; None without held-out pairs."""
        if self.by_pair:
            return share_interval(self.by_pair.hits_N, self.groups_N)
        return Interval(self.right, *interval_of(self.values)) if self.pairs else None

    @cached_property
    def margin(self) -> Interval | None:
        """Margin / beta (nats a pair); its interval is that of a mean, where the pairs are there one by one."""
        if self.by_pair:
            return mean_interval(self.by_pair.margins_N, self.groups_N)
        return Interval(margin_nats(self.values, self.run.beta), math.nan, math.nan) if self.pairs else None

    @property
    def kl(self) -> Interval | None:
        """KL to the reference (nats an answer token) on the policy's own answers, where it was estimated."""
        if "samples/kl" not in self.values:
            return None
        low, high = (self.values.get(f"samples/kl_{end}", math.nan) for end in ("low", "high"))
        return Interval(self.values["samples/kl"], low, high)

    @property
    def loss_name(self) -> str:
        """Its loss with the settings that scale it: only runs of the same name have comparable losses."""
        settings = self.run.settings
        smoothing = f" label_smoothing {settings['label_smoothing']}" if settings.get("label_smoothing") else ""
        return f"{settings.get('loss_type', 'sigmoid')} beta {self.run.beta:g}{smoothing}"

    def points(self, measure: str) -> list[tuple[float, dict[str, float]]]:
        """(distance from the reference, metrics) of each evaluation that has the measure, "kl" or "log-ratio"."""
        found = ((distance_of(values, self.run.beta, measure), values) for values in self.evaluations)
        return [(distance, values) for distance, values in found if distance is not None]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record."""
    return {name: number for name in record if math.isfinite(number := value(record, name))}


def distance_of(values: Mapping[str, float], beta: float, measure: str) -> float | None:
    """How far the policy has moved from its reference.

    "kl": nats an answer token, on its own answers; None where it was not estimated. "log-ratio": nats an answer, the
    mean of what chosen and rejected held-out answers have moved by, up or down.
    """
    if measure == "kl":
        return values.get("samples/kl")
    return sum(abs(log_ratio(values, side, beta)) for side in ("chosen", "rejected")) / 2


def margin_at(standing: Standing, distance: float, measure: str) -> float | None:
    """Margin (nats) where the run last was at a distance from its reference, between evaluations by a straight line;
    None where it never was."""
    points = [(found, margin_nats(values, standing.run.beta)) for found, values in standing.points(measure)]
    for (near, before), (far, after) in reversed(list(pairwise(points))):
        if min(near, far) <= distance <= max(near, far):
            share = (distance - near) / (far - near) if far != near else 1.0
            return before + share * (after - before)
    return None


def why_not_comparable(one: Standing, other: Standing) -> str:
    """Why the accuracies of two runs are not of the same held-out pairs; empty where they are.

    Pair by pair where both were written one by one; otherwise by the number of pairs, the settings that choose them,
    and the start model's log-probs of them.
    """
    if not one.pairs or not other.pairs:
        return "no held-out pairs"
    if one.pairs != other.pairs:
        return f"other held-out pairs: {other.pairs:,}, not {one.pairs:,}"
    if one.by_pair and other.by_pair:
        same = one.by_pair.origins == other.by_pair.origins
        same &= np.array_equal(one.by_pair.counts_N2, other.by_pair.counts_N2)
        return "" if same else "other held-out pairs, or other tokens for them"
    for name in _CHOOSE_HELD_OUT:
        values = [standing.run.settings.get(name, "") for standing in (one, other)]
        if values[0] != values[1]:
            return f"other held-out pairs: {name} is {values[1]}, not {values[0]}"
    if other_start := starts_apart(one, other):
        return f"other held-out pairs or another start model: {other_start}"
    paths = [standing.run.settings.get("rlhf_dataset_path") for standing in (one, other)]
    if paths[0] != paths[1] and not all(standing.start for standing in (one, other)):
        return f"other data: {paths[1]}, not {paths[0]}"
    return ""


def starts_apart(one: Standing, other: Standing) -> str:
    """How the start models' log-probs of the held-out pairs differ; empty where they do not, or were not recorded."""
    for name in _FINGERPRINT:
        first, second = (standing.start.get(name) for standing in (one, other))
        if first is not None and second is not None and not math.isclose(first, second, rel_tol=_SAME_START):
            return f"before training their log-probs are {second:.2f}, not {first:.2f} nats an answer"
    return ""
