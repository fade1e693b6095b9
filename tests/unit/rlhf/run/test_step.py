"""A step whose loss couples its pairs: how they are dealt into micro-batches changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from benchmarks.ours import PlainLoop
from plain_cells import alone
from simple_llama.cluster.distributed import Ranks
from simple_llama.pretraining.weights import LoadedModel
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums
from simple_llama.reinforcement_learning.rlhf.run.step import PackedAhead, Portion, accumulate, portions
from tiny_model import VOCAB, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "sigmoid:0.5,aot_unpaired"])
def test_coupled_pairs_in_any_micro_batches(ranks: Ranks, loss_type: str) -> None:
    """16 pairs as 1 x 16, 4 x 4 and 16 x 1, with one for company: losses and gradients are those of autograd through
    all chats at once (fp32 1e-5), with a reference that is some nats away."""
    model, loss_fn = tiny_model(), PreferenceLoss(loss_type, 0.3)
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(2, VOCAB, (16, 12), generator=generator).tolist()
    pairs = [TokenizedPair.from_chats([1, *t[:4]], 3, [1, *t[4 : 6 + i % 6]], 1 + i % 2) for i, t in enumerate(drawn)]
    sums = alone(model, pairs)[:, :2]
    ref = {pair.digest: row for pair, row in zip(pairs, sums.detach() + torch.randn(16, 2), strict=True)}
    ref_N2 = torch.stack([ref[pair.digest] for pair in pairs])
    losses_N = loss_fn(Scores(sums, ref_N2, PairBatch.pack(pairs).counts_B2))
    weights = list(model.parameters())
    right = torch.cat([part.flatten() for part in torch.autograd.grad(losses_N.mean(), weights)])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loop = PlainLoop(DPOPolicy(model, loss_fn), LoadedModel(state, model.architecture, Path()), DPOConfig(), CPU)
    for size in (1, 4, 16):
        parts = [Portion(PairBatch.pack(pairs[i : i + size]), 1 / 16, i + size == 16) for i in range(0, 16, size)]
        parts.insert(1, Portion(PairBatch.pack(pairs[:2]), 0.0, False))
        loop.optimizer.zero_grad()
        found = accumulate(
            loop, parts, lambda batch: torch.stack([ref[pair.digest] for pair in batch.pairs]), MetricSums(CPU), CPU
        )
        torch.testing.assert_close(torch.cat(found), losses_N.detach(), atol=1e-5, rtol=0)
        gradient = torch.cat([master.grad.flatten() for master in loop.masters.values() if master.grad is not None])
        assert (gradient - right).norm() <= 1e-5 * right.norm()


def test_the_next_step_of_an_epoch_is_packed_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 pairs, steps of 2 x 4: when a step's last micro-batch is asked for more, the next one's first is packed, but
    for another epoch's; all are those of the plan, whichever step is asked for."""
    pairs = PairSet.of([TokenizedPair.from_chats([1, n, 3], 1, [1, n, 4], 1) for n in range(5, 29)])
    plan = BatchPlan.of(pairs, DPOConfig(batch_size=4, grad_accum_steps=2), seed=0, world_size=1)
    pack, packed = PairBatch.pack, list[int]()
    monkeypatch.setattr(PairBatch, "pack", lambda some: packed.append(len(packed)) or pack(some))
    ahead = PackedAhead(plan, 0, pairs, CPU)

    def numbers(parts: Iterable[Portion]) -> list[list[int]]:
        return [[int(pair.prefix[1]) for pair in part.batch.pairs] for part in parts]

    made = []
    for index in (0, 1, 2, 3, 5, 4):  # three steps an epoch
        before = len(packed)
        found = numbers(ahead.of(index))
        made.append(len(packed) - before)
        assert found == numbers(portions(plan.step(index), 0, pairs))
    assert plan.steps_per_epoch == 3
    assert made == [2 + 1, 1 + 1, 1, 2 + 1, 2, 1 + 1]
