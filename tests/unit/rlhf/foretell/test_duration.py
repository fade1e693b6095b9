"""Times by hand."""

from __future__ import annotations

import pytest
import torch

from simple_llama.reinforcement_learning.rlhf.foretell import duration
from simple_llama.reinforcement_learning.rlhf.foretell.duration import Speed, Work, _Hours, _hours, estimated, told

WORK = Work(
    steps=1000,
    missing_rows=600.0,
    evaluations=5,
    held_out_rows=40.0,
    prompt_rows=30.0,
    spoken_rows=0.0,
    sample_tokens=64,
    saves=3,
    save_bytes=600_000_000,
)
SPEED = Speed(step_s=4.0, forward_row_s=0.01, token_s=0.02, source="hand")


def test_the_parts_of_a_run_by_hand() -> None:
    """600 rows of 0.01 s; 1000 steps of 4 s; 5 times 40 rows; 5 times 30 rows and 64 tokens of several answers, of
    0.04 s; 3 saves of 0.6 GB at 0.3 GB a second. 6 + 4000 + 2 + 14.3 + 6 = 4028.3 s = 1.119 h. 100 rows of the answers
    of the KL, three times read, and 64 tokens more: 5 times 3 + 2.56 s."""
    assert _hours(WORK, SPEED) == pytest.approx(_Hours(6.0, 4000.0, 2.0, 14.3, 6.0))
    lines = told(WORK, SPEED, "probe").splitlines()
    assert lines[0] == "a step 4.000 s (probe: hand)"
    assert lines[1].startswith("1000 steps 1.11 h; 5 evaluations 2.0 s, their sample answers 14.3 s; 3 saves 6.0 s")
    assert lines[2] == "before them a reference pass 6.0 s"
    assert lines[3].startswith("in all 1.119 h")
    beside = WORK._replace(copied=500_000_000)  # one save of 2 s, two copies of 0.5 s
    assert _hours(beside, SPEED).saves_s == pytest.approx(3.0)
    assert "3 saves 3.0 s (at 0.3 GB a second, stated; all but the last beside the steps" in told(
        beside, SPEED, "probe"
    )
    assert _hours(WORK._replace(prompt_rows=0.0), SPEED).samples_s == 0
    assert _hours(WORK._replace(spoken_rows=100.0), SPEED).samples_s == pytest.approx(14.3 + 27.8)


def test_an_estimate_is_flops_at_a_stated_rate() -> None:
    """3e12 FLOPs at a quarter of 4e12 a second: 3 s; a row of 3e9 takes 3 ms, 1 ms of it forward."""
    found = estimated(3e12, 3e9, 0, 4e12, torch.device("cpu"))
    assert (found.step_s, found.forward_row_s) == (3.0, pytest.approx(0.001))
    assert "3e+12 FLOPs" in found.source and "25% of the 4e+12 of plain GEMMs" in found.source


def test_a_token_reads_all_weights_once() -> None:
    """Twice the weights, twice the time, of the same rate."""
    assert duration.token_s(0, torch.device("cpu")) == 0
    assert duration.token_s(1 << 30, torch.device("cpu")) > 0
