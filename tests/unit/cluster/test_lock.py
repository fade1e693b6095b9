"""One run a folder: races, killed holders, reused pids, holders on other hosts, take-over of suspended ones."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from simple_llama.cluster import lock
from simple_llama.cluster.lock import FolderLock, _Holder
from simple_llama.common.errors import UserError

ROOT = Path(lock.__file__).parents[2]
# Takes the lock when told to, says how it went, and releases it when told to.
WORKER = """
import sys
from pathlib import Path
from simple_llama.common.errors import UserError
from simple_llama.cluster.lock import FolderLock
print("ready", flush=True)
for line in sys.stdin:
    try:
        lock = FolderLock.take(Path(sys.argv[1]))
    except UserError as error:
        print("refused:", str(error), flush=True)
        sys.stdin.readline()
        continue
    print("won", flush=True)
    sys.stdin.readline()
    lock.release()
    print("released", flush=True)
"""


class Worker:
    """A process that takes a lock."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.hear() == "ready"

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[Worker]]:
    """Two processes for one folder."""
    pair = [Worker(tmp_path), Worker(tmp_path)]
    yield pair
    for worker in pair:
        worker.end()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder out of reach counts as dead after 0.3 s, not 30."""
    monkeypatch.setattr(lock, "_SILENCE_S", 0.3)


def write_lock(folder: Path, **changes: object) -> _Holder:
    """A lock of this process, but for `changes`."""
    holder = dataclasses.replace(lock._this_process(), **changes)  # type: ignore[arg-type]
    (folder / "lock").write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def dead_pid() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(folder: Path) -> list[str]:
    """What lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_take_check_release(tmp_path: Path) -> None:
    """The folder is made; while it is held a second taker is told who, where and since when; afterwards it is free."""
    folder = tmp_path / "made" / "run"
    held = FolderLock.take(folder)
    held.check()
    found = json.loads((folder / "lock").read_text())
    assert found["pid"] == os.getpid() and found["token"] and names(folder) == ["lock"]
    with pytest.raises(UserError) as refused:
        FolderLock.take(folder)
    said = str(refused.value)
    assert f"host {found['host']}, pid {os.getpid()}, since {found['since']}" in said and "run_name" in said
    assert names(folder) == ["lock"]
    held.release()
    held.release()
    assert names(folder) == []
    FolderLock.take(folder).release()
    assert names(folder) == []


@pytest.mark.parametrize("stale", [False, True])
def test_two_processes_race(tmp_path: Path, workers: list[Worker], stale: bool) -> None:
    """50 tries, with no lock and with a dead run's lock in the way: one process has it, the other is refused."""
    gone = dead_pid()
    for _ in range(50):
        if stale:
            write_lock(tmp_path, pid=gone)
        for worker in workers:
            worker.tell()
        answers = [worker.hear() for worker in workers]
        assert sorted(answer.split(":")[0] for answer in answers) == ["refused", "won"], answers
        for worker, answer in zip(workers, answers, strict=True):
            worker.tell()
            if answer == "won":
                assert worker.hear() == "released"
        assert names(tmp_path) == []


def test_a_killed_holder_s_lock_is_free_at_once(
    tmp_path: Path, workers: list[Worker], caplog: pytest.LogCaptureFixture
) -> None:
    """kill -9 of the holder; also before its parent has asked for its end, when its pid is still there."""
    workers[0].tell()
    assert workers[0].hear() == "won"
    started = time.monotonic()
    workers[0].process.kill()
    deadline = started + 5
    while lock._process(workers[0].process.pid)[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.001)
    with caplog.at_level(logging.WARNING, "simple_llama"):
        held = FolderLock.take(tmp_path)
    assert time.monotonic() - started < 5
    assert f"pid {workers[0].process.pid}" in caplog.text and "taken over" in caplog.text
    held.check()
    held.release()


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    """The pid lives (it is this process), but started at another time than the holder."""
    write_lock(tmp_path, started="12345")
    FolderLock.take(tmp_path).release()
    write_lock(tmp_path)
    with pytest.raises(UserError, match="is in use by a run on host"):
        FolderLock.take(tmp_path)


# Same names and numbers do not make the same machine: containers, clones of a machine, a restart.
OUT_OF_REACH = [
    {"host": "elsewhere"},
    {"boot": "00000000-0000-0000-0000-000000000000"},
    {"namespace": "pid:[1]"},
    {"boot": "", "namespace": ""},
]


@pytest.mark.parametrize("changes", OUT_OF_REACH)
def test_a_live_holder_out_of_reach_is_refused(tmp_path: Path, changes: dict[str, str]) -> None:
    """It touches its file every 0.1 s; that the clocks are years apart does not matter."""
    write_lock(tmp_path, pid=dead_pid(), **changes)
    ended = threading.Event()

    def touch() -> None:
        then = 1_000_000
        while not ended.wait(0.1):
            os.utime(tmp_path / "lock", (then, then := then + 1))

    thread = threading.Thread(target=touch)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(UserError, match="is in use by a run on host"):
            FolderLock.take(tmp_path)
    finally:
        ended.set()
        thread.join()
    assert time.monotonic() - started < lock._SILENCE_S / 2  # 30 s would be silence; the first touch decides


