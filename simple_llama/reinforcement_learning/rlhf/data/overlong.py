"""Chats that are too long, without their oldest turns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby

from simple_llama.dataset.json_records import KeptCount
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation
from simple_llama.reinforcement_learning.rlhf.data.data_report import SHORTENED
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair

_Read = tuple[Conversation, TokenizedPair]


def without_oldest_turns(
    pairs: Iterable[_Read],
    max_seq_len: int,
    tokenized: Callable[[Conversation], TokenizedPair | None],
    count: KeptCount,
) -> Iterator[_Read]:
    """The pairs, those of more than `max_seq_len` tokens a chat without as many of their first turns as have to go.

    A turn is what the user says and the answers to it; the system prompt and the last turn stay, so that a pair may
    still be too long. The pairs of a record with several answers lose the same turns: those that the longest one of
    them loses which then fits.

    Args:
        tokenized: makes the tokens of a conversation again, None where it has none to score.
        count: of pairs that were made shorter.
    """
    for (file, record), found in groupby(pairs, lambda said: (said[0].file, said[0].record)):
        whole = list(found)
        kept = whole
        if turns := _turns_to_leave_out(whole, max_seq_len, tokenized):
            shorter = [(cut, tokenized(cut)) for cut in (_cut(c, turns) for c, _ in whole)]
            kept = [(c, pair) for c, pair in shorter if pair]
            for _ in kept:
                count.noticed.add(SHORTENED, f"{file}:{record}")
            for _ in range(len(whole) - len(kept)):
                count.dropped.add("an answer of no scored token", f"{file}:{record}")
        yield from kept


def _turns_to_leave_out(
    pairs: list[_Read], max_seq_len: int, tokenized: Callable[[Conversation], TokenizedPair | None]
) -> int:
    """How many turns the pairs of a record have to lose; 0 where all fit, or where nothing helps."""

    def needed(c: Conversation, pair: TokenizedPair) -> int:
        def fits(turns: int) -> bool:
            shorter = tokenized(_cut(c, turns))
            return shorter is not None and longest(shorter) <= max_seq_len

        if longest(pair) <= max_seq_len:
            return 0
        least = bisect_left(range(1, len(c.users)), True, key=fits) + 1
        return least if least < len(c.users) else 0  # not even the last turn alone fits

    def longest(pair: TokenizedPair) -> int:
        return max(pair.chosen_len, pair.rejected_len)

    return max(needed(c, pair) for c, pair in pairs)


def _cut(c: Conversation, turns: int) -> Conversation:
    """A conversation without its first turns."""
    return replace(c, users=c.users[turns:], chosen=c.chosen[turns:], rejected=c.rejected[turns:])
