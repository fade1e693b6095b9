"""The weights file that a run starts from, held open to the run's end: every read is of the bytes that were digested.

A path may lead to another file at any time. Here the file itself is held, so it does not matter whether it is renamed,
replaced or deleted; one that was cut or overwritten in place is refused at the next read.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BufferedReader
from pathlib import Path

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import open_file
from simple_llama.pretraining.weights import LoadedModel, load_weights, weights_digest


class StartChanged(UserError):
    """The file no longer holds what was read at the start."""


class StartFile:
    """A weights file, its descriptor, and what its tensors were when it was read first."""

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
        self.digest = weights_digest(first.state_dict)  # of names, dtypes, shapes and values

    def load(self, mapped: bool = True) -> LoadedModel:
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
    def reading(self) -> Iterator[LoadedModel]:
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

    def _opened(self) -> BufferedReader:
        """The held file, to be closed by the caller."""
        return os.fdopen(os.dup(self._descriptor), "rb")

    def _check(self, loaded: LoadedModel) -> None:
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
