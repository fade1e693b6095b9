"""RMSNorm and SwiGLU's product, which keep for the backward pass only what they are given.

Autograd would keep what is computed on the way, too: rows in fp32 and normalized ones, silu(gate). It is computed again
instead, in the backward pass, which costs about what writing and reading it did. Torch's own operators are the
specification: on a CPU values are theirs bit for bit, and gradients to rounding. On a GPU each is a Triton kernel
(`elementwise_triton`), or torch's own where Triton is not at hand.

Shapes: T rows, D width, H hidden width.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from simple_llama.ops.fused_kernels import FusedKernels

_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_kernels(rows: torch.Tensor, at_once: int = 1) -> FusedKernels | None:
    """Kernels that take these rows: Triton's, on a GPU that it reaches, in half precision or fp32, and not more numbers
    of a row `at_once` than a program can hold. None where torch's own operators are to do it."""
    kernels = _kernels(rows.device.type)
    return kernels if kernels and rows.dtype in _FUSED_DTYPES and at_once <= kernels.widest else None


@functools.cache
def _kernels(device_type: str) -> FusedKernels | None:
    """The kernels for such a device."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from simple_llama.ops.elementwise_triton import TRITON_KERNELS
    from simple_llama.ops.logprob_triton import has_driver

    return TRITON_KERNELS if has_driver() else None


def add_norm(
    x_TD: torch.Tensor, update_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + update, and `rms_norm` of that."""
    kernels = fused_kernels(x_TD, at_once=len(weight_D))
    if kernels:
        return kernels.add_norm(x_TD, update_TD, weight_D, eps)
    sum_TD = x_TD + update_TD
    return sum_TD, rms_norm(sum_TD, weight_D, eps)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps), the fraction in fp32 and rounded before the weight (arXiv:1910.07467)."""
    kernels = fused_kernels(x_TD, at_once=len(weight_D))
    if kernels:
        return kernels.rms_norm(x_TD, weight_D, eps)
    if _keeps_less(x_TD, weight_D):
        return _RMSNorm.apply(x_TD, weight_D, eps)
    return weight_D * F.rms_norm(x_TD, weight_D.shape, eps=eps)


def swiglu(gate_TH: torch.Tensor, up_TH: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv:2002.05202)."""
    kernels = fused_kernels(gate_TH)
    if kernels:
        return kernels.swiglu(gate_TH, up_TH)
    return _SwiGLU.apply(gate_TH, up_TH) if _keeps_less(gate_TH, up_TH) else F.silu(gate_TH) * up_TH


def _keeps_less(rows: torch.Tensor, factor: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and rows.device.type == "cpu" and rows.dtype == factor.dtype


class _RMSNorm(torch.autograd.Function):
    """Keeps x and a number of each row."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        scale_T1 = wide_TD.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return weight_D * (wide_TD * scale_T1).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        normed_TD = x_TD.to(scale_T1.dtype) * scale_T1
        grad_x = grad_weight = None
        if needs_weight:
            grad_weight = (grad_TD * normed_TD.to(x_TD.dtype)).reshape(-1, weight_D.numel()).sum(0)
        if needs_x:  # (g - n mean(g n)) / rms of g, the gradient of the fraction n
            grad = (grad_TD * weight_D).to(scale_T1.dtype)
            mean_T1 = (grad * normed_TD).mean(-1, keepdim=True)
            grad_x = (grad - normed_TD.mul_(mean_T1)).mul_(scale_T1).to(x_TD.dtype)
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """Keeps both factors."""

    @staticmethod
    def forward(ctx: Any, gate_TH: torch.Tensor, up_TH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_TH, up_TH)
        return F.silu(gate_TH).mul_(up_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_TH, up_TH = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad_TH * up_TH, gate_TH)
        return grad_gate, F.silu(gate_TH).mul_(grad_TH)
