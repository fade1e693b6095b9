"""Greedy tokens: the same as full forwards, and where they end; in the model's own state, one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.inference.generate import generate
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from tiny_job import TINY

VOCAB = 50
PROMPT = [8, 21, 22, 6]
NO_STOP: frozenset[int] = frozenset()
MLA = {"use_mla": True, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16}


def tiny_model(**shape: object) -> LLaMaTransformer:
    """Weights large enough that the next token depends on all tokens before it; out of training."""
    config = TrainingConfig(batch_size=1, tokens_per_update=512, **{**TINY, **shape})
    model = LLaMaTransformer(Architecture.of(config, VOCAB)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def by_full_forwards(model: LLaMaTransformer, count: int) -> list[int]:
    """The plain way: the whole chat through the model for each next token."""
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("shape", [{}, MLA], ids=["mha", "mla"])
def test_greedy_equals_full_forwards_step_by_step(shape: dict[str, Any]) -> None:
    """Twelve tokens with the cache are the argmax of twelve full forwards, and they are not one token twelve times."""
    model = tiny_model(**shape)
    expected = by_full_forwards(model, 12)
    assert len(set(expected)) > 2
    assert list(generate(model, PROMPT, 12, NO_STOP)) == expected


def test_it_ends_before_the_stop_id() -> None:
    """The fourth different token as the stop id: what stands before it is the answer."""
    model = tiny_model()
    tokens = by_full_forwards(model, 12)
    stop = list(dict.fromkeys(tokens))[3]
    assert list(generate(model, PROMPT, 12, {stop})) == tokens[: tokens.index(stop)]
    assert list(generate(model, PROMPT, 12, {tokens[0]})) == []


def test_it_respects_both_limits() -> None:
    """Prompt of 4 in a model of 8 tokens: 4 new ones at most, 3 where 3 are asked for, none where it is full."""
    model = tiny_model(max_seq_len=8)
    assert len(list(generate(model, PROMPT, 100, NO_STOP))) == 4
    assert len(list(generate(model, PROMPT, 3, NO_STOP))) == 3
    assert list(generate(model, [*PROMPT, *PROMPT], 100, NO_STOP)) == []
    with pytest.raises(UserError, match="max_seq_len = 8 tokens, found 9"):
        list(generate(model, [*PROMPT, *PROMPT, 6], 100, NO_STOP))


def test_tokens_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward for each token that is asked for and none ahead, so that an answer can be shown as it is made."""
    model, calls = tiny_model(), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *args: calls.append(len(args[0])) or decode(*args))
    tokens = generate(model, PROMPT, 12, NO_STOP)
    assert calls == []
    next(tokens)
    assert calls == [4]  # the whole prompt at once
    next(tokens)
    assert calls == [4, 1]


def test_dropout_is_refused() -> None:
    """In training the answer would be another each time."""
    with pytest.raises(AssertionError, match="dropout"):
        next(generate(tiny_model().train(), PROMPT, 1, NO_STOP))
