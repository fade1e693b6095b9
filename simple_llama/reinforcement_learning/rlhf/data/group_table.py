"""Which pairs are of one record with several answers: they share its tokens, and what a store keeps is of its answers.

44 bytes a pair; sets without such records have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A pair's group, where the branches of its answers begin behind the start of its prefix, and the answers' names; a pair
# that is of no group has number -1.
_PLACE = np.dtype([("group", "<i4"), ("chosen_at", "<i4"), ("rejected_at", "<i4"), ("answers", "V16", (2,))])
NO_GROUP = np.array((-1, 0, 0, (bytes(16), bytes(16))), _PLACE)


@dataclass(frozen=True, eq=False)
class GroupTable:
    """Groups of N pairs. Those of one group stand next to each other."""

    places: np.ndarray  # (N,) of _PLACE

    def select(self, where: Sequence[int] | np.ndarray | slice) -> GroupTable:
        """Those of the pairs at these positions, in this order."""
        return GroupTable(self.places[where])

    def numbered(self, numbers_N: np.ndarray) -> GroupTable:
        """The same pairs, those of groups with other numbers of their groups."""
        places = self.places.copy()
        places["group"] = np.where(places["group"] < 0, -1, numbers_N)
        return GroupTable(places)

    @property
    def count(self) -> int:
        """How many groups there are."""
        numbers = self.places["group"]
        return len(np.unique(numbers[numbers >= 0]))

    @property
    def by_answer(self) -> np.ndarray:
        """Positions of the pairs that are of a group."""
        return np.flatnonzero(self.places["group"] >= 0)

    def are_chains(self, starts_U: np.ndarray) -> bool:
        """Whether in each group, of units that begin there, a pair's rejected answer is the next pair's chosen one."""
        return not len(self.breaks(starts_U))

    def breaks(self, starts_U: np.ndarray) -> np.ndarray:
        """Positions of pairs whose chosen answer is not the rejected one of the pair before them in their group."""
        follows = np.ones(len(self.places), bool)
        follows[starts_U] = False
        behind = np.flatnonzero(follows)
        return behind[self.places["chosen_at"][behind] != self.places["rejected_at"][behind - 1]]

    def starts(self) -> np.ndarray:
        """Where each unit begins (U,): all pairs of a group, or a pair that is of none."""
        groups = self.places["group"]
        begins = np.ones(len(groups), bool)
        begins[1:] = (groups[1:] < 0) | (groups[1:] != groups[:-1])
        return np.flatnonzero(begins)

    def rows(self, starts_U: np.ndarray, prefix_N: np.ndarray, branches_N2: np.ndarray) -> np.ndarray:
        """Packed rows (U,) of units that begin there: the prefix once, each answer once, without its last token.

        Args:
            prefix_N, branches_N2: tokens of each pair's prefix, and of both its branches.
        """
        unit_N = np.repeat(np.arange(len(starts_U)), np.diff([*starts_U, len(prefix_N)]))
        offsets_N2 = np.stack([self.places["chosen_at"], self.places["rejected_at"]], axis=1).astype(np.int64)
        offsets_N2[self.places["group"] < 0] = (0, 1)
        sides = (unit_N[:, None] << 32) + offsets_N2
        _, first = np.unique(sides.ravel(), return_index=True)
        rows_U = np.bincount(first // 2, weights=branches_N2.ravel()[first] - 1, minlength=len(prefix_N))
        return prefix_N[starts_U] + np.bincount(unit_N, weights=rows_U, minlength=len(starts_U)).astype(np.int64)


class GroupBuffer:
    """Groups of pairs that are still being read."""

    def __init__(self) -> None:
        self._places = bytearray()
        self._count = 0

    def append(self, offsets: tuple[int, int], answers: tuple[bytes, bytes], before: int, first: bool) -> None:
        """Adds a pair of a group behind `before` pairs; `first` of its group."""
        self._fill(before)
        self._count += first
        self._places += np.array([(self._count - 1, *offsets, answers)], _PLACE).tobytes()

    def finish(self, pairs: int) -> GroupTable | None:
        """The table of so many pairs; None where none is of a group."""
        if not self._places:
            return None
        self._fill(pairs)
        places = np.frombuffer(self._places, _PLACE)
        places.setflags(write=False)
        return GroupTable(places)

    def _fill(self, pairs: int) -> None:
        """Notes that the pairs up to so many are of no group."""
        missing = pairs - len(self._places) // _PLACE.itemsize
        self._places += NO_GROUP.tobytes() * missing
