"""What a device's fused kernels are asked for: the element-wise work between a decoder block's matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class FusedKernels(NamedTuple):
    """Each with its gradients, but for the last two, which are those of each other.

    Shapes: T rows, D width, H hidden width or heads; S keys, G key heads, R query heads of each, K width of a head.
    """

    # (x_TD, update_TD, weight_D, eps) -> (x + update, RMSNorm of that)
    add_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    # (rows of any leading shape, weight_D, eps) -> RMSNorm of them
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    # (gate, up) of one shape -> silu(gate) * up
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    # (heads (T, H, K) or (T, G, R, K), cos, sin: fp32, contiguous, K / 2 angles of a row) -> pairs turned, contiguous
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    # (rows_TGK, row of each key S) -> keys (S, G, K), contiguous
    gathered: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    # (grad_SGK, places_TC int64: one at least of each row, then others or -1) -> (T, G, K), the sum of grad[places] of
    # each row, rounded after each addition
    added_places: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    widest: int  # row that the norms take
