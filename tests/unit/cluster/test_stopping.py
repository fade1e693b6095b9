"""Signals, the loss of a launcher, and when a rank stops for them."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simple_llama.cluster import processes, stopping
from simple_llama.cluster.distributed import Ranks
from simple_llama.cluster.stopping import Stopped

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
SIGNALS = stopping._SIGNALS


@pytest.fixture(autouse=True)
def _signals_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher; handlers and requests of a test end with it."""
    for mark in stopping._LAUNCHER_MARKS:
        monkeypatch.delenv(mark, raising=False)
    before = [signal.getsignal(number) for number in SIGNALS]
    stopping.uninstall()
    yield
    stopping.install()
    stopping.uninstall()
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_work_a_signal_stops_at_once(number: signal.Signals) -> None:
    """Nothing is computed yet, so nothing is waited for."""
    stopping.install()
    with pytest.raises(Stopped, match=number.name):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_at_work_a_signal_waits_for_the_micro_batch(number: signal.Signals) -> None:
    """It raises where ranks agree, and the first reason stays."""
    stopping.install()
    stopping.begin()
    stopping.agree(ALONE)
    os.kill(os.getpid(), number)
    assert stopping.requested() == number.name
    stopping.request("loss of the launcher process")
    with pytest.raises(Stopped, match=number.name):
        stopping.agree(ALONE)


def test_a_second_ctrl_c_does_not_wait() -> None:
    """A person may want to end it now, whoever asked first: another rank's SIGINT is not this one's. A second SIGTERM
    of a scheduler changes nothing."""
    stopping.install()
    stopping.begin()
    stopping.request("SIGINT")
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_new_command_starts_without_a_request() -> None:
    """One process may run several."""
    stopping.install()
    stopping.request("SIGTERM")
    stopping.install()
    stopping.begin()
    stopping.agree(ALONE)
    assert stopping.requested() == ""


def test_signals_are_given_back() -> None:
    """As they were before, also after two commands in one process; an ignored one is never taken."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in SIGNALS]
    for _ in range(2):
        stopping.install()
        assert signal.getsignal(signal.SIGTERM) != before[0]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    stopping.uninstall()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_with_several_ranks_a_signal_always_waits() -> None:
    """While data is read, say: all ranks stop where they agree, with the same status."""
    stopping.install(world_size=2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.requested() == "SIGTERM"


def test_ancestors_are_the_kernel_s() -> None:
    """Parent and grandparent; this test's own parent is the first."""
    chain = processes.ancestors(2)
    assert chain[0] == os.getppid() and len(chain) == 2
    assert processes.ancestors(0) == ()
    shown = subprocess.run(["ps", "-o", "ppid=", "-p", str(chain[0])], capture_output=True, text=True, check=True)
    assert chain[1] == int(shown.stdout)


def test_without_a_launcher_nobody_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup python ... &`, and the shell goes: the run stays."""
    stopping.install()
    assert not stopping.has_launcher()
    monkeypatch.setattr(stopping, "ancestors", lambda depth: (1,))
    assert stopping.lost_launcher(0.0) == stopping.lost_launcher(1e9) == ""


@pytest.mark.parametrize(("mark", "depth"), [("CROSS_SIZE", 2), ("TORCHELASTIC_RUN_ID", 1), ("SLURM_PROCID", 1)])
def test_a_lost_launcher_is_missed_after_ten_seconds(monkeypatch: pytest.MonkeyPatch, mark: str, depth: int) -> None:
    """DeepSpeed's: also its parent. A launcher that ends in order sends SIGTERM first, so there is time for that."""
    monkeypatch.setenv(mark, "1")
    monkeypatch.setattr(stopping, "_nobody_reads", lambda: False)
    chain = list(range(100, 100 + depth))
    monkeypatch.setattr(stopping, "ancestors", lambda wanted: tuple(chain[:wanted]))
    stopping.install()
    assert stopping.has_launcher() and stopping.lost_launcher(50.0) == ""
    chain[-1] = 1
    assert stopping.lost_launcher(51.0) == stopping.lost_launcher(60.9) == ""
    assert stopping.lost_launcher(61.0) == "loss of the launcher process"


def test_a_closed_reader_is_missed(tmp_path: Path) -> None:
    """A process whose stdout, stderr, both or neither lead into a pipe looks twice: while the pipe is read, and after
    its reader has gone."""
    code = """
import os, sys
from simple_llama.cluster.stopping import _nobody_reads

null, found = os.open(os.devnull, os.O_WRONLY), []
for piped in ((1, 2), (1,), (2,), ()):
    reader, writer = os.pipe()
    for stream in (1, 2):
        os.dup2(writer if stream in piped else null, stream)
    os.close(writer)
    found.append(_nobody_reads())
    os.close(reader)
    found.append(_nobody_reads())
open(sys.argv[1], "w").write(repr(found))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "found")], check=True, timeout=60)
    found = ast.literal_eval((tmp_path / "found").read_text())
    assert found == [False, True, False, True, False, True, False, False]
