"""Warm-up and cosine, by optimizer step."""

from __future__ import annotations

import pytest

from simple_llama.reinforcement_learning.rlhf.run.schedule import learning_rate


def test_literal_values():
    """2 warm-up steps to 1.0, then 4 steps of half a cosine to 0.2: cos(pi/4), cos(pi/2), cos(3pi/4), cos(pi)."""
    rates = [learning_rate(step, 6, 2, max_lr=1.0, min_lr=0.2) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 0.2 + 0.4 * 1.70710678, 0.6, 0.2 + 0.4 * 0.29289322, 0.2])


def test_longer_warm_up_than_training_never_reaches_the_peak():
    assert max(learning_rate(step, 10, 50, 1.0, 0.1) for step in range(10)) == pytest.approx(0.2)


def test_no_warm_up_starts_below_the_peak_and_ends_at_the_minimum():
    assert learning_rate(0, 4, 0, 1.0, 0.0) < 1.0
    assert learning_rate(3, 4, 0, 1.0, 0.0) == pytest.approx(0.0)
