"""The files of a reference store: records as arrays, their soundness, names that bind bytes to a reference. No torch.

A shard is an .npy array of records, sorted by key, which can be mapped as it lies. The names and types of its fields
(numpy's header) say what kind of record it holds; today's kind is

    digest V16, counts 2 x <i4, logps 2 x <f4      a pair: its KEY (see pair_key), then the sums of chosen and rejected

A reader passes over kinds that it does not know. So a later kind stands beside this one and changes nothing: an answer
as an entry of its own, say, or the part sums of a span, whose digest names the span. Answers are no kind today, since a
pair's digest cannot be taken apart into those of its answers: whatever else is kept, records of pairs stay.

    shard-<digest of the reference's name, then of the bytes>.npy      bound: of no other reference, and undamaged
    shard-<the same>.index                                             beside a merged one, see `merged_shards`
    <digest of the bytes>.npy                                          unbound, as they were written before

An unbound shard may be of any reference. `audit.take_over` looks at its values before it binds them.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.files import digest, open_file
from simple_llama.common.logging import LOGGER
from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY

# Key first: sorted by their bytes, records lie in the order of their keys.
RECORD = np.dtype([("digest", "V16"), ("counts", "<i4", (2,)), ("logps", "<f4", (2,))])
AS_BYTES, AS_KEY = "S32", "S24"  # a whole record, and its KEY, as one sortable value

_UNBOUND_NAME = re.compile(r"[0-9a-f]{32}\.npy")
_BOUND_NAME = re.compile(r"shard-[0-9a-f]{32}\.npy")
_MOST_SHARD_BYTES = 256 << 20  # eight million records; a pass writes a few hundred into a shard
_ROUNDING = 1e-5  # nats a scored token: a certain token's fp32 log-prob may come out just above 0
_MOST_NATS = 2e4  # a scored token: logits up to 1e4, which the head is made for, give no more


class OtherKindError(Exception):
    """A sound shard of a kind of record that a later version writes."""


class BadShardError(Exception):
    """A file with a shard's name that is none; the message says why."""


def sortable(keys: np.ndarray) -> np.ndarray:
    """Keys (B,) as values that numpy can sort."""
    return np.ascontiguousarray(keys, KEY).view(AS_KEY)


def as_records(keys: np.ndarray, logps_B2: np.ndarray) -> np.ndarray:
    """Records (B,) of pairs with these keys and log-prob sums."""
    assert keys.dtype == KEY and logps_B2.shape == (len(keys), 2)
    records = np.empty(len(keys), RECORD)
    for name in KEY.names or ():
        records[name] = keys[name]
    records["logps"] = logps_B2
    return records


def keys_of(records: np.ndarray) -> np.ndarray:
    """The keys (B,) of records."""
    return records[list(KEY.names or ())].astype(KEY)


def checked_records(keys: np.ndarray, logps_B2: np.ndarray) -> np.ndarray:
    """Records of freshly computed sums. UserError when they cannot be log-probs, which a retry would not mend."""
    assert logps_B2.dtype == np.float32, "sums in 16 bits are off by whole nats"
    records = as_records(keys, logps_B2)
    bad = np.flatnonzero(~are_sound(records))
    if len(bad):
        chosen, rejected = logps_B2[bad[0]]
        raise UserError(
            f"the reference model gave {len(bad)} of {len(keys)} pairs log-probs that are not finite numbers up to 0 "
            f"and from {-_MOST_NATS:,.0f} a token on (the first: chosen {chosen}, rejected {rejected}); check the "
            "checkpoint and its dtype. None was stored"
        )
    return records


def are_sound(records: np.ndarray) -> np.ndarray:
    """Whether each record can come from a model (B,): scored tokens on both sides, finite sums within their bounds."""
    counts_B2, logps_B2 = records["counts"], records["logps"]
    sound_B2 = (counts_B2 > 0) & np.isfinite(logps_B2) & (logps_B2 <= _ROUNDING * counts_B2)
    sound_B2 &= logps_B2 >= -_MOST_NATS * counts_B2
    return sound_B2[:, 0] & sound_B2[:, 1]


