"""How long a run is, and its learning rate by optimizer step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig, learning_rate, with_warmup


def test_literal_values():
    """2 warm-up steps to 1.0, then 4 steps of half a cosine to 0.2: cos(pi/4), cos(pi/2), cos(3pi/4), cos(pi)."""
    rates = [learning_rate(step, 6, 2, max_lr=1.0, min_lr=0.2) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 0.2 + 0.4 * 1.70710678, 0.6, 0.2 + 0.4 * 0.29289322, 0.2])


@pytest.mark.parametrize(("schedule", "after"), [("linear", [0.8, 0.6, 0.4, 0.2]), ("constant", [1.0, 1.0, 1.0, 1.0])])
def test_linear_falls_by_equal_steps_and_constant_stays(schedule: Any, after: list[float]):
    """2 warm-up steps to 1.0, then 4 steps to 0.2, or none."""
    rates = [learning_rate(step, 6, 2, 1.0, 0.2, schedule) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, *after])


def test_longer_warm_up_than_training_never_reaches_the_peak():
    assert max(learning_rate(step, 10, 50, 1.0, 0.1) for step in range(10)) == pytest.approx(0.2)


def test_no_warm_up_starts_below_the_peak_and_ends_at_the_minimum():
    assert learning_rate(0, 4, 0, 1.0, 0.0) < 1.0
    assert learning_rate(3, 4, 0, 1.0, 0.0) == pytest.approx(0.0)


def test_the_defaults_have_the_curve_that_they_had():
    """Bit by bit: warm-up over 50 steps and a cosine, as the formula stood before other schedules were there."""
    config, total = ScheduleConfig(), 60
    expected = [
        5e-7 * (step + 1) / 50
        if step < 50
        else 1e-7 + 0.5 * (5e-7 - 1e-7) * (1.0 + math.cos(math.pi * min((step - 49) / 10, 1.0)))
        for step in range(total)
    ]
    assert list(config.rates(total)) == expected
    assert with_warmup(config) == ScheduleConfig(warmup_iterations=50)


@pytest.mark.parametrize(
    ("ratio", "total", "steps"), [(0.1, 100, 10), (0.1, 9, 1), (0.07, 100, 7), (0.0, 9, 0), (1.0, 9, 9)]
)
def test_a_share_of_the_steps_warms_up(ratio: float, total: int, steps: int):
    """Rounded up, but not by an error of the float: 0.07 * 100 is 7.000000000000001."""
    config = ScheduleConfig(warmup_ratio=ratio)
    assert config.warmup_steps(total) == steps and with_warmup(config) == config


@pytest.mark.parametrize(("max_steps", "expected"), [(0, 6), (4, 4), (6, 6), (7, 6)])
def test_a_run_ends_with_max_steps_or_its_epochs(max_steps: int, expected: int):
    """Two epochs of three steps."""
    assert ScheduleConfig(epochs=2, max_steps=max_steps).total_steps(3) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup_iterations": 5, "warmup_ratio": 0.1}, "expected one of warmup_iterations and warmup_ratio"),
        ({"schedule": "constant", "min_lr": 1e-8}, "min_lr: expected none with schedule constant"),
        ({"schedule": "linear", "min_lr": 1e-6}, "min_lr: expected at most max_lr"),
    ],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        ScheduleConfig(**settings)


def test_a_constant_rate_may_be_below_the_default_of_min_lr():
    assert list(ScheduleConfig(schedule="constant", max_lr=1e-8, warmup_iterations=0).rates(2)) == [1e-8, 1e-8]
