"""What DeepSpeed's ZeRO-2 (0.19.8) does with whole gradients, in fewer passes over them, fewer kernels and less fresh
memory: the same sums, and their norm to 1e-7.

DeepSpeed makes the tensor of a step's fp32 sums anew each step; looks for the largest and the smallest value of each
parameter's, thirteen kernels each; widens each to fp64 for its norm; multiplies all by 1 where the clip has nothing to
do; and on a rank that is alone copies all gradients into one tensor and back for an exchange with nobody. Where its
methods have other names, it does as before, and so it does where the optimizer is offloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_BLOCK = 4096  # values whose squares are added in their own dtype; blocks are added in fp64
_METHODS = (
    "_build_compact_grad_partition_buffer",
    "_get_compact_grad_partition_slice",
    "check_overflow",
    "reduce_independent_p_g_buckets_and_remove_grads",
    "scaled_global_norm",
    "unscale_and_clip_grads",
)

Exchange = Callable[[torch.Tensor], Any]


def use_fewer_passes(zero: Any, exchange: Exchange | None) -> dict[int, Any]:
    """Replaces methods of DeepSpeed's optimizer, where it is ZeRO-2's; gives the sums that it keeps from step to step,
    by group of parameters, which are made anew where they were removed between two steps.

    Args: exchange: makes a tensor its sum over the ranks, in place; None on a rank that is alone.
    """
    if not all(hasattr(zero, name) for name in _METHODS) or zero.cpu_offload:
        return {}
    sums = _Sums(zero, alone=exchange is None)
    zero._build_compact_grad_partition_buffer = sums.of_step
    if exchange is None:
        zero.reduce_independent_p_g_buckets_and_remove_grads = sums.take
    _one_norm(zero, sums, exchange)
    _clip_where_needed(zero)
    return sums.kept


class _Sums:
    """A step's sums of gradients: of each group of parameters one tensor for all steps."""

    def __init__(self, zero: Any, alone: bool):
        self.zero, self.alone = zero, alone
        self.build: Callable[[int], Any] = zero._build_compact_grad_partition_buffer
        self.kept: dict[int, Any] = {}
        self.stale: dict[int, set[int]] = {}  # by group: parameters whose place has no sum of this step yet

    def of_step(self, group: int) -> Any:
        """What DeepSpeed asks for at a step's first gradient: zeros, or, alone, places that the first ones fill."""
        if group not in self.kept:
            self.kept[group] = self.build(group)
        elif not self.alone:
            self.kept[group].flat_partition.zero_()
        if self.alone:
            self.stale[group] = {self.zero.get_param_id(parameter) for parameter in self.zero.bit16_groups[group]}
        return self.kept[group]

    def take(self, parameter: torch.Tensor, group: int) -> None:
        """Adds a gradient up where its sum lies, in one kernel, and forgets it: none waits for another. Where the model
        computes in fp32, `.grad` is left to DeepSpeed, which makes it the sum."""
        gradient, number = self.zero.get_gradient_for_reduction(parameter), self.zero.get_param_id(parameter)
        place = self.zero._get_compact_grad_partition_slice(group, 0, number, gradient.numel())
        if place is None:
            return
        if number in self.stale[group]:
            self.stale[group].remove(number)
            place.view_as(gradient).copy_(gradient)
        else:
            place.view_as(gradient).add_(gradient)
        self.zero.clear_grad_attribute(parameter)

    def whole(self) -> list[torch.Tensor] | None:
        """The step's sums, flat; None where they do not lie in one tensor a group."""
        flats = [getattr(sums, "flat_partition", None) for sums in self.zero.averaged_gradients.values()]
        for group, numbers in self.stale.items():
            for number in numbers:  # without a gradient in this step
                size = self.zero.param_dict[number].numel()
                self.zero._get_compact_grad_partition_slice(group, 0, number, size).zero_()
            numbers.clear()
        found = [flat for flat in flats if flat is not None]
        return found if len(found) == len(flats) else None


def _one_norm(zero: Any, sums: _Sums, exchange: Exchange | None) -> None:
    """The norm of sums that lie in one tensor, by `block_norms`, on the host: the one wait of a step's end. It also
    says whether each value is finite: DeepSpeed makes no step at a norm that is not (`check_grad_overflow`)."""
    direct = zero.scaled_global_norm

    def norm(norm_type: float = 2) -> torch.Tensor:
        flats = sums.whole()
        if flats is None:
            return direct(norm_type).cpu()  # read once, not by each comparison
        squares = torch.cat([block_norms(flat) for flat in flats]).square().sum()
        if exchange:
            exchange(squares)
        return squares.sqrt().float().cpu()

    zero.scaled_global_norm = norm
    zero.check_overflow = lambda **_: None


def block_norms(flat: torch.Tensor) -> torch.Tensor:
    """Euclidean norms (fp64) of the blocks of a vector (fp32), whose own norm is the vector's, to the rounding of one
    block's: a sum of all squares in fp32 would lose digits."""
    whole = flat.numel() // _BLOCK * _BLOCK
    parts = flat[:whole].view(-1, _BLOCK), flat[whole:].view(1, -1)
    return torch.cat([torch.linalg.vector_norm(part, dim=1).double() for part in parts])


def _clip_where_needed(zero: Any) -> None:
    """No pass over gradients whose norm is within the clip's: DeepSpeed multiplies them by 1."""
    clip = zero.unscale_and_clip_grads

    def where_needed(gradients: Sequence[torch.Tensor], norm: torch.Tensor) -> None:
        if zero.loss_scale != 1 or norm + 1e-6 > zero.clip_grad:
            clip(gradients, norm)

    zero.unscale_and_clip_grads = where_needed
