"""Files of text, plain or packed (.gz, .zst, .xz, .bz2), a block at a time."""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from simple_llama.common.errors import UserError
from simple_llama.common.files import open_file

_MOST_EXPANSION = 100  # bytes of text from a byte of a packed file; text becomes 3 to 10 times smaller
_BLOCK_BYTES = 1 << 20  # unpacked at a time
_FREE_BYTES = 4 << 20  # unpacked before the expansion is looked at: small files may be all repetitions
_ZSTD_BYTES = 1 << 10  # taken in at a time: a block of 4 bytes may become 128 KiB


def optional_package(name: str, file: str | Path, extra: str = "data") -> Any:
    """A package that a kind of file needs, and an extra of this project brings. UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(
            f"{file}: expected the package {package}, which such files need, found none; install it: "
            f"pip install '.[{extra}]'"
        ) from None


def text_blocks(file: str, most: float = float("inf")) -> Iterator[bytes]:
    """The bytes of a file, unpacked, a block at a time. UserError for what unpacks to many times its size.

    `most` is how many bytes there may be, for those who keep them all.
    """
    too_long = f"{file}: expected a list of at most {most:,} bytes, found more; a .jsonl file may have any size"
    suffix = Path(file).suffix.lower()
    zstandard = optional_package("zstandard", file) if suffix == ".zst" else None
    errors = (OSError, EOFError, zlib.error, lzma.LZMAError, *([zstandard.ZstdError] if zstandard else []))
    try:
        with open_file(file) as packed:
            if suffix not in UNPACKED:
                if os.fstat(packed.fileno()).st_size > most:
                    raise UserError(too_long)
                yield from iter(lambda: packed.read(_BLOCK_BYTES), b"")
                return
            length = 0
            for block in UNPACKED[suffix](packed):
                length += len(block)
                if length > _FREE_BYTES and length > _MOST_EXPANSION * packed.tell():
                    raise UserError(
                        f"{file}: expected text that unpacks to at most {_MOST_EXPANSION} times its size, found "
                        "more; if it is meant to, give the unpacked file"
                    )
                if length > most:
                    raise UserError(too_long)
                yield block
    except errors as error:  # also a damaged or cut packed file
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _gzip_blocks(packed: BufferedReader) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=packed) as stream:
        yield from iter(lambda: stream.read(_BLOCK_BYTES), b"")


def _bz2_blocks(packed: BufferedReader) -> Iterator[bytes]:
    with bz2.BZ2File(packed) as stream:
        yield from iter(lambda: stream.read(_BLOCK_BYTES), b"")


def _xz_blocks(packed: BufferedReader) -> Iterator[bytes]:
    with lzma.LZMAFile(packed) as stream:
        yield from iter(lambda: stream.read(_BLOCK_BYTES), b"")


def _zstd_blocks(packed: BufferedReader) -> Iterator[bytes]:
    """Its own reader of streams would take a cut file for a whole one: each frame has to end."""
    import zstandard

    new = zstandard.ZstdDecompressor().decompressobj  # refuses windows above 128 MiB
    frame, is_open, found, length = new(), False, [], 0
    while data := packed.read(_ZSTD_BYTES):
        while data:
            frame = new() if frame.eof else frame
            found.append(frame.decompress(data))
            length += len(found[-1])
            is_open, data = not frame.eof, frame.unused_data if frame.eof else b""
        if length >= _BLOCK_BYTES:
            yield b"".join(found)
            found, length = [], 0
    yield b"".join(found)
    if is_open:
        raise EOFError("the file ends before its last frame does")


UNPACKED: dict[str, Callable[[BufferedReader], Iterator[bytes]]] = {
    ".gz": _gzip_blocks,
    ".zst": _zstd_blocks,
    ".xz": _xz_blocks,
    ".bz2": _bz2_blocks,
}
