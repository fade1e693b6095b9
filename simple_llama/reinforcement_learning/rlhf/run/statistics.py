"""Numbers with intervals: pure functions of arrays, and of which pairs belong together.

Pairs that answer one prompt are no independent draws, so what is drawn here, and what varies, are prompts ("groups")
with all their pairs. All intervals are of 95 %. Shapes: N pairs, G groups, K sums, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

_Z = 1.959964  # of the normal distribution, both sides together 5 %
_FEWEST_DRAWS, _MOST_DRAWS, _MOST_DRAWN = 500, 4000, 50_000_000  # samples, and prompts in all of them together
_DRAWN_AT_ONCE = 1 << 22
_FEWEST_GROUPS = 2
_FEWEST_COMPARED = 6  # prompts: of five, all that agree are no surprise, 2 / 2^5 being above 5 %
_EXACT = 1000  # prompts up to which a sign test is summed exactly
_NORMAL = NormalDist()


class Interval(NamedTuple):
    """A number and where it lies with 95 % confidence; NaN bounds where the data cannot say."""

    value: float
    low: float
    high: float

    @property
    def is_above(self) -> bool:
        """Whether it is above zero, chance apart."""
        return self.low > 0

    @property
    def is_below(self) -> bool:
        """Whether it is below zero, chance apart."""
        return self.high < 0


class ReliabilityBin(NamedTuple):
    """Pairs whose confidence lies between two bounds."""

    low: float
    high: float
    count: int
    confidence: float  # mean
    accuracy: float


class Reliability(NamedTuple):
    """Whether a model that says 80 % is right in 80 of 100 pairs."""

    error: float  # expected calibration error: mean |accuracy - confidence| of the bins, weighted by their pairs
    surplus_N: np.ndarray  # by how much each pair is right (1, 1/2, 0) more than it was sure
    bins: tuple[ReliabilityBin, ...]  # those that have pairs


def accuracy_interval(accuracy: float, count: float) -> tuple[float, float]:
    """Where the accuracy over all possible pairs lies with 95 % confidence (Wilson's score interval, 1927), found on as
    many independent ones as `count` says."""
    middle = accuracy + _Z * _Z / (2 * count)
    half = _Z * math.sqrt(accuracy * (1 - accuracy) / count + _Z * _Z / (4 * count * count))
    scale = 1 + _Z * _Z / count
    return (middle - half) / scale, (middle + half) / scale


def groups_of(names: Sequence[Any]) -> np.ndarray:
    """The number of the group of each item (N,), from 0, in the order in which the groups come."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def preferred(margins_N: np.ndarray) -> np.ndarray:
    """1 where the chosen answer is preferred, 0 where the rejected one is, 1/2 for a tie (N,)."""
    return (margins_N > 0) + 0.5 * (margins_N == 0)


def mean_interval(values_N: np.ndarray, groups_N: np.ndarray) -> Interval:
    """The mean and its interval by the cluster-robust standard error (Liang and Zeger, 1986):

        sqrt(G / (G - 1) * sum over groups of (sum of the group's deviations)^2) / N

    times Student's t of G - 1 degrees of freedom. With one pair a group that is the ordinary t s / sqrt(N).
    """
    mean, error = float(np.mean(values_N)), standard_error(values_N, groups_N)
    reach = error if math.isnan(error) else error * _student(int(groups_N.max()))
    return Interval(mean, mean - reach, mean + reach)


def standard_error(values_N: np.ndarray, groups_N: np.ndarray) -> float:
    """Of the mean (see `mean_interval`); NaN for fewer than two groups."""
    groups = int(groups_N.max()) + 1
    if groups < _FEWEST_GROUPS:
        return math.nan
    sums_G = np.bincount(groups_N, values_N - np.mean(values_N), groups)
    return math.sqrt(groups / (groups - 1) * float(np.sum(sums_G**2))) / len(values_N)


def share_interval(hits_N: np.ndarray, groups_N: np.ndarray) -> Interval:
    """A share of hits (each in [0, 1]) with Wilson's interval, for as many pairs as these are worth."""
    share = float(np.mean(hits_N))
    low, high = accuracy_interval(share, effective_count(hits_N, groups_N))
    return Interval(share, max(0.0, low), min(1.0, high))


def effective_count(hits_N: np.ndarray, groups_N: np.ndarray) -> float:
    """How many independent pairs those of groups (prompts) are worth.

    N pairs are worth N / max(1, V), V being by how much the variance over prompts is larger than that of as many
    independent hits (Kish's design effect): 1 where each pair has a prompt of its own. Where the pairs do not show it,
    being of one prompt or all hits or misses, a prompt counts once.
    """
    share, count = float(np.mean(hits_N)), float(len(hits_N))
    sums_G = np.bincount(groups_N, hits_N - share)
    if 0 < share < 1 and len(sums_G) >= _FEWEST_GROUPS:
        count /= max(1.0, float(np.sum(sums_G**2)) / (count * share * (1 - share)))
    else:
        count = float(np.count_nonzero(np.bincount(groups_N)))
    return count


def paired_bootstrap(ours_N: np.ndarray, theirs_N: np.ndarray, groups_N: np.ndarray, seed: int = 0) -> Interval:
    """The mean of ours - theirs on the same pairs, with the percentiles 2.5 and 97.5 of it over 4,000 samples of as
    many prompts, drawn with replacement (Efron, 1979); of many prompts fewer samples, but 500."""
    return ratio_interval(ours_N - theirs_N, np.ones(len(ours_N)), groups_N, seed)


def ratio_interval(tops_N: np.ndarray, bottoms_N: np.ndarray, groups_N: np.ndarray, seed: int = 0) -> Interval:
    """Sum of `tops_N` over sum of `bottoms_N`, by the same bootstrap over groups."""
    columns_N2 = np.stack([tops_N, bottoms_N], 1).astype(float)
    return _bootstrap(columns_N2, groups_N, lambda sums_DK: sums_DK[:, 0] / sums_DK[:, 1], seed)


def balanced_accuracy(hits_N: np.ndarray, longer_N: np.ndarray, groups_N: np.ndarray, seed: int = 0) -> Interval:
    """Mean of the accuracy where the chosen answer is longer (`longer_N` above 0) and where it is shorter.

    A model that goes by length alone has 1/2, whatever the share of longer answers is. NaN where one side has no pair;
    NaN bounds for fewer than six prompts, of which a bootstrap may draw no other value.
    """
    longer, shorter = longer_N > 0, longer_N < 0
    if not (longer.any() and shorter.any()):
        return Interval(math.nan, math.nan, math.nan)
    columns_N4 = np.stack([hits_N * longer, longer, hits_N * shorter, shorter], 1).astype(float)

    def combine(sums_DK: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # a draw may lack one side
            return (sums_DK[:, 0] / sums_DK[:, 1] + sums_DK[:, 2] / sums_DK[:, 3]) / 2

    found = _bootstrap(columns_N4, groups_N, combine, seed)
    few = int(groups_N.max()) + 1 < _FEWEST_COMPARED
    return Interval(found.value, math.nan, math.nan) if few else found


def sign_test(differences_N: np.ndarray, groups_N: np.ndarray) -> float:
    """P of so uneven a split of the prompts with a difference, were both ways as likely (McNemar's, exact).

    A bootstrap leaves 0 out already where four prompts differ, all one way, which a coin does in one of eight cases.
    """
    sums_G = np.bincount(groups_N, differences_N)
    more, fewer = int((sums_G > 0).sum()), int((sums_G < 0).sum())
    prompts, least = more + fewer, min(more, fewer)
    if prompts <= _EXACT:
        return min(1.0, 2 * sum(math.comb(prompts, i) for i in range(least + 1)) / 2**prompts)
    return two_sided((abs(more - fewer) - 1) / math.sqrt(prompts))


def two_sided(z: float) -> float:
    """P of a standard normal number at least that far from 0."""
    return min(1.0, 2 * _NORMAL.cdf(-z))


def _student(freedom: int) -> float:
    """Percentile 97.5 of Student's t (Abramowitz and Stegun 26.7.5; 0.1 % too small for 3 degrees of freedom)."""
    if freedom <= 2:
        return (12.706205, 4.302653)[freedom - 1]
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _bootstrap(
    columns_NK: np.ndarray,
    groups_N: np.ndarray,
    combine: Callable[[np.ndarray], np.ndarray],
    seed: int = 0,
) -> Interval:
    """What `combine` makes of the sums (1, K) of all pairs, and its percentiles 2.5 and 97.5 over sums (D, K) of as
    many prompts, drawn with replacement. NaN bounds for fewer than two prompts."""
    sums_GK = np.zeros((int(groups_N.max()) + 1, columns_NK.shape[1]))
    np.add.at(sums_GK, groups_N, columns_NK)
    value, groups = float(combine(sums_GK.sum(0, keepdims=True))[0]), len(sums_GK)
    if groups < _FEWEST_GROUPS:
        return Interval(value, math.nan, math.nan)
    draws = min(_MOST_DRAWS, max(_FEWEST_DRAWS, _MOST_DRAWN // groups))
    rng, found, at_once = np.random.default_rng(seed), [], max(1, _DRAWN_AT_ONCE // groups)
    for first in range(0, draws, at_once):
        drawn_DG = rng.integers(groups, size=(min(at_once, draws - first), groups))
        found.append(combine(np.stack([column_G[drawn_DG].sum(1) for column_G in sums_GK.T], 1)))
    low, high = np.nanpercentile(np.concatenate(found), [2.5, 97.5])
    return Interval(value, float(low), float(high))


def correlation(xs_N: np.ndarray, ys_N: np.ndarray) -> float:
    """Pearson's, in [-1, 1]; 0 where it is not defined: fewer than two pairs, or one of both does not vary."""
    if len(xs_N) < 2:
        return 0.0
    x_N, y_N = xs_N - xs_N.mean(), ys_N - ys_N.mean()
    scale = math.sqrt(float((x_N * x_N).sum()) * float((y_N * y_N).sum()))
    return min(max(float((x_N * y_N).sum()) / scale, -1.0), 1.0) if scale > 0 else 0.0


def reliability(margins_N: np.ndarray, bins: int = 10) -> Reliability:
    """How well sigmoid(margin) says how sure it is (Guo et al., arXiv:1706.04599).

    The model takes the side with the larger probability p, so its confidence max(p, 1 - p) lies in [1/2, 1], which is
    cut into `bins` of one width; it is right where that side is the chosen answer, half right in a tie.
    """
    confidence_N = 1 / (1 + np.exp(-np.minimum(np.abs(margins_N), 700.0)))
    where_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    right_N, found = preferred(margins_N), []
    for number in range(bins):
        inside = where_N == number
        if inside.any():
            low, high = (0.5 + edge / (2 * bins) for edge in (number, number + 1))
            means = float(confidence_N[inside].mean()), float(right_N[inside].mean())
            found.append(ReliabilityBin(low, high, int(inside.sum()), *means))
    error = sum(one.count * abs(one.accuracy - one.confidence) for one in found) / max(len(margins_N), 1)
    return Reliability(error, right_N - confidence_N, tuple(found))


def length_bins(lengths_N: np.ndarray, most: int = 5) -> list[np.ndarray]:
    """Positions of the pairs in up to `most` groups of neighbouring lengths with about as many pairs each; equal
    lengths stay together."""
    edges = np.unique(np.quantile(lengths_N, np.linspace(0, 1, most + 1)[1:-1], method="higher"))
    where_N = np.searchsorted(edges, lengths_N, side="right")
    return [np.flatnonzero(where_N == number) for number in np.unique(where_N)]
