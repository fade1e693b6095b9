"""Triton kernels for what stands between a decoder block's matrix products, each one pass over its rows.

Torch has an operator, and so a pass over memory, for each addition, rounding, product and copy. Here the stream's
addition goes with the norm behind it, silu with the product, a rotation or the gathering of keys with the copy that
they are anyhow; what is computed on the way is computed again in the backward pass.

`elementwise.py`, `pretraining/rotary.py` and `attention.py` have the plain twins, which specify these. Values are
computed in fp32 and rounded where a twin rounds, but for the gradient of a norm's weight, whose products are added up
unrounded. They differ from a twin's by the order of a sum, by the device's exponential and by fused multiplications.
Import this module only where Triton is installed.

Shapes: T rows, D width, H hidden width; of heads: T rows of the stream, S keys, G groups of R heads, K width of a head.
"""

from __future__ import annotations

# what triton.jit makes of a function takes numbers for its constants, and options of the launch
# pyright: reportArgumentType=false, reportCallIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from simple_llama.ops.fused_kernels import FusedKernels

_TILE = 2048  # numbers that a program holds of each tensor at once, where a row has not more
_MOST_PROGRAMS = 1024  # that add up gradients of one weight: more than a GPU runs at once, and the same on each
_WIDEST = 8192  # row that a program holds at once without spilling registers


