"""What the bench of a start reads of a run's log."""

from __future__ import annotations

import pytest

from benchmarks.bench_start import phases, report
from simple_llama.common.errors import UserError

LOG = "14:37:25 INFO start to the first step: 9.2 s (imports 3.9, evaluation and samples 0.6)\nstep 1/1 ...\n"


def test_phases_by_hand() -> None:
    """A phase may have several words; a log without the line is refused."""
    assert phases(LOG) == {"all": 9.2, "imports": 3.9, "evaluation and samples": 0.6}
    with pytest.raises(UserError, match="found none in the run's log"):
        phases("step 1/1")


def test_report_by_hand() -> None:
    """A phase that a start did not have took no time; the median of 9.2, 5 and 6 is 6."""
    lines = report([phases(LOG), {"all": 5.0, "data": 1.0}, {"all": 6.0, "imports": 2.0}]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["start", "all", "imports", "evaluation and samples", "data"]
    assert cells[3] == ["2", "5.0", "0.0", "0.0", "1.0"]
    assert cells[5] == ["median", "6.0", "2.0", "0.0", "0.0"]
