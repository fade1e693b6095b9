"""A `.pth` that a run starts from (a StartModel): held open, checked at each read, and what its exports are."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from simple_llama.common.errors import UserError
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.pretraining.archives import Place
from simple_llama.pretraining.beside import Beside
from simple_llama.pretraining.config import identity_fields
from simple_llama.pretraining.held_file import HeldFile
from simple_llama.pretraining.named_tensors import NamedTensors
from simple_llama.pretraining.weights import (
    LoadedModel,
    empty_model,
    load_weights,
    save_weights,
    weights_digest,
)

_EXPECTED = "expected a SimpleLLaMA checkpoint"


class _Entry(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int  # of its first number's bytes in the file
    size: int  # bytes up to its last number's
    swapped: torch.dtype | None  # as of a Place


class _HeldTensors(HeldFile, NamedTensors):
    """The tensors of a weights file, each read when it is asked for, into memory of its own.

    A tensor that is read again has to have the bytes of the first time: StartChanged otherwise.
    """

    def __init__(self, path: Path):
        """Opens the file and reads its table. UserError as of `load_weights`, and where the tensors do not fit the
        model that its config describes."""
        super().__init__(path, _EXPECTED)
        places: dict[int, Place] = {}
        with self.opened() as file:
            found = load_weights(path, file, places)
        empty_model(found)
        self.config, self.architecture, self.metadata = found.config, found.architecture, found.metadata
        self._names = self._entries = {
            name: _entry(tensor, places[tensor.untyped_storage().data_ptr()])
            for name, tensor in found.state_dict.items()
        }

    def _make(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        raw = self.tensor_bytes(name, entry.start, entry.size)
        if entry.swapped:
            raw.untyped_storage().byteswap(entry.swapped)
        return raw.view(entry.dtype).as_strided(entry.shape, entry.strides)


class StartFile:
    """A weights file, held open, and what it was when it was read first."""

    export_suffix, export_dtype, own_tokenizer, slides = ".pth", torch.float32, None, False

    def __init__(self, path: str | os.PathLike[str], beside: bool = False):
        """Opens the file and digests it; `beside`: in a thread. UserError for one that is no sound checkpoint."""
        self.path = Path(path)
        self._tensors = tensors = _HeldTensors(self.path)
        self.config, self.architecture, self.metadata = tensors.config, tensors.architecture, tensors.metadata
        self.names = list(tensors)
        self.numerics = {name: str(value) for name, value in identity_fields(self.config).items()}
        self._digest = Beside(partial(weights_digest, tensors), at_once=not beside)

    @property
    def digest(self) -> str:
        """Of names, dtypes, shapes and values. Waits for it; StartChanged where it was never made of one file."""
        return self._digest.result()

    def load(self) -> LoadedModel:
        """The model; each tensor is read, and compared with the first read, when it is asked for. StartChanged."""
        self._tensors.check_size()
        return LoadedModel(self._tensors, self.architecture, self.path)

    @contextlib.contextmanager
    def reading(self) -> Iterator[LoadedModel]:
        """The model while the body uses it: no tensor that it gets is another one than was digested (StartChanged)."""
        yield self.load()

    def merged(self, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The trained tensors by name, and the file's own where a name is not among them, on the CPU.

        The file is not needed where all are. Raises StartChanged.
        """
        if not trained.keys() >= set(self.names):
            self._tensors.check_size()
        return {name: trained[name] if name in trained else self._tensors[name] for name in self.names}

    def export(
        self,
        path: Path,
        trained: Mapping[str, torch.Tensor],
        metadata: dict[str, Any],
        dtype: torch.dtype | None = None,
        tokenizer: OwnTokenizer | None = None,
    ) -> None:
        """Writes a weights file: the trained tensors, and the file's own of the others, as they are unless a dtype is
        given. It holds no tokenizer. StartChanged."""
        merged = self.merged(trained)
        if dtype is not None:
            merged = {name: tensor.to(dtype) for name, tensor in merged.items()}
        save_weights(path, merged, self.config, metadata)

    def export_metadata(self, path: Path) -> dict[str, Any]:
        """What a weights file says of itself; nothing for a link, or what is no weights file."""
        try:
            return {} if path.is_symlink() else load_weights(path).metadata
        except UserError:
            return {}


def _entry(tensor: torch.Tensor, place: Place) -> _Entry:
    """Where a tensor's numbers lie, of a storage there."""
    first, shape = int(tensor.storage_offset()) * tensor.itemsize, tuple(tensor.shape)
    last = sum((length - 1) * stride for length, stride in zip(shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.itemsize if math.prod(shape) else 0
    return _Entry(tensor.dtype, shape, tensor.stride(), place.start + first, size, place.swapped)
