"""The reference store trusts only whole, undamaged shards, and computes nothing twice.

Pair i has the digest of the text "i", i + 1 and i + 2 scored tokens, and the log-prob sums -(i + 1) and -(i + 1.5).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simple_llama.common import files
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY, as_keys
from simple_llama.reinforcement_learning.rlhf.reference import ref_store
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id
from simple_llama.reinforcement_learning.rlhf.reference.shards import RECORD, are_sound, as_records, merged

ROOT = Path(files.__file__).parents[2]
REFERENCE = reference_id("weights", "tokenizer", {"dtype": "bfloat16", "attention": "1", "head": "1"})


def pairs(numbers: Iterable[int]) -> np.ndarray:
    """Keys (B,) of the pairs with these numbers."""
    listed = list(numbers)
    return as_keys([files.digest(str(i).encode()) for i in listed], [(i + 1, i + 2) for i in listed])


def missing(store: RefStore, keys: np.ndarray) -> list[int]:
    """Positions of the keys that the store lacks."""
    return store.missing(keys).tolist()


def logps(numbers: Iterable[int]) -> np.ndarray:
    """Sums (B, 2) of the pairs with these numbers."""
    return np.array([(-(i + 1.0), -(i + 1.5)) for i in numbers], np.float32).reshape(-1, 2)


def filled(cache_dir: Path, numbers: Iterable[int]) -> RefStore:
    """A store below `cache_dir` to which these pairs were added as one shard."""
    store, numbers = RefStore.open(cache_dir, REFERENCE), list(numbers)
    store.add(pairs(numbers), logps(numbers))
    return store


def shards(store: RefStore) -> list[Path]:
    return sorted(store.folder.glob("*.npy"))


def bytes_of(array: np.ndarray) -> bytes:
    """An array as the content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def bound_name(store: RefStore, data: bytes) -> str:
    """What a shard of these bytes is called: shard-<blake2b of the folder's name, then the bytes>.npy."""
    return f"shard-{hashlib.blake2b(store.folder.name.encode() + data, digest_size=16).hexdigest()}.npy"


def unbound_name(data: bytes) -> str:
    """What it was called before names told of the reference."""
    return f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.npy"


def place_unbound(store: RefStore, numbers: Iterable[int], shift: float = 0.0) -> Path:
    """A shard of these pairs as an earlier version wrote it, sums changed by `shift`."""
    listed = list(numbers)
    data = bytes_of(merged([as_records(pairs(listed), logps(listed) + np.float32(shift))]))
    path = store.folder / unbound_name(data)
    path.write_bytes(data)
    return path


