"""Epochs in which units stand more than once: each copy in a step of its own, all parts of an epoch alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simple_llama.reinforcement_learning.rlhf.data import spread_copies as module
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.spread_copies import spread_copies


def copies_of(times: list[int]) -> np.ndarray:
    """Which copy each unit is: 0, 1 for one that stands twice."""
    return np.array([copy for count in times for copy in range(count)])


def most_in_a_step(order: np.ndarray, times: list[int], per_step: int) -> int:
    """How often the same unit stands in one step at most."""
    owners = np.repeat(np.arange(len(times)), times)
    steps = [owners[order[start : start + per_step]].tolist() for start in range(0, len(order), per_step)]
    return max(max(Counter(step).values()) for step in steps)


@given(
    times=st.lists(st.integers(1, 5), min_size=1, max_size=60),
    per_step=st.integers(1, 24),
    seed=st.integers(0, 5),
)
def test_no_step_has_a_unit_twice_where_steps_allow(times: list[int], per_step: int, seed: int) -> None:
    """Every copy stands once. With more steps than copies of any unit none meet in a step; the last step may be short.
    With as many, only those can be apart for which the last step has room: r units."""
    order = spread_copies(copies_of(times), per_step, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(sum(times)))
    steps = -(-sum(times) // per_step)
    of_last = sum(times) - (steps - 1) * per_step
    most = max(times)
    if most < steps or (most == steps and times.count(most) <= of_last):
        assert most_in_a_step(order, times, per_step) == 1


def test_where_steps_do_not_allow_it_copies_are_as_even_as_can_be() -> None:
    """5 copies of one unit in 2 steps of 4 and 3: three and two."""
    order = spread_copies(copies_of([5, 1, 1]), 4, np.random.default_rng(0))
    assert most_in_a_step(order, [5, 1, 1], 4) == 3
    assert spread_copies(copies_of([2, 1]), 8, np.random.default_rng(0)).size == 3


def test_halves_of_an_epoch_have_the_same_mixture() -> None:
    """1,000 units once and 1,000 twice: of those that stand twice each half has each once, but for the few that trade
    places; of the others each half has half, 500 with a standard deviation of 16."""
    times = [1] * 1000 + [2] * 1000
    order = spread_copies(copies_of(times), 30, np.random.default_rng(3))
    owners = np.repeat(np.arange(2000), times)[order][:1500]
    twice = Counter(owners[owners >= 1000].tolist())
    assert len(twice) >= 950 and sum(twice.values()) - len(twice) <= 20
    assert abs((owners < 1000).sum() - 500) < 5 * 16


def test_epochs_differ_and_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is drawn from seed and epoch, and is the same on each of so many ranks with equally many units a step.
    Where trading is given up, dealing does it."""
    copies = copies_of([2] * 50 + [1] * 7)
    plan, other = (BatchPlan(np.ones(107, np.int64), 1, ranks, 2, 4 // ranks, copies=copies) for ranks in (1, 2))
    assert plan.shuffle(0).tolist() == other.shuffle(0).tolist() != plan.shuffle(1).tolist()
    first = plan.shuffle(0).copy()
    plan.shuffle(1)
    assert plan.shuffle(0).tolist() == first.tolist() and plan.steps_per_epoch == 14
    monkeypatch.setattr(module, "_MOST_TRADES", -1)
    dealt = spread_copies(copies, 8, np.random.default_rng(0))
    assert most_in_a_step(dealt, [2] * 50 + [1] * 7, 8) == 1


def test_without_copies_the_order_is_that_of_before() -> None:
    """numpy's permutation of the seed and the epoch."""
    plan = BatchPlan(np.ones(20, np.int64), 4, 1, 2, 2)
    assert plan.shuffle(3).tolist() == np.random.default_rng([4, 3]).permutation(20).tolist()
