"""Where a run stands: margins at a distance from the reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from simple_llama.reinforcement_learning.rlhf.report.standing import margin_at


def test_a_margin_between_evaluations() -> None:
    """Margins 0, 2, 11, 20 at distances 0, 1, 4, 2: on the line between the two evaluations where the distance was
    last come to, 2.5 on the way back from 4 to 2: 11 + 9 (1.5 / 2) = 17.75; nothing beyond."""
    found = [
        (distance, {"eval_log_ratio/chosen": margin, "eval_log_ratio/rejected": 0.0})
        for distance, margin in ((0.0, 0.0), (1.0, 2.0), (4.0, 11.0), (2.0, 20.0))
    ]
    run: Any = SimpleNamespace(points=lambda measure: found, run=SimpleNamespace(beta=0.5))
    assert [margin_at(run, distance, "kl") for distance in (0.5, 1.0, 2.5, 4.0, 4.5)] == [1.0, 2.0, 17.75, 11.0, None]
