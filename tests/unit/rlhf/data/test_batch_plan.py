"""Who trains on which pairs: every pair once, balanced, the same whatever the number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.data import batch_plan
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchConfig, BatchPlan, MicroBatch, deal, sweep

ROWS = st.lists(st.integers(1, 3000), min_size=1, max_size=120).map(tuple)


def plan_of(rows: Sequence[int], world: int = 1, batch: int = 2, accum: int = 2, seed: int = 0) -> BatchPlan:
    return BatchPlan(np.array(rows, np.int32), seed, world, batch, accum)


def plain_step(plan: BatchPlan, index: int) -> tuple[tuple[MicroBatch, ...], ...]:
    """The specification of `BatchPlan.step`: draws the whole epoch, deals one step of it."""
    rows, size = plan.rows.tolist(), plan.batch_size * plan.grad_accum_steps * plan.world_size
    epoch, within = divmod(index, -(-len(rows) // size))
    mine = np.random.default_rng([plan.seed, epoch]).permutation(len(rows))[within * size :][:size]
    micro_batches = -(-len(mine) // (plan.batch_size * plan.world_size))
    hands = deal([(int(i), rows[i]) for i in mine], plan.world_size * micro_batches)
    return tuple(tuple(hands[rank :: plan.world_size]) for rank in range(plan.world_size))


def plain_sweep(rows: Sequence[int], batch_size: int, world_size: int) -> list[list[MicroBatch]]:
    """The specification of `sweep`: all micro-batches at once."""
    order = sorted(range(len(rows)), key=lambda i: (-rows[i], i))
    batches = [tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    batches += [()] * (-len(batches) % world_size)
    return [batches[rank::world_size] for rank in range(world_size)]


def counted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> Callable[[], int]:
    """Counts the calls of a function from now on."""
    calls, function = [], getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args: calls.append(args) or function(*args))
    return lambda: len(calls)


# === steps ===


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_every_pair_once_an_epoch_on_any_world(rows, world, batch, accum, seed):
    plan = plan_of(rows, world, batch, accum, seed)
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
        used = [i for step in steps for rank in step for micro in rank for i in micro]
        assert sorted(used) == list(range(len(rows)))


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_a_step_is_the_plain_one(rows, world, batch, accum, seed):
    """Also when epochs are asked for out of order, as by a run that resumes."""
    plan = plan_of(rows, world, batch, accum, seed)
    for index in (0, plan.steps_per_epoch, plan.steps_per_epoch - 1, 3 * plan.steps_per_epoch):
        assert plan.step(index) == plain_step(plan, index)


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


def test_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 pairs in steps of 4: the ten steps of each of two epochs take one drawing, and one shuffle is kept."""
    plan, drawn = plan_of((5,) * 40), counted(monkeypatch, np.random, "default_rng")
    for index in range(20):
        plan.step(index)
    assert drawn() == 2 and len(plan._drawn) == 1
    plan.rows_per_step(1)
    assert drawn() == 2
    plan.step(0)
    assert drawn() == 3


def test_a_kept_shuffle_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        plan_of((5,) * 4).shuffle(0)[0] = 1


def test_settings_are_bounded() -> None:
    assert BatchConfig() == BatchConfig(batch_size=16, grad_accum_steps=8)
    for change in (lambda: BatchConfig(batch_size=0), lambda: BatchConfig(grad_accum_steps=0)):
        with pytest.raises(UserError, match=r"(batch_size|steps): expected a number from 1 to 2147483647, found 0"):
            change()


# === sizes ===


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_rows_of_steps_are_sums_of_their_pairs(rows, world, batch, accum, epoch):
    plan = plan_of(rows, world, batch, accum)
    steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
    assert plan.rows_per_step(epoch).tolist() == [
        sum(rows[i] for rank in step for micro in rank for i in micro) for step in steps
    ]


def test_rows_of_a_step_may_be_more_than_32_bits_hold() -> None:
    """Two pairs of 2^31 - 1 rows."""
    assert plan_of((2**31 - 1,) * 2).rows_per_step(0).tolist() == [2**32 - 2]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_the_largest_micro_batch_of_all(rows, world, batch, accum):
    """Where all steps are dealt: the first of those with the most rows."""
    plan = plan_of(rows, world, batch, accum)
    steps = [plan.step(index) for index in range(plan.steps_per_epoch)]
    micro_batches = [micro for step in steps for rank in step for micro in rank if micro]
    assert plan.largest_micro_batch() == max(micro_batches, key=lambda micro: sum(rows[i] for i in micro))


def test_only_a_sample_is_dealt_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 pairs in 1,000 steps of which 20 pairs may be dealt: 5 steps spread evenly, and at most two others.

    All rows are 5 but those of one step, which are 6 (24 in all, the most: 12 a micro-batch), and one of 100 in another
    step of 1, 1 and 1: that one makes the largest micro-batch, of 101 rows, though its step has only 103... so it is
    the step with the most rows too; with 9 in its place it is not, and 10 rows are not the most.
    """
    order = plan_of((5,) * 4000).shuffle(0)
    rows = np.full(4000, 5)
    rows[order[4 * 333 : 4 * 334]] = 6
    rows[order[4 * 777 : 4 * 778]] = (9, 1, 1, 1)
    plan, dealt = plan_of(rows.tolist()), counted(monkeypatch, batch_plan, "deal")
    assert set(plan.largest_micro_batch(20)) <= set(order[4 * 333 : 4 * 334].tolist())
    assert dealt() == 7
    rows[order[4 * 777]] = 20  # 23 rows in its step, 21 in its micro-batch
    plan = plan_of(rows.tolist())
    assert order[4 * 777] in plan.largest_micro_batch(20)
    assert dealt() == 14


def test_of_many_steps_with_a_longest_pair_one_is_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of pairs that are all alike: the first one is the fullest, and one more is the sample."""
    plan, dealt = plan_of((5,) * 40), counted(monkeypatch, batch_plan, "deal")
    assert len(plan.largest_micro_batch(8)) == 2
    assert dealt() == 2


