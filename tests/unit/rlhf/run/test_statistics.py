"""Numbers with intervals, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simple_llama.reinforcement_learning.rlhf.run import statistics
from simple_llama.reinforcement_learning.rlhf.run.statistics import accuracy_interval

ALONE = np.arange(4)


def test_mean_interval_of_pairs_with_prompts_of_their_own() -> None:
    """1, 2, 3, 6: mean 3, s^2 = (4 + 1 + 0 + 9) / 3, s / sqrt(4) = 1.0801; Student's t of 3 is 3.182."""
    found = statistics.mean_interval(np.array([1.0, 2, 3, 6]), ALONE)
    assert found == pytest.approx((3, 3 - 3.1824 * 1.080123, 3 + 3.1824 * 1.080123), abs=0.005)


def test_mean_interval_of_repeated_prompts() -> None:
    """Two prompts with the pairs 1, 2 and 3, 6: deviations sum to -3 and 3, so sqrt(2 * (9 + 9)) / 4 = 1.5; t of 1."""
    found = statistics.mean_interval(np.array([1.0, 2, 3, 6]), np.array([0, 0, 1, 1]))
    assert found == pytest.approx((3, 3 - 12.706205 * 1.5, 3 + 12.706205 * 1.5))


def test_percentiles_of_student() -> None:
    """Against the printed tables; a normal number from many on."""
    table = {1: 12.706, 2: 4.303, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 57: 2.0025, 10**6: 1.960}
    assert {freedom: statistics._student(freedom) for freedom in table} == pytest.approx(table, abs=1e-3)


