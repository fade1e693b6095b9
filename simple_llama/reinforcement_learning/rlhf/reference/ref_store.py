"""The reference model's log-probs on disk, keyed by content, so that no run computes them twice or trusts wrong ones.

    <cache_dir>/<digest of the reference>/reference.json      what was digested: weights, tokenizer, numerics
                                          <digest of its bytes>.npy   a shard: records of some pairs, written whole

A record is found by what was computed: the digest of a pair's tokens and scored spans, and its scored counts. Row
numbers, paths, seeds, ranks and settings of the run do not enter. B pairs, 2 sides (chosen, rejected).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write, atomic_write_json, digest, open_file, read_json, shown
from simple_llama.common.logging import LOGGER
from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY

_FILL_COMMAND = "deepspeed launch/precompute_ref.py"

# Key first: sorted by their bytes, records lie in the order of their keys.
_RECORD = np.dtype([("digest", "V16"), ("counts", "<i4", (2,)), ("logps", "<f4", (2,))])
_AS_BYTES, _AS_KEY = "S32", "S24"  # a whole record, and its KEY, as one sortable value

_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.npy")
_MOST_SHARD_BYTES = 256 << 20  # six million records; a pass writes a few hundred into a shard
_ROUNDING = 1e-5  # nats a scored token: a certain token's fp32 log-prob may come out just above 0


class _BadShardError(Exception):
    """A file with a shard's name that is none; the message says why."""


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
        self.set_aside: list[str] = []  # shards that the last `load` found damaged
        self._sorted = np.empty(0, _RECORD)  # by bytes, one per key
        self._added: list[np.ndarray] = []  # since it was sorted

    @classmethod
    def open(cls, cache_dir: str | os.PathLike[str], reference: dict, make: bool = True) -> RefStore:
        """Open the store of `reference` (see `reference_id`) below `cache_dir` and load it.

        Args:
            make: make the folder now; otherwise the first shard that is added makes it.

        Raises:
            UserError: the folder cannot be made or read, or its reference.json tells of another reference.
        """
        name = digest(json.dumps(reference, sort_keys=True).encode()).hex()
        store = cls(Path(cache_dir) / name, reference)
        described = store.folder / "reference.json"
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
        store.load()
        return store

    @property
    def reference_digest(self) -> str:
        """Hex digest of the reference, by which a training state names it."""
        return self.folder.name

    def __len__(self) -> int:
        return len(self._records)

    @property
    def _records(self) -> np.ndarray:
        """All records, sorted by bytes, one per key. A pass adds thousands of shards before anyone asks."""
        if self._added:
            self._sorted, self._added = _merged([self._sorted, *self._added]), []
        return self._sorted

    def load(self) -> None:
        """Read the folder anew, also what other ranks and runs have written.

        A shard whose bytes do not match its name is renamed to *.corrupt and its pairs count as missing; so do
        records that no model can have given. Each is logged by name. Raises UserError when the folder cannot be read.
        """
        self.set_aside = []
        parts, foreign = [np.empty(0, _RECORD)], []
        for path in _listed(self.folder):
            if _SHARD_NAME.fullmatch(path.name):
                try:
                    parts.append(_read_shard(path))
                except FileNotFoundError:
                    continue  # another rank has set it aside since the folder was listed
                except OSError as error:
                    LOGGER.warning("cannot read shard %s: %s; its pairs count as missing", path, error.strerror)
                except _BadShardError as reason:
                    self.set_aside.append(path.name)
                    _set_aside(path, str(reason))
            elif not _is_ours(path.name):
                foreign.append(path.name)
        if foreign:
            LOGGER.warning("ignored %d files in %s that are no shards: %s", len(foreign), self.folder, foreign[:5])
        self._sorted, self._added = _merged(parts), []

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Positions of the keys (B,) without a record, in order; of equal keys only the first."""
        _, found = self._find(keys)
        absent = np.flatnonzero(~found)
        _, first = np.unique(_sortable(keys[absent]), return_index=True)
        return absent[np.sort(first)]

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Log-prob sums (B, 2) float32 of (chosen, rejected) of the pairs with these keys (B,). UserError for none."""
        return self._records["logps"][self._rows(keys)].astype(np.float32)

    def content_digest(self, keys: np.ndarray) -> str:
        """Hex digest of the records of `keys`, whatever their order: equal on two ranks that see the same numbers."""
        asked = np.zeros(len(self._records), bool)
        asked[self._rows(keys)] = True
        return digest(self._records[asked].tobytes()).hex()

    def add(self, keys: np.ndarray, logps_B2: np.ndarray) -> None:
        """Write the fp32 log-prob sums of pairs with these keys (B,) as one shard, whole or not at all.

        Raises:
            UserError: a sum is not finite or above zero, or the shard cannot be written (full disk, read-only folder).
        """
        self._write(_checked_records(keys, logps_B2))

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
        described = self.folder / "reference.json"
        if not os.path.exists(described):
            atomic_write_json(described, self._reference)

    def _write(self, records: np.ndarray) -> None:
        """One shard on disk, and its records in memory."""
        if not len(records):
            return
        records = _merged([records])  # in order, so that the same content gets the same name
        data = io.BytesIO()
        np.save(data, records, allow_pickle=False)
        self._describe()
        atomic_write(self.folder / f"{digest(data.getbuffer()).hex()}.npy", data.getvalue())
        self._added.append(records)

    def _rows(self, keys: np.ndarray) -> np.ndarray:
        """Row of each key in the records (B,). UserError when one is missing."""
        rows, found = self._find(keys)
        if not found.all():
            missing, asked = (len(np.unique(_sortable(some))) for some in (keys[~found], keys))
            raise UserError(
                f"{missing} of {asked} pairs have no reference log-probs in "
                f"{self.folder}; run `{_FILL_COMMAND}` with the same model, data and settings, then start again"
            )
        return rows

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows where the records of the keys must be, and whether they are there; (B,) each."""
        wanted = _as_records(keys, np.zeros((len(keys), 2), np.float32)).view(_AS_BYTES)
        table, rows = self._records.view(_AS_BYTES), np.empty(len(keys), np.int64)
        # In about the table's order: ten million searches all over the memory would take three times as long.
        order = np.argsort(wanted.view(">u8")[:: _RECORD.itemsize // 8].astype(np.uint64))
        rows[order] = np.searchsorted(table, wanted[order])  # zero log-probs come before all others of that key
        found = rows < len(table)
        found[found] = table[rows[found]].astype(_AS_KEY) == wanted[found].astype(_AS_KEY)
        return rows, found


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
        self._parts.append(_checked_records(keys, logps_B2))
        waited = time.monotonic() - self._flushed_at
        if sum(map(len, self._parts)) >= self._every_pairs or waited >= self._every_s:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered, as one shard."""
        parts, self._parts = self._parts, []  # after a full disk the last flush must not fail again
        self._flushed_at = time.monotonic()
        if parts:
            self._store._write(np.concatenate(parts))


