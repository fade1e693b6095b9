"""A `.pth` that a run starts from (a StartModel): held open, checked at each read, and what its exports are."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import open_file
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.pretraining.config import identity_fields
from simple_llama.pretraining.start_model import StartChanged
from simple_llama.pretraining.weights import WeightsFile, load_weights, save_weights, weights_digest


class StartFile:
    """A weights file, its descriptor, and what its tensors were when it was read first."""

    export_suffix, export_dtype, own_tokenizer, slides = ".pth", torch.float32, None, False

    def __init__(self, path: str | os.PathLike[str]):
        """Opens, reads and digests the file. UserError as of `load_weights`."""
        self.path = Path(path)
        try:
            with open_file(path) as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise UserError(f"{path}: expected a SimpleLLaMA checkpoint, found: {error.strerror or error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._size = os.fstat(self._descriptor).st_size
        with self._opened() as file:
            first = load_weights(self.path, file)
        self.config, self.architecture = first.config, first.architecture
        self.names = list(first.state_dict)
        self.numerics = {name: str(value) for name, value in identity_fields(first.config).items()}
        self.digest = weights_digest(first.state_dict)  # of names, dtypes, shapes and values

    def load(self, mapped: bool = True) -> WeightsFile:
        """What the file holds now, under the config of the first read; for a look at it: its values are not checked.

        Raises StartChanged where it differs openly.
        """
        self._check_size()
        try:
            with self._opened() as file:
                loaded = load_weights(self.path, file, mapped)
        except UserError as error:
            raise self._changed(str(error)) from error
        return replace(loaded, config=self.config)

    @contextlib.contextmanager
    def reading(self) -> Iterator[WeightsFile]:
        """The file's model while the body uses it, its tensors mapped. Raises StartChanged at the end where what the
        body used need not have been what was digested: nothing that it made may be used then.

        A file cut during the body may end the process (SIGBUS), so the body is to come before there is something to
        lose.
        """
        loaded = self.load()
        yield loaded
        self._check(loaded)

    def merged(self, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The trained tensors by name, and the file's own where a name is not among them, on the CPU.

        The file is not needed where all are. It is read, not mapped: this is for the middle of a run, which must not
        end where the file is cut. Raises StartChanged.
        """
        if trained.keys() >= set(self.names):
            return {name: trained[name] for name in self.names}
        loaded = self.load(mapped=False)
        self._check(loaded)
        return {name: trained.get(name, tensor) for name, tensor in loaded.state_dict.items()}

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

    def _opened(self) -> BufferedReader:
        """The held file, to be closed by the caller."""
        return os.fdopen(os.dup(self._descriptor), "rb")

    def _check(self, loaded: WeightsFile) -> None:
        """Raises StartChanged where its tensors are not those of the first read."""
        self._check_size()  # a mapped file that was cut must not be looked into
        if weights_digest(loaded.state_dict) != self.digest:
            raise self._changed("its tensors differ")

    def _check_size(self) -> None:
        """Raises StartChanged where the file is longer or shorter than it was."""
        try:
            size = os.fstat(self._descriptor).st_size
        except OSError as error:  # on a network file system, after another host deleted it
            raise self._changed(error.strerror or str(error)) from error
        if size != self._size:
            raise self._changed(f"it had {self._size:,} bytes, now {size:,}")

    def _changed(self, how: str) -> StartChanged:
        """The error, saying how it shows."""
        return StartChanged(f"{self.path}: the start checkpoint has changed since this run read it first: {how}")