# where one row or a multiple of 16 is compiled apart, most batches would meet both
@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x_ptr, x_stride, update_ptr, update_stride, weight_ptr, sum_ptr, y_ptr, rows, width, eps,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has ROWS rows: sum = x + update; y = weight * sum / rms(sum)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(update_ptr + row * update_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype)
        tl.store(sum_ptr + row * width + column, x, mask=inside)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    y = weight * (x * scale[:, None]).to(dtype).to(tl.float32)
    tl.store(y_ptr + row * width + column, y.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def _norm_gradient_kernel(
    x_ptr, x_stride, weight_ptr, grad_ptr, onward_ptr, out_ptr, of_weight_ptr, rows, width, eps, programs,
    PASSES_ON: tl.constexpr, OF_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has every `programs`-th tile of rows: out = the norm's gradient in x + the stream's own (onward).

    Its sum of the weight's gradient is a row of `of_weight`.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < width)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]
        normed = tl.where(inside, x * scale, 0.0)  # with an eps of 0 a row that is not there has no scale
        if OF_WEIGHT:
            of_weight += grad * normed.to(dtype).to(tl.float32)
        grad = (grad * weight).to(dtype).to(tl.float32)
        mean = tl.sum(grad * normed, axis=1)[:, None] / width
        out = ((grad - normed * mean) * scale).to(dtype)
        if PASSES_ON:
            onward = tl.load(onward_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
            out = (out.to(tl.float32) + onward).to(dtype)
        tl.store(out_ptr + row * width + column, out, mask=inside)
    if OF_WEIGHT:
        place = program.to(tl.int64) * width + tl.arange(0, BLOCK)
        tl.store(of_weight_ptr + place, tl.sum(of_weight, axis=0), mask=tl.arange(0, BLOCK) < width)


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = silu(gate) * up, the first factor rounded."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + place, (silu * up).to(dtype), mask=inside)


@triton.jit
def _swiglu_gradient_kernel(gate_ptr, up_ptr, grad_ptr, of_gate_ptr, of_up_ptr, size, BLOCK: tl.constexpr):
    """Gradients of both factors, in one pass; silu is computed again."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    dtype = of_up_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    of_gate = (grad * up).to(dtype).to(tl.float32) * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(of_gate_ptr + place, of_gate.to(dtype), mask=inside)
    tl.store(of_up_ptr + place, (silu * grad).to(dtype), mask=inside)


@triton.jit
def _place_kernel(
    x_ptr, row_stride, group_stride, head_stride, rows_ptr, cos_ptr, sin_ptr, out_ptr, heads, shared,
    GATHERS: tl.constexpr, TURNS: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes a row of the result: that row of x, or row rows[.], its pairs turned by TURNS (1, -1, 0: not)."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place) if GATHERS else place
    dtype = out_ptr.dtype.element_ty
    at = tl.arange(0, BLOCK)[None, :]
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (at < K)
        head_ptr = x_ptr + row * row_stride + (head // shared) * group_stride + (head % shared) * head_stride
        value = tl.load(head_ptr + at, mask=inside, other=0.0)
        if TURNS != 0:
            pair = tl.arange(0, BLOCK // 2)
            cos = tl.load(cos_ptr + row * (K // 2) + pair, mask=pair < K // 2, other=0.0)[None, :]
            sin = tl.load(sin_ptr + row * (K // 2) + pair, mask=pair < K // 2, other=0.0)[None, :] * TURNS
            one, other = tl.split(tl.reshape(value.to(tl.float32), (HEADS, BLOCK // 2, 2)))
            both = tl.join(one * cos - other * sin, other * cos + one * sin)
            value = tl.reshape(both, (HEADS, BLOCK)).to(dtype)
        tl.store(out_ptr + (place * heads + head) * K + at, value, mask=inside)


@triton.jit
def _add_places_kernel(grad_ptr, places_ptr, out_ptr, size, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """A program makes a row of the stream's gradient: the sum of the keys that this row is, of up to COPIES."""
    row = tl.program_id(0).to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    for start in range(0, size, BLOCK):
        number = start + tl.arange(0, BLOCK)
        inside = number < size
        total = tl.load(grad_ptr + tl.load(places_ptr + row * COPIES) * size + number, mask=inside, other=0.0)
        for copy in tl.static_range(1, COPIES):  # pyright: ignore[reportGeneralTypeIssues]
            place = tl.load(places_ptr + row * COPIES + copy)
            more = tl.load(grad_ptr + place * size + number, mask=inside & (place >= 0), other=0.0)
            total = (total.to(tl.float32) + more.to(tl.float32)).to(dtype)
        tl.store(out_ptr + row * size + number, total, mask=inside)


class _AddNorm(torch.autograd.Function):
    """Keeps the sum alone."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, update_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sum_TD, y_TD = _norm(x_TD, update_TD, weight_D, eps)
        ctx.save_for_backward(sum_TD, weight_D)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return sum_TD, y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        onward_TD, grad_TD = grads
        sum_TD, weight_D = ctx.saved_tensors
        if grad_TD is None:
            return onward_TD, onward_TD, None, None
        found_TD, of_weight = _norm_gradient(sum_TD, weight_D, grad_TD, onward_TD, ctx.eps, ctx.needs_input_grad[2])
        return found_TD, found_TD, of_weight, None


class _Norm(torch.autograd.Function):
    """Keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        return _norm(x_TD, None, weight_D, eps)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_D = ctx.saved_tensors
        return *_norm_gradient(x_TD, weight_D, grad_TD, None, ctx.eps, ctx.needs_input_grad[1]), None


class _SwiGLU(torch.autograd.Function):
    """Keeps both factors."""

    @staticmethod
    def forward(ctx: Any, gate_TH: torch.Tensor, up_TH: torch.Tensor) -> torch.Tensor:
        gate_TH, up_TH = gate_TH.contiguous(), up_TH.contiguous()
        ctx.save_for_backward(gate_TH, up_TH)
        out_TH = torch.empty_like(gate_TH)
        grid = (-(-out_TH.numel() // _TILE),)
        _swiglu_kernel[grid](gate_TH, up_TH, out_TH, out_TH.numel(), BLOCK=_TILE)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_TH, up_TH = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate_TH), torch.empty_like(up_TH)
        grid = (-(-of_up.numel() // _TILE),)
        _swiglu_gradient_kernel[grid](gate_TH, up_TH, grad_TH.contiguous(), of_gate, of_up, of_up.numel(), BLOCK=_TILE)
        return of_gate, of_up


class _Rotate(torch.autograd.Function):
    """Keeps only the angles; the gradient is the rotation backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_TP, sin_TP)
        return _placed(x, None, (cos_TP, sin_TP), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _placed(grad, None, ctx.saved_tensors, -1), None, None


def _gathered(x_TGK: torch.Tensor, rows_S: torch.Tensor) -> torch.Tensor:
    return _placed(x_TGK, rows_S, None, 0)


def _added_places(grad_SGK: torch.Tensor, places_TC: torch.Tensor) -> torch.Tensor:
    rows, copies = places_TC.shape
    grad_SGK = grad_SGK.contiguous()
    out_TGK = grad_SGK.new_empty(rows, *grad_SGK.shape[1:])
    if out_TGK.numel():
        size = out_TGK[0].numel()
        block = min(_power_of_2(size), _TILE)
        _add_places_kernel[(rows,)](grad_SGK, places_TC, out_TGK, size, COPIES=copies, BLOCK=block)
    return out_TGK


def _norm(
    x: torch.Tensor, update_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of x and update (x itself without one), and its norm; contiguous."""
    x_TD = _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if update_TD is None:
        total, update_TD = x, x_TD
    else:
        total, update_TD = torch.empty_like(y), _rows(update_TD)
    rows, width = x_TD.shape
    block, together = _tile(width)
    if rows:
        _norm_kernel[(-(-rows // together),)](
            x_TD, x_TD.stride(0), update_TD, update_TD.stride(0), weight_D, total, y, rows, width, eps,
            ADDS=total is not x, ROWS=together, BLOCK=block, num_warps=_warps(block * together),
        )  # fmt: skip
    return total, y


def _norm_gradient(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    grad: torch.Tensor,
    onward: torch.Tensor | None,
    eps: float,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x, to which `onward` is added, and of the weight, where it is needed."""
    x_TD, grad = _rows(x), grad.contiguous()
    out = torch.empty_like(grad)
    rows, width = x_TD.shape
    block, together = _tile(width)
    programs = min(-(-rows // together), _MOST_PROGRAMS)
    sums_PD = torch.empty((programs, width) if needs_weight else (1, 1), dtype=torch.float32, device=x.device)
    if rows:
        _norm_gradient_kernel[(programs,)](
            x_TD, x_TD.stride(0), weight_D, grad, grad if onward is None else onward.contiguous(), out, sums_PD,
            rows, width, eps, programs, PASSES_ON=onward is not None, OF_WEIGHT=needs_weight,
            ROWS=together, BLOCK=block, num_warps=_warps(block * together),
        )  # fmt: skip
    return out, sums_PD.sum(0).to(weight_D.dtype) if needs_weight else None


def _placed(
    x: torch.Tensor, rows_S: torch.Tensor | None, angles: tuple[torch.Tensor, torch.Tensor] | None, turns: int
) -> torch.Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    count = len(x) if rows_S is None else len(rows_S)
    out = torch.empty((count, *x.shape[1:]), dtype=x.dtype, device=x.device)
    if out.numel():
        width, shared = x.shape[-1], x.shape[2] if x.dim() == 4 else 1
        heads, (block, together) = out[0].numel() // width, _tile(width)
        together = min(together, _power_of_2(heads))
        cos_TP, sin_TP = angles or (x, x)
        _place_kernel[(count,)](
            x, x.stride(0), x.stride(1), x.stride(2), x if rows_S is None else rows_S, cos_TP, sin_TP, out, heads,
            shared, GATHERS=rows_S is not None, TURNS=turns, K=width, HEADS=together, BLOCK=block,
        )  # fmt: skip
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Rows (T, D) of any leading shape, numbers of a row one behind the other; copied only where that takes it."""
    x_TD = x.reshape(-1, x.shape[-1])
    return x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()


def _tile(width: int) -> tuple[int, int]:
    """Columns of a tile, a power of two that holds a row, and its rows."""
    block = _power_of_2(width)
    return block, max(1, _TILE // block)


def _warps(numbers: int) -> int:
    """So many that each thread reads 16 bytes of bf16 at a time."""
    return min(max(numbers // 256, 4), 16)


def _power_of_2(least: int) -> int:
    """The first one from `least` on."""
    return 1 << (least - 1).bit_length()


TRITON_KERNELS = FusedKernels(
    _AddNorm.apply, _Norm.apply, _SwiGLU.apply, _Rotate.apply, _gathered, _added_places, _WIDEST
)
