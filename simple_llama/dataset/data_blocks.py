"""Data files in blocks of about 64 MB, so that what was made of a block is found again by its content.

A file of lines is cut behind the first line that ends 64 MiB or more from where its block begins: what is appended
changes the last block alone. Any other file is one block. What a file was at the last start is kept beside the store:
where size, time and inode are the same, 64 pieces of 1 MiB, drawn anew, tell whether it still is that; so a start reads
64 MiB of a file that may have gigabytes.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write_json, digest, open_file, read_json
from simple_llama.dataset.json_records import LINE_SUFFIXES

_BLOCK, _PIECE = 64 << 20, 1 << 20  # bytes
_DRAWN = 64  # pieces that are compared at a start
_MOST_LINE = 64 << 20  # bytes that a line may go beyond the end of its block; a reader refuses longer ones anyway
_NAME = 16  # bytes of a digest
_FORMAT = 1  # of the facts of a file


class UncutFile(Exception):
    """A file that is not cut into blocks."""


class Block(NamedTuple):
    """A part of a data file."""

    file: str
    start: int  # bytes
    length: int
    first: int  # number of its first record, from 1
    lines: int  # that it has; 0 where a file is no lines
    digest: str  # of its pieces, its kind, and whether it begins its file

    @property
    def is_lines(self) -> bool:
        """Whether it is whole lines of a file, rather than a whole file of another kind."""
        return self.lines > 0


class _Cut(NamedTuple):
    """A block of a file, as its facts have it."""

    length: int
    lines: int
    pieces: str  # hex digests, one behind the other


def blocks_of(file: Path, facts_folder: Path, verify: bool = False, beat: Callable[[], object] = bool) -> list[Block]:
    """The blocks of a file, in order; what it is now is noted in `facts_folder`. UserError where it cannot be read,
    UncutFile where a line is too long.

    Args:
        verify: whether all of it is read and compared, not 64 drawn pieces.
        beat: called for each 64 MiB that are read.
    """
    about = facts_folder / f"{digest(os.path.realpath(file).encode()).hex()}.json"
    try:
        with open_file(file) as opened:
            status = os.fstat(opened.fileno())
            now = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
            cuts = _known(about, now)
            if cuts is None or verify or not _still_are(opened, cuts, beat):
                cuts = list(_cut(opened, file.name.lower().endswith(LINE_SUFFIXES), beat))
                atomic_write_json(about, {"format": _FORMAT, "path": str(file), **now, "blocks": cuts})
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    return list(_numbered(file, cuts))


def read_block(block: Block) -> bytes:
    """The bytes of a block of lines. UserError where they are no longer those that it is named by."""
    try:
        with open_file(block.file) as opened:
            opened.seek(block.start)
            data = opened.read(block.length)
    except OSError as error:
        raise UserError(f"{block.file}: cannot be read: {error.strerror or error}") from error
    [found] = _numbered(Path(block.file), [_Cut(len(data), block.lines, _pieces(data))], block.start, block.first)
    if found.digest != block.digest:
        raise UserError(f"{block.file}: expected the data that was looked at first, found other bytes; start again")
    return data


def _numbered(file: Path, cuts: list[_Cut], start: int = 0, first: int = 1) -> Iterator[Block]:
    """Where each block begins, and its name."""
    for length, lines, pieces in cuts:
        kind = "lines" if lines else "".join(file.suffixes[-2:]).lower()
        name = digest(bytes.fromhex(pieces), f"{kind} {length} {first == 1}".encode()).hex()
        yield Block(str(file), start, length, first, lines, name)
        start, first = start + length, first + lines


def _known(about: Path, now: dict[str, int]) -> list[_Cut] | None:
    """The blocks that a file had, where it looks as it did; None otherwise."""
    with contextlib.suppress(UserError, TypeError, KeyError, ValueError):
        found: Any = dict(read_json(about)) if about.exists() else {}
        if found.get("format") == _FORMAT and all(found[name] == value for name, value in now.items()):
            return [_Cut(int(length), int(lines), str(pieces)) for length, lines, pieces in found["blocks"]]
    return None


def _still_are(opened: BufferedReader, cuts: list[_Cut], beat: Callable[[], object]) -> bool:
    """Whether drawn pieces of a file are what they were."""
    start, places = 0, []
    for length, _, pieces in cuts:
        for number, offset in enumerate(range(0, length, _PIECE)):
            name = pieces[2 * _NAME * number :][: 2 * _NAME]
            places.append((start + offset, min(_PIECE, length - offset), name))
        start += length
    drawn = random.SystemRandom().sample(places, min(_DRAWN, len(places)))
    for offset, length, name in sorted(drawn):
        beat()
        opened.seek(offset)
        if digest(opened.read(length)).hex() != name:
            return False
    return True


def _cut(opened: BufferedReader, is_lines: bool, beat: Callable[[], object]) -> Iterator[_Cut]:
    """The blocks of a file."""
    length, pieces = 0, []
    opened.seek(0)
    while data := opened.read(_BLOCK):
        beat()
        if is_lines:
            if len(data) == _BLOCK and not data.endswith(b"\n"):
                data += (rest := opened.readline(_MOST_LINE))
                if len(rest) == _MOST_LINE:
                    raise UncutFile(f"a line of more than {_MOST_LINE:,} bytes")
            lines = data.count(b"\n") + (not data.endswith(b"\n"))
            yield _Cut(len(data), lines, _pieces(data))
        else:
            length += len(data)
            pieces.append(_pieces(data))
    if not is_lines:
        yield _Cut(length, 0, "".join(pieces))


def _pieces(data: bytes) -> str:
    """The digests of the pieces of some bytes."""
    view = memoryview(data)
    return "".join(digest(view[start : start + _PIECE]).hex() for start in range(0, len(data), _PIECE))