def merged(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All records sorted by bytes, one per key: the first. So all ranks agree where two passes rounded differently."""
    records = np.concatenate(parts)
    records = records[np.argsort(records.view(AS_BYTES), kind="stable")]  # stable: fast on runs already sorted
    keys = records.view(AS_BYTES).astype(AS_KEY)
    return records[np.append(np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1])]


def rows_of(keys: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a `merged` table where the records of the keys must be, and whether they are there; (B,) each."""
    wanted = as_records(keys, np.zeros((len(keys), 2), np.float32)).view(AS_BYTES)
    sorted_bytes, rows = table.view(AS_BYTES), np.empty(len(keys), np.int64)
    # In about the table's order: ten million searches all over the memory would take three times as long.
    order = np.argsort(wanted.view(">u8")[:: RECORD.itemsize // 8].astype(np.uint64))
    rows[order] = np.searchsorted(sorted_bytes, wanted[order])  # zero log-probs come before all others of that key
    found = rows < len(table)
    found[found] = sorted_bytes[rows[found]].astype(AS_KEY) == wanted[found].astype(AS_KEY)
    return rows, found


def without(records: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The records whose keys no record of the `merged` others has."""
    return records[~rows_of(keys_of(records), others)[1]] if len(records) else records


def to_shard(records: np.ndarray, reference: str) -> tuple[str, bytes]:
    """Name and bytes of a bound shard; `records` are `merged`, so that the same content gets the same name.

    Args:
        reference: the digest that the store's folder is called by.
    """
    data = io.BytesIO()
    np.save(data, records, allow_pickle=False)
    return f"shard-{_digest_of(data.getvalue(), reference)}.npy", data.getvalue()


def is_shard(name: str) -> bool:
    """Whether a file is called as a shard, bound or not."""
    return bool(_BOUND_NAME.fullmatch(name) or is_unbound(name))


def is_unbound(name: str) -> bool:
    """Whether a file is called as a shard whose name does not bind it to a reference."""
    return bool(_UNBOUND_NAME.fullmatch(name))


def is_leftover(name: str) -> bool:
    """Whether a file is a temp file, of a running pass or a killed one, or a shard set aside."""
    return (name.startswith(".") and name.endswith(".tmp")) or name.endswith(".npy.corrupt")


def read_shard(path: Path, reference: str) -> np.ndarray:
    """The sound records of a shard whose bytes match its name.

    BadShardError when they do not match, or are of another reference; OtherKindError; OSError as usual.
    """
    with open_file(path) as file:
        data = file.read(_MOST_SHARD_BYTES + 1)
    if len(data) > _MOST_SHARD_BYTES:
        raise BadShardError(f"it is larger than {_MOST_SHARD_BYTES:,} bytes")
    unbound = is_unbound(path.name)
    if path.stem != (digest(data).hex() if unbound else f"shard-{_digest_of(data, reference)}"):
        raise BadShardError(f"its bytes do not match its name{'' if unbound else ', or it is of another reference'}")
    try:
        records = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy's reader raises half a dozen kinds
        raise BadShardError(f"it holds no array ({error})") from error
    if not isinstance(records, np.ndarray) or records.ndim != 1:
        raise BadShardError("it holds no records")
    if records.dtype != RECORD:
        if unbound or not records.dtype.names:
            raise BadShardError("it holds no records")
        raise OtherKindError
    sound = are_sound(records)
    if not sound.all():
        LOGGER.warning("ignored %d impossible records of shard %s; they count as missing", (~sound).sum(), path)
    return records[sound]


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged shard, so that it is kept for a look but never read again."""
    LOGGER.warning("shard %s is damaged (%s): set aside as *.corrupt, its pairs count as missing", path, reason)
    try:
        os.replace(path, path.with_name(f"{path.name}.corrupt"))
    except FileNotFoundError:
        pass  # another rank was faster
    except OSError as error:  # a read-only store still serves what is sound
        LOGGER.warning("cannot rename %s: %s", path, error.strerror)


def _digest_of(data: bytes, reference: str) -> str:
    """Hex digest that binds a shard's bytes to a reference; its name has 32 characters, so no boundary is in doubt."""
    return digest(reference.encode(), data).hex()
