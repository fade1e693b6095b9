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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from simple_llama.ops.attention import PackedLayout
from simple_llama.reinforcement_learning.rlhf.data.pair_key import Entries, as_keys
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import Spans, TokenizedPair, common_prefix


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
