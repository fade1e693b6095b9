"""The order of an epoch in which some units stand more than once: each copy of a unit in a step of its own.

Copy k of c lies somewhere in the k-th c-th of the epoch, so that all parts of it have the same mixture. The few that
would meet at an edge between two of these parts trade places with others; where that is not enough, because steps are
few, all are dealt out one step after the other.
Shapes: U units with their copies, O units without.
"""

from __future__ import annotations

import numpy as np

_TRIES = 64  # places that are looked at for a copy; most are free
_MOST_TRADES = 1 << 16  # of an epoch: more take longer than dealing


def spread_copies(copies_U: np.ndarray, per_step: int, rng: np.random.Generator) -> np.ndarray:
    """The order (U,) of an epoch that is cut into steps of `per_step`: positions of units.

    No step has two copies of a unit, as far as there are as many steps as copies; of a unit with as many copies as
    steps, that the short last step has room for one of each.

    Args:
        copies_U: which copy of its unit each is, from 0; those of a unit stand next to each other.
    """
    owners_U = np.cumsum(copies_U == 0) - 1
    times_O = np.bincount(owners_U)
    steps = -(-len(copies_U) // per_step)
    keys_U = (copies_U + rng.random(len(copies_U))) / times_O[owners_U]
    order_U = np.argsort(keys_U, kind="stable")
    if times_O.max() < steps and _trade(order_U, owners_U, times_O, per_step, rng):
        return order_U
    return _dealt(owners_U, times_O, per_step, rng)


def _trade(
    order_U: np.ndarray, owners_U: np.ndarray, times_O: np.ndarray, per_step: int, rng: np.random.Generator
) -> bool:
    """Changes places in an order until no step has two copies of a unit; whether that was done."""
    places_U = np.empty_like(order_U)
    places_U[order_U] = np.arange(len(order_U))
    steps_U = places_U // per_step
    starts_O = np.cumsum(times_O) - times_O
    # places of a unit's copies rise with the copy, so that those of one step stand next to each other
    meets = np.flatnonzero((owners_U[1:] == owners_U[:-1]) & (steps_U[1:] == steps_U[:-1])) + 1
    if len(meets) > _MOST_TRADES:
        return False

    def steps_of(unit: int) -> np.ndarray:
        start = starts_O[owners_U[unit]]
        return places_U[start : start + times_O[owners_U[unit]]] // per_step

    for unit in meets.tolist():
        step = places_U[unit] // per_step
        for place in rng.integers(len(order_U), size=_TRIES).tolist():
            other = int(order_U[place])
            if place // per_step not in steps_of(unit) and step not in steps_of(other):
                order_U[places_U[unit]], order_U[place] = other, unit
                places_U[other], places_U[unit] = places_U[unit], place
                break
        else:
            return False
    return True


def _dealt(owners_U: np.ndarray, times_O: np.ndarray, per_step: int, rng: np.random.Generator) -> np.ndarray:
    """The copies of a unit after those of another, the most copies first, dealt to one step after the other: all steps
    while the last one has room, then all but the last."""
    count = len(owners_U)
    steps = -(-count // per_step)
    of_last = count - (steps - 1) * per_step
    ranks_O = np.empty(len(times_O), np.int64)
    ranks_O[np.lexsort((rng.random(len(times_O)), -times_O))] = np.arange(len(times_O))
    units_U = np.argsort(ranks_O[owners_U], kind="stable")
    dealt_U = np.arange(count)
    late_U = dealt_U - of_last * steps
    is_late_U = late_U >= 0
    rounds_U = np.where(is_late_U, of_last + late_U // max(1, steps - 1), dealt_U // steps)
    columns_U = np.where(is_late_U, late_U % max(1, steps - 1), dealt_U % steps)
    shuffled = np.append(rng.permutation(steps - 1), steps - 1)
    order_U = np.empty(count, np.int64)
    order_U[shuffled[columns_U] * per_step + rounds_U] = units_U
    return order_U
