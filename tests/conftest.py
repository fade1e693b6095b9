"""What all tests share: the same random numbers, two threads, no launcher's variables, no network, no slow disk."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from simple_llama.ops.machine import prepare_gemms

ROOT = Path(__file__).resolve().parents[1]
WHY_DESELECTED = {
    "gpu": "need an NVIDIA GPU; make test-gpu",
    "hosts": "need root, for two hosts in network namespaces; make test-hosts",
}
DESELECTED = pytest.StashKey[list[pytest.Item]]()
FSYNC = os.fsync
LAUNCHER_PREFIXES = ("OMPI_COMM_WORLD_", "SLURM_", "TORCHELASTIC_", "GROUP_", "ROLE_")
LAUNCHER_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}


def pytest_configure(config: pytest.Config) -> None:
    """Settings of the whole session, and of the processes that tests start."""
    config.stash[DESELECTED] = []
    torch.set_num_threads(2)
    os.environ["OMP_NUM_THREADS"] = "2"
    prepare_gemms()  # as each command does: what one test calls must not change the environment of the next
    for name in list(os.environ):
        if name in LAUNCHER_VARIABLES or name.startswith(LAUNCHER_PREFIXES):
            del os.environ[name]  # a test that means to be a rank sets its own
    hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("repeatable")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.fsync = _fsync_without_waiting


def pytest_unconfigure() -> None:
    """As it was."""
    os.fsync = FSYNC


def _fsync_without_waiting(file: Any) -> None:
    """Fails where fsync would, of what is no open file. No test cuts the power, and the disk's milliseconds add up:
    to a tenth of the time of whole runs. Processes that tests start wait as they do anywhere."""
    os.fstat(file if isinstance(file, int) else file.fileno())


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at all of it again and again."""
    gc.collect()
    gc.freeze()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Remembers what `-m` and `-k` left out."""
    for item in items:
        item.config.stash[DESELECTED].append(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says how many tests were left out, and why."""
    for line in deselected_lines(config.stash[DESELECTED]):
        terminalreporter.write_line(line)


def deselected_lines(items: Sequence[pytest.Item]) -> list[str]:
    """One line for each marker of WHY_DESELECTED that left tests out, one for all others."""
    why = [next((name for name in WHY_DESELECTED if item.get_closest_marker(name)), "") for item in items]
    counts = Counter(why)
    lines = [f"deselected {counts[name]} {name} tests: {why}" for name, why in WHY_DESELECTED.items() if counts[name]]
    return lines + ([f"deselected {counts['']} other tests: -m or -k left them out"] if counts[""] else [])


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test starts from the same state of all generators, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's sockets connect to this machine only."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test connects to {address}; tests use no network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of files that are no part of the project: upstream's checkpoints and tokenizer, real preference pairs."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared (checkpoints and data that the project does not ship)")
    return folder
