"""What happens to the rows of a chunk's logits, in plain torch: a CPU's way, and the specification of a GPU's kernels.

On a CPU `logps_`, then `log_squares` where sums of squares are asked for, then `gradient_` with the coefficients that
the loss gave. On a GPU `RowKernels`, whose gradients need no coefficient yet.

Shapes: n rows of one chunk, p parts of it, V vocabulary, D width, C values of a row (1, or 2 with squares).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

_NARROWING_PARTS = 16  # narrowing a chunk holds a copy of one part at a time beside it


class RowKernels(NamedTuple):
    """Steps of a GPU's head, in the order in which they run."""

    # (logits_nV, targets_n, gradient_nV or None, squares) -> values_Cn: log-probs, and log sum p^2 where `squares`;
    # writes onehot - softmax to gradient_nV, rounded once to its dtype; may overwrite the logits
    rows_: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, bool], torch.Tensor]
    # (values_Cn, edges_p1) -> sums (p, C) of values edges[i] to edges[i + 1], added in fp64
    part_sums: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    # ([(rows_nD, out_nD)] of one shape, coefs_n): out = row times its coefficient, rounded once to its dtype
    weighted: Callable[[Sequence[tuple[torch.Tensor, torch.Tensor]], torch.Tensor], None]
    # (one or two gradients of any shapes, factor (), dtype) -> their products, rounded once to dtype; those that have
    # this dtype are multiplied where they lie, which costs nothing where the factor is 1
    scaled_: Callable[[Sequence[torch.Tensor], torch.Tensor, torch.dtype], list[torch.Tensor]]


def logps_(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax at the targets (n,), and row sums (n,) of exp(logits - row maximum), which stands in the buffer."""
    target_n = logits_nV.gather(1, targets_n[:, None])[:, 0]
    maximum_n = logits_nV.amax(1)
    sum_n = logits_nV.sub_(maximum_n[:, None]).exp_().sum(1)
    return target_n - maximum_n - sum_n.log(), sum_n


def log_squares(exp_nV: torch.Tensor, sum_n: torch.Tensor) -> torch.Tensor:
    """log sum p^2 (n,) of the buffer that `logps_` left, p = exp / sum; both stay as they are."""
    return 2 * (torch.linalg.vector_norm(exp_nV, dim=1).log() - sum_n.log())


def gradient_(
    exp_nV: torch.Tensor, targets_n: torch.Tensor, sum_n: torch.Tensor, coefs_n: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """coefficient * (onehot - softmax) in dtype, in the memory of the buffer that `logps_` left."""
    exp_nV.mul_((-coefs_n / sum_n)[:, None])
    gradient_nV = exp_nV.scatter_add_(1, targets_n[:, None], coefs_n[:, None])
    return gradient_nV if dtype == gradient_nV.dtype else _narrowed_(gradient_nV, dtype)


def _narrowed_(wide_nV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers in a narrower dtype, written to the front of their own memory, some rows at a time.

    The narrow rows 0 to i end before the wide row i + 1 begins, so nothing is written over that is still to be read.
    """
    narrow_nV = wide_nV.view(dtype).flatten()[: wide_nV.numel()].view(wide_nV.shape)
    rows = -(-len(wide_nV) // _NARROWING_PARTS)
    for wide, narrow in zip(wide_nV.split(rows), narrow_nV.split(rows), strict=True):
        narrow.copy_(wide.to(dtype))
    return narrow_nV


def part_sums(values_n: torch.Tensor, lengths_p: torch.Tensor) -> torch.Tensor:
    """Sums (p, 1) over each part, rounded once: they depend on no other part and on no order of adding."""
    # unsafe=True skips a check of the lengths that would wait for the device
    sums_p = torch.segment_reduce(values_n.double(), "sum", lengths=lengths_p, unsafe=True)
    return sums_p.to(values_n.dtype)[:, None]


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * factor, multiplied in fp32 and rounded once to `dtype`; the gradient stays."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _torch_rows_(
    logits_nV: torch.Tensor, targets_n: torch.Tensor, gradient_nV: torch.Tensor | None, squares: bool
) -> torch.Tensor:
    logps_n, sum_n = logps_(logits_nV, targets_n)
    values_Cn = torch.stack([logps_n, *([log_squares(logits_nV, sum_n)] if squares else [])])
    if gradient_nV is not None:
        softmax_nV = logits_nV.div_(sum_n[:, None])
        softmax_nV.scatter_add_(1, targets_n[:, None], -torch.ones_like(logps_n)[:, None])
        gradient_nV.copy_(softmax_nV.neg_())
    return values_Cn


def _torch_part_sums(values_Cn: torch.Tensor, edges_p1: torch.Tensor) -> torch.Tensor:
    return torch.cat([part_sums(values_n, edges_p1.diff()) for values_n in values_Cn], dim=1)


def _torch_weighted(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], coefs_n: torch.Tensor) -> None:
    for rows_nD, out_nD in pairs:
        out_nD.copy_(rows_nD * coefs_n[:, None])  # in the dtype of the coefficients, which is the wider one


def _torch_scaled_(gradients: Sequence[torch.Tensor], factor: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    return [x.mul_(factor) if x.dtype == dtype else scaled(x, factor, dtype) for x in gradients]


TORCH_KERNELS = RowKernels(_torch_rows_, _torch_part_sums, _torch_weighted, _torch_scaled_)
