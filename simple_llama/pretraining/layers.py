"""The small layers of the transformer. Rows are (T, D): T packed rows, D width."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from simple_llama.ops.linear import Linear, linear
from simple_llama.pretraining.architecture import Architecture


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the fraction in fp32 and rounded before the weight (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Rows of any leading shape."""
        return self.weight * F.rms_norm(x_TD, self.weight.shape, eps=self.eps)  # computes in fp32 inside


class TiedEmbedding(nn.Embedding):
    """One table for both ends of the model: token ids to rows, and rows to logits.

    Both by a call, since partitioned weights (ZeRO-3) are gathered when their module is called.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) to rows (T, D); rows (T, D) to logits (T, V)."""
        return linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class LoRAInjection(nn.Module):
    """alpha/rank * (x @ lora_a) @ lora_b, zero at the start because lora_b is (arXiv:2106.09685)."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.randn(inputs, rank))
        self.lora_b = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Rows (T, inputs) to rows (T, outputs)."""
        return linear(self.scale * linear(x_TD, self.lora_a.T), self.lora_b.T)


class FeedForward(nn.Module):
    """SwiGLU, w2(silu(w1 x) * w3 x) (arXiv:2002.05202)."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        width, hidden, bias = architecture.width, architecture.hidden_width, architecture.ffwd_bias
        self.w1 = Linear(width, hidden, bias)
        self.w2 = Linear(hidden, width, bias)
        self.w3 = Linear(width, hidden, bias)
        self.dropout = nn.Dropout(architecture.dropout)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Rows (T, D) to rows (T, D)."""
        return self.dropout(self.w2(F.silu(self.w1(x_TD)) * self.w3(x_TD)))
