"""Who trains on which pairs: every pair once, balanced, the same whatever the number of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan, deal, sweep

ROWS = st.lists(st.integers(1, 3000), min_size=1, max_size=120).map(tuple)


def plan_of(rows: tuple[int, ...], world: int = 1, batch: int = 2, accum: int = 2, seed: int = 0) -> BatchPlan:
    return BatchPlan(rows, seed, world, batch, accum)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_every_pair_once_an_epoch_on_any_world(rows, world, batch, accum, seed):
    plan = plan_of(rows, world, batch, accum, seed)
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
        used = [i for step in steps for rank in step for micro in rank for i in micro]
        assert sorted(used) == list(range(len(rows)))


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_ranks_march_together_and_no_micro_batch_is_too_large(rows, world, batch, accum):
    """Every rank has the same number of micro-batches, at most batch_size pairs each, within one pair of each other."""
    plan = plan_of(rows, world, batch, accum)
    for index in range(plan.steps_per_epoch):
        step = plan.step(index)
        assert len({len(rank) for rank in step}) == 1 and len(step[0]) <= accum
        sizes = [len(micro) for rank in step for micro in rank]
        assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1 or sum(sizes) < len(sizes), "empty only where the pairs do not go round"


@settings(max_examples=30, deadline=None)
@given(ROWS, st.integers(0, 5))
def test_a_step_has_the_same_pairs_on_any_number_of_ranks(rows, index):
    """12 pairs a step as 1 x 3 x 4, 2 x 3 x 2 and 4 x 3 x 1 (ranks x batch x accumulation)."""
    plans = [plan_of(rows, world, 3, accum) for world, accum in ((1, 4), (2, 2), (4, 1))]
    sets = [{i for rank in plan.step(index) for micro in rank for i in micro} for plan in plans]
    assert sets[0] == sets[1] == sets[2]


def test_balance_on_real_looking_lengths():
    """Lognormal lengths, 8 hands of 16: the fullest is within 3 % of the mean (a plain cut is off by 10 % and more)."""
    rng = np.random.default_rng(0)
    rows = [int(x) for x in rng.lognormal(5.5, 0.6, size=128)]
    loads = [sum(rows[i] for i in hand) for hand in deal(list(enumerate(rows)), 8)]
    assert max(loads) < 1.03 * sum(rows) / 8
    plain = [sum(rows[i : i + 16]) for i in range(0, 128, 16)]
    assert max(plain) > 1.1 * sum(rows) / 8


def test_deal_by_hand():
    """Rows 5, 4, 3, 2 for pairs 7, 8, 9, 6 in two hands: 5 + 2 against 4 + 3, in the order they came."""
    assert deal([(7, 5), (8, 4), (9, 3), (6, 2)], 2) == [(7, 6), (8, 9)]


def test_short_last_step_keeps_all_ranks_busy():
    """10 pairs in steps of 8: the last step has 2 pairs, one for each of the 2 ranks, in one micro-batch."""
    step = plan_of((9,) * 10, world=2, batch=2, accum=2).step(1)
    assert [[len(micro) for micro in rank] for rank in step] == [[1], [1]]


def test_fewer_pairs_than_ranks_leave_an_empty_micro_batch():
    step = plan_of((9,), world=3).step(0)
    assert list(step) == [((0,),), ((),), ((),)]


def test_epochs_are_shuffled_differently_and_seeds_too():
    plan, other = plan_of((5,) * 50), plan_of((5,) * 50, seed=1)
    assert not np.array_equal(plan.shuffle(0), plan.shuffle(1))
    assert not np.array_equal(plan.shuffle(0), other.shuffle(0))
    assert np.array_equal(plan.shuffle(0), plan_of((7,) * 50).shuffle(0)), "the lengths must not move the order"


def test_global_random_state_is_neither_used_nor_moved():
    np.random.seed(1)
    before = str(np.random.get_state())
    first = plan_of((5,) * 20).step(0)
    assert str(np.random.get_state()) == before
    np.random.seed(2)
    assert plan_of((5,) * 20).step(0) == first


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 7), st.integers(1, 5))
def test_sweep_takes_every_pair_once_in_equal_turns(rows, batch, world):
    shares = sweep(rows, batch, world)
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for micro in share for i in micro) == list(range(len(rows)))
    assert all(len(micro) <= batch for share in shares for micro in share)
