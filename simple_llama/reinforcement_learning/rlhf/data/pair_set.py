"""All pairs of a run as arrays: the tokens of all of them in one, and 52 bytes a pair beside them; 16 more where a
pair has a weight or a gap.

Text is not kept: a pair knows the file and the record that it came from. N pairs.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from simple_llama.common.files import digest
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import TokenizedPair, front_keys
from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY
from simple_llama.reinforcement_learning.rlhf.data.span_table import SpanBuffer, SpanTable

# Where the tokens of a pair begin, how many it has (prefix, then chosen, then rejected), and where its text is.
PLACE = np.dtype(
    [
        ("start", "<i8"),
        ("prefix", "<i4"),
        ("chosen", "<i4"),
        ("rejected", "<i4"),
        ("file", "<i4"),
        ("record", "<u4"),
    ]
)
_STRENGTH = np.dtype([("weight", "<f8"), ("gap", "<f8")])  # a gap that is not given is NaN
_FREE, _FIRST_SLOTS = -1, 1 << 10  # of the table in PairBuffer
_PACKED_KEY, _PACKED_PLACE = struct.Struct("<16s2i"), struct.Struct("<q4iI")  # KEY and PLACE, one at a time
_PACKED_STRENGTH = struct.Struct("<2d")
_USUAL = _PACKED_STRENGTH.pack(1.0, math.nan)


@dataclass(frozen=True, eq=False)
class PairSet(Sequence[TokenizedPair]):
    """Pairs in order. `pairs[i]` is a TokenizedPair whose arrays are views; subsets share the tokens."""

    tokens: np.ndarray  # int32 ids of all pairs
    keys: np.ndarray  # (N,) of KEY: digests and scored counts, as the reference store asks for them
    places: np.ndarray  # (N,) of PLACE
    files: tuple[str, ...]  # names of the data files
    strengths: np.ndarray | None = None  # (N,) of _STRENGTH; None: no pair has a weight or a gap
    spans: SpanTable | None = None  # None: each pair scores the last tokens of its chats

    @classmethod
    def of(cls, pairs: Iterable[TokenizedPair], origins: Iterable[tuple[str, int]] | None = None) -> PairSet:
        """Pairs that are at hand, with the file and the record of each."""
        buffer = PairBuffer()
        listed = list(pairs)
        places = list(origins) if origins is not None else [("pairs", number) for number in range(1, len(listed) + 1)]
        for pair, (file, record) in zip(listed, places, strict=True):
            buffer.append(pair, file, record)
        return buffer.finish()

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> PairSet: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | PairSet:
        if isinstance(index, slice):
            return self.select(index)
        start, prefix, chosen, rejected, _, _ = self.places[index].item()
        name, chosen_scored, rejected_scored = _PACKED_KEY.unpack(self.keys[index].tobytes())
        branches = start + prefix
        weight, gap = (1.0, math.nan) if self.strengths is None else self.strengths[index].item()
        return TokenizedPair(
            prefix=self.tokens[start:branches],
            chosen=self.tokens[branches : branches + chosen],
            rejected=self.tokens[branches + chosen : branches + chosen + rejected],
            chosen_scored=chosen_scored,
            rejected_scored=rejected_scored,
            digest=name,
            weight=weight,
            gap=None if math.isnan(gap) else gap,
            spans=None if self.spans is None else self.spans[index],
        )

    def select(self, positions: Sequence[int] | np.ndarray | slice) -> PairSet:
        """The pairs at these positions, in this order; their tokens are not copied."""
        where = positions if isinstance(positions, slice) else np.asarray(positions, dtype=np.intp)
        strengths = None if self.strengths is None else self.strengths[where]
        spans = None if self.spans is None else self.spans.select(where)
        return PairSet(self.tokens, self.keys[where], self.places[where], self.files, strengths, spans)

    def origin(self, index: int) -> str:
        """`file:record` of a pair, for messages."""
        return f"{self.files[self.places['file'][index]]}:{self.places['record'][index]}"

    @property
    def rows(self) -> np.ndarray:
        """Packed rows of each pair (N,) int32, as TokenizedPair.rows."""
        return self.places["prefix"] + self.places["chosen"] + self.places["rejected"] - np.int32(2)

    @property
    def chosen_len(self) -> np.ndarray:
        """Tokens of each whole chosen chat (N,) int32."""
        return self.places["prefix"] + self.places["chosen"]

    @property
    def rejected_len(self) -> np.ndarray:
        """Tokens of each whole rejected chat (N,) int32."""
        return self.places["prefix"] + self.places["rejected"]

    @property
    def prompts(self) -> np.ndarray:
        """The number of each pair's prompt (N,) int32, from 0: pairs that answer one prompt have one number."""
        numbers: dict[bytes, int] = {}
        found = (numbers.setdefault(pair.prompt_ids.tobytes(), len(numbers)) for pair in self)
        return np.fromiter(found, np.int32, len(self))

    @property
    def longer_is_chosen(self) -> float:
        """Share of pairs whose chosen answer has more tokens, ties one half: what a rule that reads nothing scores."""
        chosen, rejected = self.keys["counts"].T
        return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))

    def names(self, fronts: bool) -> np.ndarray:
        """What a reference store is asked for: the keys, and behind them those of all fronts where these are needed."""
        return np.concatenate([self.keys, front_keys(self)]) if fronts else self.keys

    @property
    def weights(self) -> np.ndarray:
        """The factor of each pair's loss (N,) fp64."""
        return np.ones(len(self)) if self.strengths is None else self.strengths["weight"]

    @property
    def gaps(self) -> np.ndarray:
        """The reward gap of each pair (N,) fp64; NaN where it has none."""
        return np.full(len(self), math.nan) if self.strengths is None else self.strengths["gap"]

    @property
    def is_weighted(self) -> bool:
        """Whether a pair has another weight than 1."""
        return self.strengths is not None and bool((self.weights != 1).any())

    @property
    def digest(self) -> bytes:
        """16 bytes over the digests of all pairs in order, and their weights and gaps where one has any."""
        names = self.keys["digest"].tobytes()
        if self.strengths is None or not (self.is_weighted or np.isfinite(self.gaps).any()):
            return digest(names)
        return digest(names, self.strengths.tobytes())

    @property
    def nbytes(self) -> int:
        """Bytes that the set needs beside the tokens."""
        others = (part.nbytes for part in (self.strengths, self.spans) if part is not None)
        return self.keys.nbytes + self.places.nbytes + sum(others)


