"""What a run does with its warnings: each once, in the log, a file and TensorBoard; the pairs behind a spike."""

from __future__ import annotations

import html
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.logging import LOGGER
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyOutput
from simple_llama.reinforcement_learning.rlhf.run.health import Facts
from simple_llama.reinforcement_learning.rlhf.run.records import WARNINGS, RunWriter
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig
from simple_llama.reinforcement_learning.rlhf.run.watch_health import HealthWatch, StepSums, costliest, facts_of

FACTS = Facts(pairs=80, held_out=20, total_steps=100, beta=0.1, rates=1.0, largest_prompt_share=0.5)
PAIRS = PairSet.of(
    [TokenizedPair.from_chats([1, *range(2, 4 + n)], 1 + n, [1, 2, 3], 1) for n in range(1, 12)],
    [("a.jsonl", n) for n in range(1, 12)],
)


def kept(folder: Path) -> list[tuple[int, str]]:
    """Step and name of each line of warnings.jsonl."""
    return [(line["step"], line["name"]) for line in map(json.loads, (folder / WARNINGS).read_text().splitlines())]


def test_what_is_known_before_the_first_step() -> None:
    """Rates of 0.25, 0.5, 0.5, 0.5. The chosen answers of the held-out pairs have 11 and 12 tokens, the others one:
    6.25 on average."""
    data: Any = SimpleNamespace(train=PAIRS[:9], validation=PairSet.of(list(PAIRS)[9:], [("a", 1), ("a", 2)]))
    data.largest_prompt_share = 0.5
    config = ScheduleConfig(warmup_iterations=2, max_lr=0.5, min_lr=0.5)
    assert facts_of(config, data, 4, 0.1) == Facts(9, 2, 4, 0.1, 1.75, 6.25, 0.5)


def test_each_warning_once_and_where(tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """A notice at the first line, an alarm at the ninth gradient norm, which asks for its pairs; a second spike and a
    resumed run, which begins with the norms of the file, say nothing again."""
    caplog.set_level(logging.INFO, LOGGER.name)
    asked: list[int] = []

    def train(watch: HealthWatch, step: int, norm: float) -> None:
        watch.writer.scalars(step, {"grad_norm": norm})
        watch.see(step, {"grad_norm": norm}, lambda: asked.append(step) or ["a.jsonl:3 (loss 7)"])

    writer = RunWriter(tmp_path, is_main=True)
    watch = HealthWatch(tmp_path, FACTS, writer, ranks)
    for step, norm in enumerate([*([1.0] * 8), 6.0, 30.0], 1):
        train(watch, step, norm)
    writer.close()
    assert kept(tmp_path) == [(1, "prompt_dominates"), (9, "gradient_spikes")] and asked == [9]
    levels = [(record.levelname, record.message.split(":")[0]) for record in caplog.records]
    assert levels == [("INFO", "notice (prompt_dominates)"), ("WARNING", "alarm (gradient_spikes)")]
    assert caplog.records[1].message.endswith("Its pairs with the largest loss: a.jsonl:3 (loss 7)")
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    pages = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("warnings/text_summary")]
    page = html.unescape(pages[-1])
    assert "**notice, step 1:** one prompt has 50%" in page and "**alarm, step 9:** the gradient norm" in page
    assert "*" not in pages[-1].replace("**", "") and "_" not in pages[-1]

    (tmp_path / WARNINGS).write_text((tmp_path / WARNINGS).read_text().splitlines()[0] + "\n")
    writer = RunWriter(tmp_path, is_main=True, done=8)
    watch = HealthWatch(tmp_path, FACTS, writer, ranks)
    train(watch, 9, 6.0)
    writer.close()
    assert kept(tmp_path) == [(1, "prompt_dominates"), (9, "gradient_spikes")] and asked == [9, 9]


def test_an_evaluation_asks_no_other_rank(tmp_path: Path) -> None:
    """Without pairs to name nothing is sent: only rank 0 judges."""
    other = Ranks(1, 2, 1, 2, torch.device("cpu"))
    watch = HealthWatch(tmp_path, FACTS, RunWriter(tmp_path, is_main=False), other)
    watch.see(0, {"eval_loss": 0.7})
    assert not (tmp_path / WARNINGS).exists()


def test_the_costliest_pairs_of_a_step(ranks: Ranks) -> None:
    """Eight of eleven by their losses, a loss each; an empty micro-batch has none. Pair n has n + 2 scored tokens."""
    losses = np.linspace(1.0, 2.0, 11)[[3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 10]]
    micro_batches = [(0, 1, 2, 3, 4), (), (5, 6, 7, 8, 9, 10)]
    parts = [torch.tensor(losses[:5]), torch.tensor(losses[5:])]
    named = costliest(PAIRS, micro_batches, parts, ranks)
    assert named[:3] == [
        "a.jsonl:11 (loss 2, 13 tokens)",
        "a.jsonl:6 (loss 1.9, 8 tokens)",
        "a.jsonl:9 (loss 1.8, 11 tokens)",
    ]
    assert len(named) == 8


def test_sums_keep_the_newest_steps_losses(ranks: Ranks) -> None:
    """Those of two micro-batches, until the next step begins; the means are over all steps."""
    sums = StepSums(torch.device("cpu"))
    batch = PairBatch.pack(PAIRS[:2])
    for loss in (1.0, 3.0):
        sums.begin_step()
        for _ in range(2):
            losses_B = torch.tensor([loss, loss])
            sums.add(PolicyOutput(losses_B.sum(), losses_B, torch.zeros(2, 2), torch.zeros(2, 2)), batch)
    assert [part.tolist() for part in sums.losses] == [[3.0, 3.0]] * 2
    assert sums.means()["loss"] == 2.0
