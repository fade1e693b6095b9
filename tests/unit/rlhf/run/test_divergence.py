"""The KL on sampled answers: the packed stream, k3 and its interval by hand, the reference read a block at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from simple_llama.inference.generate import Sampling
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import build_model, load_weights
from simple_llama.reinforcement_learning.rlhf.run.divergence import (
    Spoken,
    k3_sums,
    kl_metrics,
    lean_model,
    spoken_logps,
)
from simple_llama.reinforcement_learning.rlhf.run.sampling import _answers
from tiny_job import make_job

CPU = torch.device("cpu")
PROMPTS = [[8, 21, 22, 6], [9, 6]]
ANSWERS = [[[30, 31, 7], [32]], [[33, 34]]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny job's start model."""
    return make_job(tmp_path_factory.mktemp("job")).folder / "start.pth"


def model_at(path: Path) -> LLaMaTransformer:
    """In fp32."""
    return build_model(load_weights(path), torch.float32, CPU).eval()


@torch.no_grad()
def test_log_probs_are_those_of_whole_chats(start: Path) -> None:
    """Each answer behind its prompt alone, log_softmax of all logits: the packed stream gives the same to 1e-5."""
    model, spoken = model_at(start), Spoken.pack(PROMPTS, ANSWERS)
    assert spoken.counts == (3, 1, 2) and spoken.targets_N.tolist() == [30, 31, 7, 32, 33, 34]
    assert len(spoken.tokens_T) == 4 + 2 + 0 + 2 + 1, "a prompt once, and all but the last token of each answer"
    expected = []
    for prompt, own in zip(PROMPTS, ANSWERS, strict=True):
        for answer in own:
            logps = model(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)
            expected += [logps[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
    assert spoken_logps(model, spoken).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_reference_is_read_a_block_at_a_time(start: Path) -> None:
    """The same bits as of the whole model; before and after a pass no block has values."""
    spoken, loaded = Spoken.pack(PROMPTS, ANSWERS), load_weights(start)
    lean = lean_model(loaded, torch.float32, CPU)
    for _ in range(2):
        assert all(parameter.is_meta for parameter in lean.decoder_blocks.parameters())
        assert torch.equal(spoken_logps(lean, spoken), spoken_logps(model_at(start), spoken))


def test_k3_by_hand() -> None:
    """r = ln 2 gives 2 - 1 - ln 2 = 0.3069, r = -ln 2 gives 0.5 - 1 + ln 2 = 0.1931, r = 0 nothing; by answers of one
    token, and of two and one."""
    policy = torch.tensor([0.0, 0.0, -3.0], dtype=torch.float64)
    ref = torch.tensor([math.log(2), -math.log(2), -3.0], dtype=torch.float64)
    assert k3_sums(policy, ref, [1, 1, 1]) == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0.0], abs=1e-12)
    assert k3_sums(policy, ref, [2, 1]) == pytest.approx([0.5, 0.0], abs=1e-12)


def test_interval_of_the_kl() -> None:
    """A mean over tokens, not over answers: (1 + 9) / (1 + 3). Between the answers' own means 1 and 3, and one number
    where all say the same; nothing of one answer, which has no interval."""
    found = kl_metrics([1.0, 9.0], [1, 3])
    assert found == {"samples/kl": 2.5, "samples/kl_low": 1.0, "samples/kl_high": 3.0}
    assert set(kl_metrics([2.0, 4.0, 6.0], [1, 2, 3]).values()) == {2.0}
    assert kl_metrics([], []) == kl_metrics([1.0], [1]) == {}


def test_the_estimate_is_the_divergence(start: Path) -> None:
    """Of one-token answers the exact KL is a sum over the vocabulary: 400 samples of k3 come within 4 standard errors,
    and the training's random numbers stay as they were."""
    policy, reference = model_at(start), model_at(start)
    with torch.no_grad():
        policy.head_weight.mul_(1.5)
        one, other = (model(torch.tensor([PROMPTS[0]]))[0, -1].log_softmax(-1) for model in (policy, reference))
    exact = (one.exp() * (one - other)).sum().item()
    before = torch.get_rng_state()
    answers = _answers(policy, frozenset(), [PROMPTS[0]] * 400, 1, Sampling(1.0, seed=3))
    spoken = Spoken.pack([PROMPTS[0]], [answers])
    sums = k3_sums(spoken_logps(policy, spoken), spoken_logps(reference, spoken), spoken.counts)
    assert torch.equal(torch.get_rng_state(), before)
    error = torch.tensor(sums).std().item() / 20
    assert exact > 4 * error and abs(kl_metrics(sums, spoken.counts)["samples/kl"] - exact) < 4 * error
