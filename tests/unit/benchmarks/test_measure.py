"""What all benches measure with."""

from __future__ import annotations

import subprocess
import sys

from tiny_job import ROOT

FREE_AND_LOOK = """
import sys, torch
from pathlib import Path
from benchmarks.measure import keep_freed_memory, peak_gib

if sys.argv[1] == "kept":
    keep_freed_memory()
half_a_gib = torch.ones(2**27)
del half_a_gib
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 2**20)
print(peak_gib(lambda: torch.ones(2**27), torch.device("cpu")))
"""


def _resident_and_peak(way: str) -> list[float]:
    """GiB resident after half a GiB was freed, and the peak of a call that takes as much again."""
    done = subprocess.run([sys.executable, "-c", FREE_AND_LOOK, way], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


def test_freed_memory_is_kept() -> None:
    """Half a GiB stays resident; a call's peak is measured from without it all the same."""
    (returned, peak), (kept, kept_peak) = _resident_and_peak("returned"), _resident_and_peak("kept")
    assert 0.4 < kept - returned < 0.6
    assert 0.4 < peak < 0.6 and 0.4 < kept_peak < 0.6
