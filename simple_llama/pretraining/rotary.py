"""Rotary position embedding (RoFormer, arXiv:2104.09864) on adjacent pairs (x0, x1), (x2, x3), ..., in real numbers.

Shapes: T rows, H heads, K width (even).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from simple_llama.ops.elementwise import fused_kernels


@dataclass(frozen=True)
class LinearScaling:
    """All positions divided by `factor` (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: slow pairs are slowed by `factor`, fast ones left alone, those between in proportion.

    A pair is slow when it makes at most `slow_turns` whole turns over `trained_len` tokens, fast from `fast_turns` on.
    """

    factor: float
    slow_turns: float  # low_freq_factor in Hugging Face's config.json
    fast_turns: float  # high_freq_factor
    trained_len: int  # original_max_position_embeddings: tokens of a sequence before the stretch


RopeScaling = LinearScaling | Llama3Scaling


class Rotation(NamedTuple):
    """Each row's angles, (T, 1, K/2): one angle a pair, the same for all heads."""

    cos: torch.Tensor  # fp32
    sin: torch.Tensor  # fp32
    turns: torch.Tensor  # complex64, cos + i sin


def rotation(positions_T: torch.Tensor, width: int, theta: float, scaling: RopeScaling | None = None) -> Rotation:
    """Angles position * theta^(-2i / width) of pair i, or as `scaling` has it; in fp32 whatever the model's dtype."""
    pair_twice = torch.arange(0, width, 2, device=positions_T.device).float()
    frequencies = stretched(1.0 / theta ** (pair_twice / width), scaling)
    angles = torch.outer(positions_T.float(), frequencies).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return Rotation(cos, sin, torch.complex(cos, sin))


def stretched(frequencies: torch.Tensor, scaling: RopeScaling | None) -> torch.Tensor:
    """The frequencies (radians a position) as they were stretched."""
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    turns = scaling.trained_len * frequencies / (2 * math.pi)
    kept = ((turns - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


class _Rotate(torch.autograd.Function):
    """A pair times a complex number: one pass. Keeps only the angles; the gradient is the rotation backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(turns)
        # a copy of its own: a slice of a wider row may start where no complex number can
        wide = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turns)
        return wide.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (turns,) = ctx.saved_tensors
        return _Rotate.apply(grad, turns.conj()), None


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Heads (T, H, K), or by groups (T, G, R, K), with each pair turned by its row's angle, computed in fp32, in the
    dtype of x. What is given is contiguous."""
    kernels = fused_kernels(x)
    if kernels:
        return kernels.rotate(x, by.cos, by.sin)
    return _Rotate.apply(x, by.turns if x.dim() == 3 else by.turns.unsqueeze(1))
