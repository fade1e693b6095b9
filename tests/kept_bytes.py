"""What autograd keeps of a call for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from simple_llama.ops import remade


def kept_bytes(call: Callable[[], torch.Tensor], but: Iterable[torch.Tensor]) -> int:
    """Bytes of what is kept, `but` aside. Within `remade` too, whose hooks stand in the place of others: what is made
    again is none."""
    known = {tensor.untyped_storage().data_ptr() for tensor in but}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    def hooks(pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> saved_tensors_hooks:
        def seen(tensor: torch.Tensor) -> Any:
            return keep(packed) if isinstance(packed := pack(tensor), torch.Tensor) else packed

        return saved_tensors_hooks(seen, unpack)

    with pytest.MonkeyPatch.context() as patch, saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(remade, "saved_tensors_hooks", hooks)
        assert call().requires_grad
    return sum(storage.nbytes() for storage in kept.values())
