"""The bench of many pairs, on few."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.bench_pairs import TITLES, Bench, dry_run_part, main, synthetic
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan


def test_one_size_gives_every_row_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Times above 0; at most 64 bytes a pair beside its tokens."""
    main(Bench(pairs=(300,), one=True))
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == TITLES.keys()
    assert all(found[name] > 0 for name in found if name != "rss") and found["bytes"] <= 64


def test_the_dry_run_part_by_hand() -> None:
    """50 pairs in one micro-batch: the tokens are all rows and both chats, the largest micro-batch all rows."""
    pairs = synthetic(50)
    rows = pairs.rows.astype(np.int64).sum()
    chats = (2 * pairs.places["prefix"] + pairs.places["chosen"] + pairs.places["rejected"]).astype(np.int64).sum()
    plan = BatchPlan(pairs.rows, 0, 1, batch_size=50, grad_accum_steps=1)
    assert dry_run_part(pairs, plan) == (rows + chats, rows)