def raising(code: int) -> Callable[..., None]:
    """A function that always fails with this errno."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


# === what a pass and a training run do ===


def test_what_is_added_is_found_now_and_after_opening_again(tmp_path: Path) -> None:
    """Pairs 0 and 1: sums [-1, -1.5] and [-2, -2.5], asked for in the other order."""
    for store in (filled(tmp_path, [0, 1]), RefStore.open(tmp_path, REFERENCE)):
        found = store.lookup(pairs([1, 0]))
        assert found.tolist() == [[-2.0, -2.5], [-1.0, -1.5]] and found.dtype == np.float32
        assert len(store) == 2 and missing(store, pairs([0, 1])) == []


def test_a_second_pass_computes_nothing_and_growth_only_the_growth(tmp_path: Path) -> None:
    """20 pairs stored; with 10 more, put in front, only those 10 are missing; each once, where it stands first."""
    filled(tmp_path, range(20))
    store = RefStore.open(tmp_path, REFERENCE)
    assert missing(store, pairs(range(20))) == []
    assert missing(store, pairs([*range(20, 30), *range(20), 25])) == list(range(10))


def test_a_missing_pair_stops_training_with_the_command_that_fills(tmp_path: Path) -> None:
    """Two different pairs of three are absent; one of them twice."""
    store = filled(tmp_path, [0])
    for ask in (store.lookup, store.content_digest):
        with pytest.raises(UserError, match=r"2 of 3 pairs have no reference .*launch/precompute_ref\.py"):
            ask(pairs([0, 1, 2, 2]))


def test_no_pairs_are_no_work(tmp_path: Path) -> None:
    """Empty in, empty out, and no empty shard; also where nothing is stored."""
    store = filled(tmp_path, [])
    assert shards(store) == [] and missing(store, pairs([])) == [] and store.lookup(pairs([])).shape == (0, 2)
    assert missing(store, pairs([3])) == [0]


def test_the_order_of_a_pass_does_not_matter(tmp_path: Path) -> None:
    """The same pairs in another order make the same shard; in other shards, the same content."""
    one, other = filled(tmp_path / "a", [0, 1, 2]), filled(tmp_path / "b", [2, 0, 1])
    assert [path.name for path in shards(one)] == [path.name for path in shards(other)]
    split = filled(tmp_path / "c", [1])
    split.add(pairs([2, 0]), logps([2, 0]))
    digests = {store.content_digest(pairs(order)) for store in (one, other, split) for order in ([0, 1, 2], [2, 1, 0])}
    assert len(digests) == 1


def test_content_digest_tells_numbers_apart(tmp_path: Path) -> None:
    """One sum off by one bit is another content; pairs not asked for do not count."""
    one, other = filled(tmp_path / "a", [0, 1]), RefStore.open(tmp_path / "b", REFERENCE)
    changed = logps([0, 1])
    changed[1, 1] = np.nextafter(changed[1, 1], np.float32(0))
    other.add(pairs([0, 1]), changed)
    assert one.content_digest(pairs([0])) == other.content_digest(pairs([0]))
    assert one.content_digest(pairs([0, 1])) != other.content_digest(pairs([0, 1]))


def test_two_passes_that_round_differently_give_one_answer(tmp_path: Path) -> None:
    """Records of one pair in two shards: every reader takes the same, whichever pass was first, added or loaded."""
    answers = []
    for folder, values in (("a", (-1.0, -1.25)), ("b", (-1.25, -1.0))):
        store = RefStore.open(tmp_path / folder, REFERENCE)
        for value in values:
            store.add(pairs([0]), np.full((1, 2), value, np.float32))
        assert len(shards(store)) == 2 and len(store) == 1
        answers += [
            store.lookup(pairs([0])).tolist(),
            RefStore.open(tmp_path / folder, REFERENCE).lookup(pairs([0])).tolist(),
        ]
    assert answers == [answers[0]] * 4


def test_scored_counts_are_part_of_the_question(tmp_path: Path) -> None:
    """A record with other scored counts is no answer; the right one is found beside it once it is added."""
    store = filled(tmp_path, [0])
    asked = pairs([0, 0])
    asked["counts"][0] = (9, 2)
    assert missing(store, asked) == [0]
    store.add(asked[:1], logps([7]))
    assert store.lookup(asked).tolist() == [[-8.0, -8.5], [-1.0, -1.5]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"\0" * 16, b"a" + b"\0" * 15, b"\xff" * 16, b"\0" * 15 + b"a"]), st.integers(1, 300)
        ),
        unique=True,
        max_size=12,
    ),
    st.integers(0, 12),
)
def test_lookup_is_a_dict(keys: list[tuple[bytes, int]], stored: int) -> None:
    """Against a plain dict, with digests and counts full of zero bytes and bytes above 127."""
    wanted = as_keys([name for name, _ in keys], [(count, 1) for _, count in keys])
    values = -np.arange(1.0, 2 * len(wanted) + 1, dtype=np.float32).reshape(-1, 2)
    store = RefStore(Path("unused"))
    store._bound = merged([as_records(wanted[:stored], values[:stored])])
    assert missing(store, wanted) == list(range(stored, len(wanted)))
    assert store.lookup(wanted[:stored][::-1]).tolist() == values[:stored][::-1].tolist()


def test_a_record_begins_with_its_key() -> None:
    """What a pair is called in memory is what stands on disk: digest, then counts."""
    assert RECORD.descr[: len(KEY.descr)] == KEY.descr


def test_the_store_needs_no_torch() -> None:
    """A command that only looks into a store starts at once."""
    code = f"import sys, {ref_store.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# === which store: weights, tokenizer and numerics, nothing else ===


def test_folder_follows_what_moves_the_numbers(tmp_path: Path) -> None:
    """Other weights, tokenizer, dtype or head each have a folder; the same reference has one, in any key order."""
    numerics = REFERENCE["numerics"]
    references = [
        REFERENCE,
        reference_id("trained weights", "tokenizer", numerics),
        reference_id("weights", "other tokenizer", numerics),
        reference_id("weights", "tokenizer", {**numerics, "dtype": "float32"}),
        reference_id("weights", "tokenizer", {**numerics, "head": "2"}),
        reference_id("weights", "tokenizer", dict(reversed(numerics.items()))),
    ]
    folders = [RefStore.open(tmp_path, reference).folder for reference in references]
    assert len(set(folders)) == 5 and folders[0] == folders[5]
    assert folders[0].parent == tmp_path and folders[0].name == RefStore.open(tmp_path, REFERENCE).reference_digest


def test_run_settings_do_not_enter(tmp_path: Path) -> None:
    """reference.json lists what is digested: no path, seed, learning rate, rank or data. A moved cache still hits."""
    store = filled(tmp_path / "a", [0])
    described = json.loads((store.folder / "reference.json").read_text())
    assert described == {
        "format": 1,
        "weights": "weights",
        "tokenizer": "tokenizer",
        "numerics": {"dtype": "bfloat16", "attention": "1", "head": "1"},
    }
    (tmp_path / "a").rename(tmp_path / "b")
    assert missing(RefStore.open(tmp_path / "b", REFERENCE), pairs([0])) == []


@pytest.mark.parametrize("text", ['{"weights": "others"}', '{"weights'])
def test_a_changed_reference_is_refused(tmp_path: Path, text: str) -> None:
    """A reference.json that tells of another model, or is cut: the folder is named, nothing is loaded."""
    store = filled(tmp_path, [0])
    (store.folder / "reference.json").write_text(text)
    with pytest.raises(UserError, match=store.folder.name):
        RefStore.open(tmp_path, REFERENCE)


# === damage ===


def test_every_flipped_byte_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each byte of a shard with one record is flipped in turn, header and record: the pair is missing, never wrong."""
    store = filled(tmp_path, [0])
    (shard,) = shards(store)
    data = shard.read_bytes()
    for at in range(len(data)):
        shard.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        store.load()
        assert missing(store, pairs([0])) == [0] and store.set_aside == [shard.name]
        assert not shard.exists() and shard.with_name(f"{shard.name}.corrupt").exists()
    assert caplog.text.count(f"{shard} is damaged") == len(data)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_shard_is_found_and_made_again(tmp_path: Path, kept: int) -> None:
    """Cut to nothing, to a part of the header, by one byte. The other shard serves; the next pass heals the store."""
    store = filled(tmp_path, [0, 1])
    (shard,) = shards(store)
    store.add(pairs([2]), logps([2]))
    shard.write_bytes(shard.read_bytes()[:kept])
    store = RefStore.open(tmp_path, REFERENCE)
    assert missing(store, pairs([0, 1, 2])) == [0, 1] and store.set_aside == [shard.name]
    store.add(pairs([0, 1]), logps([0, 1]))
    store = RefStore.open(tmp_path, REFERENCE)
    assert missing(store, pairs([0, 1, 2])) == [] and store.set_aside == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_under_a_right_name_are_no_error(tmp_path: Path, data: st.DataObject) -> None:
    """A shard cut, changed and given the digest of its new bytes as name, of either form: it is set aside, or its
    records are sound; or a change of its header makes it one of another kind, which is left alone."""
    store = RefStore.open(tmp_path, REFERENCE)
    content = bytearray(bytes_of(as_records(pairs([0, 1]), logps([0, 1]))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    content = bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    shard = store.folder / (unbound_name(content) if data.draw(st.booleans()) else bound_name(store, content))
    shard.write_bytes(content)
    store.load()
    assert (store.set_aside == [shard.name]) != shard.exists()
    assert are_sound(store._records).all() and len(store) <= 2
    for path in store.folder.glob("*.npy*"):
        path.unlink()


@pytest.mark.parametrize("named", ["bound", "unbound"])
@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2), RECORD), np.array([{}], dtype=object)])
def test_an_array_of_something_else_is_set_aside(tmp_path: Path, array: np.ndarray, named: str) -> None:
    """Right name, wrong dtype; wrong shape; a pickle, which is not executed."""
    store = RefStore.open(tmp_path, REFERENCE)
    data = bytes_of(array)
    shard = store.folder / (bound_name(store, data) if named == "bound" else unbound_name(data))
    shard.write_bytes(data)
    store.load()
    assert store.set_aside == [shard.name] and len(store) == 0


