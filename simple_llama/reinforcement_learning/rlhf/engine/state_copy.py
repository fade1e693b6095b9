"""A rank's share of a state, copied into host memory: it is written from there while training goes on.

    rank r has the trained parameters that lie on it alone, and of those that are dealt out every R-th;
    of each: weight, exp_avg, exp_avg_sq, whole, fp32

All of it lies in one tensor, in the order of the file, so writing needs no further copy. On CUDA its pages are pinned,
which lets the device write to them itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from simple_llama.cluster.distributed import Ranks, gather_objects
from simple_llama.interop.safetensors_files import file_head
from simple_llama.ops.machine import synchronize
from simple_llama.reinforcement_learning.rlhf.engine.engine import MOMENTS, Engine

_KINDS = ("weight", *MOMENTS)


class StateCopy:
    """This rank's share as it was at the last `take`."""

    def __init__(self, engine: Engine, ranks: Ranks):
        """Collective."""
        self._engine, self._ranks = engine, ranks
        self._here = set(engine.whole_here())
        names = list(engine.trained_shapes)
        places = gather_objects([i for i, name in enumerate(names) if name in self._here], ranks, list[int])
        alone = {names[i] for there in places for i in there}
        self._dealt = [name for name in names if name not in alone]
        mine = self._here.union(self._dealt[ranks.rank :: ranks.world_size])
        self._mine = {name: shape for name, shape in engine.trained_shapes.items() if name in mine}
        self._values: torch.Tensor | None = None  # fp32; kept from one `take` to the next
        self._is_pinned = False

    @property
    def size(self) -> int:
        """Bytes."""
        return 4 * len(_KINDS) * sum(map(math.prod, self._mine.values()))

    @property
    def is_there(self) -> bool:
        """Whether its memory is taken already."""
        return self._values is not None

    def take(self, sums_stay: bool) -> None:
        """Copies masters and moments as they are now, one parameter at a time (collective).

        Args: sums_stay: whether the gradients keep their memory: there is room beside it.
        """
        if not sums_stay:
            self._engine.make_room()
        if self._values is None:
            self._values = torch.empty(self.size // 4)
            self._is_pinned = self._ranks.device.type == "cuda" and self.size > 0 and _pin(self._values)
        places, at = dict[str, int](), 0
        for name, shape in self._mine.items():
            places[name], at = at, at + len(_KINDS) * math.prod(shape)
        for name in self._here:
            self._put(places[name], self._engine.state_here(name))
        for name in self._dealt:
            state = self._engine.gathered_state(name)
            if name in places:
                self._put(places[name], state)
        synchronize(self._ranks.device)

    def _put(self, at: int, state: dict[str, torch.Tensor]) -> None:
        """Copies a parameter's state to its place."""
        assert self._values is not None
        for kind in _KINDS:
            part = self._values[at : at + state[kind].numel()]
            part.view(state[kind].shape).copy_(state[kind], non_blocking=True)
            at += len(part)

    def drop(self) -> None:
        """Gives its memory back."""
        if self._values is not None and self._is_pinned:
            _cuda_runtime().cudaHostUnregister(self._values.data_ptr())
        self._values, self._is_pinned = None, False

    def file_parts(self) -> Iterator[bytes | memoryview]:
        """The bytes of a safetensors file of it."""
        assert self._values is not None
        shapes = {f"{name}|{kind}": shape for name, shape in self._mine.items() for kind in _KINDS}
        yield file_head({name: (torch.float32, shape) for name, shape in shapes.items()})
        yield self._values.view(torch.uint8).numpy().data


def _pin(values: torch.Tensor) -> bool:
    """Whether a host tensor's pages could be pinned; where not, copies are slower.

    torch's own pinned memory comes in powers of two: up to twice as much.
    """
    return int(_cuda_runtime().cudaHostRegister(values.data_ptr(), values.nbytes, 0)) == 0


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()
