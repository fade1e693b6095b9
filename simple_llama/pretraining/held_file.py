"""A file of a model, held open for a run: only the bytes that were read first count.

It is read with `pread` into new memory, never mapped: one that somebody cuts cannot end the process (SIGBUS), and no
more of it is in memory than the tensor that is in use. Large ones are read and hashed by as many threads as this rank
computes with.
"""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import open_file, shown
from simple_llama.pretraining.start_model import StartChanged

_PIECE_BYTES = 16 << 20  # that a thread reads and hashes at a time
_ALONE_BYTES = 32 << 20  # tensors up to here have one: glibc's heap would keep their memory where threads begin and end


@cache
def _faster_hash() -> Callable[[Any], Any]:
    """That of two hashes which is faster here: where a CPU has instructions for SHA-256, it is twice as fast. What is
    hashed is compared in this process alone."""

    def seconds(hashed: Callable[[Any], Any]) -> float:
        start = time.perf_counter()
        hashed(bytes(1 << 20)).digest()
        return time.perf_counter() - start

    return min((hashlib.blake2b, hashlib.sha256), key=lambda hashed: min(seconds(hashed) for _ in range(2)))


class HeldFile:
    """A file's descriptor, and digests of what was read through it."""

    def __init__(self, path: Path, expected: str):
        """Opens the file. UserError, which begins with the path and `expected`, where it cannot be opened."""
        self.path = path
        try:
            with open_file(path) as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise UserError(f"{path}: {expected}, found: {error.strerror or error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        _faster_hash()  # chosen before threads read: each of two that asked at once could get another answer
        self.digests: dict[str, bytes] = {}  # of the pieces of a tensor, when it was read first

    def opened(self) -> BufferedReader:
        """The file, to be closed by the caller."""
        return os.fdopen(os.dup(self._descriptor), "rb")

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fills `memory` from `start` on. OSError where the file ends before, too."""
        while memory:
            count = os.preadv(self._descriptor, [memory[:_PIECE_BYTES]], start)  # the system gives less than 2 GiB
            if not count:
                raise OSError(0, "it is shorter than it was")
            memory, start = memory[count:], start + count

    def tensor_bytes(self, name: str, start: int, size: int) -> torch.Tensor:
        """A tensor's bytes (size,) in memory of their own. StartChanged where they are not those of the first time."""
        raw = torch.empty(size, dtype=torch.uint8)
        memory = raw.numpy().data
        try:
            found = self._read_hashed(memory, start)
        except OSError as error:
            raise self._changed(error.strerror or str(error)) from error
        if self.digests.setdefault(name, found) != found:
            raise self._changed(f"tensor {shown(name)} differs")
        return raw

    def _read_hashed(self, memory: memoryview, start: int) -> bytes:
        """Fills `memory` from `start` on; gives the digests of its pieces, one behind the other. OSError."""

        hashed = _faster_hash()

        def piece(first: int) -> bytes:
            part = memory[first : first + _PIECE_BYTES]
            self.read_into(part, start + first)
            return hashed(part).digest()

        if len(memory) <= _ALONE_BYTES:
            return b"".join(map(piece, range(0, len(memory), _PIECE_BYTES)))
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            return b"".join(threads.map(piece, range(0, len(memory), _PIECE_BYTES)))

    def check_size(self) -> None:
        """Raises StartChanged where the file is longer or shorter than it was."""
        try:
            size = os.fstat(self._descriptor).st_size
        except OSError as error:  # on a network file system, after another host deleted it
            raise self._changed(error.strerror or str(error)) from error
        if size != self.size:
            raise self._changed(f"it had {self.size:,} bytes, now {size:,}")

    def _changed(self, how: str) -> StartChanged:
        """The error, saying how it shows."""
        return StartChanged(f"{self.path}: the start model has changed since this run read it first: {how}")
