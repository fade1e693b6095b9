"""A preference pair in tokens: two chats that answer one prompt, and the name by which their log-probs are found."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simple_llama.common.files import digest

_HEADER = struct.Struct("<4q")  # of what a name is the digest of: tokens of both chats, scored ones of both
Spans = tuple[tuple[int, int], ...]  # (start, stop) of scored tokens in a whole chat, in order; it ends with the last


@dataclass(frozen=True)
class TokenizedPair:
    """Two chats that answer the same prompt, split into their common prefix and a branch each (int32 token ids)."""

    prefix: np.ndarray  # common first tokens, never past the first token of either last answer
    chosen: np.ndarray  # the rest of the chosen chat, which ends with a scored token
    rejected: np.ndarray  # the rest of the rejected chat
    chosen_scored: int  # scored tokens
    rejected_scored: int
    digest: bytes  # 16 bytes over both whole chats and the scored spans: the pair's name (see pair_key)
    weight: float = 1.0  # factor of its loss; like the gap no part of its name, since log-probs do not depend on it
    gap: float | None = None  # reward of the chosen answer less that of the rejected one
    spans: tuple[Spans, Spans] | None = None  # what is scored of both chats; None: the last `*_scored` tokens of each
    group: int = -1  # pairs of one number come from one record, whose answers they compare; -1: from one of two answers
    segment: int = -1  # neighbours of one number share a segment of a batch; -1: a segment of its own
    share: float = 1.0  # what it counts for in a mean; `weight` has this factor too
    answers: tuple[bytes, bytes] | None = None  # names of both as entries of a store; None: the pair is one entry

    @classmethod
    def from_chats(
        cls,
        chosen_ids: Sequence[int],
        chosen_scored: int,
        rejected_ids: Sequence[int],
        rejected_scored: int,
        weight: float = 1.0,
        gap: float | None = None,
    ) -> TokenizedPair:
        """Builds a pair from two whole chats (token ids) whose last `*_scored` tokens are scored.

        Raises ValueError when a scored span is empty or leaves no token before it to predict its first one.
        """
        for side, ids, scored in (("chosen", chosen_ids, chosen_scored), ("rejected", rejected_ids, rejected_scored)):
            if not 0 < scored < len(ids):
                raise ValueError(f"{side}: {scored} scored of {len(ids)} tokens; expected 1..{len(ids) - 1}")
        chosen, rejected = len(chosen_ids), len(rejected_ids)
        spans = ((chosen - chosen_scored, chosen),), ((rejected - rejected_scored, rejected),)
        return cls.from_spans(chosen_ids, rejected_ids, spans, weight, gap)

    @classmethod
    def from_spans(
        cls,
        chosen_ids: Sequence[int] | np.ndarray,
        rejected_ids: Sequence[int] | np.ndarray,
        spans: tuple[Spans, Spans],
        weight: float = 1.0,
        gap: float | None = None,
    ) -> TokenizedPair:
        """Builds a pair from two whole chats (token ids), of which `spans` are scored.

        Raises ValueError where a span is empty, or they are not in order, with a token before the first that predicts
        it and none behind the last.
        """
        for side, ids, some in zip(("chosen", "rejected"), (chosen_ids, rejected_ids), spans, strict=True):
            if not _in_order(some, len(ids)):
                raise ValueError(f"{side}: expected spans in order up to {len(ids)}, found {some}")
        chosen, rejected = np.asarray(chosen_ids, dtype=np.int32), np.asarray(rejected_ids, dtype=np.int32)
        limit = min(spans[0][-1][0], spans[1][-1][0])
        shared = _common(chosen[:limit], rejected[:limit])
        if shared == 0:
            raise ValueError("the two chats do not start with the same token")
        chosen_scored, rejected_scored = (sum(stop - start for start, stop in side) for side in spans)
        kept = None if len(spans[0]) == len(spans[1]) == 1 else spans
        return cls(
            prefix=chosen[:shared],
            chosen=chosen[shared:],
            rejected=rejected[shared:],
            chosen_scored=chosen_scored,
            rejected_scored=rejected_scored,
            digest=_name((chosen,), chosen_scored, (rejected,), rejected_scored, kept),
            weight=weight,
            gap=gap,
            spans=kept,
        )

    @property
    def swapped_digest(self) -> bytes:
        """The name of the pair in which the other answer is preferred."""
        spans = self.spans and (self.spans[1], self.spans[0])
        chosen, rejected = (self.prefix, self.chosen), (self.prefix, self.rejected)
        return _name(rejected, self.rejected_scored, chosen, self.chosen_scored, spans)

    @property
    def answer_names(self) -> tuple[bytes, bytes]:
        """Names of both answers: each that of a pair whose two chats are it."""
        sides = zip(self.wholes, self.scored_spans, (self.chosen_scored, self.rejected_scored), strict=True)
        chosen, rejected = (_name((ids,), n, (ids,), n, (some, some) if self.spans else None) for ids, some, n in sides)
        return chosen, rejected

    @property
    def wholes(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 token ids of the two whole chats."""
        return np.concatenate((self.prefix, self.chosen)), np.concatenate((self.prefix, self.rejected))

    @property
    def scored_spans(self) -> tuple[Spans, Spans]:
        """What is scored of the two whole chats."""
        if self.spans:
            return self.spans
        chosen, rejected = self.chosen_len, self.rejected_len
        return ((chosen - self.chosen_scored, chosen),), ((rejected - self.rejected_scored, rejected),)

    @property
    def scored_at(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the scored tokens in the two whole chats."""
        if not self.spans:
            chosen, rejected = self.chosen_len, self.rejected_len
            return np.arange(chosen - self.chosen_scored, chosen), np.arange(rejected - self.rejected_scored, rejected)
        chosen, rejected = (np.concatenate([np.arange(*span) for span in side]) for side in self.spans)
        return chosen, rejected

    @property
    def scores_one_answer(self) -> bool:
        """Whether both sides score the same tokens: only what stands before them differs, or nothing."""
        if self.spans:
            chosen, rejected = (whole[at] for whole, at in zip(self.wholes, self.scored_at, strict=True))
            return np.array_equal(chosen, rejected)
        scored = self.chosen_scored
        return scored == self.rejected_scored and np.array_equal(self.chosen[-scored:], self.rejected[-scored:])

    @property
    def is_one_chat(self) -> bool:
        """Whether both chats are the same tokens."""
        return len(self.chosen) == len(self.rejected) and np.array_equal(self.chosen, self.rejected)

    @property
    def rows(self) -> int:
        """Rows of the packed stream: every token but the last one of each branch."""
        return len(self.prefix) + len(self.chosen) + len(self.rejected) - 2

    @property
    def chosen_len(self) -> int:
        """Tokens of the whole chosen chat."""
        return len(self.prefix) + len(self.chosen)

    @property
    def rejected_len(self) -> int:
        """Tokens of the whole rejected chat."""
        return len(self.prefix) + len(self.rejected)

    @property
    def prompt_ids(self) -> np.ndarray:
        """int32 token ids of the chosen chat up to its last <SOA>: what a model is asked to continue."""
        return self.wholes[0][: self.scored_spans[0][-1][0]]

    @property
    def last_answers(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 scored token ids of the last answer of both chats."""
        chosen, rejected = (whole[spans[-1][0] :] for whole, spans in zip(self.wholes, self.scored_spans, strict=True))
        return chosen, rejected

    @property
    def front(self) -> TokenizedPair:
        """The pair up to the common length: chats that end with as many scored tokens as both have. What stands behind
        them changes no log-prob, so this is a pair with a name of its own; where both score as many, the pair itself.
        """
        common = min(self.chosen_scored, self.rejected_scored)
        if self.chosen_scored == self.rejected_scored:
            return self
        (chosen, rejected), (one, other) = self.wholes, (_first(spans, common) for spans in self.scored_spans)
        return TokenizedPair.from_spans(chosen[: one[-1][1]], rejected[: other[-1][1]], (one, other))

    def without_sharing(self) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]:
        """Both chats whole, each with its scored count: what a trainer without prefix sharing computes."""
        chosen, rejected = self.wholes
        return (chosen, self.chosen_scored), (rejected, self.rejected_scored)


