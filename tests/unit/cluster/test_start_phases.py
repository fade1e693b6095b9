"""Where a start's time goes: by a made-up clock, and of real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from simple_llama.cluster import start_phases
from simple_llama.cluster.start_phases import _StartPhases


def test_phases_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is 2 s old under a launcher that is 7 s old: 5 s of the launcher; then 3.5 to the end of the
    imports (2 + 1.5), 4 of data, 0.01 that is not shown, and 2 more of data. Told once: then another start begins."""
    now = 100.0
    monkeypatch.setattr(start_phases.time, "monotonic", lambda: now)
    monkeypatch.setattr(start_phases, "_age_s", lambda pid: 2.0 if pid == os.getpid() else 7.0)
    monkeypatch.setattr(start_phases, "ancestors", lambda _depth: (8, 9))
    monkeypatch.setattr(start_phases, "command_line", lambda pid: ["sh", "-c", "x"] if pid == 8 else ["deepspeed", "x"])
    phases = _StartPhases()
    for name, seconds in (("imports", 1.5), ("data", 4.0), ("joining", 0.01), ("data", 2.0)):
        now += seconds
        phases.ended(name)
    assert phases.told() == "14.5 s (launcher 5.0, imports 3.5, data 6.0)"
    now += 1.0
    phases.ended("data")
    assert phases.told() == "1.0 s (data 1.0)"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bin/python", "bin/deepspeed", "--num_gpus", "1", "launch/train_dpo.py"], True),
        (["bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["python", "launch/train_dpo.py", "--deepspeed_config", "ds_configs/deepspeed.json", "deepspeed"], False),
        (["make", "demo"], False),
        ([], False),
    ],
)
def test_what_is_a_launcher(words: list[str], expected: bool) -> None:
    """DeepSpeed's command by its name, its launcher by its module."""
    assert start_phases._is_launcher(words) == expected


def test_a_process_knows_its_age() -> None:
    """A child that waited tells at least that, and not much more than what its parent saw."""
    began = time.monotonic()
    code = "import os, time; from simple_llama.cluster import start_phases; time.sleep(0.3); "
    code += "print(start_phases._age_s(os.getpid()))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.3 <= float(told) <= time.monotonic() - began + 0.02


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time then counts from the import."""
    monkeypatch.setattr(start_phases, "stat_fields", lambda _pid: [])
    assert start_phases._age_s(os.getpid()) == 0.0
