"""Reads objects from .json (one list), .jsonl or .ndjson (one object a line), .parquet and .arrow files (a row each),
counts what is left out, and gathers what is faulty."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.packed_files import UNPACKED, text_blocks
from simple_llama.dataset.parquet_records import TABLE_SUFFIXES, table_rows

LINE_SUFFIXES = (".jsonl", ".ndjson")
_TEXT_SUFFIXES = (".json", *LINE_SUFFIXES)
_PACKED_SUFFIXES = tuple(f"{suffix}{packed}" for suffix in _TEXT_SUFFIXES for packed in UNPACKED)
_SUFFIXES = (*_TEXT_SUFFIXES, *_PACKED_SUFFIXES, *TABLE_SUFFIXES)  # in any case
_DOCUMENTS = ("readme", "readme.txt", "license", "license.txt")  # and *.md: may stand beside the data, in any case
_ABOUT = ("dataset_info.json", "dataset_dict.json", "state.json")  # what `datasets` puts beside its .arrow files
_UNPACKERS = {".zip": "unzip", ".tar": "tar -x", ".tgz": "tar -x", ".7z": "7z x"}
_LINE, _LIST = "one JSON object on a line", "one JSON list"  # what is expected
_MOST_LIST_BYTES = 2 << 30  # of a .json file, which stands in memory whole; a .jsonl file may have any size
_MOST_LINE_BYTES = 64 << 20  # of a line of a .jsonl file: hundreds of times the longest chat a model can read
_MOST_FAULTS = 1000  # nobody mends a file that has more one by one
_FAULT_CHARACTERS = 250  # of one fault among several


@dataclass(frozen=True)
class Record:
    """One object of a data file. `number` counts from 1: the place in a .json list, the line of a .jsonl file, the row
    of a table."""

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
        self.add_all(name, origin, 1)

    def add_all(self, name: str, origin: str, times: int) -> None:
        """Counts `name` so many times more; no time is none."""
        if times:
            self.times[name] = self.times.get(name, 0) + times
            self.first.setdefault(name, origin)


@dataclass
class KeptCount:
    """How many pairs were read, how many were left out for which reason, and what is odd about some that were kept."""

    total: int = 0
    dropped: Tally = field(default_factory=Tally)
    noticed: Tally = field(default_factory=Tally)
    faulty: str = ""  # of those left out the first ones that are no sound records, a line each

    @property
    def kept(self) -> int:
        """Pairs that were not left out."""
        return self.total - sum(self.dropped.times.values())

    def summary(self) -> str:
        """`kept 9,412 of 9,500 pairs (61 too long, 27 identical); first too long: a.json:4; first identical: ...`."""
        times = self.dropped.times
        reasons = sorted(times, key=lambda reason: (-times[reason], reason))
        counts = ", ".join(f"{times[reason]:,} {reason}" for reason in reasons)
        firsts = "".join(f"; first {reason}: {self.dropped.first[reason]}" for reason in reasons)
        return f"kept {self.kept:,} of {self.total:,} pairs" + (f" ({counts}){firsts}" if reasons else "")


@dataclass
class Faults:
    """What is wrong with records, gathered so that one start names more of them than the first."""

    most_shown: ClassVar[int] = 10

    are_dropped: bool = False  # they are left out, and reading goes on whatever their number
    number: int = 0
    shown: list[str] = field(default_factory=list)
    first: str = ""  # origin

    def add(self, fault: UserError, origin: str = "") -> None:
        """Counts one more; the first ones are kept in words."""
        self.number += 1
        self.first = self.first or origin
        if len(self.shown) < self.most_shown:
            self.shown.append(str(fault))

    @property
    def end_the_start(self) -> bool:
        """Whether there are some, and they are not dropped."""
        return bool(self.number) and not self.are_dropped

    @property
    def are_enough(self) -> bool:
        """Whether reading on would help nobody."""
        return self.number >= _MOST_FAULTS and not self.are_dropped

    def end(self) -> None:
        """Raises one UserError for all, or nothing where there are none, or they are dropped."""
        if self.end_the_start:
            raise UserError(self.shown[0] if self.number == 1 else self._words())

    def count_in(self, count: KeptCount) -> None:
        """Counts them among what was left out."""
        if self.number:
            count.total += self.number
            count.dropped.times["faulty"], count.dropped.first["faulty"] = self.number, self.first
            count.faulty = self._words()

    def _words(self) -> str:
        """Their number, and the first ones a line each."""
        records = "records" if self.number > 1 else "record"
        count = f"{'at least ' if self.are_enough else ''}{self.number:,} faulty {records}"
        first = f", the first {len(self.shown)}" if self.number > len(self.shown) else ""
        lines = (f"  {fault[:_FAULT_CHARACTERS]}{'...' * (len(fault) > _FAULT_CHARACTERS)}" for fault in self.shown)
        return "\n".join([f"{count}{first}:", *lines])


def can_read(path: str | Path) -> bool:
    """Whether a name is that of a file which `read_records` takes."""
    return str(path).lower().endswith(_SUFFIXES)


def data_files(path: str | Path) -> list[Path]:
    """The file itself, or all data files of a folder (not of its subfolders) sorted by name.

    Hidden files, README, LICENSE, *.md and what `datasets` writes beside .arrow files are passed over. Raises UserError
    for any other file that cannot be read, so that no pairs are missing in silence, and when there is nothing to read.
    """
    place, kinds = Path(path), _kinds("*")
    try:
        if not place.exists():
            raise UserError(f"{place}: expected a data file or a folder of them ({kinds}), found nothing there")
        if not place.is_dir():
            return [place]
        entries = list(place.iterdir())
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror or error}") from error
    names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir())
    if any(name.lower().endswith(".arrow") for name in names):
        names = [name for name in names if name not in _ABOUT]
    files = [place / name for name in names if can_read(name)]
    others = [name for name in names if not can_read(name) and not _is_document(name)]
    if others:
        named = ", ".join(f"{name} ({_how_to_read(name)})" for name in others[:5]) + ", ..." * (len(others) > 5)
        raise UserError(
            f"{place}: expected files of {kinds} (README, LICENSE, *.md and hidden files are passed over), found "
            f"{len(others)} of another kind: {named}; do so, or move them out of the folder"
        )
    if not files:
        found = ", ".join(names[:5]) or "no files"
        raise UserError(f"{place}: expected at least one file of {kinds}, found {found}")
    return files


def read_records(
    path: str | Path, faults: Faults | None = None, only: Container[int] | None = None
) -> Iterator[Record]:
    """Yields the records of one file in order. UTF-8, with or without a byte order mark; blank lines count as lines.

    Args:
        faults: where faults of single records go; reading goes on while they are not enough.
        only: numbers of the records that are wanted: no other is looked at, and no other line parsed.

    Raises UserError with file, record and what was found for anything that is no list of objects.
    """
    file = str(path)
    if not can_read(file):
        raise UserError(f"{file}: expected a file name that ends with {_kinds()}, found another; {_how_to_read(file)}")
    return _records(file, _values(file, only), faults)


def first_records(path: str | Path) -> Iterator[Record]:
    """As `read_records`, without what is faulty; of one JSON list, which would be parsed whole, none. UserError for a
    file that cannot be read."""
    if _is_list(str(path)):
        next(text_blocks(str(path), _MOST_LIST_BYTES), b"")
        return iter(())
    return read_records(path, Faults(are_dropped=True))


def read_lines(file: str, data: bytes, first: int, faults: Faults | None = None) -> Iterator[Record]:
    """Yields the records of some whole lines of a file, of which the first has this number; as `read_records`."""
    return _records(file, _numbered_lines(file, data.removesuffix(b"\n").split(b"\n"), first), faults)


def _records(file: str, values: Iterable[tuple[int, Any]], faults: Faults | None) -> Iterator[Record]:
    """Values as records, or as faults."""
    for number, value in values:
        fault = _fault(value, f"{file}:{number}")
        if fault is None:
            yield Record(file, number, value)
        elif faults is None:
            raise fault
        else:
            faults.add(fault, f"{file}:{number}")
        if faults is not None and faults.are_enough:
            return


def _values(file: str, only: Container[int] | None) -> Iterator[tuple[int, Any]]:
    """Number and value of each record that is wanted, by the kind of file that its name says."""
    name = file.lower()
    is_table = name.endswith(TABLE_SUFFIXES)
    if not (is_table or _is_list(name)):
        return _numbered_lines(file, _lines(file), 1, only)
    values = table_rows(file) if is_table else _json_list(file)
    return values if only is None else (one for one in values if one[0] in only)


def _is_list(file: str) -> bool:
    """Whether a file is one JSON list, plain or packed."""
    name = file.lower()
    text = Path(name).stem if name.endswith(_PACKED_SUFFIXES) else name
    return text.endswith(".json")


def _kinds(before: str = "") -> str:
    """The ends of names that can be read, with something before each."""
    texts, tables = (", ".join(f"{before}{suffix}" for suffix in some) for some in (_TEXT_SUFFIXES, TABLE_SUFFIXES))
    return f"{texts} (each also {', '.join(UNPACKED)}), {tables}"


def _fault(value: Any, origin: str) -> UserError | None:
    """What is wrong with a record as JSON; its line may be in error already."""
    if isinstance(value, _RepeatedKey):
        return UserError(f"{origin}: key {shown(value.key)} stands twice; keep one of them")
    if isinstance(value, dict):
        return None
    if isinstance(value, UserError):
        return value
    return UserError(f"{origin}: expected a JSON object, found {json_type(value)}")


def json_type(value: Any) -> str:
    """What stands there in JSON's words, with the value where it is short: `a list of 2`, `the number 5`, `true`."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, str):
        return "a string"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"the number {shown(value)}"


