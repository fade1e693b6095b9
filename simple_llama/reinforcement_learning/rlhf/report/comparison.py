"""Which of several runs is better: what their held-out pairs can tell, and what they cannot.

Differences of accuracy have 95 % intervals: paired by pair (bootstrap) where both runs left their pairs one by one,
otherwise from accuracies and counts (Newcombe's, 1998, of Wilson's). Whether runs are told apart is decided by tests
over all comparisons together (Holm, 1979): 5 % for one wrong word among all of them. Shapes: N held-out pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from simple_llama.reinforcement_learning.rlhf.report.standing import (
    Standing,
    distance_of,
    margin_at,
    starts_apart,
    why_not_comparable,
)
from simple_llama.reinforcement_learning.rlhf.run.statistics import (
    paired_bootstrap,
    sign_test,
    standard_error,
    two_sided,
)

_ERROR, _POWER = 0.05, 0.8  # of all comparisons together; of "about N pairs"
_NORMAL = NormalDist()


class Difference(NamedTuple):
    """Accuracy of the better run less that of the worse, with what is known about it."""

    better: str
    worse: str
    accuracy: float
    low: float  # NaN where it was not asked for
    high: float
    p: float  # of no difference, uncorrected, two-sided
    spread: float  # standard deviation of a pair's difference; times what pairs of one prompt have in common
    differ: int | None  # pairs on which the two differ; None where they are not paired


@dataclass(frozen=True)
class Group:
    """Runs on the same held-out pairs, best accuracy first, and their differences."""

    runs: list[Standing]
    measure: str  # of the distance: "kl" or "log-ratio"
    differences: dict[tuple[str, str], Difference]  # by (better, worse)
    told: set[tuple[str, str]]  # those that the held-out pairs tell apart, by Holm's rule

    def beaten(self) -> list[Standing]:
        """Runs that are worse than the best."""
        return [run for run in self.runs[1:] if (self.runs[0].label, run.label) in self.told]

    def level(self) -> list[Standing]:
        """The best run and all that cannot be told from it."""
        beaten = {run.label for run in self.beaten()}
        return [run for run in self.runs if run.label not in beaten]

    def distance(self, run: Standing) -> float:
        """How far a run has moved from its reference."""
        found = distance_of(run.values, run.run.beta, self.measure)
        assert found is not None
        return found

    def frontier(self) -> list[Standing]:
        """Runs to which no other is both at least as accurate and at least as near to the reference."""
        at = {run.label: (-run.right, self.distance(run)) for run in self.runs}
        return [
            run
            for run in self.runs
            if not any(
                other != at[run.label] and other[0] <= at[run.label][0] and other[1] <= at[run.label][1]
                for other in at.values()
            )
        ]

    def shared_distance(self) -> float:
        """The smallest distance at which a run ended: where the margins of all can be compared. On the way a run may
        have been further away, and have come back."""
        return min(map(self.distance, self.runs))

    def margins_at_shared_distance(self) -> dict[str, float | None]:
        """Margin (nats) of each run there."""
        return {run.label: margin_at(run, self.shared_distance(), self.measure) for run in self.runs}


def groups_of(standings: Sequence[Standing]) -> tuple[list[Group], list[str]]:
    """The finished runs by their held-out pairs, and notes on all that is not compared, and why."""
    groups: list[list[Standing]] = []
    notes: list[str] = []
    for run in standings:
        if run.unfinished or not run.pairs:
            none = (
                "no evaluation recorded"
                if run.run.settings.get("val_share") or run.run.settings.get("validation_path")
                else "no held-out pairs (val_share 0)"
            )
            why = run.unfinished or f"{none}, so that nothing says how good it is"
            notes.append(f"{run.label}: {why}; shown, and not judged")
            continue
        whys = [why_not_comparable(group[0], run) for group in groups]
        if "" in whys:
            mates = groups[whys.index("")]
            if apart := starts_apart(mates[0], run):
                notes.append(
                    f"{run.label} began with another model than {mates[0].label}, and each is measured against its own "
                    f"start: {apart}"
                )
            mates.append(run)
            continue
        if groups:
            notes.append(f"{run.label} is not comparable with {groups[0][0].label}: {whys[0]}; shown, and judged apart")
        groups.append([run])
    return [_compared(group) for group in groups], notes


def _compared(runs: Sequence[Standing]) -> Group:
    """A group with its differences."""
    measure = "kl" if all(run.kl for run in runs) else "log-ratio"
    ordered = sorted(runs, key=lambda run: (-run.right, distance_of(run.values, run.run.beta, measure)))
    found = {(a.label, b.label): _difference(a, b, a is ordered[0]) for a, b in combinations(ordered, 2)}
    return Group(ordered, measure, found, _told_apart({key: difference.p for key, difference in found.items()}))


def _difference(better: Standing, worse: Standing, interval: bool) -> Difference:
    """Of two runs on the same held-out pairs; with an `interval`, which takes as long as all the rest, where one is
    asked for."""
    value, names = better.right - worse.right, (better.label, worse.label)
    if better.by_pair and worse.by_pair:
        groups_N, low, high = better.groups_N, math.nan, math.nan
        right_N, other_N = better.by_pair.hits_N, worse.by_pair.hits_N
        if interval:
            _, low, high = paired_bootstrap(right_N, other_N, groups_N)
        by_pair_N = right_N - other_N
        spread, p = standard_error(by_pair_N, groups_N) * math.sqrt(better.pairs), sign_test(by_pair_N, groups_N)
        return Difference(*names, value, low, high, p, spread, int(np.count_nonzero(by_pair_N)))
    assert better.accuracy and worse.accuracy
    (first, low_1, high_1), (second, low_2, high_2) = better.accuracy, worse.accuracy
    low, high = math.hypot(first - low_1, high_2 - second), math.hypot(high_1 - first, second - low_2)
    spread = math.sqrt(first * (1 - first) + second * (1 - second))
    return Difference(*names, value, value - low, value + high, _unpaired_p(first, second, better.pairs), spread, None)


def _unpaired_p(first: float, second: float, pairs: int) -> float:
    """P of so large a difference of two accuracies, each of as many pairs of its own (z test of two shares)."""
    both = (first + second) / 2
    error = math.sqrt(2 * both * (1 - both) / pairs)
    return two_sided(abs(first - second) / error) if error else 1.0


def _told_apart(p_values: dict[tuple[str, str], float]) -> set[tuple[str, str]]:
    """What is significant among all comparisons together: Holm's rule, smallest p first, up to the first that fails."""
    told: set[tuple[str, str]] = set()
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        if p_values[key] > _ERROR / (len(p_values) - rank):
            break
        told.add(key)
    return told


def pairs_needed(difference: Difference, comparisons: int) -> int | None:
    """Held-out pairs that would tell a difference of this size apart four times in five, two digits of it.

    None where there is no difference to be seen.
    """
    if difference.accuracy <= 0:
        return None
    z = _NORMAL.inv_cdf(1 - _ERROR / (2 * comparisons)) + _NORMAL.inv_cdf(_POWER)
    pairs = (z * difference.spread / difference.accuracy) ** 2
    digits = max(math.floor(math.log10(max(pairs, 1))) - 1, 0)
    return math.ceil(pairs / 10**digits) * 10**digits
