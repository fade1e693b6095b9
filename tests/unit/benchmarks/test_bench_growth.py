"""The bench of memory over many steps: what a run is told, and the row that its metrics make."""

from __future__ import annotations

import pytest

from benchmarks.bench_growth import BOUNDS, environment, row


def test_bounds_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 means 8, 0 the libraries' own; as shipped, nothing is set, whatever is set here."""
    monkeypatch.setenv(BOUNDS[0], "5")
    assert [[environment(capacity).get(name) for name in BOUNDS] for capacity in (8, 0, -1)] == [
        ["8", "8"],
        ["1024", "1024"],
        [None, None],
    ]


def test_the_row_by_hand() -> None:
    """Memory 1.01 to 1.20 GiB in the first 20 steps, 1.5 at the end: a quarter more. Later steps take 10 to 20 ms."""
    lines = [{"perf/peak_memory_gb": 1 + step / 100, "perf/step_time_s": 9.0} for step in range(1, 21)]
    lines += [{"perf/peak_memory_gb": 1.5, "perf/step_time_s": step / 1000} for step in range(10, 21)]
    assert row(64, lines) == ["64", "1.01", "1.20", "1.50", "25%", "15 (10 to 20)"]
    assert row(-1, lines)[0] == "as shipped" and row(0, lines)[0] == "1,024 (the libraries' own)"