def _is_document(name: str) -> bool:
    """Whether a file is made for people, beside the data."""
    return name.lower() in _DOCUMENTS or name.lower().endswith(".md")


def _how_to_read(name: str) -> str:
    """What a person can do with a file that cannot be read."""
    unpacker = _UNPACKERS.get(Path(name).suffix.lower())
    return f"unpack it with {unpacker}" if unpacker else "write it as .jsonl, one JSON object a line"


def _numbered_lines(
    file: str, lines: Iterable[bytes], first: int, only: Container[int] | None = None
) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank; the UserError in its place where it has none."""
    for number, line in enumerate(lines, first):
        if only is not None and number not in only:
            continue
        origin = f"{file}:{number}"
        try:
            text = _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, origin).strip()
            value = _parsed(text, origin, _LINE) if text else None
        except UserError as fault:
            text, value = "faulty", fault
        if text:
            yield number, value


def _json_list(file: str) -> Iterator[tuple[int, Any]]:
    data = b"".join(text_blocks(file, _MOST_LIST_BYTES))
    text = _decoded(data.removeprefix(b"\xef\xbb\xbf"), file)
    del data  # the list alone stays in memory while its records are worked on
    value = _parsed(text, file, _LIST)
    del text
    if not isinstance(value, list):
        raise UserError(f"{file}: expected a JSON list of objects, found {json_type(value)}")
    yield from enumerate(value, 1)


def _lines(file: str) -> Iterator[bytes]:
    """Lines without their ends. Only a line feed ends a line: a string may hold other line breaks as they are."""
    rest, number = b"", 1
    for block in text_blocks(file):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
        number += len(whole)
        if len(rest) > _MOST_LINE_BYTES:
            raise UserError(
                f"{file}:{number}: expected a line of at most {_MOST_LINE_BYTES:,} bytes, found a longer one"
            )
    yield rest


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
        return _DECODER.decode(text)
    except RecursionError:
        raise UserError(f"{origin}: expected {expected}, found values nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{origin}: expected {expected}, found {_no_json(error, expected)}") from None
    except ValueError as error:  # a number with thousands of digits
        raise UserError(f"{origin}: expected {expected}, found invalid JSON: {error}") from None


def _no_json(error: json.JSONDecodeError, expected: str) -> str:
    """What stands where the text goes wrong, in words where the words of the parser would mislead."""
    found = error.doc[error.pos : error.pos + 1]
    if found == "\ufeff":
        place = f"line {error.lineno}, column {error.colno}" if expected == _LIST else f"column {error.colno}"
        return f"a byte order mark inside the file ({place}): files were joined; remove the mark"
    hint = ""
    if error.msg == "Extra data" and expected == _LINE and found in ("{", "["):
        return f"two: a line break is missing before column {error.colno}"
    if error.msg == "Extra data" and expected == _LIST and found == "{":
        hint = "; a file of one object a line is named .jsonl"
    return f"invalid JSON: {error}{hint}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    repeated, met = _RepeatedKey(fields), set()
    repeated.key = next(name for name, _ in pairs if name in met or met.add(name))
    return repeated


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
