"""SimpleLLaMA's weights as those of Hugging Face's LlamaForCausalLM, and back: the same function, other names and rows.

What differs: queries, keys and values are one matrix here, head by head; and RoPE turns adjacent pairs (x0, x1), (x2,
x3), ... here, but (x_j, x_{j + K/2}) there. So there the rows of a head's queries and keys stand in another order; a
dot product of both does not see it. Gradients map as weights do.

Shapes: H heads, K width of a head, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.layers import feed_forward_width

Tensors = Mapping[str, torch.Tensor]

# {layer} is "decoder_blocks.N" here and "model.layers.N" there; qkv_linear is mapped by itself
SAME_VALUES = {
    "embeddings.weight": "model.embed_tokens.weight",
    "{layer}.attention.out.weight": "{layer}.self_attn.o_proj.weight",
    "{layer}.ffwd.w1.weight": "{layer}.mlp.gate_proj.weight",
    "{layer}.ffwd.w3.weight": "{layer}.mlp.up_proj.weight",
    "{layer}.ffwd.w2.weight": "{layer}.mlp.down_proj.weight",
    "{layer}.norm1.weight": "{layer}.input_layernorm.weight",
    "{layer}.norm2.weight": "{layer}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "final_linear.weight": "lm_head.weight",
}


def hf_config(config: TrainingConfig, vocab: int) -> dict[str, Any]:
    """Arguments of transformers' LlamaConfig for the same architecture. UserError where it has none (MLA, LoRA)."""
    check_mappable(config)
    return {
        "vocab_size": vocab,
        "hidden_size": config.n_embd,
        "intermediate_size": feed_forward_width(config.n_embd, config.multiple_of),
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.theta)},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": False,
    }


def to_hf(state_dict: Tensors, config: TrainingConfig) -> dict[str, torch.Tensor]:
    """Copies of our tensors under LlamaForCausalLM's names, in its order of rows."""
    check_mappable(config)
    names = same_value_names(config)
    mapped = {names[ours]: tensor.clone() for ours, tensor in state_dict.items() if ours in names}
    order_K = half_order(config.n_embd // config.n_heads)
    for layer in range(config.n_layers):
        qkv = state_dict[f"decoder_blocks.{layer}.attention.qkv_linear.weight"]
        q_HKD, k_HKD, v_HKD = qkv.view(config.n_heads, 3, -1, config.n_embd).unbind(1)
        for name, rows_HKD in (("q", q_HKD[:, order_K]), ("k", k_HKD[:, order_K]), ("v", v_HKD)):
            mapped[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = rows_HKD.reshape(-1, config.n_embd).clone()
    return mapped


def from_hf(tensors: Tensors, config: TrainingConfig) -> dict[str, torch.Tensor]:
    """Copies of LlamaForCausalLM's tensors (weights or gradients) under our names, in our order of rows."""
    check_mappable(config)
    mapped = {ours: tensors[theirs].clone() for ours, theirs in same_value_names(config).items()}
    back_K = half_order(config.n_embd // config.n_heads).argsort()
    for layer in range(config.n_layers):
        parts = [tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
        q_HKD, k_HKD, v_HKD = (part.view(config.n_heads, -1, config.n_embd) for part in parts)
        qkv = torch.stack((q_HKD[:, back_K], k_HKD[:, back_K], v_HKD), dim=1)
        mapped[f"decoder_blocks.{layer}.attention.qkv_linear.weight"] = qkv.reshape(-1, config.n_embd)
    return mapped


def half_order(width: int) -> torch.Tensor:
    """Our row for each of their rows of a head (K,): the first of all pairs, then the second of all pairs."""
    return torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))


def same_value_names(config: TrainingConfig) -> dict[str, str]:
    """Their name for each of our tensors that has the same values."""
    names = {}
    for ours, theirs in SAME_VALUES.items():
        layers = range(config.n_layers) if "{layer}" in ours else (0,)
        for layer in layers:
            here, there = f"decoder_blocks.{layer}", f"model.layers.{layer}"
            names[ours.format(layer=here)] = theirs.format(layer=there)
    return names


def check_mappable(config: TrainingConfig) -> None:
    """UserError for an architecture that LlamaForCausalLM does not have."""
    if config.use_mla or config.use_lora:
        raise UserError("model: expected multi-head attention without LoRA, as LlamaForCausalLM has, found MLA or LoRA")
