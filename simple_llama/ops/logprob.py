"""Log-probs of targets under a vocabulary matrix, a chunk of logits at a time: the head of a DPO step.

    part_loss     three GEMMs a chunk of whole groups, four of a very large one; the loss is differentiated amid them
    token_logps   four GEMMs; logits are computed again in backward, for any loss downstream
    part_logps    token_logps summed over each part
    pair_loss, pair_logps    the same where each group is a pair: its sums stand in a row

Without gradient all only compute sums. Scored rows stand group after group, part after part: a pair's parts are its
chosen and its rejected answer, a prompt's all answers to it; an answer may be summed in parts. Where `squares` are
asked for, sums of log sum p^2 (p of all tokens, no gradient) stand behind those of log-probs.
Logits, sums, losses and coefficients are fp32 for bf16 and fp32 inputs, fp64 for fp64 inputs: a bf16 logit is off by
up to 0.03 at |z| = 16, and a bf16 sum near 300 has spacing 2.

This file has a CPU's GEMMs; `logprob_cuda` has a GPU's way, which is another one, and `logprob_chunks` which rows exist
at once. What happens to a chunk's logits between the GEMMs stands in `logprob_torch`, for GPUs in `logprob_triton`.

Shapes: P parts, C sums of a part (1, or 2 with squares), B pairs, K parts of a pair (2: chosen, rejected), S sums of a
pair (K C: first the K log-prob sums), N scored tokens, D width, V vocabulary; lower case p, b, n: those of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from simple_llama.ops import logprob_cuda
from simple_llama.ops.logprob_chunks import Counts, LossFn, at_once, group_chunks, row_chunks, rows_at_once
from simple_llama.ops.logprob_torch import gradient_, log_squares, logps_, part_sums, scaled
from simple_llama.ops.machine import bf16_valued_gemms, has_fast_bf16

# Part of the name of a reference store. Change it with anything that changes a log-prob by more than rounding noise.
HEAD_VERSION = "fp32-logits-1"

WIDENED_ROWS = 4096  # of the vocabulary matrix, at a time
_Grads = tuple[torch.Tensor | None, ...]  # one an argument of forward


def part_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    counts: Counts,
    loss_fn: LossFn,
    chunk_rows: int | None = None,
    squares: bool = False,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`factor` times the sum of losses, each of the log-prob sums of one group's parts, in three GEMMs.

    Each chunk's gradient is formed in the forward pass, so backward only scales it and needs no weight; it does
    not even that where the result is what is differentiated. On a GPU it can be asked for the gradient once.

    Args:
        hidden_ND: rows that predict the scored tokens; fp32, bf16 or fp64, same dtype as the weight.
        targets_N: int64 scored tokens.
        counts: scored tokens of each part of each group; they add up to N.
        loss_fn: (sums_pC, groups: slice) -> losses of these groups, any number each, of its own group's sums only.
        chunk_rows: about how many rows of logits exist at once, None for `rows_at_once`; on a CPU MOST_CHUNKS times as
            many where one group has them.
        squares: whether the sums have those of log sum p^2 behind them.
        factor: of the sum and its gradient; a step's other factors belong here, where they cost nothing.

    Returns:
        The sum (scalar, differentiable in hidden and weight), the losses that it is of, without the factor, and sums_PC
        (both detached), all fp32.
    """
    if _is_differentiated(hidden_ND, weight_VD):
        rows = chunk_rows or rows_at_once(hidden_ND.device.type, len(weight_VD))
        if hidden_ND.is_cuda:
            return logprob_cuda.part_loss(hidden_ND, weight_VD, targets_N, counts, loss_fn, rows, squares, factor)
        return _PartLoss.apply(hidden_ND, weight_VD, targets_N, counts, loss_fn, rows, squares, factor)
    sums_PC = part_logps(hidden_ND, weight_VD, targets_N, counts, chunk_rows, squares)
    losses = loss_fn(sums_PC, slice(0, len(counts)))
    return factor * losses.sum(), losses.detach(), sums_PC


