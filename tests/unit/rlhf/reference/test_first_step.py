"""What stops a run in its first step, pair by pair; whole runs with such faults are in test_apply_dpo.py.

Pair i is the tokens [1, 2, 10 + i | 10 + i, 5]: 1 and 2 scored tokens. The honest reference gives -i and -2 i, so the
mean log-prob of a token is -i, and SimPO's loss log(1 + e) of every pair.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyOutput
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores
from simple_llama.reinforcement_learning.rlhf.reference.audit import Bound
from simple_llama.reinforcement_learning.rlhf.reference.first_step import FirstStep

FP32, BF16 = Bound(torch.float32, "cpu"), Bound(torch.bfloat16, "cuda")
PAIRS = PairSet.of(TokenizedPair.from_chats([1, 2, 10 + i], 1, [1, 2, 10 + i, 5], 2) for i in range(30))
PARTS = ((7, 2), (5,))  # micro-batches


def honest(batch: PairBatch) -> torch.Tensor:
    """Sums (B, 2) of the reference."""
    numbers_B = torch.tensor([int(pair.chosen[-1]) - 10 for pair in batch.pairs], dtype=torch.float32)
    return torch.stack([-numbers_B, -2 * numbers_B], 1)


def seen(
    first: FirstStep, parts: Sequence[Sequence[int]] = PARTS, shift: float = 0.0, loss: float = 0.0, weight: float = 1.0
) -> FirstStep:
    """`first` after an honest step; sums of -2 changed by `shift`, the loss of pair 5 by `loss`, all weights by a
    factor."""
    for part in parts:
        batch = PairBatch.pack([PAIRS[i] for i in part])
        ref_B2 = honest(batch)
        logps_B2 = ref_B2 + shift * (ref_B2 == -2)
        losses_B = first.loss_fn(Scores(logps_B2, ref_B2, batch.counts_B2)) + loss * torch.tensor(
            [i == 5 for i in part]
        )
        out = PolicyOutput(losses_B.sum(), losses_B, logps_B2, torch.zeros_like(ref_B2))
        first.see(out, ref_B2, weight / sum(map(len, parts)))
    return first


def test_a_pair_that_does_not_start_at_the_reference_is_named(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """As they are, and with pair 2 (the third) off by 0.001 on one side, which only where the policy is the reference
    is wrong."""
    loss = PreferenceLoss("sigmoid")
    with caplog.at_level(logging.INFO):
        seen(FirstStep(PAIRS, PARTS, loss, FP32, ranks, at_reference=True)).judge()
    assert "step 1: loss 0.693147 on 3 pairs, foretold 0.693147 by the reference's sums" in caplog.text
    with pytest.raises(UserError, match=r"step 1: 1 pairs .*: pairs:3 \(chosen -1\.999, stored -2; .*No weights were"):
        seen(FirstStep(PAIRS, PARTS, loss, FP32, ranks, at_reference=True), shift=1e-3).judge()
    seen(FirstStep(PAIRS, PARTS, loss, FP32, ranks), shift=1e-3).judge()


def test_sums_are_those_of_chats_alone(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """SimPO of 20 pairs, of which 8 are made anew, spread over the step: log(1 + e) = 1.313262. With pair 0 off by
    0.001 the pair is named; in bf16 that is rounding, and 0.2 nats are not."""
    parts, loss = (range(12), range(12, 20)), PreferenceLoss("simpo")
    asked = list[PairBatch]()

    def alone(batch: PairBatch, extra: float) -> torch.Tensor:
        asked.append(batch)
        return honest(batch) - extra * (honest(batch) == 0)

    for bound, extra, right in ((FP32, 0.0, True), (FP32, 1e-3, False), (BF16, 1e-3, True), (BF16, 0.3, False)):
        first = FirstStep(PAIRS, parts, loss, bound, ranks)
        first.compute_anew(partial(alone, extra=extra))
        seen(first, parts)
        if right:
            with caplog.at_level(logging.INFO):
                first.judge()
        else:
            with pytest.raises(UserError, match=r"of 1 pairs are not those .*: pairs:1 \(chosen -?0, alone -0\.\d+;"):
                first.judge()
    assert f"loss {math.log(1 + math.e):.6f} on 8 pairs, foretold {math.log(1 + math.e):.6f} by sums of" in caplog.text
    assert [batch.pairs[0].digest for batch in asked[:8]] == [PAIRS[i].digest for i in (0, 2, 5, 7, 10, 12, 15, 17)]
    assert all(batch.layout.segments[0] == (3, ()) for batch in asked)  # the longer chat's length, nothing shared


def test_a_loss_of_its_own_is_named(ranks: Ranks) -> None:
    """The loss of pair 5 off by 0.001, where 1.3e-4 are allowed."""
    with pytest.raises(UserError, match=r"loss of 1 pairs .*: pairs:6 \(1\.31426, expected 1\.31326\)"):
        seen(FirstStep(PAIRS, PARTS, PreferenceLoss("simpo"), FP32, ranks), loss=1e-3).judge()


def test_the_weights_of_micro_batches_make_a_mean(ranks: Ranks) -> None:
    """Weights of 1/4 where 1/3 is right: three losses of ln 2 make 0.52."""
    first = FirstStep(PAIRS, PARTS, PreferenceLoss("sigmoid"), FP32, ranks, at_reference=True)
    with pytest.raises(UserError, match=r"the weighted loss is 0\.51986, expected 0\.693147, the mean"):
        seen(first, weight=0.75).judge()


def test_a_rank_without_pairs_of_its_own_judges_too(ranks: Ranks) -> None:
    """The only micro-batch of a rank in a short step is for company: nothing was seen, chats alone were computed."""
    first = FirstStep(PAIRS, [], PreferenceLoss("sigmoid"), FP32, ranks, at_reference=True)
    first.compute_anew(honest)
    first.judge()
