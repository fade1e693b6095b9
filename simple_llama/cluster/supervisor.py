"""Runs a launcher's command to an honest end; `launch/supervise.py` is its command line. Needs no torch.

A launcher by itself (DeepSpeed: pdsh, then a process on each host) waits for ever for a host that hangs or is cut off,
returns 0 when its own child was killed, and leaves ranks behind when it is killed. Under supervision

- a launch in which one host has failed is ended on all hosts `grace_s` later, and has that host's status;
- the status is 0 only when the job itself said FINISHED;
- a signal asks the ranks to save and stop (status 75), not the launcher to kill them;
- no process that was started on this host stays behind, whichever of them was killed, this one too.

Hosts other than this one are reached with pdsh, for DeepSpeed's pdsh launcher alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from simple_llama.cluster.hostfile import check_environment_files, option, read_hostfile
from simple_llama.cluster.processes import stat_fields
from simple_llama.common.errors import UserError

FINISHED = "job finished on all ranks"  # the last line of a job that is done
_KEEPALIVE = "-o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"  # ssh notices a dead link in 15 s
_UNFINISHED = 1  # exit status where the launcher's own would be 0

_POLL_S = 0.2
_KILL_S = 20.0  # from SIGTERM to SIGKILL of a launcher: it asks all hosts to end their processes
_CLEAN_UP_S = 40.0  # the same for what a killed launcher left: it may be saving
_HURRY_S = 3.0  # from a second signal to SIGKILL of all that is left
_READ_S = 15.0  # for output that is not passed on yet
_UNKILLABLE_S = 10.0  # after SIGKILL: a process that waits for a dead disk cannot be ended
_AGAIN_S = 1.0  # between two signals that are meant as two
_TWICE_S = 0.1  # the same of two SIGINTs: some programs pass on a Ctrl-C that has come to all
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_HOST_FAILED = re.compile(rb"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl


def supervise(command: Sequence[str], grace_s: float = 15.0) -> int:
    """Runs `command` (a launcher with its arguments) to its end; returns the exit status to end with.

    Args:
        grace_s: seconds that the other hosts have to end by themselves after the first has failed.

    Raises:
        UserError: no such program, or a hostfile or environment file that the launcher would stumble over.
    """
    if not command or shutil.which(command[0]) is None:
        raise UserError(f"expected a launcher's command, like deepspeed ..., found {' '.join(command) or 'nothing'}")
    hosts: list[str] = []
    if Path(command[0]).name == "deepspeed":
        path = option(command, "--hostfile", "-H")
        if option(command, "--launcher").lower() in ("", "pdsh"):
            hosts = read_hostfile(path)
            check_environment_files(os.environ)
        elif path and not os.path.isfile(path):
            raise UserError(f"{path}: expected a hostfile, found no such file")
    launch = _Launch(command, hosts)
    launch.wait(grace_s)
    launch.clean_up()
    return launch.status()


class _Launch:
    """One run of a launcher and of all that it started."""

    def __init__(self, command: Sequence[str], hosts: Sequence[str]):
        self.command, self.hosts = command, hosts
        self.finished = False
        self.failed_host, self.failed_status, self.failed_at = "", 0, 0.0
        self.stop_at, self.interrupt_at = 0.0, 0.0  # when a signal asked to stop; when the last SIGINT came
        self.hurry_at = 0.0  # when one came again
        self.left: list[int] = []  # processes that cannot be ended
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # which nohup and background shells ask for
                signal.signal(number, self.on_signal)
        _prctl(_SET_CHILD_SUBREAPER, 1)  # what a killed launcher leaves becomes our child, and is ended
        self.process = subprocess.Popen(
            command,
            env=_environment_with_keepalive(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C comes to this process alone
            preexec_fn=_die_with_parent,
        )
        streams = ((self.process.stdout, sys.stdout.buffer), (self.process.stderr, sys.stderr.buffer))
        self.readers = [threading.Thread(target=self.pass_on, args=stream, daemon=True) for stream in streams]
        for reader in self.readers:
            reader.start()

    def on_signal(self, number: int, frame: object) -> None:
        """Notes that somebody asks to stop; then, by another Ctrl-C or a later signal, that they will not wait."""
        now, name = time.monotonic(), signal.Signals(number).name
        twice = number == signal.SIGINT and self.interrupt_at and now - self.interrupt_at > _TWICE_S
        if number == signal.SIGINT:
            self.interrupt_at = now
        if not self.stop_at:
            self.stop_at = now
            _say(f"{name}: asking all ranks to save and stop; Ctrl-C once more: without saving")
        elif (twice or now - self.stop_at > _AGAIN_S) and not self.hurry_at:
            self.hurry_at = now
            _say(f"{name} again: ending all without saving")

    def pass_on(self, source: IO[bytes], sink: IO[bytes]) -> None:
        """Copies the launcher's output, and notes what it says of the job's end."""
        for line in source:
            if line.rstrip().endswith(FINISHED.encode()):
                self.finished = True
            if (found := _HOST_FAILED.search(line)) and not self.failed_host:
                self.failed_host, self.failed_status = found[1].decode(errors="replace"), int(found[2])
                self.failed_at = time.monotonic()
            with contextlib.suppress(OSError, ValueError):  # nobody reads us any more: the job goes on
                sink.write(line)
                sink.flush()

    def wait(self, grace_s: float) -> None:
        """Until the launcher has ended, by itself or by us.

        That is as long as the job takes: a job that hangs is ended by its ranks' watchdogs, and a host's failure, or
        a second signal, by us.
        """
        asked = False
        while self.process.poll() is None:
            if self.stop_at and not asked:
                asked = True
                self.signal_ranks("TERM")
            if self.hurry_at:
                self.signal_ranks("INT", twice=True)  # as Ctrl-C twice does to a rank: it ends, if it can, with a word
                self.wait_for_launcher()
                self.terminate()
                return
            if self.failed_host and time.monotonic() - self.failed_at > grace_s:
                _say(f"host {self.failed_host} has failed, others have not ended within {grace_s:g} s: ending all")
                self.terminate()
                return
            time.sleep(_POLL_S)

    def terminate(self) -> None:
        """Ends the launcher; DeepSpeed's then ends its processes on all hosts that it can reach."""
        if self.process.poll() is not None:
            return
        self.signal_ranks("CONT")  # a stopped process takes no other signal; awake, it finds its peers gone, and ends
        self.process.terminate()
        if not self.wait_for_launcher():
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_UNKILLABLE_S)

    def wait_for_launcher(self) -> bool:
        """Waits until the launcher has ended, but not for ever; whether it has."""
        began = time.monotonic()
        while self.process.poll() is None and time.monotonic() - began < (_HURRY_S if self.hurry_at else _KILL_S):
            time.sleep(_POLL_S)
        return self.process.poll() is not None

    def signal_ranks(self, name: str, twice: bool = False) -> None:
        """Sends a signal to the ranks: by pdsh where there are several hosts, else to those on this one."""
        if len(self.hosts) > 1 and shutil.which("pdsh"):
            script = next((word for word in self.command[1:] if word.endswith(".py")), "")
            pattern = f" [-]u {re.escape(script)}"  # `python -u SCRIPT`; the bracket keeps the remote shell out of it
            remote = f"pkill -{name} -u $(id -u) -f '{pattern}'"
            remote += f"; sleep {_TWICE_S * 2:g}; {remote}" * twice
            environment = {**_environment_with_keepalive(os.environ), "PDSH_RCMD_TYPE": "ssh"}
            subprocess.Popen(["pdsh", "-w", ",".join(self.hosts), remote], env=environment, start_new_session=True)
            return
        ranks = [pid for pid in _descendants(os.getpid()) if _is_rank(pid)] or [self.process.pid]
        for pid in ranks:
            _send(pid, signal.Signals[f"SIG{name}"])
        if twice:
            time.sleep(_TWICE_S * 2)  # two that come together are one
            for pid in ranks:
                _send(pid, signal.Signals[f"SIG{name}"])

    def clean_up(self) -> None:
        """Ends what the launcher left on this host, gently first: ranks may be saving."""
        began = time.monotonic()
        told: set[int] = set()
        while left := _descendants(os.getpid()):
            ends = max(began, self.hurry_at + _HURRY_S) if self.hurry_at else began + _CLEAN_UP_S
            late_s = time.monotonic() - ends
            if late_s > _UNKILLABLE_S:
                self.left = left
                break
            for pid in left:
                if late_s > 0 or pid not in told:
                    _send(pid, signal.SIGKILL if late_s > 0 else signal.SIGTERM)
            if not told:
                _say(f"ending {len(left)} processes that the launcher left")
            told.update(left)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(_POLL_S)
        for reader in self.readers:  # what was said last is often the reason
            reader.join(_READ_S)

    def status(self) -> int:
        """The exit status of the host that failed first, or the launcher's; a shell's 128 + n for a signal.

        Never 0 for a job that has not finished.
        """
        status = self.process.poll()
        if status is None:  # it cannot be ended: one of `left`
            status = _UNFINISHED
        if status < 0:
            _say(f"the launcher was ended by {signal.Signals(-status).name}")
            status = 128 - status
        if self.failed_status and not self.hurry_at:
            status = self.failed_status  # the launcher's own is the largest of all hosts', or 1 when it was ended
        if not status and not self.finished:
            _say("the launcher ended with status 0, but the job did not say that it finished: taken for a failure")
            status = _UNFINISHED
        if self.left:
            _say(f"cannot end processes {', '.join(map(str, self.left))}: see what they wait for")
            status = status or _UNFINISHED
        if self.failed_host and not self.stop_at:
            _say(f"host {self.failed_host} failed first, with status {self.failed_status}; see its lines above")
        return status


