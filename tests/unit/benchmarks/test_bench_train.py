"""The parts of the step's bench that need neither TRL nor DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.bench_train import BenchTrain, batch_sizes, mean_lengths, step_flops, stepper
from benchmarks.ours import micro_batches
from benchmarks.workload import PACKS, make_pairs
from simple_llama.common.errors import UserError
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize

# 2 + 1 + 0 rows and 4 + 0 + 1 rows; chats of 4 and 3, and of 5 and 6 tokens
PAIRS = [
    TokenizedPair.from_chats([1, 2, 3, 4], 2, [1, 2, 5], 1),
    TokenizedPair.from_chats([1, 2, 3, 4, 5], 1, [1, 2, 3, 4, 6, 7], 2),
]


class Recorder:
    """In a trainer's place: remembers what it is to step on."""

    size = ModelSize(layers=100, head=10, other=0)
    model = SimpleNamespace(architecture=Architecture.of(TrainingConfig(n_embd=4, n_heads=1, n_layers=1), 10))

    def __init__(self) -> None:
        self.steps: list[tuple[list[TokenizedPair], Any, int]] = []

    def step(self, pairs: list[TokenizedPair], pack: Any, count: int) -> None:
        self.steps.append((pairs, pack, count))


def test_stepper_takes_one_step_after_the_other() -> None:
    """Each call is the next step's pairs, packed as asked; a call too many is an error, not an empty step."""
    trainer: Any = Recorder()
    way = stepper(trainer, "padded", [PAIRS[:1], PAIRS[1:]], 3)
    way()
    way()
    assert trainer.steps == [(PAIRS[:1], PACKS["padded"], 3), (PAIRS[1:], PACKS["padded"], 3)]
    with pytest.raises(StopIteration):
        way()


def test_step_flops_by_hand() -> None:
    """Times 6 a weight: 8 shared rows, 14 whole or 20 padded ones, 6 scored rows; 4 * 3 * 4 a visible key.

    Visible keys: shared 3 in a prefix of 2 and 3 for the row behind it, 10 in one of 4 and 5 for the row behind it.
    """
    trainer: Any = Recorder()
    head = 6 * 6 * 10
    expected = {"shared": (8, 3 + 3 + 10 + 5), "whole": (3 + 2 + 4 + 5, 6 + 3 + 10 + 15), "padded": (20, 4 * 15)}
    for pack, (rows, visible) in expected.items():
        assert step_flops(trainer, pack, [PAIRS], count=1) == [6 * 100 * rows + head + 48 * visible], pack


def test_micro_batches_share_out_all_pairs() -> None:
    """Every pair once, equal numbers, nearly equal rows."""
    pairs = make_pairs("uf-71-169", 12, 500, seed=0)
    parts = micro_batches(pairs, 3)
    assert sorted(pair.digest for part in parts for pair in part) == sorted(pair.digest for pair in pairs)
    rows = [sum(pair.rows for pair in part) for part in parts]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert max(rows) < 1.2 * min(rows)


def test_mean_lengths_by_hand() -> None:
    """Prompts 2 and 4, chosen 2 and 1, rejected 1 and 2."""
    assert mean_lengths(PAIRS) == (3.0, 1.5, 1.5)


def test_batch_sizes() -> None:
    """On CUDA 16,384 rows of 5 or 3 a pair are 4,096 pairs, in TRL's 8; on a CPU both take 8, or what is asked for."""
    assert [pair.rows for pair in PAIRS] == [3, 5]
    assert batch_sizes(BenchTrain(device="cuda"), PAIRS) == (4096, 8)
    assert batch_sizes(BenchTrain(), PAIRS) == (8, 8)
    assert batch_sizes(BenchTrain(batch_size=6, peer_batch_size=2), PAIRS) == (6, 2)
    with pytest.raises(UserError, match="divisor of batch_size 8, found 3"):
        batch_sizes(BenchTrain(peer_batch_size=3), PAIRS)