def common_prefix(pairs: Sequence[TokenizedPair]) -> int:
    """How many tokens all chats of these pairs begin with, never past the first one of a last answer."""
    first, shared = pairs[0].prefix, min(len(pair.prefix) for pair in pairs)
    for pair in pairs[1:]:
        shared = _common(pair.prefix[:shared], first[:shared])
    assert shared, "chats begin with the same token"
    return shared


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many elements two arrays of one length begin with alike."""
    differs = one != other
    first = int(differs.argmax()) if len(differs) else 0
    return first if len(differs) and differs[first] else len(differs)


def _in_order(spans: Spans, length: int) -> bool:
    """Whether spans are of one token or more each, with one or more before each, and end with a chat of this length."""
    end = 0
    for start, stop in spans:
        if not end < start < stop:
            return False
        end = stop
    return end == length


def _first(spans: Spans, count: int) -> Spans:
    """The first `count` tokens of spans."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if count:
            found.append((start, min(stop, start + count)))
            count -= found[-1][1] - start
    return tuple(found)


def _name(
    chosen: tuple[np.ndarray, ...],
    chosen_scored: int,
    rejected: tuple[np.ndarray, ...],
    rejected_scored: int,
    spans: tuple[Spans, Spans] | None,
) -> bytes:
    """The digest of two whole chats (int32 ids, in one array or several) and how many of their last tokens, or which of
    all, are scored."""
    parts = [_HEADER.pack(sum(map(len, chosen)), chosen_scored, sum(map(len, rejected)), rejected_scored)]
    parts += [ids.astype("<i4", copy=False).tobytes() for ids in (*chosen, *rejected)]
    for side in spans or ():
        parts.append(np.asarray([len(side), *(edge for span in side for edge in span)], dtype="<i8").tobytes())
    return digest(b"".join(parts))