def test_a_kind_of_record_that_comes_later_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Entries of answers, say, beside records of pairs: today's reader neither sets them aside nor reads them."""
    store = filled(tmp_path, [0])
    data = bytes_of(np.zeros(3, [("answer", "V16"), ("count", "<i4"), ("logp", "<f4")]))
    (store.folder / bound_name(store, data)).write_bytes(data)
    before = shards(store)
    with caplog.at_level(logging.INFO):
        store.load()
    assert store.set_aside == [] and shards(store) == before and len(store) == 1
    assert "passed over 1 shards of a kind that a later version writes" in caplog.text
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.5, -1e30, -40_001.0])
def test_impossible_records_are_missing(tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture) -> None:
    """A shard with a right name in which pair 0 has a sum that no model gives: pair 0 is missing, pair 1 is there."""
    store = RefStore.open(tmp_path, REFERENCE)
    sums = logps([0, 1])
    sums[0, 1] = value
    store._write(as_records(pairs([0, 1]), sums))
    store = RefStore.open(tmp_path, REFERENCE)
    assert missing(store, pairs([0, 1])) == [0] and store.lookup(pairs([1])).tolist() == [[-2.0, -2.5]]
    assert f"ignored 1 impossible records of shard {shards(store)[0]}" in caplog.text


