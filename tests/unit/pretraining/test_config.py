"""TrainingConfig and the rules that its sizes keep."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from simple_llama.common.errors import UserError
from simple_llama.pretraining.config import TrainingConfig, check_model_config, identity_fields

SMALL: dict[str, Any] = {"n_embd": 32, "n_heads": 4, "n_layers": 1, "multiple_of": 16, "max_seq_len": 64}


def test_grad_accum_steps_is_derived():
    """2^19 tokens an update / (4 sequences of 2048 tokens) = 64 micro-batches."""
    assert TrainingConfig().grad_accum_steps == 64


def test_tokens_per_update_must_divide():
    """100 tokens are no multiple of 4 * 2048."""
    with pytest.raises(UserError, match=r"tokens_per_update: expected a multiple of .* = 8192, found 100"):
        TrainingConfig(tokens_per_update=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "n_embd: expected a multiple of n_heads = 5"),
        ({"n_heads": 32}, "expected an even number for RoPE, found 1"),
        ({"n_layers": 0}, "n_layers: expected a whole number of at least 1, found 0"),
        ({"n_embd": "32"}, "n_embd: expected a whole number"),
        ({"eps": 0.0}, "eps: expected a positive number"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"use_lora": True, "lora_rank": 0}, "lora_rank: expected"),
        ({"use_mla": True, "v_head_dim": 9}, "v_head_dim: expected n_embd / n_heads = 8, found 9"),
        ({"use_mla": True, "v_head_dim": 8, "qk_rope_head_dim": 3}, "qk_rope_head_dim: expected an even number"),
        ({"use_mla": True, "v_head_dim": 8, "q_lora_rank": -1}, "q_lora_rank: expected a whole number of at least 0"),
    ],
)
def test_impossible_sizes_are_named(changes: dict, message: str):
    """Each broken rule says what was expected and found."""
    with pytest.raises(UserError, match=message):
        check_model_config(TrainingConfig(**{**SMALL, **changes}))


def test_possible_sizes_pass():
    """Upstream's defaults and both attention kinds in small."""
    check_model_config(TrainingConfig())
    check_model_config(TrainingConfig(**SMALL))
    check_model_config(TrainingConfig(**SMALL, use_mla=True, v_head_dim=8))


def test_identity_is_what_changes_the_output():
    """Two thetas are two models with the same weights; batch sizes and unused MLA widths are no part of it."""
    base = identity_fields(TrainingConfig(**SMALL))
    assert identity_fields(TrainingConfig(**SMALL, theta=500)) != base
    assert identity_fields(TrainingConfig(**SMALL, batch_size=8, kv_lora_rank=3)) == base
    assert identity_fields(TrainingConfig(**SMALL, use_lora=True))["lora_alpha"] == 8
    assert set(base) < {field.name for field in fields(TrainingConfig)}
