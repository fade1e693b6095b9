"""A linear layer that keeps bf16 weights and rows, and multiplies in fp32 where the CPU has no bf16 units.

There oneDNN emulates a bf16 GEMM, 3 to 4 times slower than the same GEMM in fp32, while converting the operands first
costs about a tenth of that GEMM. Everywhere else this is `torch.nn.functional.linear`.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from simple_llama.ops.machine import cpu_emulates_bf16


def emulates_bf16(tensor: torch.Tensor) -> bool:
    """Whether a GEMM on `tensor` as it is would run in emulated bf16, so that fp32 is the faster way."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and cpu_emulates_bf16()


class _UpcastLinear(torch.autograd.Function):
    """bf16 in and out, three fp32 GEMMs; only the bf16 tensors are kept for backward."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        bias = None if bias_O is None else bias_O.float()
        return F.linear(x_TI.float(), weight_OI.float(), bias).to(x_TI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        grad = grad_TO.float()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = (grad @ weight_OI.float()).to(x_TI.dtype) if needs_x else None
        grad_weight = (grad.T @ x_TI.float()).to(weight_OI.dtype) if needs_weight else None
        grad_bias = grad.sum(0).to(weight_OI.dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias


def linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, *, upcast: bool | None = None
) -> torch.Tensor:
    """x W^T + b for rows x_TI, equal to F.linear to the rounding of the dtype.

    Args:
        upcast: multiply in fp32; None asks the machine (`emulates_bf16`).
    """
    if emulates_bf16(x_TI) if upcast is None else upcast:
        return _UpcastLinear.apply(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


class Linear(nn.Linear):
    """nn.Linear, same names and parameters, that multiplies by `linear` and starts as Llama does: normal(0, 0.02)."""

    def reset_parameters(self) -> None:
        """Weights normal(0, 0.02), biases zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Rows (T, I) to rows (T, O)."""
        return linear(x_TI, self.weight, self.bias)
