"""Whether a loss of step 0 that is not the one foretold may be rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.reference.audit import Bound
from simple_llama.reinforcement_learning.rlhf.run.evaluate import HeldOut
from simple_llama.reinforcement_learning.rlhf.run.start_reference import is_rounding

PAIRS = PairSet.of(
    [TokenizedPair.from_chats([1, *range(2, 12 + n)], 10, [1, *range(3, 13 + n)], 10) for n in range(4)],
    [("a.jsonl", n) for n in range(1, 5)],
)
BF16, NEAR = Bound(torch.bfloat16, "cpu", tiles=True), 2e-2


def found(off: float) -> HeldOut:
    """Sums of -20 nats of ten tokens each, of which the policy gives a chosen answer `off` more."""
    ref_N2 = np.full((4, 2), -20.0, np.float32)
    logps_N2 = ref_N2 + np.array([off, 0.0], np.float32)
    return HeldOut(logps_N2, ref_N2, np.full((4, 2), 10, np.int32), np.zeros(4, np.float32), ref_N2, {})


@pytest.mark.parametrize(
    ("loss_type", "off", "expected"),
    [("dpop", -0.1, True), ("dpop", -1.1, False), ("sigmoid", -0.1, False)],
    ids=["50 times 0.1 nats", "beyond 0.1 nats a token", "a loss that takes a nat as beta / 2"],
)
def test_rounding_that_a_loss_multiplies(loss_type: str, off: float, expected: bool) -> None:
    """dpop at beta 0.3 and lambda 50: 0.1 nats less make 0.3 x 5.1 of loss, log(1 + e^1.53) = 1.73."""
    loss = PreferenceLoss(loss_type, None if loss_type == "dpop" else 0.1)
    told = loss.foretold(
        torch.full((1, 2), -20.0), torch.full((1, 2), 10), sums_BS=torch.tensor([[-20.0 + off, -20.0]])
    )
    assert loss_type != "dpop" or off != -0.1 or told == pytest.approx(1.727, abs=1e-3)
    assert is_rounding(loss, found(off), PAIRS, BF16, told, NEAR) == expected
    assert not is_rounding(loss, found(off), PAIRS, BF16, told + 0.1, NEAR), "not the loss of these sums"