def part_logps(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    counts: Counts,
    chunk_rows: int | None = None,
    squares: bool = False,
) -> torch.Tensor:
    """Log-prob sums (P, C) of the parts, fp32, differentiable but for squares. Arguments as in `part_loss`."""
    if hidden_ND.is_cuda:
        return logprob_cuda.part_logps(
            hidden_ND, weight_VD, targets_N, counts, chunk_rows or rows_at_once("cuda", len(weight_VD)), squares
        )
    lengths = _lengths(counts)
    sums_P1 = part_sums(token_logps(hidden_ND, weight_VD, targets_N, chunk_rows), lengths)
    if not squares:
        return sums_P1
    squares_N = _token_squares(hidden_ND, weight_VD, targets_N, chunk_rows)
    return torch.cat([sums_P1, part_sums(squares_N, lengths)], dim=1)


def pair_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    counts: Counts,
    loss_fn: LossFn,
    chunk_rows: int | None = None,
    squares: bool = False,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`part_loss` of pairs of K parts each: `loss_fn` is given (sums_bS, pairs: slice), and gives losses_b. Returns the
    sum, losses_B and sums_BS."""
    parts = len(counts[0])

    def loss_of(sums_pC: torch.Tensor, pairs: slice) -> torch.Tensor:
        return loss_fn(by_pairs(sums_pC, parts), pairs)

    loss, losses_B, sums_PC = part_loss(hidden_ND, weight_VD, targets_N, counts, loss_of, chunk_rows, squares, factor)
    return loss, losses_B, by_pairs(sums_PC, parts)


def pair_logps(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    counts: Counts,
    chunk_rows: int | None = None,
    squares: bool = False,
) -> torch.Tensor:
    """Sums (B, S) of pairs, for K = 2 those of the chosen and rejected answers, fp32, differentiable but for squares.
    Arguments as in `part_loss`."""
    sums_PC = part_logps(hidden_ND, weight_VD, targets_N, counts, chunk_rows, squares)
    return by_pairs(sums_PC, len(counts[0]))


def by_pairs(sums_PC: torch.Tensor, parts: int) -> torch.Tensor:
    """The sums of pairs of so many parts in rows (B, S): those of log-probs, then those of squares."""
    return sums_PC.view(-1, parts, sums_PC.shape[1]).transpose(1, 2).flatten(1)


def token_logps(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Log-prob (N,) of each target, fp32, differentiable by computing the logits again. Arguments as in `pair_loss`."""
    rows = chunk_rows or rows_at_once(hidden_ND.device.type, len(weight_VD))
    if hidden_ND.is_cuda:
        return logprob_cuda.token_logps(hidden_ND, weight_VD, targets_N, rows)
    return _TokenLogps.apply(hidden_ND, weight_VD, targets_N, rows)


def _is_differentiated(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)


@torch.no_grad()
def _token_squares(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, chunk_rows: int | None
) -> torch.Tensor:
    """log sum p^2 (N,) of each row, fp32, by logits of its own."""
    gemms = _Gemms(hidden_ND, weight_VD)
    chunks = row_chunks(len(targets_N), chunk_rows or rows_at_once("cpu", len(weight_VD)))
    logits_nV = gemms.logits_buffer(chunks)
    squares_N = torch.empty(len(targets_N), dtype=gemms.wide_dtype)
    for chunk in chunks:
        buffer_nV = gemms.logits_(logits_nV, chunk)
        _, sum_n = logps_(buffer_nV, targets_N[chunk])
        squares_N[chunk] = log_squares(buffer_nV, sum_n)
    return squares_N


