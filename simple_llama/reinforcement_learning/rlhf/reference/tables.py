"""Look-ups in several tables of records at once: merged shards on the disk, and what is in memory. B keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY
from simple_llama.reinforcement_learning.rlhf.reference.shards import AS_BYTES, RECORD, merged, rows_of, sortable

_KEYS_AT_ONCE = 1 << 20  # looked up: some 150 MiB
_LEADS = 256  # values of a record's first byte, by which records are put in order


class Table(Protocol):
    """Records sorted by bytes, one per key."""

    @property
    def records(self) -> np.ndarray: ...

    def rows_of(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the keys, and whether they are there; (B,) each."""
        ...


class Loaded(NamedTuple):
    """A table in memory."""

    records: np.ndarray

    def rows_of(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Table`."""
        return rows_of(keys, self.records)


class Found(NamedTuple):
    """Where the records of some of the keys that were asked for are; all (B,)."""

    places: np.ndarray  # of these keys, among all that were asked for
    tables: np.ndarray  # numbers of tables; -1: in none
    rows: np.ndarray
    records: np.ndarray  # of RECORD


def find(tables: Sequence[Table], keys: np.ndarray) -> Iterator[Found]:
    """Where the records of the keys (B,) are, some of them at a time. Where several tables have one, the first by its
    bytes counts, as in `merged`: so it does not matter which table a record stands in."""
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        part = keys[start : start + _KEYS_AT_ONCE]
        order = np.argsort(sortable(part).view(">u8")[:: KEY.itemsize // 8].astype(np.uint64))
        asked = part[order]
        table_B, rows_B, records_B = (
            np.full(len(asked), -1),
            np.zeros(len(asked), np.int64),
            np.zeros(len(asked), RECORD),
        )
        for number, table in enumerate(tables):
            rows, found = table.rows_of(asked)
            hits = np.flatnonzero(found)
            records = table.records[rows[hits]]
            if (table_B[hits] >= 0).any():
                first = (table_B[hits] < 0) | (records.view(AS_BYTES) < records_B[hits].view(AS_BYTES))
                hits, records = hits[first], records[first]
            table_B[hits], rows_B[hits], records_B[hits] = number, rows[hits], records
        yield Found(start + order, table_B, rows_B, records_B)


def in_order(tables: Sequence[Table], asked: Sequence[np.ndarray]) -> Iterator[memoryview]:
    """The bytes of all records that are asked for, by a mask for each table, in their order; some at a time."""
    rows = [np.flatnonzero(mask).astype(np.int32) for mask in asked]
    # The first byte of each, as numbers of two bytes: 256 is one, too.
    leads = [
        table.records.view(np.uint8)[:: RECORD.itemsize][some].astype(np.int16)
        for table, some in zip(tables, rows, strict=True)
    ]
    for lead in range(_LEADS):
        parts = []
        for table, some, firsts in zip(tables, rows, leads, strict=True):
            start, stop = np.searchsorted(firsts, (lead, lead + 1))
            if stop > start:
                parts.append(table.records[some[start:stop]])
        if parts:
            yield (merged(parts) if len(parts) > 1 else parts[0]).view(np.uint8).data
