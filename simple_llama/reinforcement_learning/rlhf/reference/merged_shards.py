"""Merged shards: large ones that are mapped, not loaded, so that a look-up reads only the records that it asks for.

    shard-<digest>.npy      a bound shard as any other (see `shards`), which earlier versions read whole
    shard-<digest>.index    an .npy array of BLOCK: the first key and the digest of each 1,024 of its records; behind it
                            16 bytes that bind the array to the reference and to the shard's name

A block is compared with its digest when the first of its records is asked for; one that is damaged counts as missing,
and the others serve. A shard whose index is gone or damaged is read whole. The index is written first, so whoever sees
the shard sees both. B keys, R records.
"""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path

import numpy as np

from simple_llama.common.files import atomic_write, digest, open_file, read_bytes
from simple_llama.common.logging import LOGGER
from simple_llama.reinforcement_learning.rlhf.reference.shards import (
    AS_BYTES,
    AS_KEY,
    RECORD,
    are_sound,
    as_records,
    is_shard,
    sortable,
    to_shard,
)

MOST_RECORDS = 1 << 22  # of a merged shard: 128 MiB
_PER_BLOCK = 1 << 10  # records: 32 KiB
_BLOCK = np.dtype([("first", "V24"), ("digest", "V16")])
_MOST_INDEX_BYTES = 64 << 20
_SEAL = 16  # bytes
_UNREAD, _SOUND, _DAMAGED = 0, 1, 2


class NoIndexError(Exception):
    """A shard that cannot be mapped; the message says why. It may be sound all the same."""