def _sortable(keys: np.ndarray) -> np.ndarray:
    """Keys (B,) as values that numpy can sort."""
    return np.ascontiguousarray(keys, KEY).view(_AS_KEY)


def _as_records(keys: np.ndarray, logps_B2: np.ndarray) -> np.ndarray:
    """Records (B,) of pairs with these keys and log-prob sums."""
    assert keys.dtype == KEY and logps_B2.shape == (len(keys), 2)
    records = np.empty(len(keys), _RECORD)
    for name in KEY.names or ():
        records[name] = keys[name]
    records["logps"] = logps_B2
    return records


def _checked_records(keys: np.ndarray, logps_B2: np.ndarray) -> np.ndarray:
    """Records of freshly computed sums. UserError when they cannot be log-probs, which a retry would not mend."""
    assert logps_B2.dtype == np.float32, "sums in 16 bits are off by whole nats"
    records = _as_records(keys, logps_B2)
    bad = np.flatnonzero(~_are_sound(records))
    if len(bad):
        chosen, rejected = logps_B2[bad[0]]
        raise UserError(
            f"the reference model gave {len(bad)} of {len(keys)} pairs log-probs that are not finite numbers up to 0 "
            f"(the first: chosen {chosen}, rejected {rejected}); check the checkpoint and its dtype. None was stored"
        )
    return records


def _are_sound(records: np.ndarray) -> np.ndarray:
    """Whether each record can come from a model (B,): scored tokens on both sides, finite sums not above zero."""
    counts_B2, logps_B2 = records["counts"], records["logps"]
    sound_B2 = (counts_B2 > 0) & np.isfinite(logps_B2) & (logps_B2 <= _ROUNDING * counts_B2)
    return sound_B2[:, 0] & sound_B2[:, 1]


def _merged(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All records sorted by bytes, one per key: the first. So all ranks agree where two passes rounded differently."""
    records = np.concatenate(parts)
    records = records[np.argsort(records.view(_AS_BYTES), kind="stable")]  # stable: fast on runs already sorted
    keys = records.view(_AS_BYTES).astype(_AS_KEY)
    return records[np.append(np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1])]


def _listed(folder: Path) -> list[Path]:
    """What lies in the folder, by name. UserError when it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the reference store {folder}: {error.strerror or error}") from error


def _is_ours(name: str) -> bool:
    """Whether a file that is no shard belongs in a store: temp files of running or killed passes, shards set aside."""
    temp = name.startswith(".") and name.endswith(".tmp")
    return temp or name == "reference.json" or name.endswith(".npy.corrupt")


def _read_shard(path: Path) -> np.ndarray:
    """The sound records of a shard whose bytes match its name. _BadShardError when they do not, OSError as usual."""
    with open_file(path) as file:
        data = file.read(_MOST_SHARD_BYTES + 1)
    if len(data) > _MOST_SHARD_BYTES:
        raise _BadShardError(f"it is larger than {_MOST_SHARD_BYTES:,} bytes")
    if digest(data).hex() != path.stem:
        raise _BadShardError("its bytes do not match its name")
    try:
        records = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy's reader raises half a dozen kinds
        raise _BadShardError(f"it holds no array ({error})") from error
    if not isinstance(records, np.ndarray) or records.dtype != _RECORD or records.ndim != 1:
        raise _BadShardError("it holds no records")
    sound = _are_sound(records)
    if not sound.all():
        LOGGER.warning("ignored %d impossible records of shard %s; they count as missing", (~sound).sum(), path)
    return records[sound]


def _set_aside(path: Path, reason: str) -> None:
    """Rename a damaged shard, so that it is kept for a look but never read again."""
    LOGGER.warning("shard %s is damaged (%s): set aside as *.corrupt, its pairs count as missing", path, reason)
    try:
        os.replace(path, path.with_name(f"{path.name}.corrupt"))
    except FileNotFoundError:
        pass  # another rank was faster
    except OSError as error:  # a read-only store still serves what is sound
        LOGGER.warning("cannot rename %s: %s", path, error.strerror)
