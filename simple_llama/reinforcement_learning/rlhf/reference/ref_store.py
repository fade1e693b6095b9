"""The reference model's log-probs on disk, keyed by content, so that no run computes them twice or trusts wrong ones.

    <cache_dir>/<digest of the reference>/reference.json      what was digested: weights, tokenizer, numerics
                                          made_with.json      for people: the path of the model that filled it last
                                          shard-<digest>.npy  records of some pairs, written whole (see `shards`); a
                                                              large one with an index is mapped (see `merged_shards`)

A record is found by what was computed: the digest of a pair's tokens and scored spans, and its scored counts. Row
numbers, paths, seeds, ranks and settings of the run do not enter. A shard is bound to the reference by its name; one
that was written before names did that serves where no bound one has the record, until it is bound. B pairs, 2 sides
(chosen, rejected).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write, atomic_write_json, digest, read_json, shown
from simple_llama.common.logging import LOGGER
from simple_llama.common.paths import root_path
from simple_llama.common.settings import PathText, Settings
from simple_llama.reinforcement_learning.rlhf.reference.merged_shards import (
    MappedShard,
    NoIndexError,
    index_of,
    is_index,
)
from simple_llama.reinforcement_learning.rlhf.reference.shards import (
    RECORD,
    BadShardError,
    OtherKindError,
    checked_records,
    is_leftover,
    is_shard,
    is_unbound,
    keys_of,
    merged,
    read_shard,
    rows_of,
    set_aside,
    sortable,
    to_shard,
    without,
)
from simple_llama.reinforcement_learning.rlhf.reference.tables import Found, Loaded, Table, find, in_order

_FILL_COMMAND = "deepspeed launch/precompute_ref.py"
_BIND_AT_ONCE = 1 << 20  # records of a shard that is made of unbound ones: 32 MiB
_MOST_LISTINGS = 5  # of a folder in which shards come and go
_MANY_SHARDS = 1024  # that are read whole at each start, above which a word is said
DESCRIPTION, MADE_WITH = "reference.json", "made_with.json"
_OTHER_FILES = {DESCRIPTION, MADE_WITH, "lock"}  # of a store


@dataclass(frozen=True)
class CacheConfig(Settings):
    """Where reference log-probs are kept."""

    # === Store ===
    ref_cache_dir: PathText = root_path("ref_cache")  # reference log-probs, shared by all runs


def reference_id(weights_digest: str, tokenizer_digest: str, numerics: dict[str, str]) -> dict:
    """Everything that the log-probs of a pair depend on beside its tokens; `RefStore.open` keys a store by it.

    `numerics` names what moves the numbers without moving the weights: dtype, versions of attention and head.
    """
    return {"format": 1, "weights": weights_digest, "tokenizer": tokenizer_digest, "numerics": numerics}


class RefStore:
    """Log-prob sums (nats, fp32) of one frozen model. Any number of passes and readers may use a folder at once."""

    def __init__(self, folder: Path, reference: dict | None = None):
        """An empty view of `folder`; use `RefStore.open`."""
        self.folder = folder
        self._reference = reference
        self._mends = True
        self.set_aside: list[str] = []  # shards that the last `load` found damaged
        self.has_unbound = False  # whether it found shards that their names bind to no reference
        self._bound = self._unbound = np.empty(0, RECORD)  # each sorted by bytes, one per key, and none in both
        self._added: list[np.ndarray] = []  # bound ones since these were sorted
        self._table: np.ndarray | None = None  # of both
        self._mapped: list[MappedShard] = []  # merged shards: bound, and as many records as there are, not in memory
        self.loaded: list[str] = []  # names of the bound shards that the last `load` read whole

    @classmethod
    def open(cls, cache_dir: str | os.PathLike[str], reference: dict, make: bool = True, mend: bool = True) -> RefStore:
        """Open the store of `reference` (see `reference_id`) below `cache_dir` and load it.

        Args:
            make: make the folder now; otherwise the first shard that is added makes it.
            mend: rename damaged shards; otherwise the folder is only read.

        Raises:
            UserError: the folder cannot be made or read, or its reference.json tells of another reference.
        """
        name = digest(json.dumps(reference, sort_keys=True).encode()).hex()
        store = cls(Path(cache_dir) / name, reference)
        store._mends = mend
        described = store.folder / DESCRIPTION
        if not os.path.exists(described):
            if make:
                store._describe()
            elif not os.path.lexists(store.folder):
                return store
        elif (found := read_json(described)) != reference:
            raise UserError(
                f"{described} was changed: expected {reference}, found {shown(found)}; delete {store.folder}, then run "
                f"{_FILL_COMMAND}"
            )
        if mend:
            with contextlib.suppress(OSError):  # of a store that is only read
                os.utime(described)  # used now: `store_folders` and prune ask for that
        store.load()
        return store

    @property
    def reference_digest(self) -> str:
        """Hex digest of the reference, by which a training state names it."""
        return self.folder.name

    def __len__(self) -> int:
        tables = [*(shard.sound_records() for shard in self._mapped), self._records]
        return len(merged(tables))

    @property
    def mapped(self) -> list[MappedShard]:
        """The merged shards that the last `load` found."""
        return self._mapped

    def loaded_records(self) -> np.ndarray:
        """Those of the bound shards that are read whole, sorted by bytes, one per key."""
        self._take_in()
        return self._bound

    @property
    def _records(self) -> np.ndarray:
        """All records in memory, sorted by bytes, one per key. A pass adds thousands of shards before anyone asks."""
        self._take_in()
        if self._table is None:
            self._table = merged([self._bound, self._unbound]) if len(self._unbound) else self._bound
        return self._table

    @property
    def _tables(self) -> list[Table]:
        """All that records are looked up in."""
        loaded = [Loaded(self._records)] if len(self._records) or not self._mapped else []
        return [*self._mapped, *loaded]

    def _take_in(self) -> None:
        """Sorts what was added; it is bound, and stands above what is not."""
        if self._added:
            self._bound, self._added = merged([self._bound, *self._added]), []
            self._unbound, self._table = without(self._unbound, self._bound), None

    def _without_bound(self, records: np.ndarray) -> np.ndarray:
        """The records whose keys no bound one has."""
        left = without(records, self._bound)
        for shard in self._mapped:
            left = left[~shard.rows_of(keys_of(left))[1]]
        return left

    def load(self) -> None:
        """Read the folder anew, also what other ranks and runs have written.

        A shard whose bytes do not match its name, or that is of another reference, is renamed to *.corrupt and its
        pairs count as missing; so do records that no model can have given. Each is logged by name. Raises UserError
        when the folder cannot be read.
        """
        self.set_aside, self._mapped, self.loaded = [], [], []
        bound, unbound = [np.empty(0, RECORD)], [np.empty(0, RECORD)]
        for name, records in self._shards().items():
            if isinstance(records, MappedShard):
                self._mapped.append(records)
            elif is_unbound(name):
                unbound.append(records)
            else:
                bound.append(records)
                self.loaded.append(name)
        if len(self.loaded) > _MANY_SHARDS:
            LOGGER.info(
                "%s: %d shards are read at each start; `python launch/store.py merge` makes one of them",
                *(self.folder, len(self.loaded)),
            )
        self.has_unbound = len(unbound) > 1
        self._bound, self._added, self._table = merged(bound), [], None
        self._unbound = self._without_bound(merged(unbound))

    def _shards(self) -> dict[str, np.ndarray | MappedShard]:
        """The records of each sound shard by its name; those of a merged one stay on the disk.

        Where one goes while this reads, another run may have bound its records: then what came meanwhile is read too.
        """
        found: dict[str, np.ndarray | MappedShard] = {}
        paths, bad, others = [], set[str](), set[str]()
        for _ in range(_MOST_LISTINGS):
            paths, gone = files_of(self.folder), False
            indexed = {path.name for path in paths if is_index(path.name)}
            for path in paths:
                if path.name in found or path.name in bad | others or not is_shard(path.name):
                    continue
                try:
                    mapped = index_of(path).name in indexed and self._map(path)
                    found[path.name] = mapped or read_shard(path, self.reference_digest)
                except FileNotFoundError:
                    gone = True
                except OtherKindError:
                    others.add(path.name)
                except OSError as error:
                    bad.add(path.name)
                    LOGGER.warning("cannot read shard %s: %s; its pairs count as missing", path, error.strerror)
                except BadShardError as reason:
                    bad.add(path.name)
                    self.set_aside.append(path.name)
                    if self._mends:
                        set_aside(path, str(reason))
            if not gone:
                break
        if others:
            LOGGER.info("%s: passed over %d shards of a kind that a later version writes", self.folder, len(others))
        foreign = [path.name for path in paths if not is_shard(path.name) and not belongs_to_a_store(path.name)]
        if foreign:
            LOGGER.warning("ignored %d files in %s that are no shards: %s", len(foreign), self.folder, foreign[:5])
        return found

    def _map(self, path: Path) -> MappedShard | None:
        """A merged shard; None where it has to be read whole, which tells whether it is sound."""
        try:
            return MappedShard(path, self.reference_digest)
        except (OSError, NoIndexError) as error:
            if path.exists():
                LOGGER.warning("merged shard %s is read whole: %s; `launch/store.py merge` mends that", path, error)
            return None

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Whether each key (B,) has a record."""
        found_B = np.zeros(len(keys), bool)
        for found in find(self._tables, keys):
            found_B[found.places] = found.tables >= 0
        return found_B

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Positions of the keys (B,) without a record, in order; of equal keys only the first."""
        absent = np.flatnonzero(~self.has(keys))
        _, first = np.unique(sortable(keys[absent]), return_index=True)
        return absent[np.sort(first)]

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Log-prob sums (B, 2) float32 of (chosen, rejected) of the pairs with these keys (B,). UserError for none."""
        logps_B2 = np.empty((len(keys), 2), np.float32)
        for found in self._found(keys):
            logps_B2[found.places] = found.records["logps"]
        return logps_B2

    def content_digest(self, keys: np.ndarray) -> str:
        """Hex digest of the records of `keys`, whatever their order: equal on two ranks that see the same numbers."""
        tables = self._tables
        asked = [np.zeros(len(table.records), bool) for table in tables]
        for found in self._found(keys):
            for number in np.unique(found.tables):
                asked[number][found.rows[found.tables == number]] = True
        state = hashlib.blake2b(digest_size=16)
        for records in in_order(tables, asked):
            state.update(records)
        return state.hexdigest()

    def add(self, keys: np.ndarray, logps_B2: np.ndarray) -> None:
        """Write the fp32 log-prob sums of pairs with these keys (B,) as one shard, whole or not at all.

        Raises:
            UserError: a sum is not finite or above zero, or the shard cannot be written (full disk, read-only folder).
        """
        self._write(checked_records(keys, logps_B2))

    def unbound(self, keys: np.ndarray) -> np.ndarray:
        """Positions of the keys (B,) whose records stand in unbound shards alone: they may be of any reference."""
        self._take_in()
        if not len(self._unbound):
            return np.empty(0, np.int64)
        return np.flatnonzero(rows_of(keys, self._unbound)[1])

    def bind(self, keys: np.ndarray) -> int:
        """Writes the unbound records of these keys (B,), which somebody has looked at, as bound shards; gives how many.

        Their values stay as they are. Unbound shards go last, and only those of which every record is bound now: the
        others serve whoever asks for the rest. Killed anywhere, or done by two at once, it can be done again. UserError
        when the store cannot be written.
        """
        self._take_in()
        rows, found = rows_of(keys, self._unbound)
        records = self._unbound[np.unique(rows[found])]
        for start in range(0, len(records), _BIND_AT_ONCE):
            self._write(records[start : start + _BIND_AT_ONCE])
        self._drop_unbound()
        return len(records)

    def _drop_unbound(self) -> None:
        """Deletes the unbound shards that hold nothing which no bound one has."""
        self._take_in()
        for path in files_of(self.folder):
            if not is_unbound(path.name):
                continue
            try:
                if not len(self._without_bound(read_shard(path, self.reference_digest))):
                    path.unlink(missing_ok=True)
            except (OSError, BadShardError, OtherKindError) as error:
                LOGGER.warning("unbound shard %s stays: %s", path, error)

    @contextlib.contextmanager
    def writer(self, every_pairs: int = 512, every_s: float = 60.0) -> Iterator[ShardWriter]:
        """A buffer that writes a shard every so many pairs or seconds and at the end: all that a killed pass loses.

        An error in the body does not lose what was added before it.
        """
        writer = ShardWriter(self, every_pairs, every_s)
        try:
            yield writer
        finally:
            writer.flush()

    def _describe(self) -> None:
        """Write reference.json, and so the folder, if it is not there."""
        described = self.folder / DESCRIPTION
        if not os.path.exists(described):
            atomic_write_json(described, self._reference)

    def note_model(self, model_path: str) -> None:
        """Notes, for people, which model fills the store. Nothing reads it but `launch/store.py list`."""
        with contextlib.suppress(UserError):
            if self.folder.is_dir():
                atomic_write_json(self.folder / MADE_WITH, {"model_path": model_path})

    def _write(self, records: np.ndarray) -> None:
        """One shard on disk, and its records in memory."""
        if not len(records):
            return
        records = merged([records])
        name, data = to_shard(records, self.reference_digest)
        self._describe()
        atomic_write(self.folder / name, data)
        self._added.append(records)

    def _found(self, keys: np.ndarray) -> Iterator[Found]:
        """As `find`. UserError when one is missing."""
        for found in find(self._tables, keys):
            if (found.tables < 0).any():
                absent = keys[~self.has(keys)]
                missing, asked = (len(np.unique(sortable(some))) for some in (absent, keys))
                raise UserError(
                    f"{missing} of {asked} pairs have no reference log-probs in {self.folder}; run `{_FILL_COMMAND}` "
                    "with the same model, data and settings (those that choose pairs, as --pairs does, count too), "
                    "then start again"
                )
            yield found


class ShardWriter:
    """Gathers records and writes them to a store as whole shards; made by `RefStore.writer`."""

    def __init__(self, store: RefStore, every_pairs: int, every_s: float):
        self._store = store
        self._every_pairs = every_pairs
        self._every_s = every_s
        self._parts: list[np.ndarray] = []
        self._flushed_at = time.monotonic()

    def add(self, keys: np.ndarray, logps_B2: np.ndarray) -> None:
        """As `RefStore.add`, but on disk only after the next flush."""
        self._parts.append(checked_records(keys, logps_B2))
        waited = time.monotonic() - self._flushed_at
        if sum(map(len, self._parts)) >= self._every_pairs or waited >= self._every_s:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered, as one shard."""
        parts, self._parts = self._parts, []  # after a full disk the last flush must not fail again
        self._flushed_at = time.monotonic()
        if parts:
            self._store._write(np.concatenate(parts))


def files_of(folder: Path) -> list[Path]:
    """What lies in the folder, by name. UserError when it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the reference store {folder}: {error.strerror or error}") from error


def belongs_to_a_store(name: str) -> bool:
    """Whether a file that is no shard belongs in a store."""
    return name in _OTHER_FILES or is_index(name) or is_leftover(name)
