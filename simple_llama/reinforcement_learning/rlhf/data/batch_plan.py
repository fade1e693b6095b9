"""Who trains on which pairs, when: a pure function of lengths and settings, the same on all ranks and restarts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MicroBatch = tuple[int, ...]  # positions of pairs in the data set
Step = tuple[tuple[MicroBatch, ...], ...]  # [rank][micro-batch]; every rank has the same number of micro-batches


@dataclass(frozen=True)
class BatchPlan:
    """The optimizer steps of training.

    An epoch is a shuffle of all pairs, cut into steps of `batch_size * grad_accum_steps * world_size` pairs. The last
    step of an epoch has what is left. Within a step the pairs are dealt so that every micro-batch has nearly the same
    number of packed rows. Where the pairs of a short step do not go round, some ranks' micro-batches are empty.
    """

    rows: tuple[int, ...]  # packed rows of each pair
    seed: int
    world_size: int
    batch_size: int  # pairs per micro-batch per rank
    grad_accum_steps: int

    @property
    def pairs_per_step(self) -> int:
        """Pairs of a full optimizer step, over all ranks."""
        return self.batch_size * self.grad_accum_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, a short last one included."""
        return -(-len(self.rows) // self.pairs_per_step)

    def shuffle(self, epoch: int) -> np.ndarray:
        """The order of all pairs in epoch `epoch` (from 0); independent of the world size and of any global state."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def step(self, index: int) -> Step:
        """Optimizer step `index`, counted from 0 over all epochs."""
        epoch, within = divmod(index, self.steps_per_epoch)
        chosen = self.shuffle(epoch)[within * self.pairs_per_step :][: self.pairs_per_step]
        micro_batches = -(-len(chosen) // (self.batch_size * self.world_size))
        hands = deal([(int(i), self.rows[i]) for i in chosen], self.world_size * micro_batches)
        return tuple(tuple(hands[rank :: self.world_size]) for rank in range(self.world_size))


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


def sweep(rows: Sequence[int], batch_size: int, world_size: int) -> list[list[MicroBatch]]:
    """One pass over all pairs without training (reference, evaluation): `[rank] -> micro-batches`, every pair once.

    Pairs of similar length share a micro-batch, and micro-batches go round the ranks, so the ranks end together.
    Every rank gets the same number of micro-batches, the last one of some ranks empty: with partitioned weights a
    forward is a collective.
    """
    order = sorted(range(len(rows)), key=lambda i: (-rows[i], i))
    batches = [tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    batches += [()] * (-len(batches) % world_size)
    return [batches[rank::world_size] for rank in range(world_size)]
