"""Who trains on which pairs, when: a pure function of lengths and settings, the same on all ranks and restarts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from simple_llama.common.settings import Count, Settings

MicroBatch = tuple[int, ...]  # positions of pairs in the data set
Step = tuple[tuple[MicroBatch, ...], ...]  # [rank][micro-batch]; every rank has the same number of micro-batches

_MOST_DEALT = 1 << 18  # pairs that are dealt to find the largest micro-batch: under a second


@dataclass(frozen=True)
class BatchConfig(Settings):
    """How many pairs are computed at once, and how many make a step."""

    # === Batch ===
    batch_size: Count = 16  # pairs per micro-batch per rank
    grad_accum_steps: Count = 8  # micro-batches per optimizer step


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The optimizer steps of training.

    An epoch is a shuffle of all pairs, cut into steps of `batch_size * grad_accum_steps * world_size` pairs. The last
    step of an epoch has what is left. Within a step the pairs are dealt so that every micro-batch has nearly the same
    number of packed rows. Where the pairs of a short step do not go round, some ranks' micro-batches are empty.
    """

    rows: np.ndarray  # (N,) packed rows of each pair
    seed: int
    world_size: int
    batch_size: int  # pairs per micro-batch per rank
    grad_accum_steps: int
    _drawn: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)  # the last epoch's shuffle

    @property
    def pairs_per_step(self) -> int:
        """Pairs of a full optimizer step, over all ranks."""
        return self.batch_size * self.grad_accum_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, a short last one included."""
        return -(-len(self.rows) // self.pairs_per_step)

    def shuffle(self, epoch: int) -> np.ndarray:
        """The order of all pairs in epoch `epoch` (from 0); independent of the world size and of any global state.

        Drawn when an epoch is first asked for and kept until another one is: N int64.
        """
        if epoch not in self._drawn:
            self._drawn.clear()  # first, so that there are never two
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            order.setflags(write=False)
            self._drawn[epoch] = order
        return self._drawn[epoch]

    def step(self, index: int) -> Step:
        """Optimizer step `index`, counted from 0 over all epochs."""
        epoch, within = divmod(index, self.steps_per_epoch)
        mine = self.shuffle(epoch)[within * self.pairs_per_step :][: self.pairs_per_step]
        micro_batches = -(-len(mine) // (self.batch_size * self.world_size))
        pairs = list(zip(mine.tolist(), self.rows[mine].tolist(), strict=True))
        hands = deal(pairs, self.world_size * micro_batches)
        return tuple(tuple(hands[rank :: self.world_size]) for rank in range(self.world_size))

    def rows_per_step(self, epoch: int) -> np.ndarray:
        """Packed rows of each step of an epoch (steps,) int64, over all ranks."""
        starts = np.arange(0, len(self.rows), self.pairs_per_step)
        return np.add.reduceat(self.rows[self.shuffle(epoch)], starts, dtype=np.int64)

    def largest_micro_batch(self, most_dealt: int = _MOST_DEALT) -> MicroBatch:
        """The micro-batch of the first epoch with the most packed rows, the first one of equals.

        Where the epoch has more than `most_dealt` pairs, only so many are dealt: the step with the most rows, the
        fullest step with a longest pair, and others spread evenly over the epoch. Dealing makes micro-batches of a
        step nearly equal, so what the rest could add is small.
        """
        steps = range(self.steps_per_epoch)
        if len(self.rows) > most_dealt:
            rows = self.rows_per_step(0)
            longest = np.flatnonzero(self.rows[self.shuffle(0)] == self.rows.max()) // self.pairs_per_step
            spread = np.linspace(0, len(steps) - 1, max(1, most_dealt // self.pairs_per_step)).astype(int)
            steps = sorted({int(rows.argmax()), int(longest[rows[longest].argmax()]), *spread.tolist()})
        micro_batches = (micro for index in steps for rank in self.step(index) for micro in rank if micro)
        return max(micro_batches, key=lambda micro: sum(self.rows[list(micro)].tolist()))


def deal(pairs: Sequence[tuple[int, int]], hands: int) -> list[MicroBatch]:
    """Deals `(pair, rows)` into `hands` micro-batches of equal pair count (within one) and nearly equal rows.

    Longest first to the hand with the fewest rows that still has room (LPT, Graham 1969). The first `len(pairs) %
    hands` hands have one pair more. Within a hand the order is that of `pairs`.
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

    order: np.ndarray  # positions of all pairs, longest first
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        turn = self.batch_size * self.world_size
        return (len(self.order) + turn - 1) // turn

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        turns = range(len(self))[index]  # IndexError beyond the end
        if isinstance(turns, range):
            return [self[turn] for turn in turns]
        start = (turns * self.world_size + self.rank) * self.batch_size
        return tuple(self.order[start : start + self.batch_size].tolist())


def sweep(rows: np.ndarray, batch_size: int, world_size: int) -> list[Share]:
    """One pass over all pairs without training (reference, evaluation): `[rank] -> micro-batches`, every pair once.

    Pairs of similar length share a micro-batch, and micro-batches go round the ranks, so the ranks end together.
    Every rank gets the same number of micro-batches, the last one of some ranks empty: with partitioned weights a
    forward is a collective.
    """
    order = np.argsort(-np.asarray(rows, np.int64), kind="stable")
    return [Share(order, batch_size, rank, world_size) for rank in range(world_size)]