def test_sign_test_by_hand() -> None:
    """5 of 5: 2 / 32. 8 of 9: 2 (1 + 9) / 512. Ties do not count, prompts count once."""
    alone = np.arange(9)
    assert statistics.sign_test(np.ones(5), alone[:5]) == 0.0625
    assert statistics.sign_test(np.array([1.0] * 8 + [-1]), alone) == 20 / 512
    assert statistics.sign_test(np.array([1.0] * 5 + [0] * 4), alone) == 0.0625
    assert statistics.sign_test(np.ones(9), alone // 3) == 0.25
    assert statistics.sign_test(np.zeros(3), alone[:3]) == 1
    assert statistics.sign_test(np.ones(2000), np.arange(2000)) < 1e-9


def test_a_bootstrap_of_few_prompts_says_nothing_of_length() -> None:
    """Two pairs, both right: every draw is right."""
    found = statistics.balanced_accuracy(np.ones(2), np.array([1, -1]), np.arange(2))
    assert found.value == 1 and math.isnan(found.low)


def test_share_interval_counts_prompts() -> None:
    """Each pair twice is worth as many as once: the interval is that of half the pairs. All right: 4 / (4 + z^2)."""
    hits = np.repeat(np.array([1.0] * 15 + [0.0] * 5), 2)
    alone, twice = (statistics.share_interval(hits, groups) for groups in (np.arange(40), np.repeat(np.arange(20), 2)))
    assert alone == pytest.approx((0.75, *accuracy_interval(0.75, 40)))
    assert twice == pytest.approx((0.75, *accuracy_interval(0.75, 20)))
    all_right = statistics.share_interval(np.ones(4), ALONE)
    assert all_right == pytest.approx((1, 4 / (4 + 1.959964**2), 1))


def test_share_interval_where_nothing_shows_what_a_prompt_is_worth() -> None:
    """40 pairs of one prompt are one; so are those of each of four prompts where all pairs are right."""
    one = statistics.share_interval(np.repeat([1.0, 0.0], [30, 10]), np.zeros(40, int))
    assert one == pytest.approx((0.75, *accuracy_interval(0.75, 1)))
    assert statistics.share_interval(np.ones(40), np.arange(40) // 10) == statistics.share_interval(np.ones(4), ALONE)


def test_paired_bootstrap_against_the_exact_distribution() -> None:
    """Two prompts, one that gains 1 and one that gains 0: the mean of a draw is 0, 1/2, 1 with 1/4, 1/2, 1/4.

    The percentiles 2.5 and 97.5 are 0 and 1. With 100 prompts of each kind the mean is that of 200 draws of a coin:
    1/2 -+ 1.96 * sqrt(1 / 800) = 1/2 -+ 0.0693.
    """
    theirs = np.zeros(2)
    assert statistics.paired_bootstrap(np.array([1.0, 0]), theirs, np.arange(2)) == (0.5, 0, 1)
    ours = np.repeat([1.0, 0], 100)
    found = statistics.paired_bootstrap(ours, np.zeros(200), np.arange(200))
    assert found.value == 0.5
    assert found[1:] == pytest.approx((0.5 - 0.0693, 0.5 + 0.0693), abs=0.006)
    assert found == statistics.paired_bootstrap(ours, np.zeros(200), np.arange(200))


def test_paired_bootstrap_draws_prompts_whole() -> None:
    """100 prompts with two like pairs vary as 100 coins, not as 200: 1.96 * sqrt(1 / 400) = 0.098."""
    ours, groups = np.repeat([1.0, 0], 100), np.repeat(np.arange(100), 2)
    found = statistics.paired_bootstrap(ours, np.zeros(200), groups)
    assert found[1:] == pytest.approx((0.5 - 0.098, 0.5 + 0.098), abs=0.011)
    same = statistics.paired_bootstrap(ours, ours, groups)
    assert same == (0, 0, 0) and not same.is_above and not same.is_below
    assert math.isnan(statistics.paired_bootstrap(ours, np.zeros(200), np.zeros(200, int)).low)


def test_reliability_bins_by_hand() -> None:
    """Margins of ln 4 (sure by 0.8) right and wrong, -ln 9 (0.9 for the wrong side), 0 (0.5, half right); five bins.

    [0.5, 0.6): 0.5 against 0.5. [0.8, 0.9): 0.8 against 0.5. [0.9, 1]: 0.9 and 0.99, none right.
    """
    ln = math.log
    margins = np.array([ln(4) + 1e-9, -ln(4) - 1e-9, -ln(9) - 1e-9, 0.0, -ln(99)])
    found = statistics.reliability(margins, bins=5)
    assert [(round(b.low, 3), round(b.high, 3), b.count) for b in found.bins] == [
        (0.5, 0.6, 1),
        (0.8, 0.9, 2),
        (0.9, 1.0, 2),
    ]
    assert [b.confidence for b in found.bins] == pytest.approx([0.5, 0.8, 0.945])
    assert [b.accuracy for b in found.bins] == [0.5, 0.5, 0.0]
    assert found.error == pytest.approx((2 * 0.3 + 2 * 0.945) / 5)
    assert statistics.reliability(np.array([1e9]), bins=5).bins[0].confidence == 1


def test_a_rule_of_length_has_a_balanced_accuracy_of_one_half() -> None:
    """Nine of ten chosen answers are longer: the rule is right in 0.9, but in 1 and 0 of the two sides."""
    longer = np.array([3] * 90 + [-2] * 10)
    rule = statistics.preferred(longer)
    assert rule.mean() == 0.9
    assert statistics.balanced_accuracy(rule, longer, np.arange(100)) == pytest.approx((0.5, 0.5, 0.5))
    assert math.isnan(statistics.balanced_accuracy(rule, np.ones(100), np.arange(100)).value)


def test_small_things() -> None:
    """Ties count one half, groups are numbered as they come, equal lengths stay in one bin."""
    assert statistics.preferred(np.array([2.0, 0, -1])).tolist() == [1, 0.5, 0]
    assert statistics.groups_of(["b", "a", "b"]).tolist() == [0, 1, 0]
    lengths = np.array([0, 0, 0, 1, 2, 3, 4, 5, 6, 7])
    found = statistics.length_bins(lengths)
    assert [lengths[part].tolist() for part in found] == [[0, 0, 0, 1], [2, 3], [4, 5], [6, 7]]
