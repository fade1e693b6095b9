"""Arrays of numbers in one file, with JSON facts beside them; mapped when read, so that only what is used is in memory.

    8 bytes  _MAGIC
    8 bytes  length of the header, little-endian
    header   JSON: {"facts": ..., "arrays": {name: {"dtype", "shape", "start"}}, "bytes", "digest"}, blanks behind it
    arrays   each from a multiple of 64 bytes on

numpy's own .npz can be mapped by nobody: a zip's members begin at any byte. A file is whole or absent (`atomic_path`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_path, open_file

_MAGIC = b"SLDPOar1"
_ALIGN = 64  # bytes: of a cache line
_MOST_HEADER = 64 << 20
_AT_ONCE = 8 << 20  # bytes written or digested


class Damaged(UserError):
    """An array file that is not what was written."""


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Any) -> None:
    """Writes the file, whole or not at all. UserError as of `atomic_path`.

    Args:
        arrays: of any dtype that `numpy.lib.format` can say, by name; contiguous. facts: JSON values.
    """
    described: dict[str, Any] = {}
    start, state = 0, hashlib.blake2b(digest_size=16)
    for name, array in arrays.items():
        start = -(-start // _ALIGN) * _ALIGN
        dtype = np.lib.format.dtype_to_descr(array.dtype)
        described[name] = {"dtype": dtype, "shape": list(array.shape), "start": start}
        start += array.nbytes
        _each(array, state.update)
    header = {"facts": facts, "arrays": described, "bytes": start, "digest": state.hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-(len(_MAGIC) + 8 + len(text)) % _ALIGN)
    with atomic_path(path) as temp, open(temp, "wb") as file:
        file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for name, array in arrays.items():
            file.seek(len(_MAGIC) + 8 + len(text) + described[name]["start"])
            _each(array, file.write)
        file.truncate(len(_MAGIC) + 8 + len(text) + start)


def map_arrays(path: Path, verify: bool = False) -> tuple[dict[str, np.ndarray], Any]:
    """(arrays by name, facts); the arrays are read-only views of the mapped file.

    Raises Damaged for a file that is cut or is none, with `verify` also for one whose numbers have changed. OSError
    where it cannot be read.
    """
    with open_file(path) as file:
        begin = file.read(len(_MAGIC) + 8)
        length = int.from_bytes(begin[len(_MAGIC) :], "little")
        if len(begin) < len(_MAGIC) + 8 or not begin.startswith(_MAGIC) or length > _MOST_HEADER:
            raise Damaged(f"{path}: expected a file of arrays, found another")
        try:
            header = json.loads(file.read(length))
            total, facts, named = len(begin) + length + header["bytes"], header["facts"], header["digest"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(f"{path}: expected a file of arrays, found a header that is none") from error
        if os.fstat(file.fileno()).st_size != total:
            raise Damaged(f"{path}: expected {total:,} bytes, found {os.fstat(file.fileno()).st_size:,}")
        data = np.memmap(file, np.uint8, "r", offset=len(begin) + length) if header["bytes"] else np.zeros(0, np.uint8)
    try:
        found = {name: _view(data, about) for name, about in header["arrays"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: expected arrays as its header describes them, found others") from error
    if verify:
        state = hashlib.blake2b(digest_size=16)
        for array in found.values():
            _each(array, state.update)
        if state.hexdigest() != named:
            raise Damaged(f"{path}: expected the arrays that were written, found others")
    return found, facts


def _view(data: np.ndarray, about: Mapping[str, Any]) -> np.ndarray:
    """An array of the mapped bytes."""
    dtype = np.lib.format.descr_to_dtype(_tuples(about["dtype"]))
    shape, start = about["shape"], about["start"]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return data[start : start + size].view(np.ndarray).view(dtype).reshape(shape)


def _tuples(described: Any) -> Any:
    """A dtype's description as `descr_to_dtype` wants it: JSON made lists of its tuples."""
    if not isinstance(described, list):
        return described
    return [(name, _tuples(kind), *(tuple(part) for part in rest)) for name, kind, *rest in described]


def _each(array: np.ndarray, use: Any) -> None:
    """Gives the bytes of an array to `use`, some at a time."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, len(data), _AT_ONCE):
        use(data[start : start + _AT_ONCE].data)
