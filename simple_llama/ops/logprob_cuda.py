"""The log-prob head on a GPU: three GEMMs, whatever the loss, with few launches and few passes over memory.

    part_loss     the gradients of rows' logits come before the loss, whose coefficients are multiplied in behind them
    token_logps   four GEMMs: the logits are computed again in backward
    part_logps    sums of parts, by token_logps where they are differentiated

A row's gradient is its part's coefficient times (onehot - softmax) W, and the weight's gradient is a sum of (onehot -
softmax)^T times such a coefficient times the hidden row. So a chunk's (onehot - softmax) is written in bf16 while its
fp32 logits exist, some rows at a time; then the loss is differentiated once for all of them, and two large GEMMs
follow. The coefficients are multiplied into the hidden rows, before one GEMM, and into the other one's fp32 results.

bf16 operands have fp32 results, fp32 and fp64 ones their own. The weight's gradient is added up in fp32, by GEMMs that
add to what is there; where one chunk is all, its GEMM writes it in the dtype of the weight.

This runs on any device, and is for GPUs: `logprob` has the way of CPUs. Nothing here waits for the device.

Shapes: P parts, C sums of a part (1, or 2 with squares), N scored tokens, D width, V vocabulary; lower case p, n: those
of one chunk.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from simple_llama.ops.logprob_chunks import MOST_CHUNKS, Chunk, Counts, LossFn, bounded_chunks, tiled_chunks
from simple_llama.ops.logprob_torch import TORCH_KERNELS, RowKernels, part_sums

_ALIGNED = 8  # bf16 numbers of the 16 bytes at which the rows of a fast GEMM's operand begin
_Grads = tuple[torch.Tensor | None, ...]  # one an argument of forward


def part_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    counts: Counts,
    loss_fn: LossFn,
    rows: int,
    squares: bool = False,
    factor: float = 1.0,
    kernels: RowKernels | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logprob.part_loss` where something requires a gradient: sum, losses, sums_PC. It is differentiated once.

    Args:
        rows: whose logits exist at once, whatever groups they are of; the gradients of MOST_CHUNKS times as many do.
            The logits of a group of more than these are computed twice, first for its sums: four GEMMs.
        kernels: row kernels; None takes the fastest that this installation has.
    """
    kernels = kernels or _fastest_kernels(hidden_ND.device.type, hidden_ND.dtype)
    return _PartLoss.apply(hidden_ND, weight_VD, targets_N, counts, loss_fn, rows, squares, factor, kernels)


def token_logps(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    rows: int,
    kernels: RowKernels | None = None,
) -> torch.Tensor:
    """Log-prob (N,) of each target, fp32, differentiable. Arguments as in `part_loss`."""
    kernels = kernels or _fastest_kernels(hidden_ND.device.type, hidden_ND.dtype)
    return _TokenLogps.apply(hidden_ND, weight_VD, targets_N, rows, kernels)


def part_logps(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    counts: Counts,
    rows: int,
    squares: bool = False,
    kernels: RowKernels | None = None,
) -> torch.Tensor:
    """Sums (P, C) of the parts, differentiable but for squares. Arguments as in `part_loss`."""
    kernels = kernels or _fastest_kernels(hidden_ND.device.type, hidden_ND.dtype)
    whole = Chunk(slice(0, len(counts)), slice(0, len(targets_N)))
    ((edges_P1, _),) = _sent(counts, [whole], hidden_ND.device)
    differentiable = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    with torch.no_grad():
        if squares or not differentiable:
            head = _Rows(hidden_ND, weight_VD, targets_N, rows, squares, kernels)
            sums_PC = kernels.part_sums(head.values(whole.rows), edges_P1)
    if not differentiable:
        return sums_PC
    logps_N = _TokenLogps.apply(hidden_ND, weight_VD, targets_N, rows, kernels)
    sums_P1 = part_sums(logps_N, edges_P1.diff())
    return torch.cat([sums_P1, sums_PC[:, 1:]], dim=1) if squares else sums_P1


@functools.cache
def _fastest_kernels(device_type: str, dtype: torch.dtype) -> RowKernels:
    """The fastest row kernels that this installation has for a device and dtype (Triton's compute in fp32)."""
    if device_type == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton"):
        from simple_llama.ops.logprob_triton import TRITON_KERNELS, has_driver

        if has_driver():
            return TRITON_KERNELS
    return TORCH_KERNELS


