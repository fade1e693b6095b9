"""Files that are whole or absent: atomic writes, content digests, JSON with errors a person can read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simple_llama.common.errors import UserError

_READ_BYTES = 1 << 20  # of a file digested at a time


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temp path beside `path`; what the body wrote there becomes `path` at the end, or leaves no trace.

    A reader sees the old file or the whole new one, also after a crash. Missing folders are made. The temp name starts
    with "." and ends with ".tmp", so one left by a killed process is never taken for a result. Any OSError on the way
    (full disk, read-only folder) becomes a UserError that names `path` and the reason.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        _fsync(temp)
        os.replace(temp, path)
        _fsync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone after os.replace; the first error is the one to show
            temp.unlink()


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` whole or not at all (see `atomic_path`)."""
    with atomic_path(path) as temp:
        temp.write_bytes(data)


def atomic_write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON, whole or not at all."""
    atomic_write(path, (json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode())


def digest(*chunks: bytes | bytearray | memoryview, size: int = 16) -> bytes:
    """blake2b of the joined chunks in `size` bytes. Boundaries do not count: callers with several fields mark them."""
    state = hashlib.blake2b(digest_size=size)
    for chunk in chunks:
        state.update(chunk)
    return state.digest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """Hex of the 16-byte `digest` of a file's bytes. UserError when the file cannot be read."""
    state = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_READ_BYTES):
                state.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return state.hexdigest()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The object in a UTF-8 JSON file. UserError naming the file, and the line where its text goes wrong."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return json.loads(data.decode("utf-8-sig"))  # -sig: some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: expected UTF-8 text, found byte 0x{data[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists nested without end
        raise UserError(f"{path}: not JSON that can be read: {error}") from error


def _fsync(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where its file system knows how to."""
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of folders
            raise
