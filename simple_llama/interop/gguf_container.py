"""The container of a GGUF file: metadata by key, and tensors that are dequantized when they are asked for.

    "GGUF"  version  counts of tensors and keys
    a key, its type, its value; ...                     metadata
    a tensor's name, dimensions, type, offset; ...      the table, inner dimension first
    the tensors, each from a multiple of `general.alignment` on

As of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The package `gguf`
dequantizes. Its reader is not used: it maps the file, and believes every count in it.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.packed_files import optional_package
from simple_llama.pretraining.held_file import HeldFile
from simple_llama.pretraining.named_tensors import NamedTensors

_EXPECTED = "expected a GGUF file"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9  # types of values beside the scalars
_LEAST_BYTES = {_TEXT: 8, **{code: struct.calcsize(form) for code, form in _SCALARS.items()}}  # of an item of a list
_LEAST_TENSOR, _LEAST_KEY = 24, 13  # bytes of an entry
_MOST_HEADER = 256 << 20  # bytes; vocabularies of a quarter million tokens take 20 MB
_MOST_NAME, _MOST_DIMENSIONS = 1 << 16, 4
_ALIGNMENT, _MOST_ALIGNMENT = 32, 1 << 16  # the first where the file has no other
_READ_AHEAD = 1 << 20
_PIECE = 1 << 16  # numbers that are dequantized at a time, whole blocks: what fits a cache


class _Entry(NamedTuple):
    """A tensor in the file."""

    type: Any  # gguf's
    shape: tuple[int, ...]  # as torch has it: inner dimension last
    start: int  # of its bytes in the file
    size: int  # bytes
    block: int  # numbers that are quantized together
    block_bytes: int


class _Row(NamedTuple):
    """A tensor as the table has it."""

    name: str
    dimensions: list[int]
    code: int  # of the type
    offset: int


class GGUFContainer(HeldFile, NamedTensors):
    """A GGUF file held open. Its tensors are fp32, by the names in the file."""

    def __init__(self, path: Path):
        """Reads the metadata and the table. UserError for a file that is not sound, or of types that cannot be read."""
        self._gguf = optional_package("gguf", path, "gguf")
        super().__init__(path, _EXPECTED)
        try:
            header = _Header(self)
            header.opening()
            tensors, keys = header.count(_LEAST_TENSOR, "tensors"), header.count(_LEAST_KEY, "keys")
            self.metadata = header.metadata(keys)  # by key
            self._names = self._entries = self._table([header.tensor() for _ in range(tensors)], header.at)
        except UserError as error:
            raise UserError(f"{path}: {_EXPECTED}, found one that is not sound: {error}") from error
        except OSError as error:
            raise UserError(f"{path}: {_EXPECTED}, found: {error.strerror or error}") from error

    def _make(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        raw = self.tensor_bytes(name, entry.start, entry.size).numpy()
        values = np.empty(math.prod(entry.shape), np.float32)
        step = _PIECE * entry.block_bytes // entry.block
        for number, first in enumerate(range(0, entry.size, step)):
            row = raw[first : first + step][None]  # of one row gguf makes no copies
            with np.errstate(all="ignore"):  # numbers that are not finite are named by check_weights
                piece = self._gguf.dequantize(row, entry.type).reshape(-1)
            values[number * _PIECE :][: len(piece)] = piece
        return torch.from_numpy(values).view(entry.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self._entries[name].shape

    def _table(self, found: list[_Row], end: int) -> dict[str, _Entry]:
        """The tensors by name, of a table that ends at byte `end`. UserError for one that does not say what each byte
        behind it is, once."""
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise UserError(f"general.alignment: expected a power of two, found {shown(alignment)}")
        at = start = -(-end // alignment) * alignment
        entries: dict[str, _Entry] = {}
        for row in found:
            name, entry = row.name, self._entry(row, start + row.offset)
            if name in entries:
                raise UserError(f"tensor {shown(name)} stands twice")
            if entry.start != at:
                how = "overlaps the one before" if entry.start < at else f"leaves {entry.start - at:,} bytes unsaid"
                raise UserError(f"tensor {shown(name)} {how}")
            end = at + entry.size
            if end > self.size:
                raise UserError(f"tensor {shown(name)} ends {end - self.size:,} bytes behind the file's end")
            at = -(-end // alignment) * alignment
            entries[name] = entry
        if self.size > at:
            raise UserError(f"its tensors end after {at:,} of {self.size:,} bytes")
        return entries

    def _entry(self, found: _Row, start: int) -> _Entry:
        """UserError for a type that cannot be dequantized, or a shape that it cannot have."""
        gguf, name, dimensions = self._gguf, shown(found.name), found.dimensions
        try:
            kind = gguf.GGMLQuantizationType(found.code)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            raise UserError(f"tensor {name}: gguf cannot dequantize type {found.code}") from None
        sizes = bool(dimensions) and all(0 < size < 1 << 40 for size in dimensions)
        if not sizes or dimensions[0] % block:
            raise UserError(f"tensor {name}: {dimensions} is no shape of {kind.name}, {block} numbers a block")
        size = math.prod(dimensions) // block * block_bytes
        return _Entry(kind, tuple(reversed(dimensions)), start, size, block, block_bytes)


class _Header:
    """Reads the file from its start, never further than it goes. Everything raises UserError where the file ends."""

    def __init__(self, file: HeldFile):
        self._file, self._ahead, self._ahead_at, self.at = file, b"", 0, 0

    def opening(self) -> None:
        """Checks what the file begins with."""
        if (magic := bytes(self._take(4))) != b"GGUF":
            raise UserError(f"it begins with {magic!r} instead of b'GGUF'")
        [version] = struct.unpack("<I", self._take(4))
        if version not in (2, 3):
            raise UserError(f"version {version} instead of 2 or 3, little-endian; convert the model again")

    def count(self, least: int, what: str) -> int:
        """How many things follow. UserError where so many of at least `least` bytes have no room in the file."""
        [count] = struct.unpack("<Q", self._take(8))
        if count * least > self._file.size - self.at:
            raise UserError(f"it claims {count:,} {what}, and ends {self._file.size - self.at:,} bytes later")
        return count

    def metadata(self, count: int) -> dict[str, Any]:
        """Values by key."""
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._text(_MOST_NAME)
            if key in found:
                raise UserError(f"key {shown(key)} stands twice")
            [code] = struct.unpack("<I", self._take(4))
            try:
                found[key] = self._value(code)
            except UserError as error:
                raise UserError(f"key {shown(key)}: {error}") from error
        return found

    def tensor(self) -> _Row:
        """The next of the table."""
        name = self._text(_MOST_NAME)
        [dimensions] = struct.unpack("<I", self._take(4))
        if dimensions > _MOST_DIMENSIONS:
            raise UserError(f"tensor {shown(name)}: {dimensions} dimensions")
        shape = list(struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions)))
        return _Row(name, shape, *struct.unpack("<IQ", self._take(12)))

    def _value(self, code: int) -> Any:
        if code in _SCALARS:
            form = _SCALARS[code]
            return struct.unpack(form, self._take(struct.calcsize(form)))[0]
        if code == _TEXT:
            return self._text(_MOST_HEADER)
        if code != _LIST:
            raise UserError(f"type {code} of a value is not known")
        [inner] = struct.unpack("<I", self._take(4))
        if inner not in _LEAST_BYTES:
            raise UserError(f"a list of type {inner} cannot be read")
        count = self.count(_LEAST_BYTES[inner], "items")
        if inner == _TEXT:
            return [self._text(_MOST_HEADER) for _ in range(count)]
        form = f"<{count}{_SCALARS[inner][1]}"
        return list(struct.unpack(form, self._take(struct.calcsize(form))))

    def _text(self, most: int) -> str:
        [length] = struct.unpack("<Q", self._take(8))
        if length > most:
            raise UserError(f"a text of {length:,} bytes")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"a text is not UTF-8, before byte {self.at:,}") from None

    def _take(self, count: int) -> memoryview:
        """The next bytes."""
        end = self.at + count
        if end > min(self._file.size, _MOST_HEADER):
            raise UserError(f"it has {self._file.size:,} bytes, and claims {count:,} from byte {self.at:,} on")
        if end > self._ahead_at + len(self._ahead):
            ahead = bytearray(min(max(count, _READ_AHEAD), self._file.size - self.at))
            self._file.read_into(memoryview(ahead), self.at)
            self._ahead, self._ahead_at = bytes(ahead), self.at
        start, self.at = self.at - self._ahead_at, end
        return memoryview(self._ahead)[start : start + count]
