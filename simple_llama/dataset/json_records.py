"""Reads JSON objects from .json (one list) and .jsonl (one object a line) files, and counts what is left out."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simple_llama.common.errors import UserError
from simple_llama.common.files import open_file, shown

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_MOST_LIST_BYTES = 2 << 30  # of a .json file, which stands in memory whole; a .jsonl file may have any size
_MOST_LINE_BYTES = 64 << 20  # of a line of a .jsonl file: hundreds of times the longest chat a model can read
_MOST_EXPANSION = 100  # bytes of text from a byte of a .gz file; text becomes 3 to 10 times smaller
_BLOCK_BYTES = 1 << 20  # unpacked at a time
_FREE_BYTES = 4 << 20  # unpacked before the expansion is looked at: small files may be all repetitions


@dataclass(frozen=True)
class Record:
    """One object of a data file. `number` counts from 1: the place in a .json list, or the line of a .jsonl file."""

    file: str
    number: int
    fields: dict[str, Any]

    @property
    def origin(self) -> str:
        """`file:number`, for messages."""
        return f"{self.file}:{self.number}"


class _RepeatedKey(dict):
    """An object in which a key stands twice; JSON does not say which value counts, so the record is refused."""

    key: str


@dataclass
class Tally:
    """How often each thing was met, and where first."""

    times: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # origin

    def add(self, name: str, origin: str) -> None:
        """Counts `name` once more."""
        self.times[name] = self.times.get(name, 0) + 1
        self.first.setdefault(name, origin)


@dataclass
class KeptCount:
    """How many pairs were read, and how many were left out for which reason."""

    total: int = 0
    dropped: Tally = field(default_factory=Tally)

    @property
    def kept(self) -> int:
        """Pairs that were not left out."""
        return self.total - sum(self.dropped.times.values())

    def summary(self) -> str:
        """`kept 9,412 of 9,500 pairs (61 too long, 27 identical); first too long: a.json:4; first identical: ...`."""
        times = self.dropped.times
        reasons = sorted(times, key=lambda reason: -times[reason])
        counts = ", ".join(f"{times[reason]:,} {reason}" for reason in reasons)
        firsts = "".join(f"; first {reason}: {self.dropped.first[reason]}" for reason in reasons)
        return f"kept {self.kept:,} of {self.total:,} pairs" + (f" ({counts}){firsts}" if reasons else "")


def data_files(path: str | Path) -> list[Path]:
    """The file itself, or all data files of a folder (not of its subfolders) sorted by name; hidden files are skipped.

    Raises UserError when there is nothing to read.
    """
    place, kinds = Path(path), ", ".join(f"*{suffix}" for suffix in SUFFIXES)
    try:
        if not place.exists():
            raise UserError(f"{place}: expected a data file or a folder of them ({kinds}), found nothing there")
        if not place.is_dir():
            return [place]
        entries = list(place.iterdir())
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror or error}") from error
    names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir())
    files = [place / name for name in names if name.endswith(SUFFIXES)]
    if not files:
        found = ", ".join(names[:5]) or "no files"
        raise UserError(f"{place}: expected at least one file of {kinds}, found {found}")
    return files


def read_records(path: str | Path) -> Iterator[Record]:
    """Yields the records of one file in order. UTF-8, with or without a byte order mark; blank lines count as lines.

    Raises UserError with file, record and what was found for anything that is no list of JSON objects.
    """
    file = str(path)
    if not file.endswith(SUFFIXES):
        raise UserError(f"{file}: expected a file name that ends with {', '.join(SUFFIXES)}")
    values = _json_lines(file) if file.removesuffix(".gz").endswith(".jsonl") else _json_list(file)
    for number, value in values:
        if not isinstance(value, dict):
            raise UserError(f"{file}:{number}: expected a JSON object, found {json_type(value)}")
        if isinstance(value, _RepeatedKey):
            raise UserError(f"{file}:{number}: key {shown(value.key)} stands twice; keep one of them")
        yield Record(file, number, value)


def json_type(value: Any) -> str:
    """What stands there in JSON's words, with the value where it is short: `a list of 2`, `the number 5`, `true`."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, str):
        return "a string"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"the number {shown(value)}"


def _json_lines(file: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(file), 1):
        text = _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"{file}:{number}").strip()
        if text:
            yield number, _parsed(text, f"{file}:{number}", "one JSON object on a line")


def _json_list(file: str) -> Iterator[tuple[int, Any]]:
    data = b"".join(_blocks(file, _MOST_LIST_BYTES))
    text = _decoded(data.removeprefix(b"\xef\xbb\xbf"), file)
    del data  # the list alone stays in memory while its records are worked on
    value = _parsed(text, file, "one JSON list")
    del text
    if not isinstance(value, list):
        raise UserError(f"{file}: expected a JSON list of objects, found {json_type(value)}")
    yield from enumerate(value, 1)


def _lines(file: str) -> Iterator[bytes]:
    """Lines without their ends. Only a line feed ends a line: a string may hold other line breaks as they are."""
    rest, number = b"", 1
    for block in _blocks(file):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
        number += len(whole)
        if len(rest) > _MOST_LINE_BYTES:
            raise UserError(
                f"{file}:{number}: expected a line of at most {_MOST_LINE_BYTES:,} bytes, found a longer one"
            )
    yield rest


def _blocks(file: str, most: float = float("inf")) -> Iterator[bytes]:
    """The bytes of a file, unpacked, a block at a time. UserError for what unpacks to many times its size.

    `most` is how many bytes there may be, for those who keep them all.
    """
    too_long = f"{file}: expected a list of at most {most:,} bytes, found more; a .jsonl file may have any size"
    try:
        with open_file(file) as packed:
            if not file.endswith(".gz"):
                if os.fstat(packed.fileno()).st_size > most:
                    raise UserError(too_long)
                while block := packed.read(_BLOCK_BYTES):
                    yield block
                return
            length = 0
            with gzip.GzipFile(fileobj=packed) as stream:
                while block := stream.read(_BLOCK_BYTES):
                    length += len(block)
                    if length > _FREE_BYTES and length > _MOST_EXPANSION * packed.tell():
                        raise UserError(
                            f"{file}: expected text that unpacks to at most {_MOST_EXPANSION} times its size, found "
                            "more; if it is meant to, give the unpacked file"
                        )
                    if length > most:
                        raise UserError(too_long)
                    yield block
    except (OSError, EOFError, zlib.error) as error:  # also a damaged or cut .gz file
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decoded(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"in line {line}" if line > 1 else f"at offset {error.start}"
        found = f"byte 0x{data[error.start]:02x} {place}"
        raise UserError(f"{origin}: expected UTF-8 text, found {found}; save the file as UTF-8") from None


def _parsed(text: str, origin: str, expected: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise UserError(f"{origin}: expected {expected}, found values nested too deeply") from None
    except ValueError as error:  # no JSON, or a number with thousands of digits
        hint = "; a file of one object a line is named .jsonl" if str(error).startswith("Extra data") else ""
        raise UserError(f"{origin}: expected {expected}, found invalid JSON: {error}{hint}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    repeated, met = _RepeatedKey(fields), set()
    repeated.key = next(name for name, _ in pairs if name in met or met.add(name))
    return repeated