@pytest.mark.parametrize("value", [np.nan, -np.inf, 0.5, -80_001.0])
def test_a_pass_cannot_store_impossible_sums(tmp_path: Path, value: float) -> None:
    """A diverged reference stops the pass (it would compute the same for ever); what came before is kept."""
    store = RefStore.open(tmp_path, REFERENCE)
    with (
        pytest.raises(UserError, match=r"1 of 2 pairs log-probs that are not finite .*the first: chosen -3\.0"),
        store.writer() as writer,
    ):
        writer.add(pairs([0]), logps([0]))
        writer.add(pairs([1, 2]), np.array([[-2.0, -2.5], [-3.0, value]], np.float32))
    assert missing(store, pairs([0, 1, 2])) == [1, 2]


def test_the_lowest_sums_are_sound(tmp_path: Path) -> None:
    """2e4 nats a token: pair 0 has 1 and 2 scored tokens."""
    store = RefStore.open(tmp_path, REFERENCE)
    store.add(pairs([0]), np.array([[-2e4, -4e4]], np.float32))
    assert missing(RefStore.open(tmp_path, REFERENCE), pairs([0])) == []


def test_rounding_above_zero_is_sound(tmp_path: Path) -> None:
    """A scored token of probability 1 whose fp32 log-prob came out as 2^-22: stored. Sums in bf16 or fp16: refused."""
    store = RefStore.open(tmp_path, REFERENCE)
    store.add(pairs([0]), np.full((1, 2), 2.0**-22, np.float32))
    assert missing(RefStore.open(tmp_path, REFERENCE), pairs([0])) == []
    with pytest.raises(AssertionError, match="16 bits"):
        store.add(pairs([1]), logps([1]).astype(np.float16))


def test_foreign_files_are_left_alone_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Notes, a folder, a wrong name: one line. Temp files and shards set aside are the store's own: no line."""
    store = filled(tmp_path, [0])
    for name in ("notes.txt", "table.npy", "A" * 32 + ".npy"):
        (store.folder / name).write_bytes(b"x")
    (store.folder / "folder").mkdir()
    for name in (".abc.npy.1.2.tmp", "f" * 32 + ".npy.corrupt"):
        (store.folder / name).write_bytes(b"x")
    before = sorted(path.name for path in store.folder.iterdir())
    store.load()
    assert missing(store, pairs([0])) == [] and sorted(path.name for path in store.folder.iterdir()) == before
    (message,) = [record.getMessage() for record in caplog.records]
    assert "ignored 4 files" in message and "notes.txt" in message


