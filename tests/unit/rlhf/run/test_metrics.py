"""The numbers of a run: sums of pairs by hand."""

from __future__ import annotations

from dataclasses import replace

import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyOutput
from simple_llama.reinforcement_learning.rlhf.run.metrics import _SUMMED, MetricSums, _pair_statistics

CPU = torch.device("cpu")


# Five packed rows: 2 of the prefix, and all but the last token of both branches.
BATCH = PairBatch.pack([TokenizedPair.from_chats([1, 2, 3, 4], 2, [1, 2, 5, 6, 7], 3)])


def output(losses: list[float], logps: list[list[float]], rewards: list[list[float]]) -> PolicyOutput:
    """What a forward pass gives."""
    losses_B = torch.tensor(losses)
    return PolicyOutput(losses_B.sum(), losses_B, torch.tensor(logps), torch.tensor(rewards))


def three_pairs() -> PolicyOutput:
    """One right, one tied, one wrong."""
    logps = [[-10.0, -20.0], [-30.0, -40.0], [-50.0, -61.0]]
    return output([0.5, 0.25, 1.0], logps, [[1.0, -1.0], [2.0, 2.0], [-1.0, 3.0]])


def statistics(out: PolicyOutput) -> dict[str, float]:
    """The sums of a forward pass by name."""
    return dict(zip(_SUMMED, _pair_statistics(out).tolist(), strict=True))


def test_statistics_of_three_pairs_by_hand() -> None:
    """Margins 2, 0 and -4: right, tied (one half) and wrong, 1.5 in all; the other entries are column sums.

    Of the log-probs the chosen one is the larger in all three.
    """
    assert statistics(three_pairs()) == {
        "loss": 1.75,
        "rewards/chosen": 2.0,
        "rewards/rejected": 4.0,
        "rewards/accuracies": 1.5,
        "rewards/margins": -2.0,
        "logps/chosen": -90.0,
        "logps/rejected": -121.0,
        "logps/accuracies": 3.0,
        "pairs": 3.0,
        "tokens": 0.0,
        "useful_flops": 0.0,
    }


def test_a_policy_that_equals_its_reference_scores_one_half() -> None:
    """All rewards 0: four ties are 2 of 4."""
    assert statistics(output([0.0] * 4, [[0.0, 0.0]] * 4, [[0.0, 0.0]] * 4))["rewards/accuracies"] == 2.0


def test_the_raw_preference_reads_log_probs_alone() -> None:
    """Larger, equal, smaller: 1.5 of 3, while the rewards say all wrong."""
    out = output([0.0] * 3, [[-1.0, -2.0], [-3.0, -3.0], [-5.0, -4.0]], [[0.0, 1.0]] * 3)
    assert (statistics(out)["logps/accuracies"], statistics(out)["rewards/accuracies"]) == (1.5, 0.0)


def test_sums_are_fp64() -> None:
    """-2^24 - 1 is exact in fp64; in fp32 the sum would stay at -2^24."""
    out = output([0.0] * 2, [[-(2.0**24), 0.0], [-1.0, 0.0]], [[0.0, 0.0]] * 2)
    assert _pair_statistics(out).dtype == torch.float64
    assert statistics(out)["logps/chosen"] == -(2.0**24) - 1


def test_means_over_pairs_and_totals(ranks: Ranks) -> None:
    """Three pairs, then one with loss 0.25, reward margin 1 and logps -2, -3.

    loss (1.75 + 0.25) / 4 = 0.5; chosen (2 + 1) / 4; rejected 4 / 4; accuracies (1.5 + 1) / 4; margins (-2 + 1) / 4;
    logps (-90 - 2) / 4 and (-121 - 3) / 4; tokens and FLOPs are totals.
    """
    sums = MetricSums(CPU, work=lambda batch: 4e9)
    sums.add(three_pairs(), replace(BATCH, pairs=BATCH.pairs * 3))
    sums.add(output([0.25], [[-2.0, -3.0]], [[1.0, 0.0]]), BATCH)
    expected = {
        "loss": 0.5,
        "rewards/chosen": 0.75,
        "rewards/rejected": 1.0,
        "rewards/accuracies": 0.625,
        "rewards/margins": -0.25,
        "logps/chosen": -23.0,
        "logps/rejected": -31.0,
        "logps/accuracies": 1.0,
        "pairs": 4.0,
        "tokens": 10.0,
        "useful_flops": 8e9,
    }
    assert sums.means() == expected
    assert sums.means() == expected, "reading changes nothing"


def test_pairs_that_hardly_learn_any_more_are_counted(ranks: Ranks) -> None:
    """sigmoid(4.59) = 0.98995 and sigmoid(4.60) = 0.99005: the second one counts, a half of two; none after a reset."""
    sums = MetricSums(CPU)
    sums.add(output([0.0] * 2, [[0.0, 0.0]] * 2, [[4.59, 0.0], [2.0, -2.6]]), BATCH)
    assert sums.saturated_share(2) == 0.5
    sums.reset()
    assert sums.saturated_share(2) == 0.0


def test_reset_starts_anew(ranks: Ranks) -> None:
    """An empty interval has means 0 and no division by zero; then only what came afterwards counts."""
    sums = MetricSums(CPU, work=lambda batch: 1.0)
    sums.add(three_pairs(), BATCH)
    sums.reset()
    assert set(sums.means().values()) == {0.0}
    sums.add(three_pairs(), BATCH)
    assert sums.means()["pairs"] == 3.0 and sums.means()["tokens"] == 5.0


def test_the_loss_is_the_mean_that_training_has(ranks: Ranks) -> None:
    """Two pairs that share a prompt, losses of which have the half of each, beside one of its own: (0.5 + 0.5 + 3) / 2;
    rewards are of three pairs."""
    pair = BATCH.pairs[0]
    sums = MetricSums(CPU)
    halves = replace(BATCH, pairs=(replace(pair, share=0.5), replace(pair, share=0.5)))
    sums.add(output([0.5, 0.5], [[0.0, 0.0]] * 2, [[3.0, 0.0]] * 2), halves)
    sums.add(output([3.0], [[0.0, 0.0]], [[0.0, 0.0]]), BATCH)
    assert (sums.means()["loss"], sums.means()["rewards/chosen"]) == (2.0, 2.0)
