"""The mapping of weights between SimpleLLaMA and Hugging Face's Llama, without transformers."""

from __future__ import annotations

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.interop.hf_names import from_hf, half_order, hf_config, to_hf
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.rotary import rotate, rotation

CONFIG = TrainingConfig(n_embd=24, n_heads=3, n_layers=2, multiple_of=8, max_seq_len=64)
ROWS, HEADS, WIDTH = 5, 3, 8  # T rows, H heads, K width of a head


def test_round_trip_is_exact() -> None:
    """There and back gives every tensor bit for bit; no name of ours is lost and none of theirs is left over."""
    ours = LLaMaTransformer(CONFIG, vocab_size=11).state_dict()
    theirs = to_hf(ours, CONFIG)
    back = from_hf(theirs, CONFIG)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert len(theirs) == len(ours) + 2 * CONFIG.n_layers  # q, k and v are three matrices there


def test_shapes_are_those_of_the_config() -> None:
    """The feed-forward is 8/3 * 24 = 64 wide, a multiple of 8 already."""
    theirs = to_hf(LLaMaTransformer(CONFIG, vocab_size=11).state_dict(), CONFIG)
    wanted = hf_config(CONFIG, 11)
    assert wanted["intermediate_size"] == 64
    assert theirs["model.layers.1.mlp.up_proj.weight"].shape == (64, 24)
    assert theirs["model.layers.1.mlp.down_proj.weight"].shape == (24, 64)
    assert theirs["model.embed_tokens.weight"].shape == theirs["lm_head.weight"].shape == (wanted["vocab_size"], 24)


def test_half_order_by_hand() -> None:
    """Pairs (0, 1), (2, 3), (4, 5): first members, then second ones."""
    assert half_order(6).tolist() == [0, 2, 4, 1, 3, 5]


def rotate_half(x_THK: torch.Tensor, positions_T: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE on pairs (x_j, x_{j + K/2}), written out: pair j turns by position * theta^(-2j / K)."""
    half = x_THK.shape[-1] // 2
    out = torch.empty_like(x_THK)
    for j in range(half):
        angle_T1 = (positions_T * theta ** (-2 * j / x_THK.shape[-1]))[:, None]
        first, second = x_THK[..., j], x_THK[..., j + half]
        out[..., j] = first * angle_T1.cos() - second * angle_T1.sin()
        out[..., j + half] = first * angle_T1.sin() + second * angle_T1.cos()
    return out


def test_scores_of_mapped_queries_and_keys_are_ours() -> None:
    """q k^T after rotate-half RoPE of their projections equals ours after RoPE of adjacent pairs; values are equal."""
    model = LLaMaTransformer(CONFIG, vocab_size=11).double()
    theirs = to_hf(model.state_dict(), CONFIG)
    x_TD, positions_T = torch.randn(ROWS, CONFIG.n_embd).double(), torch.arange(ROWS) + 3

    qkv = model.decoder_blocks[1].attention.qkv_linear(x_TD).view(ROWS, HEADS, 3, WIDTH)  # pyright: ignore
    by = rotation(positions_T, WIDTH, CONFIG.theta)
    q, k = rotate(qkv[:, :, 0], by), rotate(qkv[:, :, 1], by)
    ours = torch.einsum("thk,shk->hts", q, k)

    projected = {
        name: (x_TD @ theirs[f"model.layers.1.self_attn.{name}_proj.weight"].T).view(ROWS, HEADS, WIDTH)
        for name in "qkv"
    }
    q, k = (rotate_half(projected[name], positions_T, CONFIG.theta) for name in "qk")
    assert torch.allclose(torch.einsum("thk,shk->hts", q, k), ours, rtol=1e-5, atol=1e-8)  # our RoPE computes in fp32
    assert torch.equal(projected["v"], qkv[:, :, 2])


def test_other_architectures_are_refused() -> None:
    """LlamaForCausalLM has neither latent attention nor LoRA."""
    for config in (TrainingConfig(use_mla=True), TrainingConfig(use_lora=True)):
        with pytest.raises(UserError, match="MLA or LoRA"):
            hf_config(config, 11)
