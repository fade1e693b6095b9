"""Losses that couple pairs: values by hand, and what each pair pulls at."""

from __future__ import annotations

import math

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.objective.coupling import Pull, at_places, of_all_ranks, pull_of
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores

NEAR, FAR = math.log1p(math.exp(-1)), math.log1p(math.e)  # -log sigmoid of 1 and of -1


def pairs(*rows: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_aot_by_hand() -> None:
    """Margins 3 and -1 of the policy, 0 and 2 of the reference, beta 1: -1 meets 0 and 3 meets 2, so D is 1 and -1,
    where pair by pair it would be 3 and -3. Slopes by the chosen sums: sigmoid(D) - 1."""
    scores = Scores(pairs((-4, -7), (-5, -4)), pairs((-6, -6), (-3, -5)))
    loss = PreferenceLoss("aot", 1.0)
    torch.testing.assert_close(loss(scores), torch.tensor([NEAR, FAR], dtype=torch.float64))
    slopes = [torch.sigmoid(torch.tensor(d, dtype=torch.float64)).item() - 1 for d in (1.0, -1.0)]
    torch.testing.assert_close(pull_of(loss, scores).coefs_B2, pairs(*((slope, -slope) for slope in slopes)))
    pairwise = PreferenceLoss("sigmoid", 1.0)(scores)
    assert pairwise.tolist() == pytest.approx([math.log1p(math.exp(-3)), math.log1p(math.exp(3))])


def test_unpaired_aot_by_hand() -> None:
    """Rewards 2 and 0 of chosen answers, -1 and 3 of rejected ones, beta 1: 0 meets -1 and 2 meets 3, so D of the first
    pair is -1, of the second 1, and the rejected answer of each pair is pulled by the other's."""
    scores = Scores(pairs((-4, -7), (-3, -2)), pairs((-6, -6), (-3, -5)))
    pull = pull_of(PreferenceLoss("aot_unpaired", 1.0), scores)
    torch.testing.assert_close(pull.losses_B, torch.tensor([FAR, NEAR], dtype=torch.float64))
    far, near = 1 / (1 + math.e) - 1, 1 / (1 + math.exp(-1)) - 1  # sigmoid(-1) - 1 and sigmoid(1) - 1
    torch.testing.assert_close(pull.coefs_B2, pairs((far, -near), (near, -far)))


def test_order_does_not_matter_and_company_does() -> None:
    """All pairs of the step in another order have the same losses; a part of them has not."""
    generator = torch.Generator().manual_seed(0)
    logps, ref = -30 * torch.rand(2, 6, 2, dtype=torch.float64, generator=generator)
    for loss in (PreferenceLoss("aot", 0.1), PreferenceLoss("aot_unpaired", 0.1), PreferenceLoss("sigmoid:2,aot", 0.1)):
        assert loss.couples and loss.at_start() == pytest.approx(math.log(2) * (3 if "," in loss.loss_type else 1))
        whole = loss(Scores(logps, ref))
        assert torch.equal(loss(Scores(logps.flip(0), ref.flip(0))), whole.flip(0))
        assert not torch.allclose(loss(Scores(logps[:3], ref[:3])), whole[:3])


def test_a_pull_has_the_value_and_the_slope_that_it_was_given() -> None:
    pull = Pull(torch.tensor([5.0, 7.0, 9.0]), torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]]))
    assert [part.losses_B.tolist() for part in pull.split([1, 2])] == [[5.0], [7.0, 9.0]]
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    losses = pull.losses(logps, slice(1, 3))
    losses.sum().backward()
    assert losses.tolist() == [7.0, 9.0] and logps.grad is not None
    assert logps.grad.tolist() == [[2.0, -2.0], [3.0, -3.0]]


def test_scores_of_all_ranks(ranks: Ranks) -> None:
    """Two pairs at places 2 and 0 of three: what no rank has is 0; dtypes and shapes stay. One rank has all."""
    scores = Scores(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), None, torch.tensor([[1, 2], [3, 4]]))
    found = at_places(scores, [2, 0], 3)
    assert found.logps_B2.tolist() == [[-3.0, -4.0], [0.0, 0.0], [-1.0, -2.0]] and found.ref_B2 is None
    assert found.counts_B2 is not None and found.counts_B2.tolist() == [[3, 4], [0, 0], [1, 2]]
    assert found.counts_B2.dtype == torch.int64 and found.logps_B2.dtype == torch.float32
    everybody, mine = of_all_ranks(scores)
    assert torch.equal(everybody.logps_B2, scores.logps_B2) and mine == slice(0, 2)
    assert len(at_places(scores.first(0), [], 3).logps_B2) == 3
