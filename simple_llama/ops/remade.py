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

    Of rows on a CPU or a GPU, outside `keeping_all`; elsewhere, and without `make`, nothing changes.
    """
    if make is None or _keeping_all or not torch.is_grad_enabled() or made.device.type not in ("cpu", "cuda"):
        return nullcontext()
    mark = _mark(made)  # as long as the caller holds it, nothing else has this one
    again = _Again(make)

    def pack(tensor: torch.Tensor) -> Any:
        if _mark(tensor) == mark:
            again.uses += 1
            return again
        # what an operator saves of its own output must not hold the operator: that would be a circle
        return tensor if tensor.is_leaf else tensor.detach()

    return saved_tensors_hooks(pack, _unpack)


class _Again:
    """What stands in a tensor's place in the graph: made once for all uses of it, which come close together."""

    def __init__(self, make: Callable[[], torch.Tensor]):
        self.uses = 0
        self._make, self._left = make, 0
        self._made: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        """The values, held until the last use has them."""
        made, self._left = (self._make(), self.uses) if self._made is None else (self._made, self._left)
        self._left -= 1
        self._made = made if self._left else None
        return made


def _mark(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers lie, and how they are read."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _unpack(kept: Any) -> torch.Tensor:
    return kept.take() if isinstance(kept, _Again) else kept


@contextmanager
def keeping_all() -> Iterator[None]:
    """Within, `remade` changes nothing: what a layer keeps is looked after by somebody else (torch's checkpoint)."""
    global _keeping_all
    before, _keeping_all = _keeping_all, True
    try:
        yield
    finally:
        _keeping_all = before
