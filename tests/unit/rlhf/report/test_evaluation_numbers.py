"""The numbers of an evaluation, by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from simple_llama.reinforcement_learning.rlhf.report import evaluation_numbers as numbers
from simple_llama.reinforcement_learning.rlhf.report.evaluation_numbers import START, Answers, ScoredPairs


def four_pairs(b_beta: float = 0.5) -> ScoredPairs:
    """Four pairs with prompts of their own. The start model prefers the chosen answer of the first two.

    Model a has the margins 2, 2, 1, -1, so it prefers it in the first three; b moves nothing.
    """
    start = np.array([[-10, -12], [-8, -9], [-5, -5.5], [-7, -3]], np.float32)
    start[2] = [-6, -5.5]
    moved = start + np.array([[1, -1], [0, -2], [1, 0], [-0.5, 0.5]], np.float32)
    counts = np.array([[5, 3], [2, 4], [6, 6], [1, 9]])
    sums, betas = {START: start, "a": moved, "b": start}, {"a": 0.5, "b": b_beta}
    return ScoredPairs(counts, np.arange(4), ["x", "x", "y", "y"], sums, betas, 0)


def test_numbers_of_a_model() -> None:
    """Accuracy 3/4, mean margin 1, loss mean of ln(1 + exp(-d / 2)); raw 3/4 where the start has 2/4."""
    found = numbers.pair_numbers(four_pairs())
    a = found["models"]["a"]
    assert (found["pairs"], found["prompts"], found["largest_prompt_share"]) == (4, 4, 0.25)
    assert a["accuracy"].value == 0.75 and a["margin"].value == 1
    assert a["loss"].value == pytest.approx(np.mean([math.log1p(math.exp(-d / 2)) for d in (2, 2, 1, -1)]))
    assert (a["preference"].value, a["preference_gained"].value) == (0.75, 0.25)
    assert (a["log_ratio_chosen"].value, a["log_ratio_rejected"].value) == (0.375, -0.625)
    assert {name: b if name == "random" else b.value for name, b in found["baselines"].items()} == {
        "longer": 0.375,
        "shorter": 0.625,
        "start_preference": 0.5,
        "random": 0.5,
    }
    assert a["above_baseline"]["longer"].value == 0.375
    assert a["balanced_accuracy"].value == (1 + 0.5) / 2  # 1 of 1 where chosen is longer, 1 of 2 where it is shorter
    assert {name: (c["count"], c["accuracy"].value, c["margin"].value) for name, c in a["by_category"].items()} == {
        "x": (2, 1, 2),
        "y": (2, 0.5, 0),
    }
    assert sum(part["count"] for part in a["by_length"]) == 4
    # sure by sigmoid(1) = 0.731 twice, both right, and by sigmoid(1/2) = 0.622 twice, one right
    assert a["calibration"]["error"] == pytest.approx((2 * 0.268941 + 2 * 0.122459) / 4, abs=1e-6)


def test_a_model_that_moved_nothing() -> None:
    """Every margin is 0: ties, a loss of ln 2, nothing gained; model a is better by the differences of the means."""
    found = numbers.pair_numbers(four_pairs())
    b = found["models"]["b"]
    assert (b["accuracy"].value, b["margin"], b["preference_gained"]) == (0.5, (0, 0, 0), (0, 0, 0))
    assert b["loss"].value == pytest.approx(math.log(2))
    [both] = found["compared"]
    assert (both["model"], both["other"]) == ("a", "b")
    assert (both["accuracy"].value, both["preference"].value, both["margin"].value) == (0.25, 0.25, 1)
    assert both["loss"].value == pytest.approx(a_loss(0.5) - math.log(2))


def a_loss(beta: float) -> float:
    """Of model a's margins."""
    return float(np.mean([np.logaddexp(0, -beta * d) for d in (2, 2, 1, -1)]))


def test_each_model_has_its_beta() -> None:
    """A model's loss and calibration are at its own beta, and losses of two betas are not subtracted."""
    pairs = four_pairs(0.1)
    found = numbers.pair_numbers(replace(pairs, sums={**pairs.sums, "b": pairs.sums["a"]}))
    a, b = (found["models"][name] for name in "ab")
    assert (a["loss"].value, b["loss"].value) == pytest.approx((a_loss(0.5), a_loss(0.1)))
    assert b["calibration"]["error"] > a["calibration"]["error"] and (a["beta"], b["beta"]) == (0.5, 0.1)
    [both] = found["compared"]
    assert "loss" not in both and both["margin"].value == 0


def test_extremes() -> None:
    """The largest first and the smallest first; of three pairs the one in the middle is neither."""
    assert numbers.extremes(np.array([1.0, 3, -2]), 5) == ([1], [2])
    assert numbers.extremes(np.array([1.0, 3, -2, 0]), 2) == ([1, 0], [2, 3])


def test_numbers_of_answers() -> None:
    """Shares and their changes by the form of the prompts."""
    before = Answers(("yes", "I cannot"), (1, 3), (True, True), (False, True), 0.0, 0.0)
    after = Answers(("", "so so so"), (0, 3), (True, False), (False, False), 0.5, 0.1)
    found = numbers.answer_numbers({START: {"training": before}, "a": {"training": after}}, 0)["training"]["a"]
    assert {key: found[key].value for key in ("tokens", "ended", "empty", "refused")} == {
        "tokens": 1.5,
        "ended": 0.5,
        "empty": 0.5,
        "refused": 0,
    }
    assert {key: change.value for key, change in found["change"].items()} == {
        "tokens": -0.5,
        "ended": -0.5,
        "empty": 0.5,
        "refused": -0.5,
    }
    assert found["repeated_trigrams"] == 0.5


def test_numbers_of_a_judge_and_as_json() -> None:
    """A tie is one half; what is no number becomes null."""
    found = numbers.judge_numbers([1, 0.75, 0.5, 0], [False, False, True, False])
    assert found["win_rate"].value == 2.25 / 4
    assert [found[name] for name in ("won", "tied", "lost", "flipped")] == [2, 1, 1, 1]
    sums = {START: np.zeros((1, 2)), "a": -np.ones((1, 2))}
    alone = ScoredPairs(np.ones((1, 2)), np.zeros(1, int), ["x"], sums, {"a": 1}, 0)
    text = json.dumps(numbers.plain(numbers.pair_numbers(alone)), allow_nan=False)
    assert json.loads(text)["models"]["a"]["margin"] == [0, None, None]
