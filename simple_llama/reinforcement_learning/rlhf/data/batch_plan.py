"""Who trains on which pairs, when: a pure function of lengths and settings, the same on all ranks and restarts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, overload

import numpy as np
from typing_extensions import Doc

from simple_llama.common.settings import Count, CountOrNone, Settings
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.spread_copies import spread_copies

MicroBatch = tuple[int, ...]  # positions of pairs in the data set
Step = tuple[tuple[MicroBatch, ...], ...]  # [rank][micro-batch]; every rank has the same number of micro-batches
Item = tuple[tuple[int, ...], int]  # units that are computed together, and their packed rows

_MOST_STARTS = 32  # ways of filling the largest micro-batch that are tried, where rows are bounded
_MOST_DEALT = 1 << 18  # pairs that are dealt to find the largest micro-batch: under a second


@dataclass(frozen=True)
class BatchConfig(Settings):
    """How many pairs are computed at once, and how many make a step."""

    # === Batch ===
    batch_size: Annotated[
        Count, Doc("pairs per micro-batch per rank; prompts where records have more than two answers")
    ] = 16
    grad_accum_steps: Count = 8  # micro-batches per optimizer step
    rows_per_micro_batch: Annotated[
        CountOrNone,
        Doc(
            "most packed tokens of a micro-batch, or those of the longest pair: it then has as many pairs as these "
            "allow, and batch_size and grad_accum_steps say only how many pairs a step has; 0: batch_size pairs"
        ),
    ] = 0
    group_weight: Annotated[
        Literal["pair", "prompt"],
        Doc("what counts alike in the mean of a step: each pair, or each prompt, whose pairs then share its weight"),
    ] = "pair"
    group_prompts: Annotated[
        bool,
        Doc("pairs of one prompt that fall into a step are computed together, the prompt once: faster, the same loss"),
    ] = False

    @property
    def accumulates(self) -> bool:
        """Whether a step may have several micro-batches on a rank."""
        return self.grad_accum_steps > 1 or self.rows_per_micro_batch > 0


class Prompts(NamedTuple):
    """Which units answer one prompt, for plans that bring them together."""

    numbers: np.ndarray  # (U,) of each unit's prompt
    prefixes: np.ndarray  # (U,) tokens that all chats of a unit begin with


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The optimizer steps of training.

    What is dealt are units: pairs, or all the pairs of a record. An epoch is a shuffle of all units, cut into steps of
    `batch_size * grad_accum_steps * world_size` units. The last step of an epoch has what is left. Within a step the
    units are dealt so that every micro-batch has nearly the same number of packed rows: `batch_size` units, or with
    `most_rows` as many as these allow. Where the units of a short step do not go round, some ranks' micro-batches are
    empty. Copies of a unit are units, each in a step of its own as far as there are as many steps.
    """

    rows: np.ndarray  # (U,) packed rows of each unit
    seed: int
    world_size: int
    batch_size: int  # units per micro-batch per rank
    grad_accum_steps: int
    starts: np.ndarray | None = None  # (U + 1,) the first pair of each unit, and the number of pairs; None: U pairs
    prompts: Prompts | None = None  # units of one prompt that fall into a step go into one micro-batch, side by side
    copies: np.ndarray | None = None  # (U,) as in `spread_copies`; None: each unit stands in an epoch once
    most_rows: int = 0  # of a micro-batch, or those of the longest unit of a step; 0: it has `batch_size` units
    _drawn: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)  # the last epoch's shuffle

    @classmethod
    def of(cls, pairs: PairSet, config: BatchConfig, seed: int, world_size: int) -> BatchPlan:
        """That of these pairs."""
        starts = None if pairs.groups is None else np.append(pairs.units, len(pairs))
        prompts = None
        if pairs.segments is not None:
            first = pairs.units
            prompts = Prompts(pairs.segments[first], pairs.places["prefix"][first])
        sizes = config.batch_size, config.grad_accum_steps
        copies = None if pairs.copies is None else pairs.copies[pairs.units]
        return cls(pairs.unit_rows, seed, world_size, *sizes, starts, prompts, copies, config.rows_per_micro_batch)

    @property
    def units_per_step(self) -> int:
        """Units of a full optimizer step, over all ranks."""
        return self.batch_size * self.grad_accum_steps * self.world_size

    @property
    def accumulates(self) -> bool:
        """Whether a step may have several micro-batches on a rank."""
        return self.grad_accum_steps > 1 or self.most_rows > 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, a short last one included."""
        return -(-len(self.rows) // self.units_per_step)

    def shuffle(self, epoch: int) -> np.ndarray:
        """The order of all units in epoch `epoch` (from 0); independent of any global state, and of the world size as
        long as a step has as many units.

        Drawn when an epoch is first asked for and kept until another one is: N int64.
        """
        if epoch not in self._drawn:
            self._drawn.clear()  # first, so that there are never two
            rng = np.random.default_rng([self.seed, epoch])
            if self.copies is None:
                order = rng.permutation(len(self.rows))
            else:
                order = spread_copies(self.copies, self.units_per_step, rng)
            order.setflags(write=False)
            self._drawn[epoch] = order
        return self._drawn[epoch]

    def step(self, index: int) -> Step:
        """Optimizer step `index`, counted from 0 over all epochs."""
        epoch, within = divmod(index, self.steps_per_epoch)
        mine = self.shuffle(epoch)[within * self.units_per_step :][: self.units_per_step]
        dealt = [_pairs_of(hand, self.starts) for hand in self._hands(mine)]
        return tuple(tuple(dealt[rank :: self.world_size]) for rank in range(self.world_size))

    def _hands(self, mine: np.ndarray) -> list[tuple[int, ...]]:
        """The units of a step in micro-batches, of which each rank has as many."""
        if self.most_rows:
            return _deal_rows(self._items(mine), self.most_rows, self.world_size)
        hands = self.world_size * -(-len(mine) // (self.batch_size * self.world_size))
        if self.prompts:
            return _deal_together(self._items(mine), hands)
        return deal(list(zip(mine.tolist(), self.rows[mine].tolist(), strict=True)), hands)

    def _items(self, units: np.ndarray) -> list[Item]:
        """Units that are to be computed together, those of one prompt where there are `prompts`, in the order of the
        first of each."""
        if not self.prompts:
            return [((unit,), rows) for unit, rows in zip(units.tolist(), self.rows[units].tolist(), strict=True)]
        together: dict[int, list[int]] = {}
        for unit, prompt in zip(units.tolist(), self.prompts.numbers[units].tolist(), strict=True):
            together.setdefault(prompt, []).append(unit)
        items = list[Item]()
        for found in together.values():
            some: Item = ((), 0)
            for unit in found:
                more = self._together((*some[0], unit))
                full = more[1] > self.most_rows if self.most_rows else len(more[0]) > self.batch_size
                if some[0] and full:
                    items.append(some)
                    more = self._together((unit,))
                some = more
            items.append(some)
        return items

    def _together(self, units: tuple[int, ...]) -> Item:
        """Units of one prompt, whose common tokens are computed once."""
        assert self.prompts
        shared = int(self.prompts.prefixes[list(units)].min()) * (len(units) - 1)
        return units, int(self.rows[list(units)].sum()) - shared

    def rows_per_step(self, epoch: int) -> np.ndarray:
        """Packed rows of each step of an epoch (steps,) int64, over all ranks."""
        starts = np.arange(0, len(self.rows), self.units_per_step)
        return np.add.reduceat(self.rows[self.shuffle(epoch)], starts, dtype=np.int64)

    def largest_micro_batch(self, most_dealt: int = _MOST_DEALT) -> MicroBatch:
        """The micro-batch of the first epoch with the most packed rows, the first one of equals.

        Where the epoch has more than `most_dealt` units, only so many are dealt: the step with the most rows, the
        fullest step with a longest unit, and others spread evenly over the epoch. Dealing makes micro-batches of a
        step nearly equal, so what the rest could add is small.

        With `most_rows` another epoch's step may fill a micro-batch more than any of the first does: as many units of
        the fullest step as are allowed.
        """
        if self.most_rows:
            return self._fullest()
        steps = range(self.steps_per_epoch)
        if len(self.rows) > most_dealt:
            rows = self.rows_per_step(0)
            longest = np.flatnonzero(self.rows[self.shuffle(0)] == self.rows.max()) // self.units_per_step
            spread = np.linspace(0, len(steps) - 1, max(1, most_dealt // self.units_per_step)).astype(int)
            steps = sorted({int(rows.argmax()), int(longest[rows[longest].argmax()]), *spread.tolist()})
        micro_batches = (micro for index in steps for rank in self.step(index) for micro in rank if micro)
        of_pair = self.rows
        if self.starts is not None:  # a unit's rows count with its first pair
            of_pair = np.zeros(self.starts[-1], np.int64)
            of_pair[self.starts[:-1]] = self.rows
        return max(micro_batches, key=lambda micro: sum(of_pair[list(micro)].tolist()))

    def _fullest(self) -> MicroBatch:
        """With `most_rows`: a micro-batch with about as many rows as one can have."""
        longest, of_steps = int(self.rows.max()), self.rows_per_step(0)
        fullest = int(of_steps.argmax())
        most = min(max(self.most_rows, longest), max(longest, -(-int(of_steps[fullest]) // self.world_size)))
        mine = self.shuffle(0)[fullest * self.units_per_step :][: self.units_per_step]
        units = mine[np.argsort(-self.rows[mine], kind="stable")].tolist()
        found = [int(self.rows.argmax())]
        for start in range(min(len(units), _MOST_STARTS)):
            taken, rows = list[int](), 0
            for unit in units[start:]:
                if rows + self.rows[unit] <= most:
                    taken.append(unit)
                    rows += int(self.rows[unit])
            found = max(found, taken, key=lambda some: self.rows[some].sum())
        return _pairs_of(found, self.starts)


def _pairs_of(units: Sequence[int], starts: np.ndarray | None) -> MicroBatch:
    """The pairs of units, unit after unit; `starts` as in `BatchPlan`."""
    if starts is None:
        return tuple(units)
    return tuple(pair for unit in units for pair in range(int(starts[unit]), int(starts[unit + 1])))


def _deal_rows(items: Sequence[Item], most_rows: int, world_size: int) -> list[tuple[int, ...]]:
    """Deals units into as few micro-batches a rank as have at most `most_rows` rows each, or those of the longest item
    where that is more; the units of an item stay together. Longest first to the hand with the fewest rows, as `deal`.
    """
    most = max(most_rows, max(rows for _, rows in items))
    by_length = sorted(range(len(items)), key=lambda i: (-items[i][1], i))

    def dealt(turns: int) -> list[list[int]] | None:
        """Places of items, in so many micro-batches a rank; None where one has too many rows."""
        heap = [(0, hand) for hand in range(turns * world_size)]
        found: list[list[int]] = [[] for _ in heap]
        for place in by_length:
            rows, hand = heapq.heappop(heap)
            found[hand].append(place)
            heapq.heappush(heap, (rows + items[place][1], hand))
        return found if max(heap)[0] <= most else None

    few = max(1, -(-sum(rows for _, rows in items) // (most * world_size))) - 1  # too few
    enough, step = few + 1, 1
    while not dealt(enough):
        few, enough, step = enough, enough + step, 2 * step
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if dealt(middle) else (middle, enough)
    return [tuple(unit for place in sorted(hand) for unit in items[place][0]) for hand in dealt(enough) or []]


def _deal_together(items: Sequence[Item], hands: int) -> list[tuple[int, ...]]:
    """Deals `(units, rows)` into `hands` micro-batches, the units of an item into one, of nearly equal rows.

    As `deal`, but for the number of units, which is at most one above equal; an item goes apart only where no hand has
    room for it, one unit after the other.
    """
    room = [-(-sum(len(units) for units, _ in items) // hands)] * hands
    rows, dealt = [0] * hands, [list[int]() for _ in range(hands)]
    waiting = [(-total, place, units) for place, (units, total) in enumerate(items)]
    heapq.heapify(waiting)
    while waiting:
        total, place, units = heapq.heappop(waiting)
        fits = [hand for hand in range(hands) if room[hand] >= len(units)]
        if not fits:
            half = len(units) // 2
            for some in (units[:half], units[half:]):
                heapq.heappush(waiting, (total * len(some) // len(units), place, some))
            continue
        hand = min(fits, key=lambda one: (rows[one], one))
        rows[hand], room[hand] = rows[hand] - total, room[hand] - len(units)
        dealt[hand] += units
    return [tuple(hand) for hand in dealt]


def deal(pairs: Sequence[tuple[int, int]], hands: int) -> list[tuple[int, ...]]:
    """Deals `(unit, rows)` into `hands` micro-batches of equal unit count (within one) and nearly equal rows.

    Longest first to the hand with the fewest rows that still has room (LPT, Graham 1969). The first `len(pairs) %
    hands` hands have one unit more. Within a hand the order is that of `pairs`.
    """
    room = [len(pairs) // hands + (hand < len(pairs) % hands) for hand in range(hands)]
    heap = [(0, hand) for hand in range(hands) if room[hand]]
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for place in sorted(range(len(pairs)), key=lambda i: (-pairs[i][1], i)):
        rows, hand = heapq.heappop(heap)
        dealt[hand].append(place)
        if len(dealt[hand]) < room[hand]:
            heapq.heappush(heap, (rows + pairs[place][1], hand))
    return [tuple(pairs[place][0] for place in sorted(hand)) for hand in dealt]


@dataclass(frozen=True, eq=False)
class Share(Sequence[MicroBatch]):
    """One rank's micro-batches of a sweep, each made when it is asked for."""

    order: np.ndarray  # all units, longest first
    starts: np.ndarray | None  # as in `BatchPlan`
    edges: Sequence[int]  # where in `order` each micro-batch of all ranks begins, and the last one ends, or later
    rank: int
    world_size: int

    def __len__(self) -> int:
        return (len(self.edges) + self.world_size - 2) // self.world_size

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        turns = range(len(self))[index]  # IndexError beyond the end
        if isinstance(turns, range):
            return [self[turn] for turn in turns]
        place = turns * self.world_size + self.rank
        edges = self.edges[place : place + 2]
        units = self.order[edges[0] : edges[1]] if len(edges) == 2 else self.order[:0]
        return _pairs_of(units.tolist(), self.starts)


