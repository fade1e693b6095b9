"""Rotary position embedding (RoFormer, arXiv:2104.09864) on adjacent pairs (x0, x1), (x2, x3), ..., in real numbers.

Shapes: T rows, H heads, K width (even).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Rotation(NamedTuple):
    """Cosine and sine of each row's angles, fp32 (T, 1, K/2): one angle a pair, the same for all heads."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotation(positions_T: torch.Tensor, width: int, theta: float) -> Rotation:
    """Angles position * theta^(-2i / width) of pair i, in fp32 whatever the dtype of the model."""
    pair_twice = torch.arange(0, width, 2, device=positions_T.device).float()
    frequencies = 1.0 / theta ** (pair_twice / width)
    angles = torch.outer(positions_T.float(), frequencies).unsqueeze(1)
    return Rotation(angles.cos(), angles.sin())


class _Rotate(torch.autograd.Function):
    """Keeps only the angles; the gradient of a rotation is the rotation backwards."""

    @staticmethod
    def forward(ctx: Any, x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        x = x_THK.float()
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
        out0, out1 = out.unflatten(-1, (-1, 2)).unbind(-1)
        torch.mul(x0, cos, out=out0).addcmul_(x1, sin, value=-1)
        torch.mul(x0, sin, out=out1).addcmul_(x1, cos)
        return out.to(x_THK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_THK: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad_THK, cos, -sin), None, None


def rotate(x_THK: torch.Tensor, by: Rotation) -> torch.Tensor:
    """x with each pair turned by its row's angle, computed in fp32, in the dtype of x."""
    return _Rotate.apply(x_THK, *by)
