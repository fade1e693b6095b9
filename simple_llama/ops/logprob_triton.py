"""Triton row kernels for a chunk of fp32 logits; the three GEMMs around them stay cuBLAS.

One pass over a row takes its logsumexp and target logit, a second one writes its gradient, in bf16 for bf16 GEMMs, and
adds up the squares where these are asked for. Import this module only where Triton is installed. `logprob_torch` is
their specification.

Shapes: n rows of one chunk, p parts of it, V vocabulary, D width, C values of a row (1, or 2 with squares).
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from simple_llama.common.logging import LOGGER
from simple_llama.ops.logprob_torch import RowKernels

_MAX_BLOCK = 4096  # numbers that one program holds at once
_WARPS = 8
_SUM_BLOCK = 512  # log-probs of a part that are added up at once
_SCALE_STEPS = 16  # blocks of a gradient that one program scales


# where one row or an odd number of them is compiled apart, every batch would compile
@triton.jit(do_not_specialize=["count"])
def _rows_kernel(
    logits_ptr,
    row_stride,
    targets_ptr,
    values_ptr,
    count,
    gradient_ptr,
    gradient_stride,
    vocab,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """One program a row: in the first pass every lane keeps the maximum and the sum of exponentials of its own columns.

    Values are the log-probs of all rows, then their log sums of p^2. gradient = onehot - softmax.
    """
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
    target = tl.load(targets_ptr + row)
    # two small terms: adding the maximum to log_total first would round away digits at |logit| 1e4
    tl.store(values_ptr + row, (tl.load(row_ptr + target) - row_maximum) - log_total)
    if GRADIENT or SQUARES:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            columns = start + lanes
            inside = columns < vocab
            logit = tl.load(row_ptr + columns, mask=inside, other=-3.4028234e38)
            softmax = tl.exp((logit - row_maximum) - log_total)
            if SQUARES:
                squares += softmax * softmax
            if GRADIENT:
                gradient = tl.where(columns == target, 1 - softmax, -softmax)
                places = gradient_ptr + row * gradient_stride + columns
                tl.store(places, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
        if SQUARES:
            tl.store(values_ptr + count + row, tl.log(tl.sum(squares, axis=0)))


@triton.jit(do_not_specialize=["count"])
def _sums_kernel(values_ptr, count, edges_ptr, sums_ptr, BLOCK: tl.constexpr):
    """One program a part and kind of value: a part's sum in fp64, whose order nothing but its own length decides."""
    part, kind = tl.program_id(0), tl.program_id(1)
    stop = tl.load(edges_ptr + part + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(tl.load(edges_ptr + part), stop, BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + kind * count + places, mask=places < stop, other=0.0).to(tl.float64)
    tl.store(sums_ptr + part * tl.num_programs(1) + kind, tl.sum(total, axis=0).to(tl.float32))


@triton.jit
def _weighted_kernel(rows_ptr, out_ptr, other_rows_ptr, other_out_ptr, coefs_ptr, width, BLOCK: tl.constexpr):
    """One program a row of the first or the other rows: out = row * coefficient, in the dtype of out."""
    row = tl.program_id(0).to(tl.int64)
    coef = tl.load(coefs_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        places, inside = row * width + columns, columns < width
        if tl.program_id(1) == 0:
            numbers = tl.load(rows_ptr + places, mask=inside).to(tl.float32)
            tl.store(out_ptr + places, (numbers * coef).to(out_ptr.dtype.element_ty), mask=inside)
        else:
            numbers = tl.load(other_rows_ptr + places, mask=inside).to(tl.float32)
            tl.store(other_out_ptr + places, (numbers * coef).to(other_out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_blocks(in_ptr, out_ptr, size, program, factor, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """out = in * factor of one program's blocks. Where both have one dtype they are one, and a factor of 1 leaves all
    unread."""
    for step in range(STEPS):
        places = (program.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        if in_ptr.dtype == out_ptr.dtype:
            inside = inside & (tl.full([BLOCK], 1.0, tl.float32) != factor)
        product = tl.load(in_ptr + places, mask=inside).to(tl.float32) * factor
        tl.store(out_ptr + places, product.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(
    in_ptr, out_ptr, size, other_ptr, other_out_ptr, other_size, factor_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr
):
    """The first programs scale the first numbers, the others the other ones."""
    factor = tl.load(factor_ptr)
    program, first = tl.program_id(0), tl.cdiv(size, BLOCK * STEPS)
    if program < first:
        _scale_blocks(in_ptr, out_ptr, size, program, factor, BLOCK, STEPS)
    else:
        _scale_blocks(other_ptr, other_out_ptr, other_size, program - first, factor, BLOCK, STEPS)


def _triton_rows_(
    logits_nV: torch.Tensor, targets_n: torch.Tensor, gradient_nV: torch.Tensor | None, squares: bool
) -> torch.Tensor:
    """The logits stay as they are."""
    n, vocab = logits_nV.shape
    values_Cn = logits_nV.new_empty(2 if squares else 1, n)
    out_nV = logits_nV if gradient_nV is None else gradient_nV
    _rows_kernel[(n,)](
        logits_nV,
        logits_nV.stride(0),
        targets_n,
        values_Cn,
        n,
        out_nV,
        out_nV.stride(0),
        vocab,
        BLOCK=_block(vocab),
        GRADIENT=gradient_nV is not None,
        SQUARES=squares,
        num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
    )
    return values_Cn


def _triton_part_sums(values_Cn: torch.Tensor, edges_p1: torch.Tensor) -> torch.Tensor:
    kinds, count = values_Cn.shape
    sums_pC = values_Cn.new_empty(len(edges_p1) - 1, kinds)
    _sums_kernel[(len(sums_pC), kinds)](
        values_Cn,
        count,
        edges_p1,
        sums_pC,
        BLOCK=_SUM_BLOCK,
        num_warps=4,  # pyright: ignore[reportCallIssue]
    )
    return sums_pC


def _triton_weighted(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], coefs_n: torch.Tensor) -> None:
    """One pair or two, all contiguous."""
    n, width = pairs[0][0].shape
    if n:
        _weighted_kernel[(n, len(pairs))](
            *pairs[0],
            *pairs[-1],
            coefs_n,
            width,
            BLOCK=_block(width),
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
        )


def _triton_scaled_(gradients: Sequence[torch.Tensor], factor: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Contiguous."""
    outs = [x if x.dtype == dtype else torch.empty_like(x, dtype=dtype) for x in gradients]
    sizes = [x.numel() for x in gradients] + [0] * (2 - len(gradients))
    programs = sum(triton.cdiv(size, _MAX_BLOCK * _SCALE_STEPS) for size in sizes)
    if programs:
        _scale_kernel[(programs,)](
            gradients[0],
            outs[0],
            sizes[0],
            gradients[-1],
            outs[-1],
            sizes[1],
            factor,
            BLOCK=_MAX_BLOCK,
            STEPS=_SCALE_STEPS,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
        )
    return outs


@functools.cache
def has_driver() -> bool:
    """Whether Triton reaches the GPU. On first use it compiles a module for that: with a C compiler, or not at all."""
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        LOGGER.warning(
            "the log-prob head and the layers run in plain torch, slower and with more memory: Triton cannot start "
            "(%s). It needs a C compiler and Python's headers, gcc and python3-dev say",
            error,
        )
        return False
    return True


def _block(width: int) -> int:
    """Numbers of a row that a program takes at a time: all of a short one, as a power of two."""
    return min(1 << (width - 1).bit_length(), _MAX_BLOCK)


TRITON_KERNELS = RowKernels(_triton_rows_, _triton_part_sums, _triton_weighted, _triton_scaled_)
