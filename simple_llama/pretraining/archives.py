"""Files of torch.save, in both of torch's formats: read through one open file and mapped into memory."""

from __future__ import annotations

import mmap
import os
import struct
import sys
import zipfile
import zlib
from io import BufferedReader
from typing import Any, NamedTuple

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.pretraining.pickles import MOST_BYTES, unpickle

_ZIP = b"PK\x03\x04"  # how a zip file begins, and each entry of it
_HEADER = struct.Struct("<26xHH")  # of an entry: lengths of its name and of what follows the name
_ENCRYPTED = 1  # a flag of an entry
_NO_CHECKSUM = 0  # what torch writes where it is told not to compute them
_PIECE = 1 << 20  # bytes that are read at a time
_MAGIC = 0x1950A86A20F9469CFC6C  # first of the pickles of torch's format before zip files
_PROTOCOL = 1001  # the second
_COUNT = struct.Struct("<q")  # elements of a storage in that format
_ALIGNED = 16  # bytes of the largest number


class Place(NamedTuple):
    """Where a storage's bytes lie in a file."""

    start: int
    size: int  # bytes
    swapped: torch.dtype | None  # of its elements, where their bytes are in the other order than this machine's


def read_archive(file: BufferedReader, places: dict[int, Place] | None = None) -> Any:
    """The object in a file of torch.save; its tensors are mapped: the ranks of a machine share one copy in the page
    cache, and the file may be closed or lose its name. One that somebody cuts ends the process where a tensor is looked
    into (SIGBUS).

    Can run no code, and allocates little before a file is refused (`pickles`). Raises UserError for a file that holds
    what no checkpoint needs, any other error for one that is damaged.

    Args:
        places: is given the place of each storage, by the address of its memory.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise UserError("it is empty")
    # a private copy: nothing writes to it, but torch warns of memory that cannot be written
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    places = {} if places is None else places
    return _Zip(file, data).read(places) if data[: len(_ZIP)] == _ZIP else _read_old(data, places)


def archive_facts(file: BufferedReader) -> tuple[str, list[str]]:
    """(format and folder of a file of torch.save, the entries whose bytes do not have their checksum).

    Reads the whole file. UserError and others as in `read_archive`.
    """
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if data[: len(_ZIP)] != _ZIP:
        return "torch's format before zip files, without checksums", []
    archive, wrong, checked = _Zip(file, data), [], 0
    for name, entry in archive.entries.items():
        start, size = archive.place(name.removeprefix(archive.folder))
        checksum = 0
        for at in range(start, start + size, _PIECE):
            checksum = zlib.crc32(data[at : min(at + _PIECE, start + size)], checksum)
        checked += entry.CRC != _NO_CHECKSUM
        wrong += [name] if entry.CRC not in (_NO_CHECKSUM, checksum) else []
    said = f"zip, {len(archive.entries)} entries in {shown(archive.folder)}, {checked} with a checksum"
    return said, wrong


class _Zip:
    """A zip file of `data.pkl` and an entry for each storage."""

    def __init__(self, file: BufferedReader, data: mmap.mmap):
        """UserError for a zip that would expand or be read in two ways: torch's own are not compressed, and no two
        entries share their name or their bytes."""
        self.data = data
        self.storages: dict[str, torch.Tensor] = {}
        self.swapped: dict[str, torch.dtype] = {}  # those in the other order of bytes
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        self.entries = {entry.filename: entry for entry in entries}
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED for entry in entries):
            raise UserError("its entries are compressed or encrypted")
        if sum(entry.file_size for entry in entries) > len(data):
            raise UserError(f"its entries claim more than the file's {len(data):,} bytes")
        tables = [name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(self.entries) < len(entries) or len(tables) != 1:
            raise UserError("expected one data.pkl and no name twice in its zip archive, found others")
        self.folder = tables[0].removesuffix("data.pkl")

    def read(self, places: dict[int, Place]) -> Any:
        """The object, with tensors on the mapped file; `places` as of `read_archive`."""
        entry = self.entries[f"{self.folder}data.pkl"]
        if entry.file_size > MOST_BYTES:
            raise UserError(f"its data.pkl has {entry.file_size:,} bytes, expected at most {MOST_BYTES:,}")
        table = self.bytes_of("data.pkl")
        if entry.CRC not in (_NO_CHECKSUM, zlib.crc32(table)):
            raise UserError("its data.pkl does not have the checksum that it should have")
        found = unpickle(table, 0, self.storage_of)[0]
        for key, raw in self.storages.items():
            _note(places, raw, Place(*self.place(f"data/{key}"), self.swapped.get(key)))
        return found

    def storage_of(self, dtype: torch.dtype, key: str, size: int) -> torch.Tensor:
        """Bytes of a storage."""
        if key not in self.storages:
            self.storages[key] = raw = _mapped(self.data, *self.place(f"data/{key}"))
            if f"{self.folder}byteorder" in self.entries and self.bytes_of("byteorder") != sys.byteorder.encode():
                raw.untyped_storage().byteswap(dtype)
                self.swapped[key] = dtype
        return _first(self.storages[key], size)

    def bytes_of(self, name: str) -> bytes:
        """A small entry."""
        start, size = self.place(name)
        return self.data[start : start + size]

    def place(self, name: str) -> tuple[int, int]:
        """Where an entry's bytes begin in the file, and how many there are."""
        entry = self.entries[f"{self.folder}{name}"]
        at = entry.header_offset
        name_length, more_length = _HEADER.unpack_from(self.data, at)
        start = at + _HEADER.size + name_length + more_length
        if self.data[at : at + len(_ZIP)] != _ZIP or start + entry.file_size > len(self.data):
            raise UserError("an entry in it is not where its table says")
        return start, entry.file_size


