"""Values that the backward pass makes again from what is kept anyway, instead of their being kept beside it.

The input of a matrix product is kept for the gradient of the matrix. Where it comes from kept rows by a pass or two
(a norm, silu(gate) * up), making it again takes about what writing it once and reading it later did, and no room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

_keeping_all = False


def remade(made: torch.Tensor, make: Callable[[], torch.Tensor] | None) -> AbstractContextManager[object]:
    """Within, where autograd would keep `made`, it keeps `make`, which gives the same values bit for bit.

    Of rows on a CPU, outside `keeping_all`; elsewhere, and without `make`, nothing changes.
    """
    if make is None or _keeping_all or not torch.is_grad_enabled() or made.device.type != "cpu":
        return nullcontext()
    mark = _mark(made)  # as long as the caller holds it, nothing else has this one

    def pack(tensor: torch.Tensor) -> Any:
        if _mark(tensor) == mark:
            return make
        # what an operator saves of its own output must not hold the operator: that would be a circle
        return tensor if tensor.is_leaf else tensor.detach()

    return saved_tensors_hooks(pack, _unpack)


def _mark(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers lie, and how they are read."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _unpack(kept: Any) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept()


@contextmanager
def keeping_all() -> Iterator[None]:
    """Within, `remade` changes nothing: what a layer keeps is looked after by somebody else (torch's checkpoint)."""
    global _keeping_all
    before, _keeping_all = _keeping_all, True
    try:
        yield
    finally:
        _keeping_all = before