class _PartLoss(torch.autograd.Function):
    """Three GEMMs: logits, hidden gradient and weight gradient, all in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        counts: Counts,
        loss_fn: LossFn,
        rows: int,
        squares: bool,
        factor: float,
        kernels: RowKernels,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chunks = bounded_chunks(counts, MOST_CHUNKS * rows)
        head = _Rows(hidden_ND, weight_VD, targets_N, rows, squares, kernels)
        blocks = [tiled_chunks(chunk.rows, MOST_CHUNKS * rows) for chunk in chunks]
        gradients = _Gradients(head, *ctx.needs_input_grad[:2], alone=sum(map(len, blocks)) == 1)
        found = []
        for chunk, parts, sent in zip(chunks, blocks, _sent(counts, chunks, hidden_ND.device), strict=True):
            edges_p1, part_n = sent
            if len(parts) == 1:
                gradient_nV, values_Cn = head.gradient(chunk.rows)
            else:
                gradient_nV, values_Cn = None, head.values(chunk.rows)
            sums_pC = kernels.part_sums(values_Cn, edges_p1)
            losses, coefs_p = _differentiate(loss_fn, sums_pC, chunk.groups, factor)
            coefs_n = coefs_p.index_select(0, part_n)
            for part, coefs in zip(parts, coefs_n.split([part.stop - part.start for part in parts]), strict=True):
                gradients.add_(head.gradient(part)[0] if gradient_nV is None else gradient_nV, coefs, part)
            del gradient_nV  # before the next one
            found.append((losses, sums_pC))
        ctx.save_for_backward(gradients.hidden_ND, gradients.weight_VD)
        ctx.dtype, ctx.scaled_ = hidden_ND.dtype, kernels.scaled_
        ctx.set_materialize_grads(False)  # no zeros for what is not differentiable
        every_loss, sums_PC = (_joined(those) for those in zip(*found, strict=True))
        ctx.mark_non_differentiable(every_loss, sums_PC)
        loss = every_loss.sum()
        return loss if factor == 1 else factor * loss, every_loss, sums_PC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> _Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_loss, *_ = grad_outputs
        saved = ctx.saved_tensors
        gradients = [gradient for gradient in saved if gradient is not None]
        found = iter(ctx.scaled_(gradients, grad_loss, ctx.dtype))
        torch.autograd.graph.increment_version(gradients)  # autograd then refuses to be asked a second time
        return *(None if gradient is None else next(found) for gradient in saved), *(None for _ in range(7))


class _TokenLogps(torch.autograd.Function):
    """Four GEMMs: nothing of size N x V or V x D is kept between forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        rows: int,
        kernels: RowKernels,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.rows, ctx.kernels = rows, kernels
        head = _Rows(hidden_ND, weight_VD, targets_N, rows, False, kernels)
        return head.values(slice(0, len(targets_N)))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> _Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        coefs_N = grad_outputs[0].contiguous()
        head = _Rows(hidden_ND, weight_VD, targets_N, ctx.rows, False, ctx.kernels)
        blocks = tiled_chunks(slice(0, len(targets_N)), MOST_CHUNKS * ctx.rows)
        gradients = _Gradients(head, *ctx.needs_input_grad[:2], alone=len(blocks) == 1)
        for block in blocks:
            gradients.add_(head.gradient(block)[0], coefs_N[block], block)
        weight_grad_VD = None if gradients.weight_VD is None else gradients.weight_VD.to(weight_VD.dtype)
        return gradients.hidden_ND, weight_grad_VD, None, None, None


