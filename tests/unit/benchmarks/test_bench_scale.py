"""The bench of several ranks: its arithmetic by hand, and settings that are what they are called."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.bench_scale import SETTINGS, SHIPPED, WITH_MEMORY, Bench, Measured, make_batches, speed_table
from simple_llama.common.paths import root_path
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig


def test_speeds_and_efficiency_by_hand() -> None:
    """2 x 4 pairs a step and rank: 8 pairs in 2 s are 4 pairs/s; three ranks make 24 in 2.5 s, 9.6 of 12 pairs/s."""
    bench = Bench(ranks=3, pairs=4, accumulate=2)
    one, shipped = Measured([9.0, 2.0, 1.0]), Measured([2.0])
    many = Measured([2.5, 2.4, 7.0], sent_mb=12.34, communicating_s=0.5)
    row = speed_table(bench, {SHIPPED: shipped, "x": one}, {SHIPPED: many, "x": many}).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "x", "2.000 s", "4.00", "2.500 s", "9.60", "80%", "12.3 MB", "0.500 s",
    ]  # fmt: skip


def test_micro_batches_have_the_sizes_asked_for() -> None:
    """Three micro-batches of two pairs: 5 shared tokens, 3 and 4 scored ones; the last one of a branch is no row."""
    batches = make_batches(Bench(pairs=2, accumulate=3, prompt=5, chosen=3, rejected=4, vocabulary=50))
    assert len(batches) == 3
    for batch in batches:
        assert (
            batch.counts == ((3, 4), (3, 4)) and len(batch.targets_N) == 14 and len(batch.tokens_T) == 2 * (5 + 2 + 3)
        )


def test_settings_change_what_is_shipped() -> None:
    """Each names a file of ours, changes fields that it has, and the first one is the default as it is."""
    shipped = json.loads(Path(root_path("ds_configs", f"{SHIPPED}.json")).read_text())
    assert set(WITH_MEMORY) <= SETTINGS.keys() and SETTINGS[SHIPPED].file == SHIPPED
    for name, setting in SETTINGS.items():
        assert setting.zero.keys() <= shipped["zero_optimization"].keys() and setting.top.keys() <= shipped.keys()
        DPOConfig(**setting.ours)
        changed = bool(setting.zero or setting.top or setting.ours or setting.file != SHIPPED)
        assert changed == (name != SHIPPED)
