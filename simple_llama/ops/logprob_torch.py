"""What happens to the rows of a chunk's logits, in plain torch: the specification of row kernels, and the CPU's way.

Shapes: n rows of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

_NARROWING_PARTS = 16  # narrowing a chunk holds a copy of one part at a time beside it


class RowKernels(NamedTuple):
    """Steps of the head, in the order in which they run. The first and the gradient may overwrite the logits."""

    # (logits_nV, targets_n) -> (logps_n, state_n); state_n is for gradient_ only
    logps_: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    # (buffer_nV as logps_ left it, state_n) -> log of the sum of p^2 over the vocabulary (n,); both stay as they are
    log_squares: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    # (buffer_nV as logps_ left it, targets_n, state_n, coefficients_n, dtype) -> d/d logits (n, V) in dtype, which
    # is that of the buffer or narrower; it lies in the memory of the buffer
    gradient_: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
    # (gradient of any shape, factor (), dtype) -> their product, rounded once to dtype; the gradient stays
    scaled: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


def _torch_logps_(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax at the targets. Leaves exp(logits - row maximum) in the buffer; the state is its row sums."""
    target_n = logits_nV.gather(1, targets_n[:, None])[:, 0]
    maximum_n = logits_nV.amax(1)
    sum_n = logits_nV.sub_(maximum_n[:, None]).exp_().sum(1)
    return target_n - maximum_n - sum_n.log(), sum_n


def _torch_log_squares(exp_nV: torch.Tensor, sum_n: torch.Tensor) -> torch.Tensor:
    """log sum p^2 of the buffer that `_torch_logps_` left: p = exp / sum."""
    return 2 * (torch.linalg.vector_norm(exp_nV, dim=1).log() - sum_n.log())


def _torch_gradient_(
    exp_nV: torch.Tensor, targets_n: torch.Tensor, sum_n: torch.Tensor, coefs_n: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """coefficient * (onehot - softmax), in place in the buffer that `_torch_logps_` left."""
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


def _torch_scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * factor, multiplied in fp32 and rounded once to `dtype`."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


TORCH_KERNELS = RowKernels(_torch_logps_, _torch_log_squares, _torch_gradient_, _torch_scaled)
