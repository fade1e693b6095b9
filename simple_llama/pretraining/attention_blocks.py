"""The two attention layers: multi-head, and multi-head latent as in DeepSeek-V2 (arXiv:2405.04434), both with LoRA.

Each makes queries, keys and values of packed rows and leaves the rest to `attend`, so that one layer serves packed
pairs, plain sequences and generation with a cache.

Shapes: T packed rows, D width, H heads, K query/key width of a head, V value width of a head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from simple_llama.ops.linear import Linear
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.layers import LoRAInjection, RMSNorm
from simple_llama.pretraining.rotary import Rotation, rotate


class Attend(Protocol):
    """Mixes rows: who sees whom is the caller's matter."""

    def __call__(
        self, q_THK: torch.Tensor, k_THK: torch.Tensor, v_THV: torch.Tensor, *, scale: float
    ) -> torch.Tensor: ...


class MHSelfAttention(nn.Module):
    """Multi-head self-attention; one matrix for queries, keys and values, head by head."""

    def __init__(self, config: TrainingConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.head_dim = config.n_embd // config.n_heads
        self.qkv_linear = Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = Linear(config.n_embd, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        _add_lora(self, config, key_width=self.head_dim, value_width=self.head_dim)

    def forward(self, x_TD: torch.Tensor, by: Rotation, attend: Attend) -> torch.Tensor:
        """Rows (T, D) to rows (T, D)."""
        rows = x_TD.shape[0]
        q_THK, k_THK, v_THK = self.qkv_linear(x_TD).view(rows, self.n_heads, 3, self.head_dim).unbind(2)
        q_THK = rotate(_plus_lora(self, "q", q_THK, x_TD), by)
        k_THK = rotate(_plus_lora(self, "k", k_THK, x_TD), by)
        v_THK = _plus_lora(self, "v", v_THK, x_TD)
        y_THK = attend(q_THK, k_THK, v_THK, scale=self.head_dim**-0.5)
        y_TD = y_THK.reshape(rows, -1)
        return self.dropout(_plus_lora(self, "o", self.out(y_TD), y_TD))


class MLA(nn.Module):
    """Multi-head latent attention: keys and values from one narrow row; one key part with RoPE for all heads."""

    def __init__(self, config: TrainingConfig):
        super().__init__()
        heads, width = config.n_heads, config.n_embd
        self.n_heads = heads
        self.kv_rank = config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        queries = heads * (self.nope + self.rope)
        self.compress_q = config.q_lora_rank > 0
        if self.compress_q:
            self.wq_a = Linear(width, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, config.eps)
            self.wq_b = Linear(config.q_lora_rank, queries)
        else:
            self.wq = Linear(width, queries)
        self.wkv_a = Linear(width, self.kv_rank + self.rope)
        self.kv_norm = RMSNorm(self.kv_rank, config.eps)
        self.wkv_b = Linear(self.kv_rank, heads * (self.nope + self.value))
        self.wo = Linear(heads * self.value, width)
        self.dropout = nn.Dropout(config.dropout)
        _add_lora(self, config, key_width=self.nope, value_width=self.value)

    def forward(self, x_TD: torch.Tensor, by: Rotation, attend: Attend) -> torch.Tensor:
        """Rows (T, D) to rows (T, D)."""
        rows, heads = x_TD.shape[0], self.n_heads
        q_TQ = self.wq_b(self.q_norm(self.wq_a(x_TD))) if self.compress_q else self.wq(x_TD)
        q_nope, q_rope = q_TQ.view(rows, heads, -1).split((self.nope, self.rope), dim=-1)
        latent, k_rope = self.wkv_a(x_TD).split((self.kv_rank, self.rope), dim=-1)
        kv = self.wkv_b(self.kv_norm(latent)).view(rows, heads, -1)
        k_nope, v_THV = kv.split((self.nope, self.value), dim=-1)

        # LoRA updates the parts without position only, as upstream's checkpoints have it
        q_nope, k_nope = _plus_lora(self, "q", q_nope, x_TD), _plus_lora(self, "k", k_nope, x_TD)
        v_THV = _plus_lora(self, "v", v_THV, x_TD)
        k_rope = rotate(k_rope.unsqueeze(1), by).expand(-1, heads, -1)
        q_THK = torch.cat((q_nope, rotate(q_rope, by)), dim=-1)
        k_THK = torch.cat((k_nope, k_rope), dim=-1)

        y_THV = attend(q_THK, k_THK, v_THV, scale=(self.nope + self.rope) ** -0.5)
        y_TD = y_THV.reshape(rows, -1)
        return self.dropout(_plus_lora(self, "o", self.wo(y_TD), y_TD))


def _add_lora(layer: nn.Module, config: TrainingConfig, *, key_width: int, value_width: int) -> None:
    """Gives `layer` a `{q,k,v,o}_lora_layer` for each projection that the configuration updates."""
    if not config.use_lora:
        return
    width, heads = config.n_embd, config.n_heads
    outputs = {"q": heads * key_width, "k": heads * key_width, "v": heads * value_width, "o": width}
    for name, size in outputs.items():
        if getattr(config, f"{name}_lora"):
            setattr(layer, f"{name}_lora_layer", LoRAInjection(width, size, config.lora_rank, config.lora_alpha))


def _plus_lora(layer: nn.Module, name: str, projected: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    """`projected` plus the low-rank update of x, where the layer has one under this name."""
    update = getattr(layer, f"{name}_lora_layer", None)
    return projected if update is None else projected + update(x_TD).view(projected.shape)
