"""What is said of a data set: one line of counts, and warnings, each once, with the first record and what to do.

A pair that is kept and yet odd is counted in `KeptCount.noticed`, under a name of _ODD or in the words of the chat
format that saw it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.dataset.json_records import KeptCount, Tally
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.speller import Speller

BOTH_WAYS, LIKE_A_TURN, SHORTENED = "both ways round", "like a turn", "shortened"
ODD_TURN = 1  # of a pair whose answers hold such a line
_ODD = {  # what is said of it, and what to do
    BOTH_WAYS: (
        "the same two answers stand both ways round",
        "take one record of each two out, or leave both out with --contradictions drop",
    ),
    SHORTENED: ("chats were too long, and lost their oldest turns (overlong)", ""),
    LIKE_A_TURN: (
        'answers hold a line that starts like a turn, "Human:" or "Assistant:", and are trained on as text',
        "where a turn is meant, mend the record",
    ),
}
_MUCH_DROPPED = 0.1  # of the pairs
_FEW_HELD_OUT = 20  # pairs
_MUCH_UNKNOWN = 0.01  # of the scored tokens
_SPELL = "make the data with launch/prepare_data.py --ascii_only, or take a tokenizer that knows all bytes"
_WAYS_OUT = {"too long": "raise max_seq_len, if the model allows it"}  # of pairs that are dropped for a reason


class Unknown(NamedTuple):
    """Tokens <UNK> in the chats of a data set, and in their scored answers. The first are `file:record`."""

    tokens: int = 0
    pairs: int = 0  # that have one
    first: str = ""
    scored_share: float = 0.0  # of the scored tokens
    scored_pairs: int = 0
    scored_first: str = ""


def describe(count: KeptCount, extra_keys: Tally, unknown: Unknown, speller: Speller, pairs: PairSet) -> str:
    """One line: kept and dropped pairs, their weights and gaps where they have any, ignored keys, characters that the
    tokenizer does not know and what became of them."""
    line = count.summary()
    if pairs.groups is not None:
        line += f"; {len(pairs.groups.by_answer):,} of them compare answers of {pairs.groups.count:,} ranked records"
    if pairs.is_weighted:
        weights = pairs.weights
        line += f"; weights from {weights.min():g} to {weights.max():g}, mean {weights.mean():g}"
    if len(gaps := pairs.gaps[np.isfinite(pairs.gaps)]):
        line += f"; gaps from {gaps.min():g} to {gaps.max():g}, mean {gaps.mean():g} (pairs: {len(gaps):,})"
    for key, times in extra_keys.times.items():
        line += f"; ignored key {key} (records: {times:,}, first: {extra_keys.first[key]})"
    if speller.characters:
        line += f"; {speller.characters:,} characters that the tokenizer does not know are spelled in ASCII"
        line += f" (pairs: {speller.pairs:,}, first: {speller.first}; --no_ascii_text leaves them)"
    if unknown.tokens:
        line += f"; {unknown.tokens:,} bytes that the tokenizer does not know became <UNK>"
        line += f" (pairs: {unknown.pairs:,}, first: {unknown.first})"
    return line


def warnings_of(
    count: KeptCount, unknown: Unknown | None = None, held_out: int | None = None, of_files: bool = False
) -> list[str]:
    """What a person should know before training on the pairs. `held_out`: how many, where some are meant to be, by a
    share, or by files."""
    found = [f"left out: {count.faulty}"] if count.faulty else []
    found += _much_dropped(count)
    known = [*_ODD]
    for name in sorted(
        count.noticed.times, key=lambda name: (known.index(name) if name in known else len(known), name)
    ):
        times = count.noticed.times[name]
        said, way_out = _ODD.get(name, (name, ""))
        found.append(f"{said} (pairs: {times:,}, first: {count.noticed.first[name]})" + (way_out and f"; {way_out}"))
    if unknown and unknown.scored_share > _MUCH_UNKNOWN:
        pairs_share = unknown.scored_pairs / count.kept
        found.append(
            f"{unknown.scored_share:.1%} of the scored answer tokens are <UNK>, in {pairs_share:.1%} of the pairs "
            f"(first: {unknown.scored_first}): the tokenizer does not know what stands there, and the model learns to "
            f"write <UNK>; {_SPELL}"
        )
    if held_out is not None and held_out < _FEW_HELD_OUT:
        ways = "add data" if of_files else "add data, raise val_share, or set it to 0"
        found.append(f"pairs held out: {held_out:,}, and fewer than {_FEW_HELD_OUT} say little; {ways}")
    return found


def warn_of_prompts(pairs: PairSet, shares_N: np.ndarray, trained: int) -> list[str]:
    """A warning of prompts that stand on both sides, where files say what is held out.

    Args: shares_N: where the prompt of each pair stands, which names it. trained: pairs that come before all others.
    """
    trained_N, held_N = shares_N[:trained], shares_N[trained:]
    places = np.flatnonzero(np.isin(held_N, trained_N))
    if not len(places):
        return []
    first = int(places[0])
    twin = int(np.flatnonzero(trained_N == held_N[first])[0])
    return [
        f"prompts that stand in training and validation files both: {len(np.unique(held_N[places])):,} (validation "
        f"pairs: {len(places):,}, first: {pairs.origin(trained + first)}, trained on in {pairs.origin(twin)}): what is "
        "measured on them is not what the model does with prompts that it has not seen; take them out of one side"
    ]


def check_unknown(path: str | Path, unknown: Unknown, most: float, ascii_text: bool) -> None:
    """UserError where more than the share `most` of the scored tokens are <UNK>."""
    if unknown.scored_share > most:
        way = "" if ascii_text else "leave out --no_ascii_text, "
        raise UserError(
            f"{path}: expected at most {most:.1%} of the scored answer tokens to be <UNK> (max_unknown), found "
            f"{unknown.scored_share:.1%} (first: {unknown.scored_first}): the tokenizer does not know what stands "
            f"there, and the model would learn to write <UNK>; {way}{_SPELL}; max_unknown allows more"
        )


def _much_dropped(count: KeptCount) -> list[str]:
    """A warning where more than a tenth of the pairs were left out."""
    times, dropped = count.dropped.times, count.total - count.kept
    if dropped <= _MUCH_DROPPED * count.total:
        return []
    reason = min(times, key=lambda reason: (-times[reason], reason not in _WAYS_OUT, reason))
    way_out = _WAYS_OUT.get(reason, "look at how the data was made")
    return [
        f'{dropped / count.total:.1%} of the pairs are left out, most of them as "{reason}" (first: '
        f"{count.dropped.first[reason]}); {way_out}"
    ]
