"""A folder that only one run writes at a time: a lock file that is seen by every host that shares the disk.

    <folder>/lock      JSON: who holds it (host, pid, ...) and a random token; touched every few seconds by its holder

A holder in reach (same host, boot and PID namespace) is asked of the kernel; so a killed run's lock is free at once.
Any other one is watched: a live holder's file changes within _SILENCE_S. Clocks of different hosts are never compared.
Beside that watch nothing here waits, but for the disk: a run that hangs with it is the watchdog's to end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from simple_llama.cluster.processes import boot_id, stat_fields
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER

NAME = "lock"
_REFRESH_S = 5.0  # between touches by the holder
_SILENCE_S = 30.0  # without a touch, watched on the taker's clock, after which a holder out of reach counts as dead
_LOOKS = 60  # of the taker during _SILENCE_S
_TURNS = 100  # in which the lock may change hands before the taker gives up
_MOST = 1 << 16  # bytes of a lock file; ours has a few hundred

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}  # file systems without links


@dataclass(frozen=True)
class _Holder:
    """Who wrote a lock file. An empty `boot`, `namespace` or `started` is one that its system does not tell."""

    host: str
    pid: int
    boot: str  # differs after each start of the machine
    namespace: str  # of PIDs: containers may share a host name and count their processes from 1
    started: str  # when the process started, in ticks since boot: tells a reused pid
    token: str
    since: str

    def __str__(self) -> str:
        return f"a run on host {self.host}, pid {self.pid}, since {self.since}"

    def is_in_reach(self) -> bool:
        """Whether this process can ask the kernel about that pid."""
        here = _this_process()
        same = (self.host, self.boot, self.namespace) == (here.host, here.boot, here.namespace)
        return same and self.boot != ""  # the host's name alone may be another machine's too


@dataclass(frozen=True)
class _Seen:
    """A lock file at one moment. `holder` is None where its text is none of ours."""

    text: bytes
    touched_ns: int
    holder: _Holder | None

    def __str__(self) -> str:
        return str(self.holder or "an unknown run (the lock file is damaged)")


class FolderLock:
    """A held lock; made by `take`. A process that ends without `release` leaves a lock that the next one finds dead."""

    def __init__(self, path: Path, token: str, file: BinaryIO):
        """Starts the touching; use `FolderLock.take`."""
        self.path, self._token = path, token
        self._ended = threading.Event()
        # A thread of its own, which nobody waits for: touching a file on a disk that hangs takes forever.
        threading.Thread(target=_keep_touching, args=(file, self._ended), name="lock", daemon=True).start()

    @classmethod
    def take(cls, folder: Path) -> FolderLock:
        """Locks `folder`, made if it is not there. A dead run's lock is taken over with a warning that names the run.

        Raises:
            UserError: a live run holds the lock (at once, or after up to _SILENCE_S for one on another host), or the
                disk does not let it be written.
        """
        path, me = folder / NAME, _this_process()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(_TURNS):
                if (file := _create(path, me)) is not None:
                    return cls(path, me.token, file)
                seen = _look(path)
                if seen is not None and _is_dead(path, seen) and _remove(path, seen.text):
                    LOGGER.warning("%s was locked by %s, which is dead: taken over", folder, seen)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; free space or choose another place"
            ) from error
        raise UserError(f"{folder} is locked by one run after the other; wait, or choose another place (run_name)")

    def check(self) -> None:
        """Raises UserError when the lock is no longer ours: another run took it for dead while we were suspended."""
        try:
            seen = _look(self.path)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}; the run stops") from error
        if seen is None or not self._is_ours(seen):
            now = "its lock file was removed" if seen is None else f"it belongs to {seen}"
            raise UserError(
                f"{self.path.parent} is no longer locked by this run, which was suspended or cut off from the disk for "
                f"more than {_SILENCE_S:g} s: {now}; this run stops so as not to write beside another one"
            )

    def release(self) -> None:
        """Stops the touching and removes the lock file, if it is still ours. Calling it again does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        try:
            seen = _look(self.path)
            if seen is not None and self._is_ours(seen):
                _remove(self.path, seen.text)
        except (OSError, UserError) as error:  # the next run finds this process gone
            LOGGER.warning("cannot remove %s: %s", self.path, error)

    def _is_ours(self, seen: _Seen) -> bool:
        return seen.holder is not None and seen.holder.token == self._token


def _this_process() -> _Holder:
    """This process as a holder, with a fresh token."""
    try:
        boot, namespace = boot_id(), os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        boot, namespace = "", ""
    _, started = _process(os.getpid())
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return _Holder(socket.gethostname(), os.getpid(), boot, namespace, started, secrets.token_hex(16), since)


