"""Triton row kernels for a chunk of fp32 logits; the three GEMMs around them stay cuBLAS.

A row pass reads the logits once (logsumexp and target logit), another one where sums of squares are asked for, and a
gradient pass overwrites them in place. For bf16
GEMMs the gradient is written as bf16 into the first half of each row's own bytes, so that it needs no second buffer.
Import this module only where Triton is installed. `logprob_torch` is their specification.

Shapes: n rows of one chunk, V vocabulary.
"""

from __future__ import annotations

import subprocess

import torch
import triton
import triton.language as tl

from simple_llama.common.logging import LOGGER
from simple_llama.ops.logprob_torch import RowKernels

_MAX_BLOCK = 4096  # logits of a row that one program holds at once
_WARPS = 8


@triton.jit
def _logps_kernel(logits_ptr, row_stride, targets_ptr, logps_ptr, lse_ptr, vocab, BLOCK: tl.constexpr):
    """One program a row: every lane keeps the maximum and the sum of exponentials of its own columns."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    lanes = tl.arange(0, BLOCK)
    # the lowest fp32 stands in for -inf: its exponential is 0 too, and it subtracts from itself without a NaN
    maximum = tl.full([BLOCK], -3.4028234e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + lanes
        logit = tl.load(row_ptr + columns, mask=columns < vocab, other=-3.4028234e38)
        higher = tl.maximum(maximum, logit)
        total = total * tl.exp(maximum - higher) + tl.exp(logit - higher)
        maximum = higher
    row_maximum = tl.max(maximum, axis=0)
    log_total = tl.log(tl.sum(total * tl.exp(maximum - row_maximum), axis=0))
    target_logit = tl.load(row_ptr + tl.load(targets_ptr + row))
    # two small terms: adding the maximum to log_total first would round away digits at |logit| 1e4
    tl.store(logps_ptr + row, (target_logit - row_maximum) - log_total)
    tl.store(lse_ptr + 2 * row, row_maximum)
    tl.store(lse_ptr + 2 * row + 1, log_total)


@triton.jit
def _squares_kernel(logits_ptr, row_stride, lse_ptr, squares_ptr, vocab, BLOCK: tl.constexpr):
    """One program a row: log of the sum of the squares of its softmax."""
    row = tl.program_id(0).to(tl.int64)
    row_maximum = tl.load(lse_ptr + 2 * row)
    log_total = tl.load(lse_ptr + 2 * row + 1)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + lanes
        logit = tl.load(logits_ptr + row * row_stride + columns, mask=columns < vocab, other=-3.4028234e38)
        softmax = tl.exp((logit - row_maximum) - log_total)
        total += softmax * softmax
    tl.store(squares_ptr + row, tl.log(tl.sum(total, axis=0)))


@triton.jit
def _gradient_kernel(
    logits_ptr, row_stride, grad_ptr, grad_stride, targets_ptr, lse_ptr, coefs_ptr, vocab, BLOCK: tl.constexpr
):
    """One program a row: grad = coefficient * (onehot - softmax). grad may lie over the front of the row itself."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    coef = tl.load(coefs_ptr + row)
    row_maximum = tl.load(lse_ptr + 2 * row)
    log_total = tl.load(lse_ptr + 2 * row + 1)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        columns = start + lanes
        inside = columns < vocab
        logit = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=0.0)
        softmax = tl.exp((logit - row_maximum) - log_total)
        grad = tl.where(columns == target, coef - coef * softmax, -coef * softmax)
        # a bf16 gradient ends at or before the last byte read so far, so no warp writes before all have read
        tl.debug_barrier()
        tl.store(grad_ptr + row * grad_stride + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(gradient_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = gradient * factor, in the dtype of out. A factor on the device keeps torch's own kernel from vectors."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    product = tl.load(gradient_ptr + places, mask=inside) * tl.load(factor_ptr)
    tl.store(out_ptr + places, product.to(out_ptr.dtype.element_ty), mask=inside)


def _triton_logps_(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax at the targets; the logits stay. The state (n, 2) is each row's maximum and log of its sum."""
    n, vocab = logits_nV.shape
    logps_n, lse_n2 = logits_nV.new_empty(n), logits_nV.new_empty(n, 2)
    _logps_kernel[(n,)](
        logits_nV,
        logits_nV.stride(0),
        targets_n,
        logps_n,
        lse_n2,
        vocab,
        BLOCK=_block(vocab),
        num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
    )
    return logps_n, lse_n2


def _triton_log_squares(logits_nV: torch.Tensor, lse_n2: torch.Tensor) -> torch.Tensor:
    """log sum p^2 of each row; the logits are read once more."""
    n, vocab = logits_nV.shape
    squares_n = logits_nV.new_empty(n)
    _squares_kernel[(n,)](
        logits_nV,
        logits_nV.stride(0),
        lse_n2,
        squares_n,
        vocab,
        BLOCK=_block(vocab),
        num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
    )
    return squares_n


def _triton_gradient_(
    logits_nV: torch.Tensor, targets_n: torch.Tensor, lse_n2: torch.Tensor, coefs_n: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """coefficient * (onehot - softmax) in fp32 or bf16, in the memory of the logits (bf16 rows then have gaps)."""
    n, vocab = logits_nV.shape
    grad_nV = logits_nV.view(dtype)[:, :vocab]
    _gradient_kernel[(n,)](
        logits_nV,
        logits_nV.stride(0),
        grad_nV,
        grad_nV.stride(0),
        targets_n,
        lse_n2,
        coefs_n.contiguous(),
        vocab,
        BLOCK=_block(vocab),
        num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
    )
    return grad_nV


def _triton_scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * factor, multiplied in fp32 and rounded once to `dtype`. The gradient is contiguous."""
    out = torch.empty_like(gradient, dtype=dtype)
    if out.numel():
        grid = (triton.cdiv(out.numel(), _MAX_BLOCK),)
        _scale_kernel[grid](
            gradient,
            factor,
            out,
            out.numel(),
            BLOCK=_MAX_BLOCK,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
        )
    return out


def has_driver() -> bool:
    """Whether Triton reaches the GPU. On first use it compiles a module for that: with a C compiler, or not at all."""
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        LOGGER.warning(
            "the log-prob head runs in plain torch, slower and with more memory: Triton cannot start (%s). It needs a "
            "C compiler and Python's headers, gcc and python3-dev say",
            error,
        )
        return False
    return True


def _block(vocab: int) -> int:
    """Columns a program takes at a time: all of a small vocabulary, as a power of two."""
    return min(1 << (vocab - 1).bit_length(), _MAX_BLOCK)


TRITON_KERNELS = RowKernels(_triton_logps_, _triton_log_squares, _triton_gradient_, _triton_scaled)