def _environment_with_keepalive(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with options for pdsh's ssh that end a connection over a dead link."""
    options = environment.get("PDSH_SSH_ARGS_APPEND", "")
    if "ServerAlive" not in options:
        options = f"{options} {_KEEPALIVE}".strip()
    return {**environment, "PDSH_SSH_ARGS_APPEND": options}


def _descendants(root: int) -> list[int]:
    """Process ids of all that `root` started and that runs still, zombies left out; empty without /proc."""
    children: dict[int, list[int]] = {}
    for pid, parent in _processes():
        children.setdefault(parent, []).append(pid)
    found, ahead = [], [root]
    while ahead:
        ahead += (below := children.get(ahead.pop(), []))
        found += below
    return found


def _send(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process, unless it has gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_rank(pid: int) -> bool:
    """Whether a launcher started this process as a rank: LOCAL_RANK is set in it, and not in its parent."""
    return _has_local_rank(pid) and not any(_has_local_rank(parent) for child, parent in _processes() if child == pid)


def _processes() -> Iterator[tuple[int, int]]:
    """(pid, parent's pid) of each process that is no zombie."""
    for folder in Path("/proc").glob("[0-9]*"):
        fields = stat_fields(int(folder.name))
        if fields and fields[0] != "Z":
            yield int(folder.name), int(fields[1])


def _has_local_rank(pid: int) -> bool:
    """Whether LOCAL_RANK was in a process's environment when it started."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(variable.startswith((b"LOCAL_RANK=", b"SLURM_LOCALID=")) for variable in variables)


def _prctl(what: int, value: int) -> None:
    """Linux's prctl; nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


def _die_with_parent() -> None:
    """In the launcher, before it starts: SIGTERM when this process is killed, however hard."""
    _prctl(_SET_PDEATHSIG, signal.SIGTERM)


def _say(message: str) -> None:
    """A line of the supervisor's own, on stderr."""
    with contextlib.suppress(OSError):
        print(f"supervise: {message}", file=sys.stderr, flush=True)
