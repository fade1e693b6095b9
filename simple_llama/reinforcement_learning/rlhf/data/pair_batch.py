"""A preference pair as one packed sequence: the shared prompt is computed once for both answers.

    stream of one pair   [ prefix | chosen branch | rejected branch ]
    positions            0..P-1     P..             P..

The last token of each branch predicts nothing and is not in the stream; the last prefix row predicts the first token
of both branches. Where earlier answers are scored too, they may stand in the prefix: its rows then predict for both
chats. Pairs of one prompt may share a segment, which has the prompt once and each answer once:

    stream of a segment  [ prefix | answer | answer | answer | ... ]

Shapes: B pairs, A answers, T packed rows, N scored tokens.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from simple_llama.common.files import digest
from simple_llama.ops.attention import PackedLayout
from simple_llama.reinforcement_learning.rlhf.data.pair_key import Entries, as_keys

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


class _Segment(NamedTuple):
    """Pairs that share a prefix."""

    shared: int  # tokens of the prefix
    chats: list[tuple[np.ndarray, np.ndarray]]  # of each answer: token ids of the whole chat, which are scored
    sides: list[tuple[int, int]]  # of each pair: its chosen and its rejected answer

    @classmethod
    def of(cls, pairs: Sequence[TokenizedPair]) -> _Segment:
        """That of pairs whose chats begin alike; answers in the order in which they come, each once."""
        first, *others = pairs
        if not others:
            return cls(len(first.prefix), list(zip(first.wholes, first.scored_at, strict=True)), [(0, 1)])
        shared = common_prefix(pairs)
        found: dict[tuple[bytes, Spans], int] = {}
        chats, sides = [], []
        for pair in pairs:
            numbers = []
            for whole, at, spans in zip(pair.wholes, pair.scored_at, pair.scored_spans, strict=True):
                number = found.setdefault((whole.tobytes(), spans), len(chats))
                if number == len(chats):
                    chats.append((whole, at))
                numbers.append(number)
            sides.append((numbers[0], numbers[1]))
        return cls(shared, chats, sides)


@dataclass(frozen=True)
class PairBatch:
    """Pairs packed into one stream, ready for the model. Scored rows stand answer after answer: pair after pair, chosen
    then rejected, where no segment is shared.

    It has all that log-probs come from: the stream for a model, the keys for a store.
    """

    pairs: tuple[TokenizedPair, ...]  # what is packed, on the host
    tokens_T: torch.Tensor  # int64 input token ids
    positions_T: torch.Tensor  # int64 position of each row in its own chat
    layout: PackedLayout  # which rows see which
    rows_N: torch.Tensor  # int64 row of the stream that predicts each scored token
    targets_N: torch.Tensor  # int64 scored token ids
    counts_B2: torch.Tensor  # int64 scored tokens of (chosen, rejected)
    weights_B: torch.Tensor  # fp32 factors of the pairs' losses
    gaps_B: torch.Tensor  # fp32 reward gaps, NaN for a pair without one
    groups_B: torch.Tensor  # int64: pairs of one record have one number
    answers_B2: torch.Tensor  # int64: which answers a pair compares
    answer_counts: tuple[tuple[int, ...], ...]  # scored tokens of the answers of each segment, on the host
    edges: tuple[int, ...]  # the first pair of each segment, and B

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def shares_segments(self) -> bool:
        """Whether pairs share a segment; else answers 2 i and 2 i + 1 are those of pair i."""
        return len(self.answer_counts) != len(self.pairs)

    @property
    def shares(self) -> float:
        """What its pairs count for in a mean, together."""
        return sum(pair.share for pair in self.pairs)

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """`counts_B2` on the host."""
        return tuple((pair.chosen_scored, pair.rejected_scored) for pair in self.pairs)

    @property
    def part_counts(self) -> tuple[tuple[int, int, int, int], ...]:
        """Scored tokens of chosen and rejected, each up to the common length and beyond it."""
        common = (min(counts) for counts in self.counts)
        return tuple((c, w - c, c, r - c) for (w, r), c in zip(self.counts, common, strict=True))

    def counts_of(self, columns: int) -> torch.Tensor:
        """Scored tokens (B, 2) of the answers, or (B, 4) with those up to the common length behind them."""
        common_B1 = self.counts_B2.amin(dim=1, keepdim=True)
        return self.counts_B2 if columns == 2 else torch.cat([self.counts_B2, common_B1, common_B1], dim=1)

    def entries(self, fronts: bool = False) -> Entries:
        """What a reference store is asked for: its entries of the pairs, and of their fronts where these are needed."""
        keys = as_keys([pair.digest for pair in self.pairs], self.counts)
        by_answer = [place for place, pair in enumerate(self.pairs) if pair.answers]
        names = b"".join(name for pair in self.pairs for name in pair.answers or ())
        names_G2 = np.frombuffer(names, "V16").reshape(-1, 2)
        return Entries.of(keys, by_answer, names_G2, front_keys(self.pairs) if fronts else None)

    @property
    def keys(self) -> np.ndarray:
        """Those of the pairs by name: of KEY."""
        return self.entries().keys

    @classmethod
    def pack(cls, pairs: Sequence[TokenizedPair]) -> PairBatch:
        """Packs `pairs` in the given order (B >= 1), on the CPU; neighbours of one `segment` share it."""
        tokens, positions, rows, targets, layout = [], [], [], [], []
        segments = [_Segment.of(run) for run in _runs(pairs)]
        start = 0
        for shared, chats, _ in segments:
            tokens.append(chats[0][0][:shared])
            positions.append(np.arange(shared))
            branch_start = start + shared
            for whole, at in chats:
                tokens.append(whole[shared:-1])
                positions.append(np.arange(shared, len(whole) - 1))
                # a token is predicted by the row before it, the first of a branch by the last of the prefix
                predicts = at + (branch_start - shared - 1)
                if branch_start - shared > start:
                    predicts[: np.searchsorted(at, shared, "right")] -= branch_start - shared - start
                rows.append(predicts)
                targets.append(whole[at])
                branch_start += len(whole) - 1 - shared
            layout.append((shared, tuple(len(whole) - 1 - shared for whole, _ in chats)))
            start = branch_start

        return cls._of(pairs, segments, PackedLayout(segments=tuple(layout)), tokens, positions, rows, targets)

    @classmethod
    def unshared(cls, pairs: Sequence[TokenizedPair], padded: bool) -> PairBatch:
        """Both chats of each pair whole, each a causal sequence of its own, without its last token, which predicts
        nothing: what `pack` is compared with.

        Args:
            padded: whether each chat is as long as the longest, with tokens 0 behind it.
        """
        segments = [_Segment.of([pair]) for pair in pairs]
        chats = [chat for segment in segments for chat in segment.chats]
        lengths = [len(ids) - 1 for ids, _ in chats]
        rooms = [max(lengths) if padded else length for length in lengths]
        starts = np.cumsum([0, *rooms[:-1]]).tolist()
        tokens = [np.pad(ids[:-1], (0, room - len(ids) + 1)) for (ids, _), room in zip(chats, rooms, strict=True)]
        positions = [np.arange(room) for room in rooms]
        rows = [start + places - 1 for start, (_, places) in zip(starts, chats, strict=True)]
        targets = [ids[places] for ids, places in chats]
        return cls._of(pairs, segments, PackedLayout.causal(rooms), tokens, positions, rows, targets)

    @classmethod
    def _of(
        cls,
        pairs: Sequence[TokenizedPair],
        segments: Sequence[_Segment],
        layout: PackedLayout,
        *parts: list[np.ndarray],
    ) -> PairBatch:
        """A batch of these tokens, positions, rows and targets, each in parts that stand one after the other."""
        tokens_T, positions_T, rows_N, targets_N = map(_stack, parts)
        before = accumulate((len(one.chats) for one in segments), initial=0)
        sides = [(start + w, start + r) for start, one in zip(before, segments, strict=False) for w, r in one.sides]
        groups = [pair.group if pair.group >= 0 else -1 - place for place, pair in enumerate(pairs)]
        return cls(
            pairs=tuple(pairs),
            tokens_T=tokens_T,
            positions_T=positions_T,
            layout=layout,
            rows_N=rows_N,
            targets_N=targets_N,
            counts_B2=_numbers([(pair.chosen_scored, pair.rejected_scored) for pair in pairs]),
            weights_B=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
            gaps_B=torch.tensor([math.nan if pair.gap is None else pair.gap for pair in pairs], dtype=torch.float32),
            groups_B=_numbers(groups),
            answers_B2=_numbers(sides),
            answer_counts=tuple(tuple(len(at) for _, at in one.chats) for one in segments),
            edges=tuple(accumulate((len(one.sides) for one in segments), initial=0)),
        )

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on `device`; copies to a GPU do not block the host."""
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        tensors = {name: move(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors, layout=self.layout.to(device))


def _runs(pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
    """Neighbours that share a segment, together."""
    runs: list[list[TokenizedPair]] = []
    for pair in pairs:
        if runs and pair.segment >= 0 and pair.segment == runs[-1][0].segment:
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return runs


def front_keys(pairs: Iterable[TokenizedPair]) -> np.ndarray:
    """Names in the reference store of pairs up to their common lengths: (B,) of KEY."""
    fronts = [pair.front for pair in pairs]
    return as_keys([one.digest for one in fronts], [(one.chosen_scored, one.rejected_scored) for one in fronts])


def _numbers(listed: list[int] | list[tuple[int, int]]) -> torch.Tensor:
    """What is listed, int64: by way of numpy in a fraction of the time."""
    return torch.from_numpy(np.array(listed, np.int64))


def _stack(parts: list[np.ndarray]) -> torch.Tensor:
    """Parts one after the other, int64."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