def test_a_folder_with_a_shard_s_name_is_unreadable_not_fatal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read counts as missing, with its name."""
    store = filled(tmp_path, [0])
    (store.folder / ("a" * 32 + ".npy")).mkdir()
    store.load()
    assert missing(store, pairs([0])) == [] and "cannot read shard" in caplog.text


def test_a_shard_that_another_rank_sets_aside_first_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All ranks load at once: a damaged shard can be gone when it is read, or renamed; no word about that."""
    store = filled(tmp_path, [0])
    listed = [*shards(store), store.folder / ("a" * 32 + ".npy")]
    monkeypatch.setattr(ref_store, "files_of", lambda folder: listed)
    store.load()
    assert missing(store, pairs([0])) == [] and caplog.text == ""
    monkeypatch.setattr(os, "replace", raising(errno.ENOENT))
    listed[0].write_bytes(b"damaged")
    store.load()
    assert missing(store, pairs([0])) == [0]
    assert "is damaged" in caplog.text and "cannot rename" not in caplog.text


# === disks ===


def test_a_read_only_store_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is written by opening and looking up; a damaged shard that cannot be renamed still counts as missing."""
    store = filled(tmp_path, [0])
    store.add(pairs([1]), logps([1]))
    damaged = shards(store)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for name in ("replace", "rename", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, raising(errno.EROFS))
    store = RefStore.open(tmp_path, REFERENCE)
    assert len(store) == 1 and len(missing(store, pairs([0, 1]))) == 1
    assert "cannot rename" in caplog.text and damaged.exists()
    with pytest.raises(UserError, match="cannot write .*Read-only file system"):
        store.add(pairs([2]), logps([2]))
    with pytest.raises(UserError, match="cannot write .*Read-only file system"):
        RefStore.open(tmp_path / "new", REFERENCE)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_stops_the_pass_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """One error for people, raised once; no shard, no temp file, nothing in memory that is not on disk."""
    store = filled(tmp_path, [0])
    before = sorted(path.name for path in store.folder.iterdir())
    monkeypatch.setattr(os, failing, raising(errno.ENOSPC))
    with pytest.raises(UserError, match="No space left on device") as caught, store.writer(every_pairs=1) as writer:
        writer.add(pairs([1]), logps([1]))
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__context__ is caught.value.__cause__
    monkeypatch.undo()
    assert sorted(path.name for path in store.folder.iterdir()) == before and missing(store, pairs([0, 1])) == [1]


def test_an_unreadable_folder_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is there, but listing it is refused."""
    store = filled(tmp_path, [0])
    monkeypatch.setattr(Path, "iterdir", raising(errno.EACCES))
    with pytest.raises(UserError, match="cannot read the reference store .*Permission denied"):
        store.load()


# === shards that no name binds to the reference ===

OTHER = reference_id("other weights", "tokenizer", REFERENCE["numerics"])


def test_a_shard_of_another_reference_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Copied as it is, its name does not fit here. Under the name that its bytes had before names told of the
    reference it is read, but stands below what is bound, and counts as unbound."""
    store, other = filled(tmp_path, [0]), RefStore.open(tmp_path, OTHER)
    other.add(pairs([0, 1]), logps([7, 8]))
    (shard,) = shards(other)
    copy = store.folder / shard.name
    copy.write_bytes(shard.read_bytes())
    store.load()
    assert store.set_aside == [shard.name] and not copy.exists() and missing(store, pairs([0, 1])) == [1]
    assert "or it is of another reference" in caplog.text
    (store.folder / unbound_name(shard.read_bytes())).write_bytes(shard.read_bytes())
    store.load()
    assert store.set_aside == [] and store.unbound(pairs([0, 1, 2])).tolist() == [1] and store.has_unbound
    assert store.lookup(pairs([0, 1])).tolist() == [[-1.0, -1.5], [-9.0, -9.5]]


def test_what_is_bound_is_equal_byte_for_byte_and_only_what_was_asked_for(tmp_path: Path) -> None:
    """Unbound shards of pairs 0-2 and of 3; bound are 1 and 3: the second shard goes, the first serves 0 and 2."""
    store = RefStore.open(tmp_path, REFERENCE)
    kept, gone = place_unbound(store, [0, 1, 2]), place_unbound(store, [3])
    store.load()
    before = store._records.tobytes(), store.content_digest(pairs(range(4)))
    assert store.bind(pairs([1, 3, 9])) == 2
    for view in (store, RefStore.open(tmp_path, REFERENCE)):
        assert (view._records.tobytes(), view.content_digest(pairs(range(4)))) == before
        assert view.unbound(pairs(range(5))).tolist() == [0, 2]
    assert kept.exists() and not gone.exists()
    (made,) = store.folder.glob("shard-*.npy")
    assert made.name == bound_name(store, made.read_bytes())
    assert store.bind(pairs(range(4))) == 2 and not kept.exists()
    found = RefStore.open(tmp_path, REFERENCE)
    assert found._records.tobytes() == before[0] and not found.has_unbound


def test_what_is_added_stands_above_what_is_unbound(tmp_path: Path) -> None:
    """A pass computes pair 0 anew: its value counts at once, whichever of the two comes first by its bytes."""
    for shift in (-1.0, 1.0):
        store = RefStore.open(tmp_path / str(shift), REFERENCE)
        place_unbound(store, [0], shift * 0.5)
        store.load()
        store.add(pairs([0]), logps([0]))
        assert store.lookup(pairs([0])).tolist() == [[-1.0, -1.5]] and len(store.unbound(pairs([0]))) == 0
        assert RefStore.open(tmp_path / str(shift), REFERENCE).lookup(pairs([0])).tolist() == [[-1.0, -1.5]]


BIND = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from test_ref_store import *
from simple_llama.reinforcement_learning.rlhf.reference import ref_store

def kill_at(owner, name, call):
    original, calls = getattr(owner, name), []
    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, deadly)

ref_store._BIND_AT_ONCE = 2
store = RefStore.open(sys.argv[2], REFERENCE)
owner, name, call = sys.argv[3:]
kill_at({"os": os, "Path": Path, "none": RefStore}[owner], name, int(call))
store.bind(pairs(range(5)))
"""


