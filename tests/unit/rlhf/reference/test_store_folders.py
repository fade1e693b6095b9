"""launch/store.py names what lies in a cache, finds damage, and removes only what it is told to remove."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simple_llama.cluster.lock import FolderLock
from simple_llama.common import files
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf import store as commands
from simple_llama.reinforcement_learning.rlhf.data.pair_key import as_keys
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id
from simple_llama.reinforcement_learning.rlhf.store import run_store

ROOT = Path(files.__file__).parents[2]


def age(path: Path, days: float) -> None:
    """Makes a file so many days older."""
    then = path.stat().st_mtime - 86400 * days
    os.utime(path, (then, then))


def filled(cache_dir: Path, name: str = "weights", days: float = 0.0) -> RefStore:
    """A store of three shards of one pair each, opened and written so many days ago."""
    store = RefStore.open(cache_dir, reference_id(name, "tokenizer", {"dtype": "bfloat16", "head": "1"}))
    for i in range(3):
        keys = as_keys([files.digest(str(i).encode())], [(i + 1, i + 2)])
        store.add(keys, np.full((1, 2), -1.0, np.float32))
    store.note_model("/models/start.pth")
    for path in store.folder.iterdir():
        age(path, days)
    return store


def run(cache_dir: Path, *words: str) -> int:
    """An action on a cache."""
    return run_store("help", [words[0], "--ref_cache_dir", str(cache_dir), *words[1:]])


def test_list_tells_of_each_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two stores: digest, entries, shards, dtype, model, weights. Nothing is changed by looking."""
    stores = [filled(tmp_path, name) for name in ("weights", "others")]
    run(tmp_path, "merge", "--digests", stores[0].reference_digest[:6])
    capsys.readouterr()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert run(tmp_path, "list") == 0
    out = capsys.readouterr().out
    assert all(store.reference_digest in out for store in stores)
    assert "3 entries in 1 merged and 0 other shards" in out and "3 entries in 0 merged and 3 other shards" in out
    assert "bfloat16; model /models/start.pth; used 20" in out and "weights others, tokenizer tokenizer, head 1" in out
    assert "2 reference stores in" in out and "leftovers" not in out
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_verify_names_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sound store: status 0. A flipped bit in a small shard, in a merged one, in its index, another reference.json:
    each is named with what to do, status 2; nothing is renamed."""
    small, merged = filled(tmp_path, "small"), filled(tmp_path, "merged")
    run(tmp_path, "merge", "--digests", merged.reference_digest)
    assert run(tmp_path, "verify") == 0
    capsys.readouterr()
    for path in (next(small.folder.glob("*.npy")), *merged.folder.glob("*.npy"), *merged.folder.glob("*.index")):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert run(tmp_path, "verify") == 2
        out = capsys.readouterr().out
        assert f"{path}: expected" in out and "2 reference stores read: 1 faults" in out and path.exists()
        path.write_bytes(data)
    (small.folder / "reference.json").write_text("{}")
    assert (
        run(tmp_path, "verify") == 2
        and "expected the reference that the folder is called by" in capsys.readouterr().out
    )


def test_prune_removes_by_choice_and_only_with_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of stores used 100 and 10 days ago the first is older than 90; without --yes it is only named."""
    old, young = filled(tmp_path, "old", days=100), filled(tmp_path, "young", days=10)
    assert run(tmp_path, "prune", "--older_than_days", "90") == 0
    assert f"would remove {old.folder} (3 entries" in capsys.readouterr().out and old.folder.exists()
    run(tmp_path, "prune", "--older_than_days", "90", "--yes")
    assert "1 removed" in capsys.readouterr().out and [*tmp_path.iterdir()] == [young.folder]
    run(tmp_path, "prune", "--digests", young.reference_digest[:8], "--yes")
    assert [*tmp_path.iterdir()] == []


def test_a_run_that_opens_a_store_uses_it(tmp_path: Path) -> None:
    """Opened now, a store of 100 days is young; a dry run, which only reads, does not count."""
    old = filled(tmp_path, "old", days=100)
    reference = reference_id("old", "tokenizer", {"dtype": "bfloat16", "head": "1"})
    for mend, stays in ((False, False), (True, True)):
        RefStore.open(tmp_path, reference, make=False, mend=mend)
        used = old.folder.joinpath("reference.json").stat().st_mtime
        assert (used > old.folder.stat().st_mtime - 86400) == stays


def test_prune_leaves_what_is_in_use(tmp_path: Path) -> None:
    """A store that a merge has locked, one written this minute, one in which other files lie: all of them stay."""
    locked, fresh, mixed = filled(tmp_path, "a", days=9), filled(tmp_path, "b"), filled(tmp_path, "c", days=9)
    lock = FolderLock.take(locked.folder)
    (mixed.folder / "notes.txt").write_text("mine")
    for store, words in ((locked, "is in use by a run"), (fresh, "shard of [0-9]+ s ago"), (mixed, "notes.txt")):
        with pytest.raises(UserError, match=words):
            run(tmp_path, "prune", "--digests", store.reference_digest, "--yes")
        assert len([*store.folder.glob("*.npy")]) == 3
    lock.release()


def test_leftovers_go_after_a_week(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A temp file and a shard set aside of eight days ago, and a store half removed then: gone. One of now stays."""
    store = filled(tmp_path)
    old = [store.folder / f".shard-{'a' * 32}.npy.1.2.tmp", store.folder / f"shard-{'b' * 32}.npy.corrupt"]
    half, now = tmp_path / f".{'c' * 32}.12345678.tmp", store.folder / ".now.tmp"
    half.mkdir()
    for path in (*old, now):
        path.write_bytes(b"x")
    for path in (*old, half):
        age(path, 8)
    run(tmp_path, "list")
    assert "3 leftovers" in capsys.readouterr().out
    run(tmp_path, "prune", "--leftovers")
    assert "3 would be removed" in capsys.readouterr().out and all(path.exists() for path in (*old, half))
    run(tmp_path, "prune", "--leftovers", "--yes")
    assert not any(path.exists() for path in (*old, half)) and now.exists() and len([*store.folder.glob("*.npy")]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one of list, verify, merge, prune, export, import as the first word, found nothing"),
        (["purge"], "found 'purge'"),
        (["prune"], "expected what to remove"),
        (["prune", "--digests", "0123456"], "with which 0 begin"),
        (["merge", "--digests", "3"], "first 4 letters or more"),
        (["list", "--ref_cache_dir", "nowhere"], "cannot read nowhere: No such file"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, words: list[str], message: str) -> None:
    """Mistakes of the command line."""
    where = [] if not words or "--ref_cache_dir" in words else ["--ref_cache_dir", str(tmp_path)]
    with pytest.raises(UserError, match=message):
        run_store("help", [*words, *where])


def test_the_script_starts_without_torch(tmp_path: Path) -> None:
    """`list` of a cache is there at once; status 2 and one line for a mistake."""
    filled(tmp_path)
    code = f"import sys, {commands.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    command = [sys.executable, "launch/store.py"]
    done = subprocess.run(
        [*command, "list", "--ref_cache_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "3 entries" in done.stdout
    done = subprocess.run([*command, "purge"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: expected one of list")