def sweep_of(pairs: PairSet, batch_size: int, world_size: int, most_rows: int = 0) -> list[Share]:
    """`sweep` of these pairs, those of a record together."""
    starts = None if pairs.groups is None else np.append(pairs.units, len(pairs))
    return sweep(pairs.unit_rows, batch_size, world_size, starts, most_rows)


def sweep(
    rows: np.ndarray, batch_size: int, world_size: int, starts: np.ndarray | None = None, most_rows: int = 0
) -> list[Share]:
    """One pass over all units without training (reference, evaluation): `[rank] -> micro-batches`, every pair once.

    Units of similar length share a micro-batch, and micro-batches go round the ranks, so the ranks end together.
    Every rank gets the same number of micro-batches, the last one of some ranks empty: with partitioned weights a
    forward is a collective.

    Args: most_rows: of a micro-batch, in place of `batch_size` units; 0: as many as these have.
    """
    order = np.argsort(-np.asarray(rows, np.int64), kind="stable")
    edges: Sequence[int] = range(0, len(order) + batch_size, batch_size)
    if most_rows:
        edges = [0]
        ends = np.cumsum(rows[order], dtype=np.int64)
        while edges[-1] < len(order):
            before = ends[edges[-1] - 1] if edges[-1] else 0
            edges.append(max(edges[-1] + 1, int(np.searchsorted(ends, before + most_rows, side="right"))))
    return [Share(order, starts, edges, rank, world_size) for rank in range(world_size)]