# === micro-batches by rows ===


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6000))
def test_by_rows_a_step_has_the_same_pairs_in_as_few_micro_batches(rows, world, batch, accum, most):
    """None has more rows than asked for, or than the longest pair of the step; one a rank fewer would not hold them, or
    is beyond what dealing the longest first finds (4/3 of the best, Graham 1969)."""
    plan, by_pairs = plan_of(rows, world, batch, accum), plan_of(rows, world, batch, accum)
    plan = replace(plan, most_rows=most)
    assert (plan.steps_per_epoch, plan.accumulates) == (by_pairs.steps_per_epoch, True)
    for index in range(plan.steps_per_epoch):
        step = plan.step(index)
        hands = [micro for rank in step for micro in rank]
        mine = sorted(i for micro in hands for i in micro)
        assert mine == sorted(i for rank in by_pairs.step(index) for micro in rank for i in micro)
        assert len({len(rank) for rank in step}) == 1
        limit = max(most, max(rows[i] for i in mine))
        assert max(sum(rows[i] for i in micro) for micro in hands) <= limit
        fewer = len(hands) - world
        assert not fewer or 4 / 3 * sum(rows[i] for i in mine) > fewer * limit * 3 / 4 - limit * world


def test_by_rows_in_numbers() -> None:
    """Six pairs of 5 rows and one of 12, two ranks: at most 10 rows, or the 12 of the longest."""
    plan = BatchPlan(np.array([5, 5, 12, 5, 5, 5, 5]), 0, 2, 4, 2, most_rows=10)
    hands = [sorted(plan.rows[list(micro)].tolist()) for rank in plan.step(0) for micro in rank]
    assert sorted(hands) == [[5, 5], [5, 5], [5, 5], [12]]
    assert plan.rows[list(plan.largest_micro_batch())].tolist() == [12]


def test_by_rows_the_largest_stands_for_all_epochs() -> None:
    """No micro-batch of four epochs has more rows, and it has no more than is allowed, or than a rank has of a step."""
    rng = np.random.default_rng(0)
    for most, world in product((100, 700, 2500, 5000), (1, 2)):
        plan = BatchPlan(rng.integers(100, 600, 128), 3, world, 4, 4, most_rows=most)
        largest = int(plan.rows[list(plan.largest_micro_batch())].sum())
        steps = [plan.step(index) for index in range(4 * plan.steps_per_epoch)]
        seen = max(int(plan.rows[list(micro)].sum()) for step in steps for rank in step for micro in rank)
        assert seen <= 1.1 * largest and largest <= max(most, plan.rows.max())


def test_by_rows_many_pairs_of_half_the_limit_are_dealt_at_once() -> None:
    """2,048 pairs of little more than half: each for itself, in less than a second."""
    plan = BatchPlan(np.random.default_rng(0).integers(270, 513, 2048), 0, 1, 2048, 1, most_rows=512)
    started = time.perf_counter()
    [rank] = plan.step(0)
    assert len(rank) == 2048 and time.perf_counter() - started < 1


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 5), st.integers(1, 6000))
def test_a_sweep_by_rows_takes_every_pair_once(rows, world, most):
    """Longest first, each micro-batch filled until the next pair would be too much."""
    shares = sweep(np.array(rows, np.int32), 2, world, most_rows=most)
    assert len({len(share) for share in shares}) == 1
    turns = [share[turn] for turn in range(len(shares[0])) for share in shares]
    assert [i for micro in turns for i in micro] == sorted(range(len(rows)), key=lambda i: (-rows[i], i))
    for micro, behind in pairwise(turns):
        taken = sum(rows[i] for i in micro)
        assert len(micro) <= 1 or taken <= most
        assert not behind or taken + rows[behind[0]] > most


# === passes without training ===


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 7), st.integers(1, 5))
def test_sweep_takes_every_pair_once_in_equal_turns(rows, batch, world):
    shares = sweep(np.array(rows, np.int32), batch, world)
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for micro in share for i in micro) == list(range(len(rows)))
    assert all(len(micro) <= batch for share in shares for micro in share)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 7), st.integers(1, 5))
def test_sweep_is_the_plain_one(rows, batch, world):
    assert [list(share) for share in sweep(np.array(rows, np.int32), batch, world)] == plain_sweep(rows, batch, world)


def test_a_share_is_a_sequence() -> None:
    """5 pairs of rows 1 to 5, two a micro-batch, on two ranks: 4 3 | 0 for rank 0, 2 1 and nothing for rank 1."""
    first, second = sweep(np.arange(1, 6), 2, 2)
    assert list(first) == [(4, 3), (0,)] and list(second) == [(2, 1), ()]
    assert first[-1] == (0,) and first[1:] == [(0,)] and (4, 3) in first
    with pytest.raises(IndexError):
        first[2]
    assert [list(share) for share in sweep(np.zeros(0, np.int32), 2, 2)] == [[], []]