class PairBuffer:
    """Pairs that are still being read: buffers that grow, of which `finish` makes a set without copying them.

    Which digests it has is kept in a hash table of positions with open addressing: 8 to 16 bytes a pair, where a set of
    them would take a hundred.
    """

    def __init__(self) -> None:
        self._tokens = array("i")
        self._keys, self._places = bytearray(), bytearray()
        self._strengths = bytearray()  # of the pairs up to the last that has a weight or a gap
        self._spans = SpanBuffer()
        self._files: dict[str, int] = {}
        self._slots = array("i", [_FREE]) * _FIRST_SLOTS  # position of a pair whose digest starts its search here

    def __len__(self) -> int:
        return len(self._keys) // KEY.itemsize

    def __contains__(self, name: bytes) -> bool:
        """Whether a pair with this digest is there."""
        return self._slots[self._slot(name)] != _FREE

    def append(self, pair: TokenizedPair, file: str, record: int) -> None:
        """Adds a pair that came from this record."""
        if 2 * len(self) >= len(self._slots):
            self._grow()
        if self._slots[slot := self._slot(pair.digest)] == _FREE:
            self._slots[slot] = len(self)
        if pair.weight != 1 or pair.gap is not None:
            self._fill_strengths()
            self._strengths += _PACKED_STRENGTH.pack(pair.weight, math.nan if pair.gap is None else pair.gap)
        if pair.spans:
            self._spans.append(pair.spans, len(self))
        number = self._files.setdefault(file, len(self._files))
        parts = (pair.prefix, pair.chosen, pair.rejected)
        self._places += _PACKED_PLACE.pack(len(self._tokens), *map(len, parts), number, record)
        self._keys += _PACKED_KEY.pack(pair.digest, pair.chosen_scored, pair.rejected_scored)
        for part in parts:
            self._tokens.frombytes(part.astype(np.int32, copy=False).tobytes())

    def finish(self) -> PairSet:
        """All pairs in the order they came; the buffer takes no more."""
        self._slots = array("i")
        tokens = np.frombuffer(self._tokens, np.int32)
        keys, places = np.frombuffer(self._keys, KEY), np.frombuffer(self._places, PLACE)
        if self._strengths:
            self._fill_strengths()
        strengths = np.frombuffer(self._strengths, _STRENGTH)
        for part in (tokens, keys, places, strengths):
            part.setflags(write=False)  # pairs are views of them
        spans = self._spans.finish(len(self))
        return PairSet(tokens, keys, places, tuple(self._files), strengths if len(strengths) else None, spans)

    def _fill_strengths(self) -> None:
        """Notes that the pairs since the last one which has a weight or a gap have none."""
        self._strengths += _USUAL * (len(self) - len(self._strengths) // _STRENGTH.itemsize)

    def _slot(self, name: bytes) -> int:
        """Where the position of the pair with this digest is, or is to be."""
        last = len(self._slots) - 1  # their number is a power of two
        slot = int.from_bytes(name[:8], "little") & last
        while (position := self._slots[slot]) != _FREE:
            start = KEY.itemsize * position
            if self._keys[start : start + len(name)] == name:
                break
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        """Twice the slots."""
        self._slots = array("i", [_FREE]) * (2 * len(self._slots))
        last = len(self._slots) - 1
        for position in range(len(self)):
            start = KEY.itemsize * position
            slot = int.from_bytes(self._keys[start : start + 8], "little") & last
            while self._slots[slot] != _FREE:
                slot = (slot + 1) & last
            self._slots[slot] = position