def _read_old(data: mmap.mmap, places: dict[int, Place]) -> Any:
    """The object in a file of torch's format before zip files: five pickles, then each storage with its length."""
    sizes: dict[str, int] = {}  # bytes of an element
    storages: dict[str, torch.Tensor] = {}

    def measured(dtype: torch.dtype, key: str, size: int) -> torch.Tensor:
        sizes.setdefault(key, dtype.itemsize)
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def stored(dtype: torch.dtype, key: str, size: int) -> torch.Tensor:
        return _first(storages[key], size)

    found, ends = [], [0]
    for _ in range(5):
        value, length = unpickle(data[ends[-1] : ends[-1] + MOST_BYTES], 0, measured)
        found.append(value)
        ends.append(ends[-1] + length)
        if found[:2] != [_MAGIC, _PROTOCOL][: len(found)]:
            raise UserError("it does not begin as torch.save's files do")
    at = ends[-1]
    for key in found[-1]:
        if key in storages:
            raise UserError("it holds a storage twice")
        [count] = _COUNT.unpack_from(data, at)
        start, size = at + _COUNT.size, count * sizes[key]
        if not 0 <= size <= len(data) - start:
            raise UserError("a storage in it is longer than the file")
        storages[key], at = _mapped(data, start, size), start + size
        _note(places, storages[key], Place(start, size, None))
    return unpickle(data[ends[3] : ends[4]], 0, stored)[0]


def _mapped(data: mmap.mmap, start: int, size: int) -> torch.Tensor:
    """Bytes of the file as a tensor; copied where numbers of two, four or eight bytes would lie across words."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    raw = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=start)
    return raw if start % _ALIGNED == 0 else raw.clone()


def _note(places: dict[int, Place], raw: torch.Tensor, place: Place) -> None:
    """Notes where a storage lies; of two that begin at one place the longer has both."""
    address = raw.untyped_storage().data_ptr()
    places[address] = max(place, places.get(address, place), key=lambda one: one.size)


def _first(raw: torch.Tensor, size: int) -> torch.Tensor:
    """The first `size` bytes of a storage. UserError where it has fewer."""
    if size > raw.numel():
        raise UserError("a storage in it is shorter than its table says")
    return raw[:size]
