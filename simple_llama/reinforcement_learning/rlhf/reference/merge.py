"""Merges the shards of a store into few large ones that starts map instead of reading (see `merged_shards`).

What is merged has the values that look-ups gave before. First the merged shards are written and read back, then those
that they were made of go: killed anywhere, what lies there gives the same sums, and the next merge ends the work. A
pass or a run may read and write meanwhile: what it adds stays beside the merged shards. A mapped shard that is replaced
is renamed to a temp file, not deleted, since a run on another host may have it mapped: `prune` deletes it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from simple_llama.cluster.lock import FolderLock
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.reference.merged_shards import (
    MOST_RECORDS,
    MappedShard,
    is_index,
    write_merged,
)
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from simple_llama.reinforcement_learning.rlhf.reference.shards import AS_BYTES, AS_KEY, merged, set_aside

_ROOM = 1.01  # of the ranges of keys: digests fall into them with equal chances, not in equal numbers


def merge(folder: Path) -> str:
    """Merges the bound shards of the store in `folder`, one merge at a time. Gives what was done, in words.

    Raises UserError where another merge is at it, or the store cannot be read or written; nothing is lost then.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a reference store, found no folder; `list` names those that are there")
    lock = FolderLock.take(folder)
    try:
        return _merge(RefStore(folder))
    finally:
        lock.release()


def _merge(store: RefStore) -> str:
    """The work, under the lock."""
    store.load()
    damaged = [shard for shard in store.mapped if shard.damaged()]
    before = len(store.loaded) + len(store.mapped)
    if not store.loaded and not damaged and _are_apart(store.mapped):
        _drop_lonely_indexes(store.folder)
        return f"{store.folder}: nothing to merge: {before} merged shards, no others"
    outputs = list[Path]()
    for records in _ranges(store):
        outputs.append(write_merged(store.folder, records, store.reference_digest))
    count = sum(_read_back(path, store.reference_digest) for path in outputs)
    names = {path.name for path in outputs}
    for name in store.loaded:
        if name not in names:
            (store.folder / name).unlink(missing_ok=True)
    for shard in store.mapped:
        if shard in damaged:
            set_aside(shard.path, "blocks of it do not match their digests")
        elif shard.path.name not in names:
            _retire(shard.path)
    _drop_lonely_indexes(store.folder)
    lost = sum(shard.damaged() for shard in damaged)
    words = f"; {lost} records stood in damaged blocks: the next pass computes them again" if lost else ""
    return f"{store.folder}: {before} shards are {len(outputs)} now, of {count:,} records{words}"


def _are_apart(shards: Sequence[MappedShard]) -> bool:
    """Whether no two of them have keys of one range; a merge that was killed leaves such."""
    keys = [shard.records[[0, -1]].view(AS_BYTES).astype(AS_KEY).tolist() for shard in shards]
    return all(one[1] < other[0] for one, other in pairwise(sorted(keys)))


def _ranges(store: RefStore) -> Iterator[np.ndarray]:
    """The `merged` records of all bound shards by ranges of keys, as many at a time as a merged shard has at most."""
    loaded = store.loaded_records()
    total = len(loaded) + sum(map(len, store.mapped))
    count = max(1, -(-int(total * _ROOM) // MOST_RECORDS))
    bounds = [b"", *((2**64 * number // count).to_bytes(8, "big") for number in range(1, count)), None]
    for low, high in pairwise(bounds):
        start, stop = (int(np.searchsorted(loaded.view(AS_BYTES), end)) if end else None for end in (low, high))
        records = merged([loaded[start:stop], *(shard.sound_records(low or b"", high) for shard in store.mapped)])
        for first in range(0, len(records), MOST_RECORDS):
            yield records[first : first + MOST_RECORDS]


def _read_back(path: Path, reference: str) -> int:
    """The records of a merged shard that was written. UserError where the disk gives others."""
    shard = MappedShard(path, reference)
    if bad := shard.damaged():
        raise UserError(
            f"{path}: expected the {len(shard)} records that were written, found {bad} changed; no shard was deleted: "
            "look at the disk, then merge again"
        )
    return len(shard)


def _retire(path: Path) -> None:
    """Takes a mapped shard out of the store; whoever has it mapped goes on."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
        path.rename(path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"))


def _drop_lonely_indexes(folder: Path) -> None:
    """Deletes indexes whose shards are gone."""
    for path in folder.iterdir():
        if is_index(path.name) and not path.with_suffix(".npy").exists():
            path.unlink(missing_ok=True)
