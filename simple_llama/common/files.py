"""Files that are whole or absent: atomic writes, content digests, JSON with errors a person can read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any

from simple_llama.common.errors import UserError

_READ_BYTES = 1 << 20  # of a file digested at a time
_MOST_JSON_BYTES = 64 << 20  # of a file of settings or facts: far above any honest one, far below a machine's memory
_MOST_SHOWN = 200  # characters of a value shown in one message
_MOST_NAME = 100  # characters of a name in a list of them
_NAMES_SHOWN = 6  # names of such a list
_ASKING = threading.Lock()  # for the process's umask
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


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
        _share(temp)
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


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], publishing: contextlib.AbstractContextManager[object] | None = None
) -> Iterator[Path]:
    """Yield a temp folder beside `path`; with the files that the body wrote there it becomes `path` at the end, or
    leaves no trace. Its name is like that of `atomic_path`.

    UserError, naming `path`, for any OSError on the way, and where something lies at `path` that is no empty folder.

    Args:
        publishing: entered when all is on the disk, for no longer than the folder needs to get its name.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir()
        yield temp
        for file in temp.iterdir():
            _fsync(file)
        _fsync_folder(temp)
        with publishing or contextlib.nullcontext():
            publish_folder(temp, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)  # gone after the renaming; made above, so nobody else's


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` whole or not at all (see `atomic_path`)."""
    with atomic_path(path) as temp:
        temp.write_bytes(data)


def atomic_write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON, whole or not at all."""
    atomic_write(path, json_bytes(obj))


def json_bytes(obj: Any) -> bytes:
    """`obj` as indented UTF-8 JSON; what `read_json` makes of it gives the same bytes again."""
    return (json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode()


def check_free(path: str | os.PathLike[str]) -> None:
    """UserError where something lies at the path of an --output, a broken link too."""
    if os.path.lexists(path):
        raise UserError(f"{path}: expected nothing there yet; choose another --output, or move it away")


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
        with open_file(path) as file:
            while chunk := file.read(_READ_BYTES):
                state.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return state.hexdigest()


def write_digested(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview]) -> str:
    """Writes the joined chunks to a file; gives its `file_digest`, made of the bytes on their way there. OSError."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "wb") as file:
        for chunk in chunks:
            for start in range(0, len(chunk), _READ_BYTES):
                piece = chunk[start : start + _READ_BYTES]
                state.update(piece)
                file.write(piece)
    return state.hexdigest()


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a file to read its bytes. OSError for a pipe, a device or a folder: they might hang, or never end."""
    return os.fdopen(_open_regular(path, os.O_RDONLY), "rb")


def append_to(path: str | os.PathLike[str]) -> TextIOWrapper:
    """Opens a file, made if it is not there, to add UTF-8 text at its end. OSError as in `open_file`."""
    descriptor = _open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return open(descriptor, "a", encoding="utf-8", newline="\n")


def _open_regular(path: str | os.PathLike[str], flags: int) -> int:
    """A descriptor of a regular file."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)  # without O_NONBLOCK a pipe hangs here
    except OSError as error:
        if error.errno != errno.ENXIO:  # a pipe that nobody reads, or a device or socket without an answer
            raise
        raise OSError(errno.EINVAL, "expected a file, found a pipe, a socket or a device", os.fspath(path)) from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return descriptor
    os.close(descriptor)
    code = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
    raise OSError(code, f"expected a file, found {_KINDS.get(kind, 'something else')}", os.fspath(path))


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """A whole file. OSError as in `open_file`, and for a file of more than `most` bytes."""
    with open_file(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"expected at most {most:,} bytes, found more", os.fspath(path))
    return data


def shown(value: Any) -> str:
    """A value from a file as text that fits a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, a nested list
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def listed(items: Sequence[str]) -> str:
    """The first few names, and how many more. Names in a file may hold anything: line breaks, terminal commands."""
    few = [item if item.isprintable() else repr(item) for item in items[:_NAMES_SHOWN]]
    more = f" and {len(items) - _NAMES_SHOWN} more" if len(items) > _NAMES_SHOWN else ""
    return ", ".join(item[:_MOST_NAME] for item in few) + more


def brief(value: Any, most: int = _MOST_SHOWN) -> str:
    """A value of a JSON file as JSON that fits a message."""
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}..."


def read_json(path: str | os.PathLike[str]) -> Any:
    """The object in a UTF-8 JSON file. UserError naming the file, and the line where its text goes wrong."""
    try:
        data = read_bytes(path, _MOST_JSON_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_json(data, path)


def parse_json(data: bytes, path: str | os.PathLike[str]) -> Any:
    """The object in the bytes of a UTF-8 JSON file. UserError as of `read_json`."""
    try:
        text = data.decode("utf-8-sig")  # -sig: some editors put a byte order mark in front
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: expected UTF-8 text, found byte 0x{data[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists nested without end
        raise UserError(f"{path}: not JSON that can be read: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key stands twice: which value counts is not guessed."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} stands twice; keep one of them")
        found[key] = value
    return found


def _fsync(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(temp: Path, final: Path) -> None:
    """Give a finished folder its name, on disk when this returns. UserError if it fails: something has that name."""
    try:
        _fsync_folder(temp)
        temp.rename(final)
        _fsync_folder(final.parent)
    except OSError as error:
        raise UserError(f"cannot rename {temp} to {final.name}: {error.strerror or error}") from error


def _share(path: Path) -> None:
    """Lets those read a file whom the process's umask lets; some writers make files for their owner alone."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """The process's umask. Where Linux does not say it, it must be set to be asked for: by one thread at a time."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    with _ASKING:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where its file system knows how to."""
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of folders
            raise
