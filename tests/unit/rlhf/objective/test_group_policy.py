"""Answers that pairs share, computed once: the numbers and gradients of the pairs one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.ops import logprob_chunks
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairBuffer, PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.coupling import pull_of
from simple_llama.reinforcement_learning.rlhf.objective.policy import (
    DPOPolicy,
    pair_logps,
    require_rankings,
    scores_of,
)
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Asked, Scores
from tiny_job import TINY

VOCAB = 50


@pytest.fixture
def model() -> LLaMaTransformer:
    """Random weights large enough that attention and positions matter."""
    torch.manual_seed(0)
    shape: dict[str, Any] = TINY
    config = TrainingConfig(batch_size=1, tokens_per_update=512, **shape)
    model = LLaMaTransformer(Architecture.of(config, VOCAB))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def ranked_pairs(seed: int, answers: Sequence[int], chains: bool = False) -> list[TokenizedPair]:
    """A record for each number, of so many answers of 1 to 9 tokens, some with a common beginning; pairs by rank."""
    rng, buffer = np.random.default_rng(seed), PairBuffer()

    def some(most: int) -> list[int]:
        return rng.integers(2, VOCAB, rng.integers(1, most)).tolist()

    for record, count in enumerate(answers):
        prompt, start = [1, *some(12)], some(3)
        chats = [([*prompt, *found], len(found)) for found in ([*start[: n % 2], *some(8)] for n in range(count))]
        places = [(w, r) for w in range(count) for r in range(w + 1, count) if not chains or r == w + 1]
        pairs = [TokenizedPair.from_chats(*chats[w], *chats[r], weight=1.0 + w) for w, r in places]
        buffer.append_group(pairs, "file", record + 1)
    return list(buffer.finish())


def apart(pairs: Sequence[TokenizedPair]) -> PairBatch:
    """Each pair in a segment of its own."""
    return PairBatch.pack([replace(pair, segment=-1) for pair in pairs])


def gradients(model: LLaMaTransformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each weight, by name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_rows", [16, 512])
@pytest.mark.parametrize("options", [{}, {"weighting": "wpo", "nll_weight": 0.3}, {"loss_type": "aot"}], ids=str)
def test_grouped_is_pair_by_pair(
    model: LLaMaTransformer, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], chunk_rows: int
) -> None:
    """Losses, sums and gradients, fp32 1e-5, of records of 4, 2, 8 and 3 answers; also with chunks of few records."""
    monkeypatch.setattr(logprob_chunks, "_CPU_ROWS", chunk_rows)
    pairs, loss_fn = ranked_pairs(1, (4, 2, 8, 3)), PreferenceLoss(**options)
    both = []
    for batch in (PairBatch.pack(pairs), apart(pairs)):
        reference = pair_logps(model, apart(pairs)) + torch.linspace(-1, 1, 2 * len(pairs)).view(-1, 2)
        pull = pull_of(loss_fn, scores_of(pair_logps(model, batch), reference, batch)) if loss_fn.couples else None
        out = DPOPolicy(model, loss_fn)(batch, reference, pull)
        both.append((out, gradients(model, out.loss)))
    (shared, grads), (one_by_one, right) = both
    assert len(pairs) == 6 + 1 + 28 + 3
    assert sum(map(sum, PairBatch.pack(pairs).answer_counts)) < len(apart(pairs).targets_N) / 2
    torch.testing.assert_close(shared.losses_B, one_by_one.losses_B, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.sums_BS, one_by_one.sums_BS, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(shared.rewards_B2, one_by_one.rewards_B2, atol=1e-5, rtol=1e-5)
    for name, gradient in right.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4, msg=name)


def test_sums_without_gradient(model: LLaMaTransformer) -> None:
    """Those of the reference pass, squares too."""
    pairs = ranked_pairs(2, (3, 5, 2))
    for asked in (Asked(), Asked(squares=True)):
        found, right = (pair_logps(model, batch, asked) for batch in (PairBatch.pack(pairs), apart(pairs)))
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-6)


def test_a_ranking_by_hand() -> None:
    """Rewards 2, 1, 0 in order: -log(e^2 / (e^2 + e + 1)) - log(e / (e + 1)); another record beside it changes
    nothing."""
    chosen, rejected = torch.tensor([2.0, 1.0, 5.0]), torch.tensor([1.0, 0.0, 3.0])
    scores = Scores(torch.stack([chosen, rejected], 1).double(), torch.zeros(3, 2), groups_B=torch.tensor([7, 7, 8]))
    losses = PreferenceLoss("plackett_luce", 1.0)(scores)
    e = np.e
    expected = [-np.log(e**2 / (e**2 + e + 1)), -np.log(e / (e + 1)), -np.log(1 / (1 + np.exp(-2.0)))]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9])
def test_a_ranking_of_many_answers(model: LLaMaTransformer, count: int) -> None:
    """The whole ranking's -log probability, answer by answer; its first value is log K!."""
    pairs, loss_fn = ranked_pairs(3, (count, 2, count), chains=True), PreferenceLoss("plackett_luce", 0.3)
    batch = PairBatch.pack(pairs)
    logps = pair_logps(model, batch)
    out = DPOPolicy(model, loss_fn)(batch, logps)
    logs = [float(np.log(np.arange(1, k + 1)).sum()) for k in (count, 2, count)]
    weights = batch.weights_B
    by_record = [out.losses_B[: count - 1], out.losses_B[count - 1 : count], out.losses_B[count:]]
    for losses, of_record, log in zip(by_record, weights.split([count - 1, 1, count - 1]), logs, strict=True):
        assert float((losses / of_record).sum()) == pytest.approx(log, abs=1e-5)
    ref = logps + torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    for pair in range(count - 2):  # an answer that is rejected and then chosen has one reference
        ref[pair + 1, 0] = ref[pair, 1]
    found = DPOPolicy(model, loss_fn)(batch, ref).losses_B[: count - 1] / weights[: count - 1]
    rewards = 0.3 * (logps - ref)[: count - 1].double()
    order = torch.cat([rewards[:, 0], rewards[-1:, 1]])
    expected = [float(order[k:].logsumexp(0) - order[k]) for k in range(count - 1)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_what_a_loss_cannot_use_is_refused() -> None:
    """Plackett-Luce of all pairs, and sums over common lengths of shared answers."""
    every, chains = (PairSet.of([]), PairSet.of([]))
    for name, chain in (("every", False), ("chains", True)):
        buffer = PairBuffer()
        buffer.append_group([replace(one, answers=None) for one in ranked_pairs(4, (4,), chain)], "file", 1)
        every, chains = (buffer.finish(), chains) if name == "every" else (every, buffer.finish())
    ranked = PreferenceLoss("plackett_luce")
    require_rankings(ranked, chains, "adjacent")
    require_rankings(PreferenceLoss(), every, "all")
    with pytest.raises(
        UserError, match="ranks the answers of a record: expected --pairs adjacent, .* found --pairs all"
    ):
        require_rankings(ranked, every, "all")
    with pytest.raises(UserError, match=r"with the next one, found one missing \(file:1\): it was too long"):
        require_rankings(ranked, every, "adjacent")
    with pytest.raises(UserError, match="ld_alpha: expected pairs of records of their own"):
        require_rankings(PreferenceLoss(ld_alpha=0.5), every, "all")
