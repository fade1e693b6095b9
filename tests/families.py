"""Tiny models of each family of Hugging Face's, every parameter random, and chats whose positions reach 2,048.

Their epsilons are larger than those in use, which rounding would hide. Values come from bits of PCG64, which are the
same on every machine and in every version of numpy. Used by the tests and by golden/make_families.py, which records
what transformers computes with them.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch

LENGTH = 2048  # tokens of the longest chat
VOCAB = 40
BETA = 0.1
_REFERENCE_OFFSETS_B2 = [[3.0, -5.0], [-2.0, 4.0]]  # nats that the reference lies beside the model's log-probs

_SIZES = {
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "hidden_act": "silu",
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_SIZES}
_LLAMA3 = {  # over 200 tokens the four pairs of a head of 8 make 31.8 turns, 3.2, 0.32 and 0.03
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 200,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {
        **_LLAMA,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-3,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "pretraining_tp": 1,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
    },
    "llama3.1": {
        **_LLAMA,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-3,
        "rope_theta": 10_000.0,
        "rope_scaling": _LLAMA3,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
    },
    "llama3.2": {
        **_LLAMA,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {**_LLAMA3, "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "transformers_version": "5.0.0",
    },
    "linear": {
        **_LLAMA,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "tinyllama": {
        **_LLAMA,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "attention_bias": False,
        "rms_norm_eps": 1e-3,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    },
    "smollm2": {
        **_LLAMA,
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "is_llama_config": True,
        "rms_norm_eps": 1e-3,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100_000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **_SIZES,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-3,
        "rope_theta": 1_000_000.0,
        "sliding_window": LENGTH,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_SIZES,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_window_layers": 1,
        "rms_norm_eps": 2e-3,
        "rope_theta": 1_000_000.0,
        "sliding_window": 100,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **_SIZES,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": False,
        "layer_types": ["full_attention", "full_attention"],
        "max_window_layers": 2,
        "rms_norm_eps": 2e-3,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
}


class Pair(NamedTuple):
    """Token ids; all of both answers is scored."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def weights(family: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Values (fp32) of a family's tensors by their names in transformers."""
    return {name: _weight(f"{family} {name}", shape) for name, shape in shapes.items()}


def pairs() -> list[Pair]:
    """A long prompt with answers of 48 and 37 tokens, which end at positions 2,047 and 2,036, and a short one."""
    ids = (_bits("chats", LENGTH + 37 + 25) >> np.uint64(40)) % VOCAB
    pieces = np.split(ids.astype(int), np.cumsum([2000, 48, 37, 11, 5]))
    return [Pair(*(piece.tolist() for piece in pieces[:3])), Pair(*(piece.tolist() for piece in pieces[3:]))]


def reference(logps_B2: torch.Tensor) -> torch.Tensor:
    """Log-probs of a reference some nats beside the model's, so that no coefficient of the loss is trivial."""
    return logps_B2.detach() + torch.tensor(_REFERENCE_OFFSETS_B2)


def _weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Norms around 1, biases around 0, matrices that keep a row's size."""
    uniform = torch.tensor((_bits(name, int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) / 2**23 - 1)
    if name.endswith("bias"):
        values = 0.5 * uniform
    elif len(shape) == 1:
        values = 1 + 0.5 * uniform
    else:
        values = 2 * uniform * shape[1] ** -0.5
    return values.float().view(shape)


def _bits(name: str, count: int) -> np.ndarray:
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)
