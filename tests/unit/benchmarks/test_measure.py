"""Memory of processes, and rounds that others disturb."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import PeakMemory, interleaved
from benchmarks.quiet import CoreWatch, Share

CHILD = "import sys; held = bytearray(100 << 20); held[::4096] = b'1' * len(held[::4096]); sys.stdin.read()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_the_memory_of_a_childs_child_is_seen() -> None:
    """A process whose child holds 100 MiB: both are counted; this process and a child that was there before are not."""
    with (
        subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE) as earlier,
        PeakMemory() as memory,
        subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE) as process,
    ):
        memory._over.wait(2)
        for child in (process, earlier):
            assert child.stdin
            child.stdin.close()
    assert 0.1 < memory.peak_gib < 0.2


@pytest.mark.parametrize(
    ("others", "counted", "words"),
    [
        ([0.0, 0.2, 0.01, 0.0], [0, 2, 3], "3 of 4 rounds were quiet; at most others 20.0%"),
        ([0.0, 0.2, 0.3, 0.2, 0.0, 0.2], [0, 4], "2 of 6 rounds were quiet; at most"),
        ([0.2] * 6, [0, 1, 2, 3, 4, 5], "0 of 6 rounds were quiet, NOT QUIET: all count"),
    ],
)
def test_a_round_that_others_disturb_is_made_again(
    monkeypatch: pytest.MonkeyPatch, others: list[float], counted: list[int], words: str
) -> None:
    """Three rounds are wanted, and at most three made again; disturbed ones count where fewer than two are quiet."""
    shares = iter(Share(0.0, share, 0.0, 1.0) for share in others)
    monkeypatch.setattr(measure.CoreWatch, "share", lambda self: next(shares))
    calls: list[int] = []
    timed = interleaved({"a": lambda: calls.append(1)}, 3, torch.device("cpu"))
    assert list(timed.rounds) == counted and len(timed["a"]) == len(timed.cpu["a"]) == len(counted)
    assert len(calls) == 1 + len(others)  # with a warm-up
    assert words in timed.in_words() and "CPU seconds a call: a 0.00" in timed.in_words()


def test_what_is_quiet() -> None:
    """Up to a twentieth of the cores' time, or what ticks of 10 ms cannot tell; so is what is not known."""
    assert Share(1.0, 0.03, 0.02, 1.0).is_quiet and not Share(1.0, 0.03, 0.03, 1.0).is_quiet
    assert Share(1.0, 0.5, 0.0, 1.0, seconds=0.05).is_quiet
    assert "not known" in str(Share(1.0, 0.0, 0.0, 0.0, is_known=False))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_what_others_do_is_seen_and_what_this_process_does_is_not() -> None:
    """A child that is busy half a second is another's work while it lives, and this process's own once it has ended."""
    watch = CoreWatch()
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)"
    busy += "; input()"
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        child.stdout.readline()
        seen = watch.share()
        child.stdin.close()
        child.wait()
    assert seen.seconds > 0.3 and seen.others * (os.cpu_count() or 1) > 0.2
    assert watch.share().cpu >= seen.cpu + 0.4
