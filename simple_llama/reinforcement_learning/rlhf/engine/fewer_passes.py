"""What DeepSpeed's ZeRO-2 (0.19.8) does with whole gradients, in fewer passes over them and less fresh memory: the same
sums, and their norm to 1e-7.

DeepSpeed makes the tensor of a step's fp32 sums anew each step, which on a CPU are pages that the kernel clears one by
one; widens each sum to fp64 for its norm; and on a rank that is alone copies all gradients into one tensor and back for
an exchange with nobody. Where its methods have other names, it does as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_BLOCK = 4096  # values whose squares are added in their own dtype; blocks are added in fp64


def use_fewer_passes(zero: Any, alone: bool) -> dict[int, Any]:
    """Replaces methods of DeepSpeed's optimizer, where it is ZeRO-2's; gives the sums that it keeps from step to step,
    by group of parameters, which are made anew where they were removed between two steps.

    Args: alone: whether this rank is the only one.
    """
    names = ("_build_compact_grad_partition_buffer", "_get_compact_grad_partition_slice")
    if not all(hasattr(zero, name) for name in (*names, "_buffered_reduce_fallback_preserving_fp32")):
        return {}
    _norms_by_blocks(zero)
    if alone:
        _add_up_at_once(zero)
    return {} if zero.cpu_offload else _keep_sums(zero)


def _norms_by_blocks(zero: Any) -> None:
    """The norm of sums that lie in one tensor, by `block_norms`."""
    direct = zero.get_grad_norm_direct

    def norm(gradients: Any, params: Sequence[torch.Tensor], norm_type: float = 2) -> torch.Tensor:
        flat = getattr(gradients, "flat_partition", None)
        if flat is None or norm_type != 2:
            return direct(gradients, params, norm_type)
        return direct([block_norms(flat)], params[:1], norm_type)  # which adds up squares over the ranks

    zero.get_grad_norm_direct = norm


def block_norms(flat: torch.Tensor) -> torch.Tensor:
    """Euclidean norms (fp64) of the blocks of a vector (fp32), whose own norm is the vector's, to the rounding of one
    block's: a sum of all squares in fp32 would lose digits."""
    whole = flat.numel() // _BLOCK * _BLOCK
    parts = flat[:whole].view(-1, _BLOCK), flat[whole:].view(1, -1)
    return torch.cat([torch.linalg.vector_norm(part, dim=1).double() for part in parts])


def _add_up_at_once(zero: Any) -> None:
    """Gradients that are no buckets' go straight to the sums, where no other rank has any, and then are no more."""

    def add_up(gradients: Sequence[torch.Tensor], places: Sequence[tuple[int, int, int]], *_: Any, **__: Any) -> None:
        for gradient, (group, _place, parameter) in zip(gradients, places, strict=True):
            sum_ = zero._get_compact_grad_partition_slice(group, 0, parameter, gradient.numel())
            sum_.view_as(gradient).add_(gradient)
            zero.clear_grad_attribute(zero.param_dict[parameter])

    zero._buffered_reduce_fallback_preserving_fp32 = add_up


def _keep_sums(zero: Any) -> dict[int, Any]:
    """One tensor of sums a group for all steps, zeroed for each."""
    build, kept = zero._build_compact_grad_partition_buffer, dict[int, Any]()

    def again(group: int) -> Any:
        if group in kept:
            kept[group].flat_partition.zero_()
        else:
            kept[group] = build(group)
        return kept[group]

    zero._build_compact_grad_partition_buffer = again
    return kept