class _Rows:
    """The rows of one call: their logits, a part at a time, and what is made of these."""

    def __init__(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        at_once: int,
        squares: bool,
        kernels: RowKernels,
    ):
        self.hidden_ND, self.weight_VD, self.targets_N = hidden_ND.contiguous(), weight_VD, targets_N.contiguous()
        self.wide_dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        self.kernels = kernels
        self._at_once, self._squares = at_once, squares

    def values(self, some: slice) -> torch.Tensor:
        """Values (C, n) of some rows: log-probs, and log sum p^2 where these are asked for."""
        return self._through(some, None)

    def gradient(self, some: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(onehot - softmax (n, V) in the dtype of the weight, values) of some rows."""
        vocabulary = len(self.weight_VD)
        padded = -(-vocabulary // _ALIGNED) * _ALIGNED
        gradient_nV = self.weight_VD.new_empty(some.stop - some.start, padded)[:, :vocabulary]
        return gradient_nV, self._through(some, gradient_nV)

    def _through(self, some: slice, gradient_nV: torch.Tensor | None) -> torch.Tensor:
        blocks, found = tiled_chunks(some, self._at_once), []
        most = max((block.stop - block.start for block in blocks), default=0)
        logits_nV = self.weight_VD.new_empty(most, len(self.weight_VD), dtype=self.wide_dtype)
        for block in blocks:
            buffer_nV = logits_nV[: block.stop - block.start]
            _product(self.hidden_ND[block], self.weight_VD.T, self.wide_dtype, buffer_nV)
            out_nV = gradient_nV
            if gradient_nV is not None:
                out_nV = gradient_nV[block.start - some.start : block.stop - some.start]
            found.append(self.kernels.rows_(buffer_nV, self.targets_N[block], out_nV, self._squares))
        if not found:
            return logits_nV.new_empty(1 + self._squares, 0)
        return _joined(found, dim=1)


class _Gradients:
    """Gradients of the hidden rows and the weight, each None where it is not needed.

    That of the hidden rows is in their dtype. That of the weight is so where one chunk is `alone`, and else fp32.
    """

    def __init__(self, head: _Rows, hidden: bool, weight: bool, alone: bool):
        self.hidden_ND = torch.empty_like(head.hidden_ND) if hidden else None
        self.weight_VD: torch.Tensor | None = None
        self._head, self._of_weight, self._alone = head, weight, alone

    def add_(self, gradient_nV: torch.Tensor, coefs_n: torch.Tensor, some: slice) -> None:
        """Takes in onehot - softmax of some rows, and their coefficients."""
        head, pairs = self._head, []
        rows_nD = head.hidden_ND[some]
        if self.hidden_ND is not None:
            pairs.append((_product(gradient_nV, head.weight_VD, head.wide_dtype), self.hidden_ND[some]))
        if self._of_weight:
            pairs.append((rows_nD, torch.empty_like(rows_nD)))
        head.kernels.weighted(pairs, coefs_n)
        if not self._of_weight:
            return
        _, weighted_nD = pairs.pop()
        pairs.clear()  # the product is not needed any more
        if self.weight_VD is not None:
            _add_product_(self.weight_VD, gradient_nV.T, weighted_nD)
            return
        with _whole_sums():
            dtype = head.weight_VD.dtype if self._alone else head.wide_dtype
            self.weight_VD = _product(gradient_nV.T, weighted_nD, dtype)


def _product(
    left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """left right in dtype, that of both or fp32."""
    if dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=dtype, out=out)


def _add_product_(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left right to fp32 sums where they lie: cuBLAS is given them as what it adds to and as what it writes."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    else:
        torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)


@contextmanager
def _whole_sums() -> Iterator[None]:
    """Within, a bf16 GEMM adds up all in fp32; torch allows it else to add parts of a long sum in bf16."""
    setting = torch.backends.cuda.matmul
    before: Any = setting.allow_bf16_reduced_precision_reduction
    with suppress(AttributeError):  # torch 2.11 may not have that one
        before = before, setting.allow_bf16_reduced_precision_reduction_split_k
    setting.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        setting.allow_bf16_reduced_precision_reduction = before


def _sent(counts: Counts, chunks: Sequence[Chunk], device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each chunk where its parts begin and end among its rows (p + 1,), and the part of each row (n,), by one copy
    to the device that nothing waits for."""
    pieces: list[torch.Tensor] = []
    for chunk in chunks:
        lengths_p = torch.tensor([part for parts in counts[chunk.groups] for part in parts])
        edges_p1 = torch.zeros(len(lengths_p) + 1, dtype=torch.int64)
        torch.cumsum(lengths_p, 0, out=edges_p1[1:])
        pieces += [edges_p1, torch.arange(len(lengths_p)).repeat_interleave(lengths_p)]
    flat = torch.cat(pieces)
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    there = flat.split([len(piece) for piece in pieces])
    return list(zip(there[0::2], there[1::2], strict=True))


def _joined(pieces: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """All in one tensor, which costs nothing where there is one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


def _differentiate(
    loss_fn: LossFn, sums_pC: torch.Tensor, groups: slice, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of these groups, and the derivative (p,) of `factor` times their sum in each sum of log-probs."""
    with torch.enable_grad():
        leaf_pC = sums_pC.detach().requires_grad_()
        losses = loss_fn(leaf_pC, groups)
        (coefs_pC,) = torch.autograd.grad(losses, leaf_pC, torch.full_like(losses, factor))
    return losses.detach(), coefs_pC[:, 0]
