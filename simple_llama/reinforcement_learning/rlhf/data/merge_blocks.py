"""The pairs of a data set from those of its blocks, each read by itself: the same pairs as in one reading.

A block has left out what is wrong with a pair alone, and the repetitions within it. What is left for all of them: pairs
that stand in an earlier block too are left out, and those are noticed whose answers stand the other way round before
them. N pairs of all blocks in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from simple_llama.dataset.json_records import KeptCount, Tally
from simple_llama.reinforcement_learning.rlhf.data.data_report import BOTH_WAYS, LIKE_A_TURN, ODD_TURN, Unknown
from simple_llama.reinforcement_learning.rlhf.data.group_table import NO_GROUP, GroupTable
from simple_llama.reinforcement_learning.rlhf.data.pair_set import USUAL_STRENGTH, PairSet
from simple_llama.reinforcement_learning.rlhf.data.span_table import NO_SPANS, SpanTable
from simple_llama.reinforcement_learning.rlhf.data.token_files import TokenFiles
from simple_llama.reinforcement_learning.rlhf.data.unknown_tokens import unknown_of
from simple_llama.reinforcement_learning.rlhf.data.usable_pairs import CONTRADICTORY, DUPLICATE, HELD_OUT

_First = tuple[int, int]  # block, record within it


class BlockPairs(NamedTuple):
    """What was made of a block."""

    file: str
    first: int  # number of its first record in the file
    is_held: bool  # whether its file is held out
    arrays: Mapping[str, np.ndarray]  # tokens, keys, places, shares, swapped, odd, and what else its pairs have
    facts: Mapping[str, Any]  # counts


class Merged(NamedTuple):
    """What was made of all blocks."""

    pairs: PairSet
    shares: np.ndarray  # (N,) where the prompt of each stands in [0, 1)
    count: KeptCount
    extra_keys: Tally
    spelled: tuple[int, int, str]  # characters, pairs, the first one's origin
    unknown: Unknown


def merge(blocks: Sequence[BlockPairs], drop_contradictions: bool) -> Merged | None:
    """All pairs that stay. None where only one reading can tell: a record with more than two answers loses a pair, so
    that others of its pairs may be compared.

    Args:
        drop_contradictions: see `Usable`. A contradictory pair that stands twice in a block counts as a duplicate once.
    """
    keys = _joined(blocks, "keys")
    block_N = np.repeat(np.arange(len(blocks)), [len(block.arrays["keys"]) for block in blocks])
    numbers_N2 = np.ascontiguousarray(keys["digest"]).view("<u8").reshape(-1, 2)
    order_N = np.lexsort((numbers_N2[:, 1], numbers_N2[:, 0]))  # stable: of equal digests the first one leads
    earlier_N = _earlier(numbers_N2, order_N)
    first_N = earlier_N == np.arange(len(keys))
    held_N = np.array([block.is_held for block in blocks])[block_N]
    places, groups, spans = _places(blocks), _groups(blocks), _spans(blocks)
    counts = _Counts(blocks, block_N, places["record"])
    twin_N = _twins(numbers_N2, order_N, _joined(blocks, "swapped"))
    turned_N = (twin_N >= 0) & (twin_N < earlier_N)
    refuted_N = np.zeros(len(keys), bool)
    if drop_contradictions:
        later_N = (twin_N > earlier_N) & first_N
        refuted_N = turned_N | (later_N & ~(held_N & ~held_N[twin_N]))
        counts.drop(CONTRADICTORY, refuted_N)
    stays_N = first_N & ~refuted_N
    if groups is not None and (groups["group"][~stays_N] >= 0).any():
        return None
    both_N = held_N[earlier_N] & ~held_N
    counts.drop(HELD_OUT, ~first_N & ~refuted_N & both_N)
    counts.drop(DUPLICATE, ~first_N & ~refuted_N & ~both_N)
    if not drop_contradictions:
        counts.notice(BOTH_WAYS, turned_N & first_N)
    counts.notice(LIKE_A_TURN, stays_N & (_joined(blocks, "odd") & ODD_TURN > 0))
    firsts = np.array([block.first for block in blocks], np.int64)
    places["record"] += (firsts - 1)[block_N].astype(np.uint32)
    used = np.unique(block_N[stays_N])
    names = list(dict.fromkeys(blocks[number].file for number in used))
    places["file"] = np.array([names.index(one.file) if one.file in names else 0 for one in blocks], np.int32)[block_N]
    table = None if spans is None else SpanTable(*spans)
    ranked = None if groups is None else GroupTable(groups)
    tokens = TokenFiles([block.arrays["tokens"] for block in blocks])
    pairs, shares = (
        PairSet(tokens, keys, places, tuple(names), _strengths(blocks), table, ranked),
        _joined(blocks, "shares"),
    )
    unknown_N2 = _filled(blocks, "unknown", np.zeros(2, np.int32))
    if not stays_N.all():
        kept = np.flatnonzero(stays_N)
        pairs, shares = pairs.select(kept), shares[kept]
        unknown_N2 = None if unknown_N2 is None else unknown_N2[kept]
    unknown = unknown_of(pairs, unknown_N2)
    return Merged(pairs, shares, counts.count(), counts.tally("extra_keys"), counts.spelled(), unknown)


def _joined(blocks: Sequence[BlockPairs], name: str) -> np.ndarray:
    """An array of all blocks, copied."""
    return np.concatenate([block.arrays[name] for block in blocks])


def _filled(blocks: Sequence[BlockPairs], name: str, none: np.ndarray) -> np.ndarray | None:
    """An array that some blocks have, with a row for the pairs of the others; None where no block has it."""
    if not any(name in block.arrays for block in blocks):
        return None
    sizes = (len(block.arrays["keys"]) for block in blocks)
    parts = (block.arrays.get(name, np.repeat(none[None], n, axis=0)) for block, n in zip(blocks, sizes, strict=True))
    return np.concatenate(list(parts))


def _strengths(blocks: Sequence[BlockPairs]) -> np.ndarray | None:
    """Weights and gaps."""
    return _filled(blocks, "strengths", USUAL_STRENGTH)


def _places(blocks: Sequence[BlockPairs]) -> np.ndarray:
    """Where the tokens of each pair begin among those of all blocks; records are counted within a block."""
    places, tokens, done = _joined(blocks, "places"), 0, 0
    for block in blocks:
        places["start"][done : (done := done + len(block.arrays["places"]))] += tokens
        tokens += len(block.arrays["tokens"])
    return places


def _groups(blocks: Sequence[BlockPairs]) -> np.ndarray | None:
    """Which pairs are of one record, numbered through all blocks."""
    groups = _filled(blocks, "groups", NO_GROUP)
    if groups is None:
        return None
    number = done = 0
    for block in blocks:
        mine = groups["group"][done : (done := done + len(block.arrays["keys"]))]
        count = int(mine.max(initial=-1)) + 1
        mine[mine >= 0] += number
        number += count
    return groups


def _spans(blocks: Sequence[BlockPairs]) -> tuple[np.ndarray, np.ndarray] | None:
    """Spans of all pairs, and where each pair's are."""
    places = _filled(blocks, "span_places", NO_SPANS)
    if places is None:
        return None
    parts = [block.arrays["spans"] for block in blocks if "spans" in block.arrays]
    spans = done = 0
    for block in blocks:
        places["start"][done : (done := done + len(block.arrays["keys"]))] += spans
        spans += len(block.arrays.get("spans", ()))
    return np.concatenate(parts), places


