"""Memory of processes."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import PeakMemory

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
