"""Which of the pairs that were read are used, and on which side of the validation split each is."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from json.encoder import encode_basestring_ascii

import numpy as np

from simple_llama.common.files import digest
from simple_llama.dataset.json_records import KeptCount
from simple_llama.reinforcement_learning.rlhf.data.conversation import (
    Compared,
    Conversation,
    chosen_pairs,
    holds_a_turn,
)
from simple_llama.reinforcement_learning.rlhf.data.data_report import BOTH_WAYS, LIKE_A_TURN, ODD_TURN
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairBuffer, PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair

_Read = tuple[Conversation, TokenizedPair]
CONTRADICTORY, DUPLICATE, HELD_OUT = "contradictory", "duplicate", "held out as well"  # why pairs are dropped


@dataclass(frozen=True)
class Usable:
    """What makes a pair usable."""

    max_seq_len: int
    seed: int  # of the split
    compared: Compared
    drop_contradictions: bool = False  # pairs of which the same two answers stand the other way round too
    held_files: frozenset[str] = frozenset()  # that are read first, and whose pairs are all held out


@dataclass
class ForMerge:
    """What those of a block say of its pairs who put several blocks together, in place of counts."""

    swapped: bytearray = field(default_factory=bytearray)  # the digest of each pair with its answers swapped
    odd: bytearray = field(default_factory=bytearray)  # ODD_TURN, or 0


def keep_usable(
    pairs: Iterable[_Read], usable: Usable, count: KeptCount, merge: ForMerge | None = None
) -> tuple[PairSet, np.ndarray]:
    """The usable pairs, and where the prompt of each stands in [0, 1) (see `_prompt_share`).

    Over-long and identical pairs, pairs that score one answer twice and repetitions are left out and counted, by their
    tokens: what the model sees decides. Of a record with more answers those are compared that are left.

    Of two answers that stand both ways round both pairs are left out where contradictions are; of one that is held out
    and one that is not, the latter alone.
    """
    kept, shares, held = PairBuffer(), array("d"), 0
    refuted: set[int] = set()  # positions of pairs that a later one contradicts
    for (file, record), found in groupby(pairs, lambda said: (said[0].file, said[0].record)):
        origin, is_held = f"{file}:{record}", file in usable.held_files
        sound = _sound(found, kept, usable.max_seq_len, 0 if is_held else held, count)
        chosen = [sound[place] for place in chosen_pairs([c.ranks for c, _ in sound], usable.compared)]
        count.total -= len(sound) - len(chosen)
        swapped = [pair.swapped_digest for _, pair in chosen]
        twins = [kept.position(name) for name in swapped]
        if merge:
            merge.swapped += b"".join(swapped)
            merge.odd += bytes(ODD_TURN * holds_a_turn(c) for c, _ in chosen)
        elif usable.drop_contradictions:
            refuted.update(twin for twin in twins if twin >= (0 if is_held else held))
            count.dropped.add_all(CONTRADICTORY, origin, sum(twin >= 0 for twin in twins))
            chosen = [one for one, twin in zip(chosen, twins, strict=True) if twin < 0]
        else:
            count.noticed.add_all(BOTH_WAYS, origin, sum(twin >= 0 for twin in twins))
        for c, _ in chosen:
            if not merge and holds_a_turn(c):
                count.noticed.add(LIKE_A_TURN, origin)
            shares.append(_prompt_share(c.system, c.users, usable.seed))
        if chosen:
            kept.append_group([pair for _, pair in chosen], file, record)
        held = len(kept) if is_held else held
    return _without(kept.finish(), np.array(shares), refuted, count)


def _without(pairs: PairSet, shares_N: np.ndarray, refuted: set[int], count: KeptCount) -> tuple[PairSet, np.ndarray]:
    """All but the pairs at these positions, which are counted as contradictory."""
    if not refuted:
        return pairs, shares_N
    for position in sorted(refuted):
        count.dropped.add(CONTRADICTORY, pairs.origin(position))
    stays = np.delete(np.arange(len(pairs)), sorted(refuted))
    return pairs.select(stays), shares_N[stays]


def _sound(found: Iterable[_Read], kept: PairBuffer, max_seq_len: int, held: int, count: KeptCount) -> list[_Read]:
    """The pairs of a record that can be used, beside those that are kept, of which the first `held` are held out while
    this record is none of them; counts the others."""
    sound: list[_Read] = []
    for c, pair in found:
        origin = f"{c.file}:{c.record}"
        if max(pair.chosen_len, pair.rejected_len) > max_seq_len:
            count.dropped.add("too long", origin)
        elif pair.is_one_chat:
            count.dropped.add("identical", origin)
        elif pair.scores_one_answer:
            count.dropped.add("same last answer", origin)
        elif (place := kept.position(pair.digest)) >= 0:
            count.dropped.add(HELD_OUT if place < held else DUPLICATE, origin)
        elif any(pair.digest == one.digest for _, one in sound):
            count.dropped.add(DUPLICATE, origin)
        else:
            sound.append((c, pair))
    return sound


def held_out_prompts(shares_N: np.ndarray, val_share: float) -> np.ndarray:
    """Which pairs go to validation (N,): a prompt with all its pairs does when its hash is below `val_share`.

    So a prompt stays on its side when data is added. Only where no hash is below `val_share` (few prompts) the smallest
    one goes to validation, and more data may move it back.
    """
    limit = max(val_share, np.nextafter(shares_N.min(), 1.0)) if val_share > 0 else 0.0
    return shares_N < limit


def _prompt_share(system: str | None, users: Sequence[str], seed: int) -> float:
    """Where the prompt stands in [0, 1), from a hash of the seed, the system prompt and the user turns."""
    written = "null" if system is None else encode_basestring_ascii(system)
    key = f"[{seed}, {written}, [{', '.join(map(encode_basestring_ascii, users))}]]"  # as json.dumps writes the list
    return int.from_bytes(digest(key.encode(), size=6), "big") / 2**48  # 48 bits are exact in a float