def _earlier(numbers_N2: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    """The position of the first pair with each one's digest (N,). Args: order_N sorts the digests, stably."""
    sorted_N2 = numbers_N2[order_N]
    leads_N = np.ones(len(order_N), bool)
    leads_N[1:] = (sorted_N2[1:] != sorted_N2[:-1]).any(axis=1)
    starts = np.flatnonzero(leads_N)
    found_N = np.empty(len(order_N), np.int64)
    found_N[order_N] = np.repeat(order_N[starts], np.diff(np.append(starts, len(order_N))))
    return found_N


def _twins(numbers_N2: np.ndarray, order_N: np.ndarray, swapped: np.ndarray) -> np.ndarray:
    """The position of the first pair with the answers of each the other way round (N,); -1 where there is none."""
    wanted_N2 = np.ascontiguousarray(swapped).view("<u8").reshape(-1, 2)
    first_N = numbers_N2[order_N, 0]
    at_N = np.minimum(np.searchsorted(first_N, wanted_N2[:, 0]), max(len(first_N) - 1, 0))
    found_N = order_N[at_N]
    return np.where((numbers_N2[found_N] == wanted_N2).all(axis=1), found_N, -1)


class _Counts:
    """The counts of all blocks, with what all of them together showed, in the order in which one reading meets it."""

    def __init__(self, blocks: Sequence[BlockPairs], block_N: np.ndarray, record_N: np.ndarray):
        self._blocks, self._block_N, self._record_N = blocks, block_N, record_N.copy()
        self._more: dict[str, list[tuple[str, int, _First]]] = {"dropped": [], "noticed": []}

    def drop(self, reason: str, which_N: np.ndarray) -> None:
        """Counts pairs that are left out."""
        self._add("dropped", reason, which_N)

    def notice(self, name: str, which_N: np.ndarray) -> None:
        """Counts pairs that are odd."""
        self._add("noticed", name, which_N)

    def _add(self, kind: str, name: str, which_N: np.ndarray) -> None:
        if which_N.any():
            first = int(np.argmax(which_N))
            where = int(self._block_N[first]), int(self._record_N[first])
            self._more[kind].append((name, int(np.count_nonzero(which_N)), where))

    def count(self) -> KeptCount:
        """All that were read, and what became of them."""
        total = sum(block.facts["total"] for block in self._blocks)
        return KeptCount(total, self.tally("dropped"), self.tally("noticed"))

    def tally(self, kind: str) -> Tally:
        """One of the tallies."""
        times: dict[str, int] = {}
        firsts: dict[str, _First] = {}
        for name, number, first in (*self._of_blocks(kind), *self._more.get(kind, ())):
            times[name] = times.get(name, 0) + number
            firsts[name] = min(firsts.get(name, first), first)
        names = sorted(times, key=lambda name: firsts[name])
        return Tally({name: times[name] for name in names}, {name: self._origin(*firsts[name]) for name in names})

    def spelled(self) -> tuple[int, int, str]:
        """What was spelled in ASCII: characters, pairs, the first one's origin."""
        found = [(number, *block.facts["spelled"]) for number, block in enumerate(self._blocks)]
        first = next((self._origin(number, record) for number, _, pairs, record in found if pairs), "")
        return sum(one[1] for one in found), sum(one[2] for one in found), first

    def _of_blocks(self, kind: str) -> Iterable[tuple[str, int, _First]]:
        for number, block in enumerate(self._blocks):
            for name, (times, record) in block.facts[kind].items():
                yield name, times, (number, record)

    def _origin(self, number: int, record: int) -> str:
        block = self._blocks[number]
        return f"{block.file}:{block.first - 1 + record}"
