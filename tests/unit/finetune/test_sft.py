"""The short SFT: it learns, leaves out what is too long, and saves a model that loads; its packed loss by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.format_llm_prompt import encode_chat
from simple_llama.finetune.full_sft.sft import Chat, SFTConfig, _answer_loss, _rate, finetune
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import build_model, load_weights
from tiny_job import TINY, make_job

CPU = torch.device("cpu")
CHATS = [
    Chat("Be kind.", ["say a"], ["the cat sits"]),
    Chat("Be kind.", ["say b", "more"], ["a dog", "the dog runs near the tree"]),
    Chat("", ["c"], ["red"]),
]
TOO_LONG = Chat("x" * 600, ["d"], ["blue"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny job's tokenizer, 300 tokens."""
    return load_tokenizer(make_job(tmp_path_factory.mktemp("job")).folder / "tokenizer.json")


def tiny_config() -> TrainingConfig:
    """The tiny job's shape: at most 512 tokens."""
    shape: dict[str, Any] = {**TINY, "batch_size": 1, "tokens_per_update": 512}
    return TrainingConfig(**shape)


def encoded(tokenizer: Tokenizer) -> list[tuple[np.ndarray, int]]:
    """The chats as finetune passes them on."""
    return [(np.asarray(ids), scored) for ids, scored in (encode_chat(tokenizer, *chat) for chat in CHATS)]


@torch.no_grad()
def test_packed_loss_is_the_mean_over_the_scored_tokens(tokenizer: Tokenizer) -> None:
    """Each chat alone through the model, log_softmax of all logits; the sum over the last answers and their <EOA>,
    by the number of those tokens (not the mean of the chats' means, which differs here)."""
    model = LLaMaTransformer(Architecture.of(tiny_config(), tokenizer.get_vocab_size()))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    sums, counts = [], []
    for ids, scored in encoded(tokenizer):
        logps = model(torch.tensor([ids.tolist()]))[0].log_softmax(-1)
        places = range(len(ids) - scored, len(ids))
        sums.append(-sum(logps[place - 1, ids[place]].item() for place in places))
        counts.append(scored)
    expected = sum(sums) / sum(counts)
    assert _answer_loss(model, encoded(tokenizer), CPU).item() == pytest.approx(expected, abs=1e-5)
    mean_of_means = sum(total / count for total, count in zip(sums, counts, strict=True)) / 3
    assert abs(mean_of_means - expected) > 0.01


def test_the_loss_of_an_even_model_is_ln_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    """All logits 0: every token has probability 1 / 300."""
    model = LLaMaTransformer(Architecture.of(tiny_config(), tokenizer.get_vocab_size()))
    model.head_weight.data.zero_()
    assert _answer_loss(model, encoded(tokenizer), CPU).item() == pytest.approx(math.log(300), abs=1e-5)


def test_ten_steps_lower_the_loss_and_the_saved_model_has_it(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three chats in every step: from about ln 300 = 5.70 by more than 1 nat. The fourth chat, longer than 512 tokens,
    is left out and counted. The file loads; its loss is below that of the last step, which came before an update."""
    path = tmp_path / "sft" / "start.pth"
    config = SFTConfig(steps=10, max_lr=1e-2, seed=3)
    with caplog.at_level("INFO", logger="simple_llama"):
        last = finetune([*CHATS, TOO_LONG], tokenizer, tiny_config(), config, path)
    assert "SFT: kept 3 of 4 chats (1 too long)" in caplog.text
    torch.manual_seed(3)
    untrained = LLaMaTransformer(Architecture.of(tiny_config(), 300))
    first = _answer_loss(untrained, encoded(tokenizer), CPU).item()
    assert first == pytest.approx(math.log(300), abs=0.1)
    assert last < first - 1.0
    loaded = load_weights(path)
    assert loaded.metadata == {"kind": "sft", "steps": 10} and loaded.config == tiny_config()
    model = build_model(loaded, torch.float32, CPU)
    assert _answer_loss(model, encoded(tokenizer), CPU).item() < last


def test_the_same_seed_gives_the_same_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two steps each: equal for equal seeds, whatever was drawn before; another seed is another model."""
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        torch.rand(number)
        path = tmp_path / f"{number}.pth"
        finetune(CHATS, tokenizer, tiny_config(), SFTConfig(steps=2, batch_size=2, seed=seed), path)
        weights.append(load_weights(path).state_dict["norm.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_learning_rate_by_hand() -> None:
    """100 steps, 10 of them warm-up: 1/10 first, 1 at the end of warm-up and at step 10, half of the cosine at step 55
    (0.55), near 0.1 at the end; a single step has the full rate."""
    assert _rate(0, 100) == 0.1 and _rate(9, 100) == 1.0
    assert _rate(10, 100) == pytest.approx(1.0, abs=1e-12)
    assert _rate(55, 100) == pytest.approx(0.55, abs=1e-12)
    assert _rate(99, 100) == pytest.approx(0.1, abs=1e-3)
    assert _rate(0, 1) == 1.0