@pytest.mark.parametrize("changes", OUT_OF_REACH)
def test_a_silent_holder_out_of_reach_is_taken_over(
    tmp_path: Path, quick: None, changes: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its pid lives here, which says nothing about it; its file never changes."""
    dead = write_lock(tmp_path, since="2026-01-02 03:04:05 +0000", **changes)
    held = FolderLock.take(tmp_path)
    assert f"was locked by a run on host {dead.host}, pid {dead.pid}, since 2026-01-02 03:04:05" in caplog.text
    held.check()
    held.release()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"host": "a", "pid": "7", "boot": "", "namespace": "", "started": "", "token": "", "since": ""}',
        b'{"host": ["a"], "pid": 7, "boot": "", "namespace": "", "started": "", "token": "", "since": ""}',
        b'{"host": "a", "pid": -1, "boot": "", "namespace": "", "started": "", "token": "", "since": ""}',
    ],
)
def test_a_damaged_lock_is_watched(tmp_path: Path, quick: None, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody knows whose it is: taken over when it stays as it is."""
    (tmp_path / "lock").write_bytes(text)
    started = time.monotonic()
    FolderLock.take(tmp_path).release()
    assert time.monotonic() - started >= 0.3
    assert "an unknown run (the lock file is damaged)" in caplog.text and names(tmp_path) == []


def test_a_huge_pid_is_no_crash(tmp_path: Path, quick: None) -> None:
    """A number that no process can have; its system does not say that it is gone, so it is watched."""
    write_lock(tmp_path, pid=10**30)
    FolderLock.take(tmp_path).release()


def test_a_lock_that_goes_while_it_is_watched(tmp_path: Path) -> None:
    """The holder on another host ends: its folder is free at once."""
    write_lock(tmp_path, host="elsewhere")
    timer = threading.Timer(0.2, (tmp_path / "lock").unlink)
    timer.start()
    started = time.monotonic()
    FolderLock.take(tmp_path).release()
    timer.join()
    assert time.monotonic() - started < 5


def test_time_in_which_nobody_looked_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk hangs for 0.5 s, longer than a silence of 0.3 s; the live holder's touch shows a little later."""
    monkeypatch.setattr(lock, "_SILENCE_S", 0.3)
    write_lock(tmp_path, host="elsewhere")
    look, looks = lock._look, [0]

    def slow_look(path: Path) -> lock._Seen | None:
        looks[0] += 1
        if looks[0] == 3:
            time.sleep(0.5)
        if looks[0] == 6:
            os.utime(path, (5, 5))
        return look(path)

    monkeypatch.setattr(lock, "_look", slow_look)
    with pytest.raises(UserError, match="is in use"):
        FolderLock.take(tmp_path)


def test_the_holder_touches_its_own_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file's time changes every _REFRESH_S; that of a run which took over does not."""
    monkeypatch.setattr(lock, "_REFRESH_S", 0.02)
    held = FolderLock.take(tmp_path)
    path = tmp_path / "lock"
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 5
    while path.stat().st_mtime == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_mtime > 1
    path.unlink()
    write_lock(tmp_path)
    os.utime(path, (1, 1))
    time.sleep(0.2)
    assert path.stat().st_mtime == 1
    held.release()


def test_a_run_that_was_taken_over_is_told_and_leaves_the_other_s_lock(tmp_path: Path) -> None:
    """As after a suspended laptop: check() stops the first run; its release() does not free the second one's folder."""
    first = FolderLock.take(tmp_path)
    write_lock(tmp_path, started="1")  # as if the first one were gone
    second = FolderLock.take(tmp_path)
    with pytest.raises(UserError, match=r"no longer locked by this run.*belongs to a run on host .*, pid"):
        first.check()
    first.release()
    second.check()
    second.release()
    with pytest.raises(UserError, match="its lock file was removed"):
        second.check()


def test_removing_is_for_the_file_that_was_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another taker was faster: its lock stays, also where the disk has no flock and it slips in before the rename."""
    path, rename = tmp_path / "lock", os.rename
    dead = write_lock(tmp_path, pid=dead_pid())
    judged = path.read_bytes()
    live = write_lock(tmp_path)
    assert live.token != dead.token and not lock._remove(path, judged)
    path.write_bytes(judged)

    def rename_late(source: Path, target: Path) -> None:
        path.unlink()
        write_lock(tmp_path, token=live.token)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_late)
    assert not lock._remove(path, judged)
    assert json.loads(path.read_text())["token"] == live.token and names(tmp_path) == ["lock"]


def test_disks_without_links_and_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is exclusive and whole there too."""

    def unsupported(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    write_lock(tmp_path, pid=dead_pid())
    held = FolderLock.take(tmp_path)
    held.check()
    with pytest.raises(UserError, match="is in use"):
        FolderLock.take(tmp_path)
    held.release()
    assert names(tmp_path) == []


@pytest.mark.parametrize("failing", ["open", "fsync", "link"])
def test_a_disk_that_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Full when the file is made, when its bytes reach the disk, when it gets its name: nothing is left."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock if failing == "open" else os, failing, full, raising=False)
    with pytest.raises(UserError, match=r"cannot write .*lock: No space left on device; free space"):
        FolderLock.take(tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_a_link_in_place_of_the_lock_is_a_user_error(tmp_path: Path) -> None:
    """It leads nowhere: to open it finds no file, to make it finds one."""
    (tmp_path / "lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot write"):
        FolderLock.take(tmp_path)


def test_a_pipe_in_place_of_the_lock_is_a_user_error(tmp_path: Path) -> None:
    """It would be waited for without end."""
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(UserError, match="lock: expected a file, found something else"):
        FolderLock.take(tmp_path)


def test_a_lock_that_changes_hands_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time somebody else was faster, and gone at the next look: given up after 100 turns."""
    turns = []
    monkeypatch.setattr(lock, "_create", lambda path, me: turns.append(path))
    with pytest.raises(UserError, match="locked by one run after the other"):
        FolderLock.take(tmp_path)
    assert len(turns) == 100
