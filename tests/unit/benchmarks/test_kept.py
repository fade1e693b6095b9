"""A bench that is killed leaves what it has measured; one whose time is over ends by itself, with its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.kept import _Kept
from tiny_job import ROOT

# fp32 inputs at one small size, for ever
BENCH = [
    *(sys.executable, "-m", "benchmarks.bench_logprob", "--sizes", "12", "8", "20", "--answer_tokens", "3"),
    *("--dtype", "fp32", "--rounds", "1000000"),
]


def bench(*flags: str) -> subprocess.Popen[str]:
    """Starts it; its stdout is a pipe, as under a launcher or `tee`."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.Popen(
        [*BENCH, *flags], cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_a_killed_bench_leaves_what_it_measured(tmp_path: Path) -> None:
    """Killed in its third round: all times of the first two have been printed, and are in the file, whole."""
    with bench("--results", str(tmp_path / "R.md")) as process:
        assert process.stdout
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("round 3, N 12, "):
                process.send_signal(signal.SIGKILL)
                break
        assert printed[-1].startswith("round 3")
    lines = [json.loads(line) for line in (tmp_path / "R.partial.jsonl").read_text().splitlines()]
    assert not (tmp_path / "R.md").exists()
    for number in (1, 2):
        of_round = {line["what"]: line for line in lines if line["what"].startswith(f"round {number}, N 12, ")}
        ours = of_round[f"round {number}, N 12, D 8, V 20, fp32, ours"]
        assert len(of_round) >= 5 and ours["seconds"] > 0 and "--dtype fp32" in ours["command"]
        assert all(any(what in line for line in printed) for what in of_round)


def test_a_bench_ends_when_its_time_is_over(tmp_path: Path) -> None:
    """Of a million rounds some are made in three seconds; the table is written as always."""
    with bench("--results", str(tmp_path / "R.md"), "--minutes", "0.05") as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "## The log-prob head" in said
    assert "Median milliseconds" in (tmp_path / "R.md").read_text()
    assert "round 1, N 12, D 8, V 20, fp32, ours" in (tmp_path / "R.partial.jsonl").read_text()


def test_one_round_is_made_and_no_memory_looked_at_when_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bench whose time was over before it began: a warm-up, a round, and nan in the place of memory."""
    kept, calls = _Kept(), []
    kept.begin("bench", "", 1e-9)
    monkeypatch.setattr(measure, "KEPT", kept)
    ways = {"a": lambda: calls.append(1)}
    timed = measure.interleaved(ways, 5, torch.device("cpu"))
    assert len(timed["a"]) == 1 and len(calls) == 2
    [memory] = measure.peaks_gib(ways, torch.device("cpu")).values()
    assert memory != memory and len(calls) == 2
    assert capsys.readouterr().out.startswith("warm-up, a: seconds ")


def test_lines_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers to four digits on stdout, whole in the file, behind what an earlier bench left there."""
    (tmp_path / "R.partial.jsonl").write_text("{}\n")
    kept = _Kept()
    kept.keep("before", gib=1.0)
    kept.begin("python -m bench", str(tmp_path / "R.md"), 0)
    kept.keep("round 1, ours", seconds=0.123456, pairs=64)
    assert capsys.readouterr().out == "before: gib 1\nround 1, ours: seconds 0.1235, pairs 64\n"
    [first, second] = (tmp_path / "R.partial.jsonl").read_text().splitlines()
    found = json.loads(second)
    assert first == "{}" and (found["what"], found["seconds"], found["pairs"]) == ("round 1, ours", 0.123456, 64)
    assert found["command"] == "python -m bench" and not kept.is_over(1e9)


def test_a_line_is_out_at_once() -> None:
    """The process ends without giving its buffers away, as one that is killed."""
    code = "import os; from benchmarks.kept import KEPT; KEPT.keep('a', pairs=1); os._exit(3)"
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("a: pairs 1\n", 3)