def _is_dead(path: Path, seen: _Seen) -> bool:
    """Whether the holder is gone; False: the file has changed hands, look again. UserError when it lives."""
    if seen.holder is not None and seen.holder.is_in_reach():
        runs = _runs(seen.holder)
        if runs:
            raise _in_use(path, seen)
        if runs is False:
            return True
    return _is_silent(path, seen)


def _runs(holder: _Holder) -> bool | None:
    """Whether a process in reach still runs; None where the system does not tell."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's; or a number that no process can have
        pass
    state, started = _process(holder.pid)
    if not (started and holder.started):
        return None
    return started == holder.started and state not in ("Z", "X")  # a zombie is dead, only not buried


def _process(pid: int) -> tuple[str, str]:
    """(state, start time in ticks since boot) of a process; empty where the system does not tell."""
    fields = stat_fields(pid)
    return (fields[0], fields[19]) if fields else ("", "")


def _is_silent(path: Path, seen: _Seen) -> bool:
    """Watches a holder out of reach for up to _SILENCE_S; False: the file has changed hands. UserError when it lives.

    Only time in which we looked counts as silence: where this process or the disk hung, the holder may have hung too.
    """
    LOGGER.warning("%s is locked by %s: watching for up to %g s whether it lives", path.parent, seen, _SILENCE_S)
    pause, silent = _SILENCE_S / _LOOKS, 0.0
    while silent < _SILENCE_S:
        before = time.monotonic()
        time.sleep(pause)
        now = _look(path)
        if now is None or now.text != seen.text:
            return False
        if now.touched_ns != seen.touched_ns:
            raise _in_use(path, seen)
        silent += min(time.monotonic() - before, 2 * pause)
    return True


def _in_use(path: Path, seen: _Seen) -> UserError:
    """What the second run is told."""
    return UserError(
        f"{path.parent} is in use by {seen}; wait until it has ended, stop it, or choose another place (run_name)"
    )


def _look(path: Path) -> _Seen | None:
    """The lock file now, None when there is none. Opened anew each time: a network disk asks its server only then."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # without it a named pipe hangs here
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "expected a file, found something else", os.fspath(path))
        text = file.read(_MOST)
        return _Seen(text, os.fstat(descriptor).st_mtime_ns, _parse(text))


def _parse(text: bytes) -> _Holder | None:
    """Who wrote a lock file, None where its text is none of ours."""
    try:
        holder = _Holder(**json.loads(text))
    except (ValueError, TypeError, RecursionError):  # no JSON, no object, other keys
        return None
    texts = (holder.host, holder.boot, holder.namespace, holder.started, holder.token, holder.since)
    sound = type(holder.pid) is int and holder.pid > 0 and all(isinstance(text, str) for text in texts)
    return holder if sound else None


def _create(path: Path, me: _Holder) -> BinaryIO | None:
    """Makes the lock file, whole and exclusively; gives it open, or None where there is one already."""
    temp = path.with_name(f".{path.name}.{me.token}.tmp")
    file = open(temp, "xb")  # noqa: SIM115 (open as long as the lock is held)
    made = False
    try:
        file.write((json.dumps(dataclasses.asdict(me), indent=2) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())  # a full disk may say so only now
        made = _put(temp, path)
    finally:
        temp.unlink(missing_ok=True)
        if not made:
            file.close()
    return file if made else None


def _put(temp: Path, path: Path) -> bool:
    """Gives `temp` the name `path`; False where there is such a file already.

    By a link: exclusive opening is not atomic on every network disk. Where there are no links, it must do.
    """
    try:
        os.link(temp, path)
        return True
    except FileExistsError:
        return os.stat(temp).st_nlink > 1  # made, but the answer got lost and the network asked twice
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    os.replace(temp, path)
    return True


def _remove(path: Path, text: bytes) -> bool:
    """Removes the lock file if it is still the one with `text`, which no two processes manage for the same file.

    The old file itself is locked meanwhile (flock), so that nobody removes the one that takes its place. Where disks
    have no such locks, renaming still lets only one win, and what was renamed by mistake is put back.

    Raises UserError when another process is doing the same.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    with open(descriptor, "rb") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent} is being taken by another run at this moment") from None
        except OSError:
            pass  # a disk without such locks
        aside = path.with_name(f".{path.name}.{secrets.token_hex(16)}.tmp")
        try:
            if file.read(_MOST) != text or not os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return False
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        if not os.path.samestat(os.stat(aside), os.fstat(descriptor)):
            os.replace(aside, path)
            return False
        aside.unlink()
        return True


def _keep_touching(file: BinaryIO, ended: threading.Event) -> None:
    """Touches the lock file until `ended`. Through the open file: that of a run that took over is not ours to touch."""
    with file:
        while not ended.wait(_REFRESH_S):
            with contextlib.suppress(OSError):  # a disk that is away may come back
                os.utime(file.fileno())
