"""Safetensors files held open: tensors are read when they are asked for, and only the bytes that were read first count.

Nothing in a file is trusted: its table has to account for every byte behind it exactly once.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import listed, parse_json, read_json, shown
from simple_llama.pretraining.held_file import HeldFile
from simple_llama.pretraining.named_tensors import NamedTensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LENGTH = struct.Struct("<Q")  # of the table, in front of it
_MOST_TABLE_BYTES = 25 << 20  # a tensor's entry takes about 100 bytes
_MOST_DIMENSIONS = 8
_MOST_SHARDS = 1000  # each is held open
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPECTED = "expected a safetensors file"


def file_head(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What stands in a file in front of the bytes of these tensors, which follow in this order: the length of the
    table in 8 bytes, the table as JSON. Format: https://github.com/huggingface/safetensors#format"""
    words = {dtype: word for word, dtype in _DTYPES.items()}
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        table[name] = {"dtype": words[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return _LENGTH.pack(len(text)) + text


class _Entry(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    size: int  # bytes


class _File(HeldFile):
    """One safetensors file and its table."""

    def __init__(self, path: Path):
        """Opens the file and reads its table. UserError for a file that is not sound."""
        super().__init__(path, _EXPECTED)
        try:
            self.entries = self._table()
        except UserError as error:
            raise UserError(f"{path}: {_EXPECTED}, found one that is not sound: {error}") from error
        except OSError as error:
            raise UserError(f"{path}: {_EXPECTED}, found: {error.strerror or error}") from error

    def _table(self) -> dict[str, _Entry]:
        """The tensors by name. UserError for a table that does not say what each byte is, once."""
        if self.size < _LENGTH.size:
            raise UserError(f"it has {self.size} bytes")
        head = bytearray(_LENGTH.size)
        self.read_into(memoryview(head), 0)
        [length] = _LENGTH.unpack(head)
        first = _LENGTH.size + length
        if length > _MOST_TABLE_BYTES or first > self.size:
            raise UserError(f"its table claims {length:,} bytes of the file's {self.size:,}")
        table = bytearray(length)
        self.read_into(memoryview(table), _LENGTH.size)
        found = parse_json(bytes(table), "its table")
        if not isinstance(found, dict):
            raise UserError(f"its table is a {type(found).__name__} instead of an object")
        found.pop("__metadata__", None)
        entries = {name: _entry(name, value, first, self.size) for name, value in found.items()}
        at = first
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
            if entry.start != at:
                how = "overlaps the one before" if entry.start < at else f"leaves {entry.start - at:,} bytes unsaid"
                raise UserError(f"tensor {shown(name)} {how}")
            at += entry.size
        if at != self.size:
            raise UserError(f"its tensors end after {at:,} of {self.size:,} bytes")
        return entries


class SafetensorsFiles(NamedTensors):
    """The tensors of one or several files by the names in them, each read when it is asked for, into memory of its own.

    A tensor that is read again has to have the bytes of the first time: StartChanged otherwise.
    """

    def __init__(self, paths: list[Path]):
        """Opens the files and reads their tables. UserError for a file that is not sound, or a tensor in two files."""
        self._files = [_File(path) for path in paths]
        self._owners: dict[str, _File] = {}
        self._names = self._owners
        for file in self._files:
            for name in file.entries:
                if name in self._owners:
                    raise UserError(
                        f"{file.path}: expected each tensor in one file, found {shown(name)} in "
                        f"{self._owners[name].path.name} too"
                    )
                self._owners[name] = file

    def _make(self, name: str) -> torch.Tensor:
        file = self._owners[name]
        entry = file.entries[name]
        return file.tensor_bytes(name, entry.start, entry.size).view(entry.dtype).view(entry.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self._owners[name].entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, without reading it."""
        return self._owners[name].entries[name].dtype

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same, bit for bit; both are read, one after the other."""
        entries = [self._owners[each].entries[each] for each in (name, other)]
        if len({(entry.dtype, entry.shape) for entry in entries}) > 1:
            return False
        for each in (name, other):
            self[each]
        return self._owners[name].digests[name] == self._owners[other].digests[other]

    def file_of(self, name: str) -> Path:
        """Where a tensor lies."""
        return self._owners[name].path

    def check_sizes(self) -> None:
        """Raises StartChanged where a file is longer or shorter than it was."""
        for file in self._files:
            file.check_size()


def open_weights(folder: Path) -> SafetensorsFiles:
    """The tensors of a model's folder, in `model.safetensors` or the files of `model.safetensors.index.json`.

    UserError for a folder that has neither, or both; weights in pickles are not read.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    there = [path for path in (single, index) if os.path.lexists(path)]
    if len(there) == 2:
        raise UserError(
            f"{folder}: expected {single.name} or {index.name}, found both; take away which is not the model"
        )
    if not there:
        raise UserError(f"{folder}: expected {single.name} or {index.name}, found {weights_there(folder)}")
    if there == [single]:
        return SafetensorsFiles([single])
    weight_map = _read_index(index)
    tensors = SafetensorsFiles([folder / name for name in sorted(set(weight_map.values()))])
    for name, file in weight_map.items():
        if name not in tensors or tensors.file_of(name).name != file:
            raise UserError(f"{index}: expected tensor {shown(name)} in {file}, found none by that name there")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """File names by tensors. UserError for an index that is none, or names what is no file of its folder."""
    found = read_json(path)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: expected an object with a weight_map, file names by tensors, found {shown(found)}")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name == os.path.basename(name) and name.isprintable()
        if not plain or not name.endswith(".safetensors"):
            raise UserError(
                f"{path}: weight_map: expected the name of a .safetensors file beside it for {shown(tensor)}, "
                f"found {shown(name)}"
            )
    names = sorted(set(weight_map.values()))
    if len(names) > _MOST_SHARDS:
        raise UserError(f"{path}: expected at most {_MOST_SHARDS:,} files, found {len(names):,}")
    missing = [name for name in names if not (path.parent / name).exists()]
    if missing:
        raise UserError(
            f"{path}: expected its {len(names):,} files beside it, missing {listed(missing)}; download them again"
        )
    return weight_map


def weights_there(folder: Path) -> str:
    """What stands in a folder in the place of a whole model, in words, with the way out."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f"a folder that cannot be listed: {error.strerror or error}"
    if "adapter_model.safetensors" in names or "adapter_config.json" in names:
        return "adapters alone (adapter_config.json); merge them into their base model first"
    if others := [name for name in names if name.endswith((".safetensors", ".gguf", ".h5", ".msgpack"))]:
        return listed(others)
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]:
        return (
            f"pickles alone ({listed(pickles)}), which can run code and are not read; "
            "save the model again as safetensors (save_pretrained with a recent transformers)"
        )
    return "no weights"


def _entry(name: str, value: Any, first: int, end: int) -> _Entry:
    """A tensor of a file's table. UserError where its entry is no such thing, or its bytes do not lie in the file."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"tensor {shown(name)}: expected dtype, shape and data_offsets, found {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(
            f"tensor {shown(name)}: expected {', '.join(_DTYPES)}, found {shown(dtype)}; quantized ones are not taken"
        )
    if not _whole_numbers(shape) or len(shape) > _MOST_DIMENSIONS:
        raise UserError(f"tensor {shown(name)}: expected a shape, found {shown(shape)}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise UserError(f"tensor {shown(name)}: expected two data_offsets, found {shown(offsets)}")
    size = offsets[1] - offsets[0]
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if size != needed:
        raise UserError(f"tensor {shown(name)}: its shape needs {needed:,} bytes, its data_offsets give {size:,}")
    if first + offsets[1] > end:
        raise UserError(f"tensor {shown(name)} ends {first + offsets[1] - end:,} bytes behind the file's end")
    return _Entry(_DTYPES[dtype], tuple(shape), first + offsets[0], size)


def _whole_numbers(value: Any) -> bool:
    """Whether a value of the table is a list of numbers from 0 to 2^63 - 1."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