class MappedShard:
    """The records of a merged shard where they lie on the disk."""

    def __init__(self, path: Path, reference: str):
        """Maps it, and reads its index alone.

        Args:
            reference: the digest that the store's folder is called by.

        Raises:
            NoIndexError: the index is damaged, or not of this shard; OSError as usual.
        """
        self.path = path
        blocks = _read_index(path, reference)
        self.records = _mapped(path)
        if len(blocks) != -(-len(self.records) // _PER_BLOCK):
            raise NoIndexError(f"its index has {len(blocks)} blocks, but it has {len(self.records)} records")
        self._first = blocks["first"].copy().view(AS_KEY)
        self._digests = [one.tobytes() for one in blocks["digest"]]
        self._states = bytearray(len(blocks))

    def __len__(self) -> int:
        return len(self.records)

    def rows_of(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `shards.rows_of` of its records, which stay where they are; fast where the keys come in order."""
        wanted = as_records(keys, np.zeros((len(keys), 2), np.float32)).view(AS_BYTES)
        table, rows = self.records.view(AS_BYTES), np.full(len(keys), -1, np.int64)
        blocks = np.searchsorted(self._first, sortable(keys), side="right") - 1
        ends = [*(np.flatnonzero(blocks[1:] != blocks[:-1]) + 1).tolist(), len(keys)]
        for start, stop in pairwise([0, *ends]) if len(keys) else ():
            block = int(blocks[start])
            if block >= 0 and self._is_sound(block):
                first = block * _PER_BLOCK
                part = table[first : first + _PER_BLOCK]
                within = np.searchsorted(part, wanted[start:stop])
                rows[start:stop] = np.where(within < len(part), first + within, -1)
        found = rows >= 0
        found[found] = table[rows[found]].astype(AS_KEY) == wanted[found].astype(AS_KEY)
        return rows, found

    def sound_records(self, low: bytes = b"", high: bytes | None = None) -> np.ndarray:
        """A copy of its records (R,) whose keys are from `low` to below `high`, those of damaged blocks left out."""
        first = max(0, int(np.searchsorted(self._first, low, side="right")) - 1)
        last = len(self._states) if high is None else int(np.searchsorted(self._first, high, side="left"))
        parts = [np.empty(0, RECORD), *(self._block(k) for k in range(first, last) if self._is_sound(k))]
        records = np.concatenate(parts)
        keys = records.view(AS_BYTES).astype(AS_KEY)
        return records[(keys >= low) & (True if high is None else keys < high)]

    def damaged(self) -> int:
        """Reads all that was not read yet; gives how many records stand in damaged blocks."""
        bad = [block for block in range(len(self._states)) if not self._is_sound(block)]
        return sum(len(self._block(block)) for block in bad)

    def _block(self, block: int) -> np.ndarray:
        """The records of a block."""
        return self.records[block * _PER_BLOCK : (block + 1) * _PER_BLOCK]

    def _is_sound(self, block: int) -> bool:
        """Whether a block has its digest, and records that a model can have given; looked at once."""
        if self._states[block] == _UNREAD:
            records = self._block(block)
            sound = digest(records.view(np.uint8).data) == self._digests[block] and bool(are_sound(records).all())
            if not sound and _DAMAGED not in self._states:
                LOGGER.warning(
                    "shard %s is damaged at record %d: %d pairs count as missing there, and so do those of any other "
                    "damaged block of it; `launch/store.py verify` reads all, the next pass computes them again",
                    *(self.path, block * _PER_BLOCK, len(records)),
                )
            self._states[block] = _SOUND if sound else _DAMAGED
        return self._states[block] == _SOUND


def index_of(shard: Path) -> Path:
    """Where the index of a shard is."""
    return shard.with_suffix(".index")


def is_index(name: str) -> bool:
    """Whether a file is called as the index of a shard."""
    return name.endswith(".index") and is_shard(f"{name.removesuffix('.index')}.npy")


def write_merged(folder: Path, records: np.ndarray, reference: str) -> Path:
    """Writes `merged` records as a shard that can be mapped, whole or not at all. UserError when it cannot be written.

    The same records get the same name, so that two that merge at once write the same files.
    """
    name, data = to_shard(records, reference)
    path = folder / name
    blocks = np.empty(-(-len(records) // _PER_BLOCK), _BLOCK)
    for number in range(len(blocks)):
        part = records[number * _PER_BLOCK : (number + 1) * _PER_BLOCK]
        first = part[:1].view(AS_BYTES).astype(AS_KEY)
        blocks[number] = (first.tobytes(), digest(part.view(np.uint8).data))
    index = io.BytesIO()
    np.save(index, blocks, allow_pickle=False)
    atomic_write(index_of(path), index.getvalue() + _seal(index.getvalue(), path, reference))
    if not os.path.exists(path):
        atomic_write(path, data)
    return path


def _read_index(path: Path, reference: str) -> np.ndarray:
    """The blocks of a shard."""
    data = read_bytes(index_of(path), _MOST_INDEX_BYTES)
    array, seal = data[:-_SEAL], data[-_SEAL:]
    if seal != _seal(array, path, reference):
        raise NoIndexError("its index is damaged, or that of another shard")
    try:
        blocks = np.load(io.BytesIO(array), allow_pickle=False)
    except Exception as error:  # numpy's reader raises half a dozen kinds
        raise NoIndexError(f"its index holds no array ({error})") from error
    if blocks.dtype != _BLOCK or blocks.ndim != 1:
        raise NoIndexError("its index holds no blocks")
    return blocks


def _seal(array: bytes, path: Path, reference: str) -> bytes:
    """What binds an index to a reference and a shard, whose names have a fixed length."""
    return digest(reference.encode(), path.stem.encode(), array)


def _mapped(path: Path) -> np.ndarray:
    """The records of a shard's file, mapped; its header and its size fit."""
    with open_file(path) as file:
        try:
            assert np.lib.format.read_magic(file) == (1, 0)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:
            raise NoIndexError(f"its header is damaged ({error})") from error
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
        if dtype != RECORD or len(shape) != 1 or size != offset + shape[0] * RECORD.itemsize or not shape[0]:
            raise NoIndexError("its header does not fit its size")
        return np.asarray(np.memmap(file, RECORD, "r", offset, shape))
