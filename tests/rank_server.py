"""Starts ranks for tests by forking a process that has imported torch and DeepSpeed: 0.02 s in the place of 2.5 s.

A rank that is started so is as one that Python started, where a test can look: arguments, environment, working folder,
session, signals, exit status, random numbers of its own; the project's modules it imports itself, and all threads are
its own. What differs: its parent, its line in `ps`, and the hash seed, which is its server's (tiny_job has a server for
even ranks and one for odd ones).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What ranks import of others, with all that those import. None of the project's own: tests/crash_at.py patches some
# before others import from them.
_IMPORTS = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "safetensors.torch",
    "tokenizers",
    "torch.utils.tensorboard",
    "tqdm",
    "typing_extensions",
    "tyro",
)
# Nothing reads these while it is imported; all other variables must be those with which the server was started.
_FREE = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST"}
# The imports set these themselves, here to what they are set to there.
_FREE |= {"DS_ACCELERATOR", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK"}
_PID, _STATUS = struct.Struct("q"), struct.Struct("i")  # what the server says of a rank: first one, then the other


class RankServer:
    """The process that forks, started here with that environment. Linux only."""

    def __init__(self, environment: Mapping[str, str]):
        self._environment = _read_early(environment)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
            )
        atexit.register(self.close)

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Whether the libraries would have read the same from this environment."""
        return _read_early(environment) == self._environment

    def start(self, script: str, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedRank:
        """Starts a script in the project's root. `environment` is one that `can_start`."""
        assert self.can_start(environment)
        output, its_output = os.pipe()
        report, its_report = os.pipe()
        order = [script, *arguments], dict(environment)
        socket.send_fds(self._control, [json.dumps(order).encode()], [its_output, its_report])
        os.close(its_output)
        os.close(its_report)
        return ForkedRank(script, output, report)

    def close(self) -> None:
        """Ends the server; ranks that still run are left alone."""
        self._control.close()
        self._process.wait()


class ForkedRank:
    """A started rank: the part of `subprocess.Popen` that tests use, for text, with stderr in stdout."""

    def __init__(self, script: str, output: int, report: int):
        self.args, self.returncode = script, None
        self.stdout = open(output, errors="replace")  # noqa: SIM115 - closed by who reads it to its end
        self._report, self._said = report, b""
        answer = os.read(report, _PID.size)
        assert answer, "the rank server has ended"
        [self.pid] = _PID.unpack(answer)

    def __del__(self) -> None:
        self.stdout.close()  # a rank that was killed is not always heard to the end

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._status(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when it has ended. Raises subprocess.TimeoutExpired."""
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """(all that it said, None), when it has ended. Raises subprocess.TimeoutExpired; may be called again then."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.stdout.closed:
            if not _readable(self.stdout.fileno(), _left(deadline)):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            piece = os.read(self.stdout.fileno(), 1 << 16)
            self._said += piece
            if not piece:
                self.stdout.close()
        self.wait(_left(deadline))
        return self._said.decode(errors="replace").replace("\r\n", "\n"), None

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM, unless it has ended."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def _status(self, timeout: float | None) -> int | None:
        """The exit status as subprocess has it; None where it still runs after the timeout."""
        if self.returncode is None and _readable(self._report, timeout):
            answer = os.read(self._report, _STATUS.size)
            assert answer, "the rank server has ended"
            [self.returncode] = _STATUS.unpack(answer)
            os.close(self._report)
        return self.returncode


def possible() -> bool:
    """Whether this system tells of a process's end through a file descriptor: Linux from 5.3 on."""
    return hasattr(os, "pidfd_open")


def _read_early(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that must be the same."""
    return {name: value for name, value in environment.items() if name not in _FREE}


def _left(deadline: float | None) -> float | None:
    """Seconds until then, at least none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _readable(descriptor: int, timeout: float | None) -> bool:
    """Whether there is something to read, or the end of it, within this time."""
    return bool(select.select([descriptor], [], [], timeout)[0])


# === In the server ===


def _serve(control: socket.socket) -> Any:
    """Forks a rank for each order that comes, tells how each ends, and ends with its client. Returns in a rank: the
    order."""
    ranks: dict[int, tuple[int, int]] = {}  # by descriptor of the process: its id, where to report
    while True:
        for ready in select.select([control, *ranks], [], [])[0]:
            if not isinstance(ready, socket.socket):
                pid, report = ranks.pop(ready)
                os.write(report, _STATUS.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                os.close(report)
                os.close(ready)
                continue
            order, descriptors, _, _ = socket.recv_fds(control, 1 << 18, 2)
            if not order:
                os._exit(0)
            output, report = descriptors
            pid = os.fork()
            if not pid:
                control.close()
                for descriptor in (report, *ranks, *(to for _, to in ranks.values())):
                    os.close(descriptor)
                for stream in (1, 2):
                    os.dup2(output, stream)
                os.close(output)
                return json.loads(order)
            os.close(output)
            os.write(report, _PID.pack(pid))
            ranks[os.pidfd_open(pid)] = pid, report


def _fresh_random_numbers() -> None:
    """Each rank draws its own, as each process does; Python's `random` sees to that itself."""
    import numpy as np
    import torch

    np.random.seed()
    torch.default_generator.seed()


def main() -> None:
    """Imports, serves; in a rank, runs its script as Python would."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's import would look for a GPU
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a rank's collections do not touch, and so copy, what is imported
    sys.stdout.flush()
    arguments, environment = _serve(control)
    _fresh_random_numbers()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = arguments, str((ROOT / arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
