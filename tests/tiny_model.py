"""A model of a few thousand weights whose next token depends on all tokens before it, and prompts for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from tiny_job import TINY

VOCAB = 50
PROMPT = [8, 21, 22, 6]
PROMPTS = [PROMPT, [9, 6], [8, 30, 31, 32, 33, 34, 6], [40]]
MLA = {"use_mla": True, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16}


def tiny_model(changes: dict[str, Any] | None = None, **shape: object) -> LLaMaTransformer:
    """Weights large enough that the next token depends on all tokens before it; out of training. `changes`: of the
    architecture."""
    config = TrainingConfig(batch_size=1, tokens_per_update=512, **{**TINY, **shape})
    model = LLaMaTransformer(replace(Architecture.of(config, VOCAB), **(changes or {}))).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
