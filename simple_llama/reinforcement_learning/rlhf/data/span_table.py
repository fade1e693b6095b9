"""Which tokens of pairs are scored where these are not the last ones of each chat alone: spans of all pairs, as arrays.

16 bytes a pair and 8 a span; pairs that score last tokens alone have none.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import Spans

_PLACE = np.dtype([("start", "<i8"), ("chosen", "<i4"), ("rejected", "<i4")])  # a pair's first span, and how many
NO_SPANS = np.zeros((), _PLACE)
_PACKED_PLACE = struct.Struct("<q2i")


@dataclass(frozen=True, eq=False)
class SpanTable:
    """Spans of N pairs. `table[i]` is that of `TokenizedPair.spans`."""

    spans: np.ndarray  # (S, 2) int32 of all pairs: start and stop in a whole chat
    places: np.ndarray  # (N,) of _PLACE

    def __getitem__(self, index: int) -> tuple[Spans, Spans] | None:
        start, chosen, rejected = self.places[index].item()
        if not chosen:
            return None
        found: list[tuple[int, int]] = [(a, b) for a, b in self.spans[start : start + chosen + rejected].tolist()]
        return tuple(found[:chosen]), tuple(found[chosen:])

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.spans.nbytes + self.places.nbytes

    def select(self, where: Sequence[int] | np.ndarray | slice) -> SpanTable:
        """Those of the pairs at these positions, in this order."""
        return SpanTable(self.spans, self.places[where])


class SpanBuffer:
    """Spans of pairs that are still being read."""

    def __init__(self) -> None:
        self._spans, self._places = array("i"), bytearray()

    def append(self, spans: tuple[Spans, Spans], before: int) -> None:
        """Adds those of a pair behind `before` others, of which the newest may have none."""
        self._fill(before)
        self._places += _PACKED_PLACE.pack(len(self._spans) // 2, *map(len, spans))
        for side in spans:
            for span in side:
                self._spans.extend(span)

    def finish(self, pairs: int) -> SpanTable | None:
        """The table of so many pairs; None where none has any."""
        if not self._places:
            return None
        self._fill(pairs)
        table = SpanTable(np.frombuffer(self._spans, np.int32).reshape(-1, 2), np.frombuffer(self._places, _PLACE))
        for part in (table.spans, table.places):
            part.setflags(write=False)
        return table

    def _fill(self, pairs: int) -> None:
        """Notes that the pairs up to so many have none."""
        self._places += NO_SPANS.tobytes() * (pairs - len(self._places) // _PLACE.itemsize)