def test_binding_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    """Five records become three shards, then two unbound ones go. Killed before the first is written, before the first
    and the second get their names, before the first unbound one goes and before the second; two at once: each time all
    is there, and the next command ends it."""
    kills = [("Path", "write_bytes", 1), ("os", "replace", 1), ("os", "replace", 2), ("Path", "unlink", 1)]
    kills += [("Path", "unlink", 2), ("none", "bind", 2), ("none", "bind", 2)]
    stores, processes = [], []
    for number, kill in enumerate(kills):
        folder = tmp_path / str(min(number, 5))  # the last two are at once in one folder
        if number < 6:
            stores.append(RefStore.open(folder, REFERENCE))
            place_unbound(stores[-1], [0, 1, 2])
            place_unbound(stores[-1], [3, 4])
        command = [sys.executable, "-c", BIND, str(Path(__file__).parent), str(folder), *map(str, kill)]
        processes.append(subprocess.Popen(command, cwd=ROOT))
    stop = -signal.SIGKILL
    assert [process.wait(60) for process in processes] == [stop, stop, stop, stop, stop, 0, 0]
    for number, store in enumerate(stores):
        for _ in range(2):
            store = RefStore.open(store.folder.parent, REFERENCE)
            assert store.lookup(pairs(range(5))).tolist() == logps(range(5)).tolist() and store.set_aside == []
            store.bind(pairs(range(5)))
        assert not store.has_unbound and len(shards(store)) >= 1, number


def test_a_shard_that_is_bound_while_another_reads_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing and the reading, another command binds all: the reader looks again, and misses nothing."""
    store = RefStore.open(tmp_path, REFERENCE)
    place_unbound(store, [0, 1])
    other = RefStore.open(tmp_path, REFERENCE)
    listed, read = ref_store.files_of, []

    def list_then_bind(folder: Path) -> list[Path]:
        paths = listed(folder)
        if not read:
            read.append(1)
            other.bind(pairs([0, 1]))
        return paths

    monkeypatch.setattr(ref_store, "files_of", list_then_bind)
    store.load()
    assert store.lookup(pairs([0, 1])).tolist() == logps([0, 1]).tolist() and not store.has_unbound


# === passes that are killed, and two at once ===


def test_the_writer_flushes_by_pairs_by_time_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """every_pairs 3, every_s 10: after pairs 0-1 nothing, after 2-3 a shard of 4, pair 4 after 10 s, 5 at the end."""
    now = [100.0]
    monkeypatch.setattr(ref_store.time, "monotonic", lambda: now[0])
    store, counts = RefStore.open(tmp_path, REFERENCE), []
    with store.writer(every_pairs=3, every_s=10.0) as writer:
        for numbers, waited in (([0, 1], 9.0), ([2, 3], 0.0), ([4], 10.0), ([5], 9.0)):
            now[0] += waited
            writer.add(pairs(numbers), logps(numbers))
            counts.append((len(shards(store)), len(store)))
    assert counts == [(0, 0), (1, 4), (2, 5), (2, 5)]
    assert len(shards(store)) == 3 and missing(RefStore.open(tmp_path, REFERENCE), pairs(range(6))) == []


PASS = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from test_ref_store import *

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half_and_die(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
    die()

store = RefStore.open(sys.argv[2], REFERENCE)
numbers = missing(store, pairs(range(30)))
with store.writer(every_pairs=5) as writer:
    for done, number in enumerate(numbers):
        if done == 12 and sys.argv[3] == "half-written":
            Path.write_bytes = write_half_and_die
        if done == 12 and sys.argv[3] == "before the rename":
            os.replace = die
        if done == 12 and sys.argv[3] == "buffered":
            die()
        writer.add(pairs([number]), logps([number]))
"""


