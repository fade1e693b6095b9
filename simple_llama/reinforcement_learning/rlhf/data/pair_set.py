"""All pairs of a run as arrays: the tokens of all of them in one, and 52 bytes a pair beside them.

Text is not kept: a pair knows the file and the record that it came from. N pairs.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from simple_llama.common.files import digest
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY

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
_PACKED_KEY, _PACKED_PLACE = struct.Struct("<16s2i"), struct.Struct("<q4iI")  # KEY and PLACE, one at a time


@dataclass(frozen=True, eq=False)
class PairSet(Sequence[TokenizedPair]):
    """Pairs in order. `pairs[i]` is a TokenizedPair whose arrays are views; subsets share the tokens."""

    tokens: np.ndarray  # int32 ids of all pairs
    keys: np.ndarray  # (N,) of KEY: digests and scored counts, as the reference store asks for them
    places: np.ndarray  # (N,) of PLACE
    files: tuple[str, ...]  # names of the data files

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
        return TokenizedPair(
            prefix=self.tokens[start:branches],
            chosen=self.tokens[branches : branches + chosen],
            rejected=self.tokens[branches + chosen : branches + chosen + rejected],
            chosen_scored=chosen_scored,
            rejected_scored=rejected_scored,
            digest=name,
        )

    def select(self, positions: Sequence[int] | np.ndarray | slice) -> PairSet:
        """The pairs at these positions, in this order; their tokens are not copied."""
        where = positions if isinstance(positions, slice) else np.asarray(positions, dtype=np.intp)
        return PairSet(self.tokens, self.keys[where], self.places[where], self.files)

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
    def digest(self) -> bytes:
        """16 bytes over the digests of all pairs in order."""
        return digest(self.keys["digest"].tobytes())

    @property
    def nbytes(self) -> int:
        """Bytes that the set needs beside the tokens."""
        return self.keys.nbytes + self.places.nbytes


class PairBuffer:
    """Pairs that are still being read: buffers that grow, of which `finish` makes a set without copying the tokens."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._keys, self._places = bytearray(), bytearray()
        self._files: dict[str, int] = {}

    def append(self, pair: TokenizedPair, file: str, record: int) -> None:
        """Adds a pair that came from this record."""
        number = self._files.setdefault(file, len(self._files))
        parts = (pair.prefix, pair.chosen, pair.rejected)
        self._places += _PACKED_PLACE.pack(len(self._tokens), *map(len, parts), number, record)
        self._keys += _PACKED_KEY.pack(pair.digest, pair.chosen_scored, pair.rejected_scored)
        for part in parts:
            self._tokens.frombytes(part.astype(np.int32, copy=False).tobytes())

    def finish(self) -> PairSet:
        """All pairs in the order they came; the buffer takes no more."""
        tokens = np.frombuffer(self._tokens, np.int32)
        keys, places = np.frombuffer(self._keys, KEY), np.frombuffer(self._places, PLACE)
        return PairSet(tokens, keys, places, tuple(self._files))
