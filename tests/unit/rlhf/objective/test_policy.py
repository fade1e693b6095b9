"""The one forward: packed and shared equals each chat alone, whatever stands beside it; the gradient at step 0."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Asked, Scores
from tiny_job import TINY

VOCAB = 50
MLA = {"use_mla": True, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16}
LORA = {"use_lora": True, "lora_rank": 4}


def tiny_model(seed: int = 0, **shape: object) -> LLaMaTransformer:
    """Random weights large enough that attention and positions matter."""
    torch.manual_seed(seed)
    config = TrainingConfig(batch_size=1, tokens_per_update=512, **{**TINY, **shape})
    model = LLaMaTransformer(Architecture.of(config, VOCAB))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_pairs(seed: int, count: int) -> list[TokenizedPair]:
    """Prompts of 1-30 tokens, some with a part before the answer that differs, answers of 1-20 tokens."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = [1, *rng.integers(2, VOCAB, rng.integers(0, 30))]
        sides = []
        for _ in range(2):
            answer = list(rng.integers(2, VOCAB, rng.integers(1, 20)))
            context = list(rng.integers(2, VOCAB, rng.integers(0, 4)))
            sides += [[*prompt, *context, *answer], len(answer)]
        pairs.append(TokenizedPair.from_chats(*sides))
    return pairs


def random_dialogues(seed: int, count: int) -> list[TokenizedPair]:
    """Two answers of 1-6 tokens on each side, all scored; the first one is common to both sides every other time."""
    rng, pairs = np.random.default_rng(seed), []

    def some(most: int) -> list[int]:
        return rng.integers(2, VOCAB, rng.integers(1, most)).tolist()

    for number in range(count):
        prompt, answer, question, sides, spans = [1, *some(9)], some(7), some(5), [], []
        for _ in range(2):
            first, last = answer if number % 2 else some(7), some(7)
            context = [*prompt, *first, *question]
            spans.append(((len(prompt), len(prompt) + len(first)), (len(context), len(context) + len(last))))
            sides.append([*context, *last])
        pairs.append(TokenizedPair.from_spans(sides[0], sides[1], (spans[0], spans[1])))
    return pairs


def alone(model: LLaMaTransformer, pairs: list[TokenizedPair], pad: int) -> torch.Tensor:
    """The plain way: each chat whole, on its own, padded behind; log_softmax of all logits, then gather."""
    sums = []
    for pair in pairs:
        for ids, scored_at in zip(pair.wholes, pair.scored_at, strict=True):
            row = torch.tensor([[*ids.tolist(), *[0] * pad]])
            logps = model(row)[0, : len(ids) - 1].float().log_softmax(-1)
            sums.append(logps.gather(1, row[0, 1 : len(ids), None])[torch.from_numpy(scored_at) - 1].sum())
    return torch.stack(sums).view(-1, 2)


@pytest.mark.parametrize("shape", [{}, MLA, LORA], ids=["mha", "mla", "lora"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), pad=st.integers(0, 9))
def test_packed_and_shared_equals_each_chat_alone(shape, seed, count, pad):
    """fp32, 1e-5 a token: for any lengths, order, neighbours and padding."""
    model, pairs = tiny_model(**shape), random_pairs(seed, count) + random_dialogues(seed, count)
    with torch.no_grad():
        packed, plain = pair_logps(model, PairBatch.pack(pairs)), alone(model, pairs, pad)
    counts = torch.tensor(PairBatch.pack(pairs).counts)
    assert ((packed - plain).abs() / counts).max() < 1e-5
    assert (packed <= 0).all()


