"""A merged store gives the sums that it gave before, whatever is killed, damaged or added meanwhile.

Pair i has the sums that test_ref_store gives it. Shards of 4 pairs each; merged shards and blocks are made small.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simple_llama.cluster.lock import FolderLock
from simple_llama.common.errors import UserError
from simple_llama.common.files import digest
from simple_llama.reinforcement_learning.rlhf.data.pair_key import as_keys
from simple_llama.reinforcement_learning.rlhf.reference import merge as merging
from simple_llama.reinforcement_learning.rlhf.reference import merged_shards, ref_store, tables
from simple_llama.reinforcement_learning.rlhf.reference.merge import merge
from simple_llama.reinforcement_learning.rlhf.reference.merged_shards import MappedShard
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id
from simple_llama.reinforcement_learning.rlhf.reference.shards import as_records, merged, rows_of

REFERENCE = reference_id("weights", "tokenizer", {"dtype": "float32"})
PAIRS = 50


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 records, merged shards of 16, look-ups of 7 keys at a time: every border is crossed. A killed process
    loses nothing that it has written, so no disk is waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(merged_shards, "_PER_BLOCK", 4)
    for module in (merged_shards, merging):
        monkeypatch.setattr(module, "MOST_RECORDS", 16)
    monkeypatch.setattr(tables, "_KEYS_AT_ONCE", 7)


def keys_of(numbers: range) -> np.ndarray:
    """Keys (B,) of the pairs with these numbers."""
    return as_keys([digest(str(i).encode()) for i in numbers], [(i + 1, i + 2) for i in numbers])


def logps_of(numbers: range, shift: float = 0.0) -> np.ndarray:
    """Sums (B, 2) of the pairs with these numbers."""
    return np.array([(-(i + 1.0) - shift, -(i + 1.5) - shift) for i in numbers], np.float32).reshape(-1, 2)


def filled(cache_dir: Path, pairs: int = PAIRS) -> RefStore:
    """A store of many small shards; pair 3 was computed twice, and rounded differently."""
    store = RefStore.open(cache_dir, REFERENCE)
    for first in range(0, pairs, 4):
        numbers = range(first, min(pairs, first + 4))
        store.add(keys_of(numbers), logps_of(numbers))
    store.add(keys_of(range(3, 4)), logps_of(range(3, 4), 2**-12))
    return store


def said(store: RefStore, pairs: int = PAIRS) -> tuple[str, list[list[float]]]:
    """All that a run asks a store."""
    keys = keys_of(range(pairs))
    assert store.has(keys).all() and not len(store.missing(keys)) and not store.set_aside
    return store.content_digest(keys), store.lookup(keys[::-1]).tolist()


def opened(store: RefStore) -> RefStore:
    """The store as the next run opens it."""
    return RefStore.open(store.folder.parent, REFERENCE)


def names(store: RefStore, pattern: str) -> list[str]:
    return sorted(path.name for path in store.folder.glob(pattern))


def test_a_merged_store_gives_what_it_gave(tmp_path: Path) -> None:
    """14 shards of 50 pairs become 4 or more of at most 16, each with an index; none is read into memory."""
    store = filled(tmp_path)
    before, count = said(opened(store)), len(names(store, "*.npy"))
    done = merge(store.folder)
    assert f"{count} shards are" in done and "of 50 records" in done
    again = opened(store)
    assert said(again) == before == said(store) and len(again) == PAIRS
    assert not again.loaded and len(again.mapped) >= 4 and all(len(shard) <= 16 for shard in again.mapped)
    assert names(store, "*.index") == [name.replace(".npy", ".index") for name in names(store, "*.npy")]
    assert not len(again.loaded_records()) and names(store, ".*") == []
    assert "nothing to merge" in merge(store.folder)


def test_absent_keys_are_missing_in_a_merged_store(tmp_path: Path) -> None:
    """Pairs 50 to 79 are in no block, first, middle or last; a key with other counts neither."""
    store = filled(tmp_path)
    merge(store.folder)
    again, keys = opened(store), keys_of(range(PAIRS + 30))
    assert again.missing(keys).tolist() == list(range(PAIRS, PAIRS + 30))
    other = keys[:1].copy()
    other["counts"] += 1
    assert again.missing(other).tolist() == [0]
    with pytest.raises(UserError, match="30 of 80 pairs have no reference"):
        again.content_digest(keys)


def test_what_is_added_stands_beside_until_the_next_merge(tmp_path: Path) -> None:
    """Ten more pairs, and pair 7 once more: the first by its bytes counts, as in one table, before and after."""
    plain, store = filled(tmp_path / "plain", PAIRS), filled(tmp_path / "merged", PAIRS)
    merge(store.folder)
    for one in (plain, store := opened(store)):
        one.add(keys_of(range(50, 60)), logps_of(range(50, 60)))
        one.add(keys_of(range(7, 8)), logps_of(range(7, 8), 2**-10))
    assert said(store, 60) == said(plain, 60) == said(opened(store), 60) and len(store) == 60
    mapped = [shard.path for shard in opened(store).mapped]
    reader = opened(store)
    merge(store.folder)
    assert said(opened(store), 60) == said(plain, 60) == said(reader, 60)
    gone = [path for path in mapped if not path.exists()]
    assert gone and len(names(store, ".shard-*.tmp")) == len(gone), "replaced ones are left for who has them mapped"


def test_an_earlier_version_reads_a_merged_store(tmp_path: Path) -> None:
    """Without an index a merged shard is a shard as any other."""
    store = filled(tmp_path)
    before = said(store)
    merge(store.folder)
    for path in store.folder.glob("*.index"):
        path.unlink()
    again = opened(store)
    assert said(again) == before and not again.mapped and len(again.loaded) >= 4


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_tables_together_are_one_table(tmp_path: Path, data: st.DataObject) -> None:
    """Records of 12 keys, full of zero bytes and bytes above 127, some several times with other sums, in up to three
    merged shards and memory: what is found, and in which order it is digested, is as in one `merged` table."""
    ends = [b"\0\0", b"a\0", b"a\1", b"\xff\xff"]
    known = as_keys([bytes([lead]) * 14 + end for lead in (0, 127, 255) for end in ends], [(5, 300)] * 12)
    parts = []
    for _ in range(data.draw(st.integers(1, 4))):
        places = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
        sums = np.array([data.draw(st.sampled_from([(-1.0, -2.0), (-1.5, -1.0)])) for _ in places], np.float32)
        parts.append(merged([as_records(known[places], sums)]))
    whole = merged(parts)
    paths = [merged_shards.write_merged(tmp_path, part, "0" * 32) for part in parts[1:]]
    several = [*(MappedShard(path, "0" * 32) for path in paths), tables.Loaded(parts[0])]
    masks = [np.zeros(len(table.records), bool) for table in several]
    rows, there = rows_of(known, whole)
    for found in tables.find(several, known):
        assert ((found.tables >= 0) == there[found.places]).all()
        assert found.records[found.tables >= 0].tobytes() == whole[rows[found.places][found.tables >= 0]].tobytes()
        for number in np.unique(found.tables[found.tables >= 0]):
            masks[number][found.rows[found.tables == number]] = True
    assert b"".join(tables.in_order(several, masks)) == whole.tobytes()


# === kills ===


def effects() -> Iterator[tuple[object, str]]:
    """What changes a folder."""
    yield from ((os, "replace"), (Path, "unlink"), (Path, "rename"), (Path, "write_bytes"))


def die_at(call: int, after: bool) -> None:
    """Lets the process kill itself at a call of one of the effects, before or after it."""
    calls = 0

    def deadly(original: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return original(*args, **kwargs)
            finally:  # also where a temp file is gone already
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        return run

    for owner, name in effects():
        setattr(owner, name, deadly(getattr(owner, name)))


def is_killed(folder: Path, call: int, after: bool) -> bool:
    """Merges in a process of its own that is killed at that call; False where it had ended before."""
    child = os.fork()
    if not child:
        try:
            die_at(call, after)
            merge(folder)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_a_store_gives_the_same(tmp_path: Path, after: bool) -> None:
    """A merge of merged and small shards is killed at every effect in turn, and the one after it at the same. What is
    left gives the same each time, and the next merge ends the work."""
    call, kills = 1, 0
    while True:
        store = filled(tmp_path / str(call), 4)
        merge(store.folder)
        store.add(keys_of(range(4, 6)), logps_of(range(4, 6)))
        before = said(store, 6)
        killed = is_killed(store.folder, call, after)
        assert said(opened(store), 6) == before
        is_killed(store.folder, call, after)
        assert said(opened(store), 6) == before
        merge(store.folder)
        again = opened(store)
        assert said(again, 6) == before and not again.loaded and merging._are_apart(again.mapped)
        if not killed:
            break
        call, kills = call + 1, kills + 1
    assert kills >= 10


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second merged shard cannot be written: no small one is gone."""
    store = filled(tmp_path)
    before, listed = said(store), names(store, "*.npy")
    write, calls = Path.write_bytes, 0

    def full(path: Path, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        merge(store.folder)
    assert set(listed) <= set(names(store, "*.npy")) and said(opened(store)) == before
    assert not (store.folder / "lock").exists()


# === readers meanwhile ===


def test_a_reader_looks_again_where_shards_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is merged between the reader's listing and its reading: all small shards it listed are gone."""
    store = filled(tmp_path)
    before = said(store)
    listed, listings = ref_store.files_of, []

    def listed_before_a_merge(folder: Path) -> list[Path]:
        found = listed(folder)
        listings.append(len(found))
        if len(listings) == 1:
            merge(folder)
        return found

    monkeypatch.setattr(ref_store, "files_of", listed_before_a_merge)
    reader = opened(store)
    assert said(reader) == before and len(reader.mapped) >= 4 and len(listings) == 3  # one of them the merge's


def test_one_merge_at_a_time(tmp_path: Path) -> None:
    """A live holder of the lock is named; its store is as it was."""
    store = filled(tmp_path)
    lock = FolderLock.take(store.folder)
    listed = names(store, "*")
    with pytest.raises(UserError, match="is in use by a run on host"):
        merge(store.folder)
    lock.release()
    assert names(store, "*") == [name for name in listed if name != "lock"]
    assert opened(store).has(keys_of(range(PAIRS))).all()


# === damage ===


def merged_alone(tmp_path: Path) -> tuple[RefStore, Path]:
    """A store of one merged shard of 12 records in three blocks."""
    store = filled(tmp_path, 12)
    merge(store.folder)
    [shard] = store.folder.glob("*.npy")
    return store, shard


def test_every_flipped_byte_of_a_merged_shard_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the records: the four pairs of its block are missing, the others serve. Of the header: no other number than
    the right one is ever given."""
    store, shard = merged_alone(tmp_path)
    data, right = shard.read_bytes(), store.lookup(keys_of(range(12)))
    header = len(data) - 12 * 32
    with caplog.at_level(logging.CRITICAL):
        for at in range(len(data)):
            shard.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
            again = RefStore.open(tmp_path, REFERENCE, mend=False)
            there = again.has(keys_of(range(12)))
            assert (again.lookup(keys_of(range(12))[there]) == right[there]).all()
            assert there.sum() == 8 if at >= header else there.all() or not there.any()


@pytest.mark.parametrize("where", [0, 100, -20, -1])
def test_a_damaged_index_costs_only_time(tmp_path: Path, where: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its array or its seal is changed: the shard is read whole, with a word; the next merge writes an index anew."""
    store, shard = merged_alone(tmp_path)
    before = said(store, 12)
    index = merged_shards.index_of(shard)
    data = bytearray(index.read_bytes())
    data[where] ^= 1
    index.write_bytes(data)
    again = opened(store)
    assert said(again, 12) == before and again.loaded == [shard.name] and "is read whole" in caplog.text
    merge(store.folder)
    assert said(opened(store), 12) == before and len(opened(store).mapped) == 1


def test_an_index_of_another_store_is_none(tmp_path: Path) -> None:
    """Shard and index copied to another reference: the index says so, and the shard is set aside as ever."""
    _, shard = merged_alone(tmp_path)
    other = RefStore.open(tmp_path, reference_id("others", "tokenizer", {}))
    for path in (shard, merged_shards.index_of(shard)):
        (other.folder / path.name).write_bytes(path.read_bytes())
    other.load()
    assert other.set_aside == [shard.name] and not other.has(keys_of(range(12))).any()


def test_merging_a_damaged_shard_keeps_what_is_sound(tmp_path: Path) -> None:
    """A byte of the last record: four pairs are lost and said, eight are merged, the damaged file is set aside."""
    store, shard = merged_alone(tmp_path)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "4 records stood in damaged blocks" in merge(store.folder)
    again = opened(store)
    assert again.has(keys_of(range(12))).sum() == 8 == len(again)
    assert names(store, "*.corrupt") == [f"{shard.name}.corrupt"]


def test_a_look_up_reads_only_the_blocks_that_it_needs(tmp_path: Path) -> None:
    """One key: one block of three is compared with its digest."""
    store, shard = merged_alone(tmp_path)
    mapped = MappedShard(shard, store.reference_digest)
    assert mapped.rows_of(keys_of(range(5, 6)))[1].all() and sorted(mapped._states) == [0, 0, 1]


def test_unbound_shards_are_left_to_the_audit(tmp_path: Path) -> None:
    """What no name binds to the reference is not merged, and still serves where no bound shard has the record."""
    store = RefStore.open(tmp_path, REFERENCE)
    store.add(keys_of(range(4)), logps_of(range(4)))
    [shard] = store.folder.glob("*.npy")
    unbound = store.folder / f"{digest(shard.read_bytes()).hex()}.npy"
    shard.rename(unbound)
    store.add(keys_of(range(3, 8)), logps_of(range(3, 8)))
    merge(store.folder)
    again = opened(store)
    assert unbound.exists() and again.unbound(keys_of(range(8))).tolist() == [0, 1, 2]
    assert again.bind(keys_of(range(8))) == 3 and not unbound.exists()
    assert opened(store).unbound(keys_of(range(8))).tolist() == [] and said(opened(store), 8)
