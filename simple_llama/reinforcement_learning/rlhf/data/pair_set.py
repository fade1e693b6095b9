"""All pairs of a run as arrays: the tokens of all of them in one, and 52 bytes a pair beside them; 16 more where a
pair has a weight or a gap, 44 where records have more than two answers.

Text is not kept: a pair knows the file and the record that it came from. N pairs; U units, each the pairs of a record.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from simple_llama.common.files import digest
from simple_llama.reinforcement_learning.rlhf.data.group_table import GroupBuffer, GroupTable
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import front_keys
from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY, Entries
from simple_llama.reinforcement_learning.rlhf.data.span_table import SpanBuffer, SpanTable
from simple_llama.reinforcement_learning.rlhf.data.token_files import TokenFiles
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair, common_prefix

# Where the tokens of a pair begin, how many it has (prefix, then chosen, then rejected; those of a group lie where its
# table says), and where its text is.
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
USUAL_STRENGTH = np.array((1.0, math.nan), _STRENGTH)


@dataclass(frozen=True, eq=False)
class PairSet(Sequence[TokenizedPair]):
    """Pairs in order. `pairs[i]` is a TokenizedPair whose arrays are views; subsets share the tokens."""

    tokens: np.ndarray | TokenFiles  # int32 ids of all pairs
    keys: np.ndarray  # (N,) of KEY: digests and scored counts, as the reference store asks for them
    places: np.ndarray  # (N,) of PLACE
    files: tuple[str, ...]  # names of the data files
    strengths: np.ndarray | None = None  # (N,) of _STRENGTH; None: no pair has a weight or a gap
    spans: SpanTable | None = None  # None: each pair scores the last tokens of its chats
    groups: GroupTable | None = None  # None: each pair is of a record of its own
    segments: np.ndarray | None = None  # (N,) int32: neighbours of one number share a segment; None: those of a group
    shares: np.ndarray | None = None  # (N,) fp64: what each counts for in a mean; None: 1
    copies: np.ndarray | None = None  # (N,) uint16: which copy of its pair each is, from 0; None: there are none

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
        group, chosen_at, rejected_at, answers = -1, prefix, prefix + chosen, None
        if self.groups is not None and self.groups.places["group"][index] >= 0:
            group, chosen_at, rejected_at, names = self.groups.places[index].item()
            answers = names[0].tobytes(), names[1].tobytes()
        weight, gap = (1.0, math.nan) if self.strengths is None else self.strengths[index].item()
        share = 1.0 if self.shares is None else self.shares.item(index)
        return TokenizedPair(
            prefix=self.tokens[start : start + prefix],
            chosen=self.tokens[start + chosen_at : start + chosen_at + chosen],
            rejected=self.tokens[start + rejected_at : start + rejected_at + rejected],
            chosen_scored=chosen_scored,
            rejected_scored=rejected_scored,
            digest=name,
            weight=weight * share,
            gap=None if math.isnan(gap) else gap,
            spans=None if self.spans is None else self.spans[index],
            group=group,
            segment=group if self.segments is None else self.segments.item(index),
            share=share,
            answers=answers,
        )

    def select(self, positions: Sequence[int] | np.ndarray | slice) -> PairSet:
        """The pairs at these positions, in this order; their tokens are not copied."""
        where = positions if isinstance(positions, slice) else np.asarray(positions, dtype=np.intp)
        arrays = (self.strengths, self.segments, self.shares, self.copies)
        strengths, segments, shares, copies = (None if one is None else one[where] for one in arrays)
        spans = None if self.spans is None else self.spans.select(where)
        groups = None if self.groups is None else self.groups.select(where)
        rest = strengths, spans, groups, segments, shares, copies
        return PairSet(self.tokens, self.keys[where], self.places[where], self.files, *rest)

    def by_prompt(self) -> PairSet:
        """The same pairs; those of one prompt that stand next to each other in a batch share a segment."""
        return replace(self, segments=self.prompts)

    def shared_out(self) -> PairSet:
        """The same pairs; those of a record count together for as much as a pair that is of its own."""
        starts_U = self.units
        sizes_U = np.diff([*starts_U, len(self)])
        return replace(self, shares=np.repeat(1 / sizes_U, sizes_U))

    def repeated(self, times_U: np.ndarray) -> PairSet:
        """Each unit so many times, its copies next to each other; tokens are not copied."""
        starts_U = self.units
        sizes_U = np.diff(np.append(starts_U, len(self)))
        units_C = np.repeat(np.arange(len(starts_U)), times_U)
        sizes_C = sizes_U[units_C]
        copies_C = np.arange(len(units_C)) - np.repeat(np.cumsum(times_U) - times_U, times_U)
        ends_C = np.cumsum(sizes_C)
        found = self.select(np.repeat(starts_U[units_C] + sizes_C - ends_C, sizes_C) + np.arange(sizes_C.sum()))
        numbers_C = np.repeat(np.arange(len(units_C)), sizes_C)
        groups = None if found.groups is None else found.groups.numbered(numbers_C)
        return replace(found, groups=groups, copies=np.repeat(copies_C, sizes_C).astype(np.uint16))

    @property
    def units(self) -> np.ndarray:
        """Where each unit begins (U,)."""
        return np.arange(len(self)) if self.groups is None else self.groups.starts()

    @property
    def unit_rows(self) -> np.ndarray:
        """Packed rows of each unit (U,)."""
        if self.groups is None:
            return self.rows
        branches_N2 = np.stack([self.places["chosen"], self.places["rejected"]], axis=1)
        return self.groups.rows(self.units, self.places["prefix"], branches_N2)

    @property
    def token_array(self) -> np.ndarray:
        """The tokens of pairs that were read just now, which lie in one array."""
        assert isinstance(self.tokens, np.ndarray)
        return self.tokens

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

    def entries(self, fronts: bool = False) -> Entries:
        """What a reference store is asked for: its entries of the pairs, and of their fronts where these are needed."""
        keys = front_keys(self) if fronts else None
        if self.groups is None:
            return Entries.of(self.keys, (), np.empty((0, 2), "V16"), keys)
        places = self.groups.by_answer
        return Entries.of(self.keys, places, self.groups.places["answers"][places], keys)

    @property
    def weights(self) -> np.ndarray:
        """The factor of each pair's loss (N,) fp64."""
        own = np.ones(len(self)) if self.strengths is None else self.strengths["weight"]
        return own if self.shares is None else own * self.shares

    @property
    def group_numbers(self) -> np.ndarray:
        """(N,) int64: pairs of one record have one number, all others numbers of their own below 0."""
        own = -1 - np.arange(len(self))
        return (
            own if self.groups is None else np.where(self.groups.places["group"] < 0, own, self.groups.places["group"])
        )

    @property
    def total(self) -> float:
        """What its pairs count for in a mean, together: their number, or that of records."""
        return float(len(self) if self.shares is None else self.shares.sum())

    @property
    def gaps(self) -> np.ndarray:
        """The reward gap of each pair (N,) fp64; NaN where it has none."""
        return np.full(len(self), math.nan) if self.strengths is None else self.strengths["gap"]

    @property
    def is_weighted(self) -> bool:
        """Whether a pair has another weight than 1."""
        return self.strengths is not None and bool((self.strengths["weight"] != 1).any())

    @property
    def digest(self) -> bytes:
        """16 bytes over the digests of all pairs in order, their weights and gaps where one has any, and which are of
        one record."""
        parts = [self.keys["digest"].tobytes()]
        if self.strengths is not None and (self.is_weighted or np.isfinite(self.gaps).any()):
            parts.append(self.strengths.tobytes())
        if self.groups is not None:
            parts.append(self.units.astype("<i8").tobytes())
        return digest(*parts)

    @property
    def nbytes(self) -> int:
        """Bytes that the set needs beside the tokens."""
        tables = (self.groups and self.groups.places, self.strengths, self.segments, self.shares, self.copies)
        others = (part.nbytes for part in (*tables, self.spans) if part is not None)
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
        self._spans, self._groups = SpanBuffer(), GroupBuffer()
        self._files: dict[str, int] = {}
        self._slots = array("i", [_FREE]) * _FIRST_SLOTS  # position of a pair whose digest starts its search here

    def __len__(self) -> int:
        return len(self._keys) // KEY.itemsize

    def position(self, name: bytes) -> int:
        """The position of the pair with this digest; below 0 where there is none."""
        return self._slots[self._slot(name)]

    def append(self, pair: TokenizedPair, file: str, record: int) -> None:
        """Adds a pair that came from this record."""
        parts = pair.prefix, pair.chosen, pair.rejected
        self._note(pair, file, record, len(self._tokens), parts)
        self._take(*parts)

    def append_group(self, pairs: Sequence[TokenizedPair], file: str, record: int) -> None:
        """Adds pairs of one record: each of its answers is kept once, behind what all its chats begin with."""
        if len(pairs) == 1:
            return self.append(pairs[0], file, record)
        start, shared = len(self._tokens), common_prefix(pairs)
        self._take(pairs[0].prefix[:shared])
        offsets: dict[bytes, int] = {}
        for pair in pairs:
            branches = [whole[shared:] for whole in pair.wholes]
            for name, branch in zip(pair.answer_names, branches, strict=True):
                if name not in offsets:
                    offsets[name] = len(self._tokens) - start
                    self._take(branch)
            chosen, rejected = (offsets[name] for name in pair.answer_names)
            self._groups.append((chosen, rejected), pair.answer_names, len(self), first=pair is pairs[0])
            self._note(pair, file, record, start, (pair.prefix[:shared], *branches))

    def _take(self, *parts: np.ndarray) -> None:
        """Keeps tokens."""
        self._tokens.frombytes(b"".join([ids.astype(np.int32, copy=False).tobytes() for ids in parts]))

    def _note(self, pair: TokenizedPair, file: str, record: int, start: int, parts: tuple[np.ndarray, ...]) -> None:
        """Adds what stands beside a pair's tokens, which begin at `start`, in these parts."""
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
        self._places += _PACKED_PLACE.pack(start, *map(len, parts), number, record)
        self._keys += _PACKED_KEY.pack(pair.digest, pair.chosen_scored, pair.rejected_scored)

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
        spans, groups = self._spans.finish(len(self)), self._groups.finish(len(self))
        known = strengths if len(strengths) else None
        return PairSet(tokens, keys, places, tuple(self._files), known, spans, groups)

    def _fill_strengths(self) -> None:
        """Notes that the pairs since the last one which has a weight or a gap have none."""
        self._strengths += USUAL_STRENGTH.tobytes() * (len(self) - len(self._strengths) // _STRENGTH.itemsize)

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