def test_all_sums_of_a_pair():
    """Chosen, rejected, both over the common length, and log sum p^2 of both: against each chat alone."""
    model, pairs = tiny_model(), random_pairs(2, 3) + random_dialogues(2, 2)
    expected = []
    with torch.no_grad():
        for pair in pairs:
            sides = []
            for ids, at in zip(pair.wholes, pair.scored_at, strict=True):
                row, at = torch.from_numpy(ids).long(), torch.from_numpy(at)
                logps = model(row[None])[0].double().log_softmax(-1)[at - 1]
                own = logps.gather(1, row[at, None])[:, 0]
                common = min(pair.chosen_scored, pair.rejected_scored)
                sides.append((own.sum(), own[:common].sum(), logps.exp().square().sum(1).log().sum()))
            expected.append([value for both in zip(*sides, strict=True) for value in both])
    expected_BS = torch.tensor(expected)
    for asked in (Asked(), Asked(fronts=True), Asked(True, True)):
        found = pair_logps(model, PairBatch.pack(pairs), asked)
        torch.testing.assert_close(found.double(), expected_BS[:, : asked.columns], atol=1e-4, rtol=1e-5)
    found = pair_logps(model, PairBatch.pack(pairs), Asked(squares=True)).double()[:, [0, 1, 4, 5]]
    torch.testing.assert_close(found, expected_BS[:, [0, 1, 4, 5]], atol=1e-4, rtol=1e-5)
    fronts = pair_logps(model, PairBatch.pack([pair.front for pair in pairs]))
    both = pair_logps(model, PairBatch.pack(pairs), Asked(fronts=True))
    torch.testing.assert_close(fronts, both[:, 2:], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize(
    "loss_fn",
    [
        PreferenceLoss("sigmoid", 0.5, ld_alpha=0.25),
        PreferenceLoss("sigmoid_norm", 2.0, weighting="wpo"),
        PreferenceLoss("hinge:0.5,simpo", nll_weight=0.1, ld_alpha=0.0, weighting="wpo"),
    ],
    ids=str,
)
def test_losses_of_more_sums_and_their_gradients(loss_fn):
    """Three GEMMs against autograd through whole chats alone, token by token: loss and gradients."""
    model, pairs = tiny_model(), random_pairs(4, 3) + random_dialogues(4, 1)
    batch = PairBatch.pack(pairs)
    ref = pair_logps(tiny_model(1), batch, Asked(fronts=True))
    out = DPOPolicy(model, loss_fn)(batch, ref)
    out.loss.backward()
    got = {name: torch.clone(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.zeros(())
    for place, pair in enumerate(pairs):
        whole, fronts, squares = [], [], []
        for ids, at in zip(pair.wholes, pair.scored_at, strict=True):
            row, at = torch.from_numpy(ids).long(), torch.from_numpy(at)
            logps = model(row[None])[0].log_softmax(-1)[at - 1]
            own = logps.gather(1, row[at, None])[:, 0]
            whole.append(own.sum())
            fronts.append(own[: min(pair.chosen_scored, pair.rejected_scored)].sum())
            squares.append(logps.detach().exp().square().sum(1).log().sum())
        sums = (torch.stack(part)[None] for part in (whole, fronts, squares))
        logps_12, fronts_12, squares_12 = sums
        counts_12 = torch.tensor([[pair.chosen_scored, pair.rejected_scored]])
        others = {"fronts_B2": fronts_12, "ref_fronts_B2": ref[place, None, 2:], "squares_B2": squares_12}
        total = total + loss_fn(Scores(logps_12, ref[place, None, :2], counts_12, **others)).sum()
    total.backward()
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=2e-5, rtol=1e-4, msg=name)
    assert max(grad.abs().max() for grad in got.values()) > 1e-4


def test_positions_that_go_on_counting_are_noticed():
    """The same batch with positions 0..T-1 instead of each chat's own: the numbers must differ."""
    model, pairs = tiny_model(), random_pairs(3, 3)
    batch = PairBatch.pack(pairs)
    wrong = dataclasses.replace(batch, positions_T=torch.arange(len(batch.tokens_T)))
    assert (pair_logps(model, wrong) - pair_logps(model, batch)).abs().max() > 0.01


def test_order_and_company_do_not_matter():
    """A pair has the same log-probs first, last and alone (fp32 1e-5)."""
    model, pairs = tiny_model(), random_pairs(5, 4)
    forward, backward = pair_logps(model, PairBatch.pack(pairs)), pair_logps(model, PairBatch.pack(pairs[::-1]))
    torch.testing.assert_close(forward, backward.flip(0), atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(forward[2:3], pair_logps(model, PairBatch.pack(pairs[2:3])), atol=1e-4, rtol=1e-6)


def test_loss_at_step_0_and_its_gradient():
    """Policy == reference, beta 0.5, 3 pairs: the sum is 3 ln 2; d loss / d logp is -0.25 for chosen and +0.25 for
    rejected, so the gradient equals that of -0.25 * sum(chosen - rejected); it is not zero though rewards are."""
    model, pairs = tiny_model(), random_pairs(7, 2) + random_dialogues(7, 2)[1:]
    batch = PairBatch.pack(pairs)
    loss_fn = PreferenceLoss(beta=0.5)
    reference = pair_logps(model, batch)
    out = DPOPolicy(model, loss_fn)(batch, reference)
    assert out.loss.item() == pytest.approx(3 * 0.6931472, abs=1e-5)
    assert out.rewards_B2.abs().max() < 1e-5 and out.losses_B.sum().item() == pytest.approx(out.loss.item())
    out.loss.backward()
    got = {name: torch.clone(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    by_hand = alone(model, pairs, 0)
    (-0.25 * (by_hand[:, 0] - by_hand[:, 1])).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(got[name], parameter.grad, atol=2e-5, rtol=1e-4, msg=name)
    assert max(grad.abs().max() for grad in got.values()) > 1e-3


def test_activation_checkpointing_changes_nothing():
    """The same loss and gradients, bit for bit."""
    model, batch = tiny_model(), PairBatch.pack(random_pairs(9, 3))
    reference = pair_logps(model, batch) - 1.0
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.activation_checkpointing = checkpointing
        DPOPolicy(model, PreferenceLoss())(batch, reference).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_reference_pass_draws_no_random_numbers_and_keeps_the_mode():
    """Dropout 0.5 in a training model: the pass is deterministic, and the model stays in training mode."""
    model, batch = tiny_model(dropout=0.5).train(), PairBatch.pack(random_pairs(1, 2))
    state = torch.get_rng_state()
    first, second = pair_logps(model, batch), pair_logps(model, batch)
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state) and model.training
