"""Evaluation: every held-out pair counts once, and the means are those of a plain loop over whole chats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.evaluate import evaluate
from simple_llama.reinforcement_learning.rlhf.run.statistics import accuracy_interval, correlation
from tiny_job import TINY

VOCAB = 20
PAIRS = [
    TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 6, 7, 8], 3),
    TokenizedPair.from_chats([1, 9, 4], 1, [1, 9, 5, 6], 2),
    TokenizedPair.from_chats([1, 2, 10, 11, 12, 13], 3, [1, 2, 14], 1),
]
REFERENCE = {PAIRS[0].digest: (-5.0, -9.0), PAIRS[1].digest: (-3.0, -6.0), PAIRS[2].digest: (-9.0, -2.0)}
BETA = 0.5


@pytest.fixture
def model() -> LLaMaTransformer:
    """Weights large enough that the log-probs differ from pair to pair."""
    shape: dict[str, Any] = {**TINY, "batch_size": 1, "tokens_per_update": 512}
    model = LLaMaTransformer(Architecture.of(TrainingConfig(**shape), VOCAB))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def reference(batch: PairBatch) -> torch.Tensor:
    """Made-up sums of the reference, by the pair."""
    return torch.tensor([REFERENCE[pair.digest] for pair in batch.pairs])


def by_hand(model: LLaMaTransformer, pairs: Sequence[TokenizedPair]) -> dict[str, float]:
    """Means over `pairs`, each chat on its own: log_softmax of all logits, the scored tokens summed, DPO's Eq. 7."""
    rows = []
    for pair in pairs:
        sums = []
        for ids, scored in pair.without_sharing():
            logps = model(torch.tensor([ids.tolist()]))[0].log_softmax(-1)
            places = range(len(ids) - scored, len(ids))
            sums.append(sum(logps[place - 1, ids[place]].item() for place in places))
        chosen, rejected = (BETA * (sum_ - ref) for sum_, ref in zip(sums, REFERENCE[pair.digest], strict=True))
        right = 1.0 if chosen > rejected else 0.0
        loss = math.log1p(math.exp(rejected - chosen))
        rows.append((loss, chosen, rejected, right, chosen - rejected, *sums, float(sums[0] > sums[1])))
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    names = (*names, "logps/chosen", "logps/rejected", "logps/accuracies")
    columns = zip(*rows, strict=True)
    means = {f"eval_{name}": sum(column) / len(rows) for name, column in zip(names, columns, strict=True)}
    gaps = [float(pair.chosen_scored - pair.rejected_scored) for pair in pairs]
    together = statistics.correlation([row[4] / BETA for row in rows], gaps) if len(rows) > 1 else 0.0
    ratios = {f"eval_log_ratio/{side}": means[f"eval_rewards/{side}"] / BETA for side in ("chosen", "rejected")}
    return {**means, **ratios, "eval_margin_length_correlation": together, "eval_pairs": len(rows)}


@pytest.mark.parametrize("micro_batches", [[(2, 0), (1,), ()], [(), (0, 1, 2)], [(1,), (2,), (0,)]])
@torch.no_grad()
def test_means_equal_a_loop_over_whole_chats(
    model: LLaMaTransformer, ranks: Ranks, micro_batches: list[tuple[int, ...]]
) -> None:
    """Any order and grouping, also with an empty micro-batch: the same numbers to fp32's 1e-5, of 3 pairs; and each
    pair's own, in the order of the pairs."""
    found = evaluate(
        partial(pair_logps, model),
        PreferenceLoss("sigmoid", BETA),
        reference,
        PairSet.of(PAIRS),
        micro_batches,
        ranks.device,
    )
    expected = by_hand(model, PAIRS)
    assert found.metrics.keys() == expected.keys()
    assert found.metrics == pytest.approx(expected, abs=1e-5)
    assert found.metrics["eval_pairs"] == 3
    assert found.ref_N2.tolist() == [[-5.0, -9.0], [-3.0, -6.0], [-9.0, -2.0]]
    assert found.counts_N2.tolist() == [[2, 3], [1, 2], [3, 1]] and found.length_gaps_N.tolist() == [-1, -1, 2]
    alone = [by_hand(model, [pair]) for pair in PAIRS]
    assert found.losses_N == pytest.approx([pair["eval_loss"] for pair in alone], abs=1e-5)
    for side, name in enumerate(("chosen", "rejected")):
        assert found.logps_N2[:, side] == pytest.approx([pair[f"eval_logps/{name}"] for pair in alone], abs=1e-5)
        assert found.rewards_N2[:, side] == pytest.approx([pair[f"eval_rewards/{name}"] for pair in alone], abs=1e-5)
    assert found.margins_N == pytest.approx([pair["eval_rewards/margins"] / BETA for pair in alone], abs=1e-5)


@torch.no_grad()
def test_only_this_ranks_share_is_counted(model: LLaMaTransformer, ranks: Ranks) -> None:
    """Micro-batches of pairs 1 and 2 only: pair 0 takes no part, although the empty one borrows it."""
    found = evaluate(
        partial(pair_logps, model),
        PreferenceLoss("sigmoid", BETA),
        reference,
        PairSet.of(PAIRS),
        [(1,), (), (2,)],
        ranks.device,
    )
    assert found.metrics == pytest.approx(by_hand(model, PAIRS[1:]), abs=1e-5)
    assert found.logps_N2[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("margins", "gaps", "expected"),
    [
        ([1.0, 2.0, 3.0], [2, 4, 6], 1.0),
        ([1.0, 2.0, 3.0], [6, 4, 2], -1.0),
        ([1.0, -2.0, 1.0], [1, 0, -1], 0.0),
        ([3.0, 1.0, 2.0], [1, 1, 4], -0.0),
        ([0.0, 0.0, 0.0], [1, 2, 3], 0.0),
        ([1.0, 2.0], [5, 5], 0.0),
        ([1.0], [5], 0.0),
        ([1.0, 2.0, 3.0, 4.0], [1, 3, 2, 4], 0.8),
    ],
)
def test_correlation_of_margin_and_length(margins: list[float], gaps: list[int], expected: float) -> None:
    """Pearson's by hand; the last: sums of products 4 of squares 5 and 5. 0 where one of both does not vary."""
    assert correlation(np.array(margins), np.array(gaps)) == pytest.approx(expected, abs=1e-12)


def test_an_empty_micro_batch_still_makes_its_forward(model: LLaMaTransformer, ranks: Ranks) -> None:
    """Under ZeRO-3 a forward is a collective: three micro-batches are three calls of the model, empty or not."""
    sizes = []

    def logps(batch: PairBatch) -> torch.Tensor:
        sizes.append(len(batch))
        return pair_logps(model, batch)

    evaluate(logps, PreferenceLoss(), reference, PairSet.of(PAIRS), [(0, 1), (2,), ()], ranks.device)
    assert sizes == [2, 1, 1]


@pytest.mark.parametrize(
    ("accuracy", "pairs", "expected"),
    [(0.5, 100, (0.4038, 0.5962)), (1.0, 10, (0.7225, 1.0)), (0.0, 10, (0.0, 0.2775)), (50 / 54, 54, (0.8245, 0.9708))],
)
def test_interval_of_an_accuracy(accuracy: float, pairs: int, expected: tuple[float, float]) -> None:
    """Wilson's, z = 1.96. Of 10 right of 10: 10 / (10 + 3.8415) = 0.7225. Of half of 100: 0.5 -+ 0.0962."""
    assert accuracy_interval(accuracy, pairs) == pytest.approx(expected, abs=1e-4)
