"""The loop of the reference pass; whole passes are in test_apply_dpo.py and tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from simple_llama.reinforcement_learning.rlhf import precompute
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.scores import Asked

CPU = torch.device("cpu")
PAIRS = [TokenizedPair.from_chats([1, 2, i], 1, [1, 2, i + 1, 5], 2) for i in range(10, 15)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In the model's place: the sum of a pair's target tokens. Holds how many pairs each call had."""
    calls: list[int] = []

    def sums(model: Any, batch: PairBatch, asked: Asked) -> torch.Tensor:
        calls.append(len(batch))
        lengths = [length for pair in batch.counts for length in pair]
        parts = [batch.targets_N.split(lengths), [part[:1] for part in batch.targets_N.split(lengths)]]
        taken = [torch.stack([one.sum() for one in part]).view(-1, 2).float() for part in parts]
        return torch.cat(taken[: asked.columns // 2], dim=1)

    monkeypatch.setattr(precompute, "pair_logps", sums)
    return calls


def test_each_micro_batch_comes_with_its_own_sums(asked: list[int]) -> None:
    """In order, none lost at the end, and one more computed than given out: a GPU has work while the host writes."""
    model: Any = None
    seen = []
    batches = [PairBatch.pack(part) for part in (PAIRS[:2], PAIRS[2:3], PAIRS[3:])]
    for keys, sums_B2 in precompute.computed(model, iter(batches), CPU):
        seen.append((keys.tobytes(), sums_B2.tolist(), list(asked)))
        assert sums_B2.dtype == np.float32
    assert seen == [
        (batches[0].keys.tobytes(), [[10, 16], [11, 17]], [2, 1]),
        (batches[1].keys.tobytes(), [[12, 18]], [2, 1, 2]),
        (batches[2].keys.tobytes(), [[13, 19], [14, 20]], [2, 1, 2]),
    ]


def test_fronts_come_from_the_same_call(asked: list[int]) -> None:
    """Of answers of 1 and 2 tokens that up to the common length of 1, under the names of pairs that end there."""
    model: Any = None
    batch = PairBatch.pack(PAIRS[:2])
    [(keys, sums_B2)] = precompute.computed(model, iter([batch]), CPU, fronts=True)
    assert asked == [2] and sums_B2.tolist() == [[10, 16], [11, 17], [10, 11], [11, 12]]
    shorter = [TokenizedPair.from_chats([1, 2, i], 1, [1, 2, i + 1], 1) for i in (10, 11)]
    assert keys.tobytes() == batch.keys.tobytes() + PairBatch.pack(shorter).keys.tobytes()


def test_a_stop_gives_out_what_is_computed(asked: list[int]) -> None:
    """Micro-batches that end early, and none at all."""

    batch = PairBatch.pack(PAIRS[:1])

    def stopped() -> Iterator[PairBatch]:
        yield batch

    model: Any = None
    assert [keys.tobytes() for keys, _ in precompute.computed(model, stopped(), CPU)] == [batch.keys.tobytes()]
    assert list(precompute.computed(model, iter([]), CPU)) == []