class _PartLoss(torch.autograd.Function):
    """Three GEMMs: logits, hidden gradient and weight gradient of a chunk, all in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        counts: Counts,
        loss_fn: LossFn,
        chunk_rows: int,
        squares: bool,
        factor: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gemms = _Gemms(hidden_ND, weight_VD)
        gradients = _Gradients(gemms, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        chunks = group_chunks(counts, chunk_rows)
        logits_nV = gemms.logits_buffer([part for chunk in chunks for part in at_once(chunk.rows, chunk_rows)])
        lengths, edges = _lengths(counts), [0, *accumulate(map(len, counts))]
        losses, sums = [], []
        for chunk in chunks:
            lengths_p = lengths[edges[chunk.groups.start] : edges[chunk.groups.stop]]
            parts, values = at_once(chunk.rows, chunk_rows), []
            for part in parts:
                buffer_nV = gemms.logits_(logits_nV, part)
                logps_n, sum_n = logps_(buffer_nV, targets_N[part])
                values.append((logps_n, *([log_squares(buffer_nV, sum_n)] if squares else [])))
            sums_pC = torch.cat(
                [part_sums(torch.cat(column), lengths_p) for column in zip(*values, strict=True)], dim=1
            )
            chunk_losses, coefs_pC = _differentiate(loss_fn, sums_pC, chunk.groups)
            coefs_p = factor * coefs_pC[:, 0]
            coefs_n = torch.repeat_interleave(coefs_p, lengths_p, output_size=chunk.rows.stop - chunk.rows.start)
            for part, coefs in zip(parts, coefs_n.split([part.stop - part.start for part in parts]), strict=True):
                if len(parts) > 1:  # what was there is that of another part
                    buffer_nV = gemms.logits_(logits_nV, part)
                    _, sum_n = logps_(buffer_nV, targets_N[part])
                gradient_nV = gradient_(buffer_nV, targets_N[part], sum_n, coefs, gemms.gradient_dtype)
                gradients.add_(gradient_nV, part)
            losses.append(chunk_losses)
            sums.append(sums_pC)
        ctx.save_for_backward(gradients.hidden_ND, gradients.weight_VD)
        ctx.dtype = hidden_ND.dtype
        every_loss, sums_PC = torch.cat(losses), torch.cat(sums)
        ctx.mark_non_differentiable(every_loss, sums_PC)
        return factor * every_loss.sum(), every_loss, sums_PC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> _Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_loss, *_ = grad_outputs
        as_it_is = grad_loss.item() == 1

        def times(gradient: torch.Tensor) -> torch.Tensor:
            return gradient.to(ctx.dtype) if as_it_is else scaled(gradient, grad_loss, ctx.dtype)

        hidden_ND, weight_VD = (None if gradient is None else times(gradient) for gradient in ctx.saved_tensors)
        return hidden_ND, weight_VD, *(None for _ in range(6))


class _TokenLogps(torch.autograd.Function):
    """Four GEMMs: nothing of size N x V or V x D is kept between forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        chunk_rows: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.chunk_rows = chunk_rows
        gemms = _Gemms(hidden_ND, weight_VD)
        chunks = row_chunks(len(targets_N), chunk_rows)
        logits_nV = gemms.logits_buffer(chunks)
        logps_N = torch.empty(len(targets_N), dtype=gemms.wide_dtype, device=hidden_ND.device)
        for chunk in chunks:
            logps_N[chunk], _ = logps_(gemms.logits_(logits_nV, chunk), targets_N[chunk])
        return logps_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> _Grads:  # pyright: ignore[reportIncompatibleMethodOverride]
        (coefs_N,) = grad_outputs
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        gemms = _Gemms(hidden_ND, weight_VD)
        gradients = _Gradients(gemms, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        chunks = row_chunks(len(targets_N), ctx.chunk_rows)
        logits_nV = gemms.logits_buffer(chunks)
        for chunk in chunks:
            buffer_nV = gemms.logits_(logits_nV, chunk)
            _, sum_n = logps_(buffer_nV, targets_N[chunk])
            gradient_nV = gradient_(buffer_nV, targets_N[chunk], sum_n, coefs_N[chunk], gemms.gradient_dtype)
            gradients.add_(gradient_nV, chunk)
        hidden_grad_ND, weight_grad_VD = (
            None if gradient is None else gradient.to(hidden_ND.dtype)
            for gradient in (gradients.hidden_ND, gradients.weight_VD)
        )
        return hidden_grad_ND, weight_grad_VD, None, None


class _Gemms:
    """The GEMMs of one call. Their results are fp32 (fp64 for fp64 inputs), whatever the operands are held in.

    bf16: logits from widened operands. Where a CPU has bf16 units, gradients from those in bf16, and the weight is
    widened some rows at a time, which its cache still has when they are multiplied; elsewhere gradients from widened
    operands, the weight widened once.
    """

    def __init__(self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor):
        self.hidden_ND, self.weight_VD = hidden_ND, weight_VD
        self.wide_dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        narrow = weight_VD.dtype != self.wide_dtype
        self.fast_bf16 = narrow and has_fast_bf16(weight_VD.device)
        self.gradient_dtype = weight_VD.dtype if self.fast_bf16 else self.wide_dtype
        if not self.fast_bf16:
            self.wide_VD = weight_VD.to(self.wide_dtype)
        self.wide_nD = hidden_ND[:0]  # the rows of the chunk whose logits came last

    def logits_buffer(self, chunks: Sequence[slice]) -> torch.Tensor:
        """The one workspace that the logits of every chunk are written to."""
        most_rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        return self.weight_VD.new_empty(most_rows, len(self.weight_VD), dtype=self.wide_dtype)

    def logits_(self, buffer_nV: torch.Tensor, rows: slice) -> torch.Tensor:
        """Writes hidden[rows] weight^T into the first rows of the buffer and gives these."""
        out_nV = buffer_nV[: rows.stop - rows.start]
        self.wide_nD = self.hidden_ND[rows].to(self.wide_dtype)
        if not self.fast_bf16:
            return torch.mm(self.wide_nD, self.wide_VD.T, out=out_nV)
        with bf16_valued_gemms():
            for start in range(0, len(self.weight_VD), WIDENED_ROWS):
                some = slice(start, start + WIDENED_ROWS)
                torch.mm(self.wide_nD, self.weight_VD[some].to(self.wide_dtype).T, out=out_nV[:, some])
        return out_nV

    def hidden_gradient_(self, gradient_nV: torch.Tensor, out_nD: torch.Tensor) -> None:
        """out = gradient weight."""
        if self.fast_bf16:
            out_nD.copy_(gradient_nV @ self.weight_VD)
        else:
            torch.mm(gradient_nV, self.wide_VD, out=out_nD)

    def weight_gradient(self, gradient_nV: torch.Tensor, rows: slice, before_VD: torch.Tensor | None) -> torch.Tensor:
        """gradient^T hidden[rows], the rows of the last logits, added to what came before, which is overwritten.

        With bf16 units the first one is in bf16, as its GEMM gives it: most micro-batches have no second.
        """
        if self.fast_bf16:
            product_VD = gradient_nV.T @ self.hidden_ND[rows]
            if before_VD is None:
                return product_VD
            for sums, some in zip(before_VD.split(WIDENED_ROWS), product_VD.split(WIDENED_ROWS), strict=True):
                sums.add_(some)  # in parts: torch widens what it adds first
            return before_VD
        beta = 0 if before_VD is None else 1  # 0 ignores what stands in the result
        out_VD = torch.empty_like(self.weight_VD, dtype=self.wide_dtype) if before_VD is None else before_VD
        return torch.addmm(out_VD, gradient_nV.T, self.wide_nD, beta=beta, out=out_VD)


class _Gradients:
    """Gradients of the hidden rows (fp32) and the weight, each None where it is not needed."""

    def __init__(self, gemms: _Gemms, hidden: bool, weight: bool):
        self.gemms = gemms
        self.hidden_ND = torch.empty_like(gemms.hidden_ND, dtype=gemms.wide_dtype) if hidden else None
        self.weight_VD: torch.Tensor | None = None
        self._of_weight = weight

    def add_(self, gradient_nV: torch.Tensor, rows: slice) -> None:
        """Takes in the gradient of the logits of these rows."""
        if self.hidden_ND is not None:
            self.gemms.hidden_gradient_(gradient_nV, self.hidden_ND[rows])
        if self._of_weight:
            if self.weight_VD is not None:
                self.weight_VD = self.weight_VD.to(self.gemms.wide_dtype)  # before there is a product beside it
            self.weight_VD = self.gemms.weight_gradient(gradient_nV, rows, self.weight_VD)


def _lengths(counts: Counts) -> torch.Tensor:
    """Scored tokens of each part (P,), group after group."""
    return torch.tensor([part for parts in counts for part in parts], dtype=torch.int64)


def _differentiate(loss_fn: LossFn, sums_pC: torch.Tensor, groups: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of these groups, and the derivative (p, C) of their sum in each sum."""
    with torch.enable_grad():
        leaf_pC = sums_pC.detach().requires_grad_()
        losses = loss_fn(leaf_pC, groups)
        (coefs_pC,) = torch.autograd.grad(losses.sum(), leaf_pC)
    return losses.detach(), coefs_pC
