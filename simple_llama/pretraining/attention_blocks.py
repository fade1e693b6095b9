"""The two attention layers: multi-head, and multi-head latent as in DeepSeek-V2 (arXiv:2405.04434), both with LoRA.

Each makes queries, keys and values of packed rows and leaves the rest to `mix`, so that one layer serves packed
pairs, plain sequences and generation with a cache.

Shapes: T packed rows, D width, H query heads, G key heads, each of which serves R of them, K query/key width of a head,
V value width of a head, A the values of all query heads (H * V).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from simple_llama.ops.linear import Linear
from simple_llama.pretraining.architecture import Architecture, Latent
from simple_llama.pretraining.layers import RMSNorm, add_lora, plus_lora
from simple_llama.pretraining.rotary import Rotation, rotate


class Attend(Protocol):
    """Mixes rows: who sees whom is the caller's matter."""

    def __call__(
        self, q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor, *, scale: float
    ) -> torch.Tensor: ...


class MHSelfAttention(nn.Module):
    """Multi-head self-attention, with as many key heads as query heads or fewer.

    One matrix makes all, key head by key head: the queries that it serves, the key, the value.
    """

    def __init__(self, architecture: Architecture):
        super().__init__()
        key, value = architecture.key_width, architecture.value_width
        self.heads, self.key_heads, self.scale = architecture.heads, architecture.key_heads, key**-0.5
        self.parts = (self.heads // self.key_heads * key, key, value)  # widths of a key head's queries, key, value
        self.qkv_linear = Linear(architecture.width, self.key_heads * sum(self.parts), architecture.qkv_bias)
        self.out = Linear(self.heads * value, architecture.width, architecture.out_bias)
        self.dropout = nn.Dropout(architecture.dropout)
        self.q_norm, self.k_norm = (
            RMSNorm(key, architecture.eps) if architecture.qk_norm else nn.Identity() for _ in range(2)
        )
        _add_lora(self, architecture, queries=self.heads * key, keys=self.key_heads * key)

    def forward(self, x_TD: torch.Tensor, by: Rotation, mix: Attend) -> torch.Tensor:
        """Rows (T, D) to rows (T, D)."""
        rows = x_TD.shape[0]
        q, k_TGK, v_TGV = self.qkv_linear(x_TD).view(rows, self.key_heads, -1).split(self.parts, dim=-1)
        q_TGRK = q.unflatten(-1, (-1, k_TGK.shape[-1]))
        q_THK = rotate(self.q_norm(plus_lora(self, "q", q_TGRK, x_TD)), by).flatten(1, 2)
        k_TGK = rotate(self.k_norm(plus_lora(self, "k", k_TGK, x_TD)), by)
        v_TGV = plus_lora(self, "v", v_TGV, x_TD)
        y_TA = mix(q_THK, k_TGK, v_TGV, scale=self.scale).reshape(rows, -1)
        return self.dropout(plus_lora(self, "o", self.out(y_TA), y_TA))


class MLA(nn.Module):
    """Multi-head latent attention: keys and values from one narrow row; one key part with RoPE for all heads."""

    def __init__(self, architecture: Architecture, latent: Latent):
        super().__init__()
        width, heads, bias = architecture.width, architecture.heads, architecture.qkv_bias
        self.heads, self.key_rank = heads, latent.key_rank
        self.plain, self.rope, self.value = latent.plain_width, architecture.rope_width, architecture.value_width
        queries = heads * architecture.key_width
        self.compress_q = latent.query_rank > 0
        if self.compress_q:
            self.wq_a = Linear(width, latent.query_rank, bias)
            self.q_norm = RMSNorm(latent.query_rank, architecture.eps)
            self.wq_b = Linear(latent.query_rank, queries, bias)
        else:
            self.wq = Linear(width, queries, bias)
        self.wkv_a = Linear(width, self.key_rank + self.rope, bias)
        self.kv_norm = RMSNorm(self.key_rank, architecture.eps)
        self.wkv_b = Linear(self.key_rank, heads * (self.plain + self.value), bias)
        self.wo = Linear(heads * self.value, width, architecture.out_bias)
        self.scale = architecture.key_width**-0.5
        self.dropout = nn.Dropout(architecture.dropout)
        _add_lora(self, architecture, queries=heads * self.plain, keys=heads * self.plain)

    def forward(self, x_TD: torch.Tensor, by: Rotation, mix: Attend) -> torch.Tensor:
        """Rows (T, D) to rows (T, D)."""
        rows, heads = x_TD.shape[0], self.heads
        q_TQ = self.wq_b(self.q_norm(self.wq_a(x_TD))) if self.compress_q else self.wq(x_TD)
        q_plain, q_rope = q_TQ.view(rows, heads, -1).split((self.plain, self.rope), dim=-1)
        latent, k_rope = self.wkv_a(x_TD).split((self.key_rank, self.rope), dim=-1)
        kv = self.wkv_b(self.kv_norm(latent)).view(rows, heads, -1)
        k_plain, v_THV = kv.split((self.plain, self.value), dim=-1)

        # LoRA updates the parts without position only, as upstream's checkpoints have it
        q_plain, k_plain = plus_lora(self, "q", q_plain, x_TD), plus_lora(self, "k", k_plain, x_TD)
        v_THV = plus_lora(self, "v", v_THV, x_TD)
        k_rope = rotate(k_rope.unsqueeze(1), by).expand(-1, heads, -1)
        q_THK = torch.cat((q_plain, rotate(q_rope, by)), dim=-1)
        k_THK = torch.cat((k_plain, k_rope), dim=-1)

        y_TA = mix(q_THK, k_THK, v_THV, scale=self.scale).reshape(rows, -1)
        return self.dropout(plus_lora(self, "o", self.wo(y_TA), y_TA))


def _add_lora(layer: nn.Module, architecture: Architecture, *, queries: int, keys: int) -> None:
    """Gives `layer` a `{q,k,v,o}_lora_layer` for each projection that is updated; `queries` and `keys` numbers wide."""
    width, value = architecture.width, architecture.value_width
    sizes = {
        "q": (width, queries),
        "k": (width, keys),
        "v": (width, architecture.key_heads * value),
        "o": (architecture.heads * value, width),
    }
    add_lora(layer, architecture.lora, sizes)