def start_pass(cache_dir: Path, dies: str = "never") -> subprocess.Popen[bytes]:
    """A pass over pairs 0 to 29 in a process of its own; it may kill itself about the third shard."""
    return subprocess.Popen([sys.executable, "-c", PASS, str(Path(__file__).parent), str(cache_dir), dies], cwd=ROOT)


@pytest.mark.parametrize("dies", ["half-written", "before the rename", "buffered"])
def test_kill_9_loses_at_most_one_flush(tmp_path: Path, dies: str, caplog: pytest.LogCaptureFixture) -> None:
    """Killed while writing the third shard of 5: 10 pairs are there and right, 20 missing; the next pass ends it."""
    assert start_pass(tmp_path, dies).wait(60) == -signal.SIGKILL
    store = RefStore.open(tmp_path, REFERENCE)
    assert missing(store, pairs(range(30))) == list(range(10, 30)) and store.set_aside == []
    assert store.lookup(pairs(range(10))).tolist() == logps(range(10)).tolist()
    assert start_pass(tmp_path).wait(60) == 0
    store = RefStore.open(tmp_path, REFERENCE)
    assert store.lookup(pairs(range(30))).tolist() == logps(range(30)).tolist()
    assert caplog.text == ""


def test_two_passes_at_once_do_no_harm(tmp_path: Path) -> None:
    """Both may compute the same pairs: the store is as after one pass, and no file is in anyone's way."""
    processes = [start_pass(tmp_path), start_pass(tmp_path)]
    assert [process.wait(60) for process in processes] == [0, 0]
    store = RefStore.open(tmp_path, REFERENCE)
    assert len(store) == 30 and store.lookup(pairs(range(30))).tolist() == logps(range(30)).tolist()
    assert [path.name for path in store.folder.iterdir() if path.name.endswith(".tmp")] == []


def test_the_same_content_twice_is_one_shard(tmp_path: Path) -> None:
    """Two passes that finish the same pairs write the same bytes under the same name."""
    one, other = RefStore.open(tmp_path, REFERENCE), RefStore.open(tmp_path, REFERENCE)
    for store in (one, other):
        store.add(pairs([0, 1]), logps([0, 1]))
    assert len(shards(one)) == 1 and one.content_digest(pairs([0, 1])) == other.content_digest(pairs([0, 1]))


def test_a_reload_shows_what_other_ranks_wrote(tmp_path: Path) -> None:
    """Rank 0 and rank 1 of one pass: after the pass, load brings both halves to both."""
    one, other = RefStore.open(tmp_path, REFERENCE), RefStore.open(tmp_path, REFERENCE)
    one.add(pairs([0]), logps([0]))
    other.add(pairs([1]), logps([1]))
    assert missing(one, pairs([0, 1])) == [1]
    one.load()
    other.load()
    assert one.content_digest(pairs([0, 1])) == other.content_digest(pairs([0, 1]))


def test_a_large_store_is_asked_at_once(tmp_path: Path) -> None:
    """100,000 pairs, asked for in the other order: a lookup that searched pair by pair would take minutes."""
    count = 100_000
    many = as_keys([i.to_bytes(16, "little") for i in range(count)], [(1, 1)] * count)
    store = RefStore.open(tmp_path, REFERENCE)
    store.add(many, np.full((count, 2), -1.0, np.float32))
    assert len(RefStore.open(tmp_path, REFERENCE)) == count and missing(store, many[::-1]) == []
