"""What lies in a cache of reference stores: what each is of, how large, whether it is sound; and its removal.

Nothing here needs torch, or writes without being told to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simple_llama.cluster.lock import FolderLock
from simple_llama.common.errors import UserError
from simple_llama.common.files import digest, listed, open_file, read_json
from simple_llama.reinforcement_learning.rlhf.reference.merged_shards import (
    MappedShard,
    NoIndexError,
    index_of,
    is_index,
)
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import (
    DESCRIPTION,
    MADE_WITH,
    belongs_to_a_store,
    files_of,
)
from simple_llama.reinforcement_learning.rlhf.reference.shards import (
    BadShardError,
    OtherKindError,
    is_leftover,
    is_shard,
    read_shard,
)

_STORE_NAME = re.compile(r"[0-9a-f]{32}")
_A_WEEK = 7 * 86400.0  # seconds
_JUST_WRITTEN_S = 300.0  # a pass flushes at least every minute
_FEWEST_LETTERS = 4  # of a digest that is given by its beginning


@dataclass(frozen=True)
class StoreFacts:
    """A store, from the names and sizes of its files and their headers."""

    folder: Path
    reference: dict[str, Any]  # empty where nothing can be read
    model: str  # path of the model that filled it last; empty where that was not noted
    entries: int  # of all shards; a pair that two passes computed stands twice
    merged: int  # shards
    others: int  # shards
    leftovers: tuple[Path, ...]  # temp files and shards set aside
    foreign: tuple[str, ...]  # files that no store has
    size: int  # bytes of all
    written: float  # when the newest shard was, in seconds since 1970; 0 without any
    used: float  # when a run or a pass opened it last


def store_folders(cache_dir: str | os.PathLike[str]) -> list[Path]:
    """The stores below `cache_dir`, by name. UserError where it cannot be read."""
    try:
        found = sorted(Path(cache_dir).iterdir())
    except OSError as error:
        raise UserError(
            f"ref_cache_dir: cannot read {cache_dir}: {error.strerror or error}; expected the folder of reference "
            "stores, as it was given to the pass"
        ) from error
    return [path for path in found if _STORE_NAME.fullmatch(path.name) and path.is_dir()]


def facts_of(folder: Path) -> StoreFacts:
    """What can be said of a store without reading it."""
    entries, size, written, merged, others, leftovers, foreign = 0, 0, 0.0, 0, 0, [], []
    paths = files_of(folder)
    names = {path.name for path in paths}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # of a pass, or a merge, that goes on
            about = path.lstat()
            size += about.st_size
            if is_shard(path.name):
                entries += _records_in(path)
                merged, others = (merged + 1, others) if index_of(path).name in names else (merged, others + 1)
                written = max(written, about.st_mtime)
            elif is_leftover(path.name):
                leftovers.append(path)
            elif not belongs_to_a_store(path.name):
                foreign.append(path.name)
    reference, made = (_object_in(folder / name) for name in (DESCRIPTION, MADE_WITH))
    described = folder / DESCRIPTION
    used = described.stat().st_mtime if described.exists() else written
    model = str(made.get("model_path", ""))
    counts = entries, merged, others
    return StoreFacts(folder, reference, model, *counts, tuple(leftovers), tuple(foreign), size, written, used)


def verify(folder: Path) -> list[str]:
    """Reads all of a store; what is wrong, each with its file and what to do. Nothing is renamed or mended."""
    found = []
    reference = _object_in(folder / DESCRIPTION)
    if digest(json.dumps(reference, sort_keys=True).encode()).hex() != folder.name:
        found.append(
            f"{folder / DESCRIPTION}: expected the reference that the folder is called by, found another or none; "
            "delete the store and run the pass again"
        )
    for path in files_of(folder):
        if is_shard(path.name):
            found += _faults_of(path, folder.name)
        elif is_index(path.name) and not path.with_suffix(".npy").exists():
            found.append(f"{path}: expected a shard beside it, found none; `merge` deletes it")
        elif path.name.endswith(".corrupt"):
            found.append(f"{path}: a shard that was set aside; its pairs are computed again; `prune --leftovers`")
    return found


def prune_stores(folders: Sequence[Path], dry: bool) -> Iterator[str]:
    """Removes stores whole; gives what was done, or with `dry` would be, a line each.

    UserError for one that a merge has locked, to which something was written in the last minutes, or in which files lie
    that no store has.
    """
    for folder in folders:
        facts = facts_of(folder)
        if facts.foreign:
            raise UserError(
                f"{folder}: expected the files of a store, found others beside them: {listed(facts.foreign)}; move "
                "them away, then prune again"
            )
        if (age := time.time() - facts.written) < _JUST_WRITTEN_S:
            raise UserError(
                f"{folder}: expected a store that nobody writes to, found a shard of {age:.0f} s ago; wait until the "
                "pass has ended"
            )
        if not dry:
            _remove(folder)
        yield f"{'would remove' if dry else 'removed'} {folder} ({facts.entries:,} entries, {facts.size:,} bytes)"


def prune_leftovers(cache_dir: str | os.PathLike[str], dry: bool) -> Iterator[str]:
    """Removes what killed passes, merges and prunes left, and shards set aside, a week after they were changed last:
    runs on other hosts that had replaced shards mapped have ended then."""
    halves = [path for path in sorted(Path(cache_dir).glob(".*.tmp")) if _STORE_NAME.fullmatch(path.name[1:33])]
    files = [path for folder in store_folders(cache_dir) for path in facts_of(folder).leftovers]
    for path in [*halves, *files]:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime < _A_WEEK:
                continue
            if not dry and path.is_dir():
                shutil.rmtree(path)
            elif not dry:
                path.unlink()
            yield f"{'would remove' if dry else 'removed'} {path}"


def named(folders: Sequence[Path], beginnings: Sequence[str]) -> list[Path]:
    """The stores whose digests begin so. UserError where one of these is too short, or is not of one store."""
    found = []
    for text in beginnings:
        fitting = [folder for folder in folders if folder.name.startswith(text)]
        if len(fitting) != 1 or len(text) < _FEWEST_LETTERS:
            raise UserError(
                f"digests: expected the first {_FEWEST_LETTERS} letters or more of one store's digest, found {text!r}, "
                f"with which {len(fitting)} begin; `list` names them"
            )
        found += fitting
    return found


def _remove(folder: Path) -> None:
    """A store, whole or not at all: it loses its name first."""
    lock = FolderLock.take(folder)
    gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise UserError(f"cannot remove {folder}: {error.strerror or error}") from error
    finally:
        lock.release()


def _records_in(path: Path) -> int:
    """How many records a shard's header tells of; 0 for one that has none."""
    try:
        with open_file(path) as file:
            np.lib.format.read_magic(file)
            return int(np.lib.format.read_array_header_1_0(file)[0][0])
    except (OSError, ValueError, IndexError):
        return 0


def _object_in(path: Path) -> dict[str, Any]:
    """A small JSON object; empty where there is none that can be read."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _faults_of(path: Path, reference: str) -> list[str]:
    """What is wrong with a shard, and with its index if it has one."""
    try:
        records = read_shard(path, reference)
        if impossible := _records_in(path) - len(records):
            return [
                f"{path}: expected log-probs that a model can give, found {impossible} others; they are passed over"
            ]
        if index_of(path).exists():
            MappedShard(path, reference)
    except FileNotFoundError:
        return []  # of a merge that goes on
    except OtherKindError:
        return []
    except BadShardError as reason:
        return [f"{path}: expected the bytes that its name tells of, found: {reason}; the next pass mends it"]
    except NoIndexError as reason:
        return [f"{index_of(path)}: expected the index of the shard beside it, found: {reason}; `merge` writes it anew"]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror or error}"]
    return []
