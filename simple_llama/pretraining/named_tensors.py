"""Tensors by name that are made when they are asked for: read from a file, merged, averaged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping

import torch


class NamedTensors(Mapping[str, torch.Tensor]):
    """Tensors whose names are known before one is made. Mapping's own `in` would make the tensor."""

    _names: Collection[str]  # in order; each class sets it

    @abstractmethod
    def _make(self, name: str) -> torch.Tensor:
        """The tensor of one of the names."""

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
