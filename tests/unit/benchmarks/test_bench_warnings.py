"""Alarms counted again on the numbers that small runs recorded, and some of these runs made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_warnings import (
    PAGE,
    Bench,
    clean_lines,
    count,
    keep,
    kept,
    recall_table,
    warnings_table,
    which_runs,
)
from benchmarks.small_language import END, has_unknown, loops, runs_on
from benchmarks.small_runs import FAULTS, STRENGTHS, Made
from simple_llama.reinforcement_learning.rlhf.run.health import CHECKS


@pytest.fixture(scope="module")
def recorded() -> list[Made]:
    """The runs that were kept."""
    return kept()


def test_recall_and_false_alarms(recorded: list[Made]) -> None:
    """60 runs with each fault at each strength, of which the two stronger are found in 95 of 100; 200 runs without,
    with at least 200 held-out pairs, of which at most two give any alarm. docs/warnings.md says so."""
    counted = count(recorded)
    assert counted.runs == {(fault, strength): 60 for fault in FAULTS for strength in STRENGTHS}
    assert min(share for (_, strength), share in counted.recall.items() if strength > 1) >= 0.95
    clean = [made for made in recorded if not made.spec.fault]
    assert len(clean) == counted.clean == 200 and min(made.facts.held_out for made in clean) >= 200
    assert counted.with_any <= 2
    text = PAGE.read_text()
    for part in (recall_table(counted), clean_lines(counted), warnings_table("notice"), warnings_table("alarm")):
        assert part in text


def test_each_alarm_has_its_fault() -> None:
    """And each fault its alarm."""
    alarms = [name for name, check in CHECKS.items() if check.level == "alarm"]
    assert sorted(fault.alarm for fault in FAULTS.values()) == sorted(alarms)


def test_seeds_are_those_that_nothing_was_fixed_on() -> None:
    """Each run has a seed of its own, also among those of the calibration."""
    bench = Bench()
    seeds = [seed for each in (bench, Bench(calibration=True)) for seed, _, _ in which_runs(each)]
    assert len(set(seeds)) == len(seeds) == 2 * (bench.clean + 3 * bench.runs * len(FAULTS))


def test_kept_runs_come_back(tmp_path: Path, recorded: list[Made]) -> None:
    """The same lines and facts, whatever the lengths of their neighbours."""
    some = recorded[:2] + recorded[-2:]
    keep(some, tmp_path / "some.npz")
    assert kept(tmp_path / "some.npz") == some


def test_habits_by_hand() -> None:
    """Two words six times, an answer of 19 tokens without an end, every third word unknown."""
    answer = [20, 21, 30, 31, END]
    assert loops(answer) == [20, 21, *[20, 21] * 5, 30, 31, END]
    assert runs_on(answer) == [20, 21, 30, 31, *[31] * 15] and len(runs_on(answer)) == 19
    assert has_unknown(answer) == [20, 0, 30, 31, END]
