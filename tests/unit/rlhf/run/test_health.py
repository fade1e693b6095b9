"""Warnings in words: each one's boundary by hand-made histories, once a run, and what a run writes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from simple_llama.reinforcement_learning.rlhf.run.health import CHECKS, Facts, Finding, warnings_of

FACTS = Facts(pairs=1000, held_out=200, total_steps=40, beta=0.1, rates=1e-3, answer_tokens=50.0)
Line = dict[str, float]


def trained(name: str, values: Sequence[float], **others: float) -> list[Line]:
    """Lines of training from step 1 on."""
    return [{"step": step, name: value, **others} for step, value in enumerate(values, 1)]


def evaluated(name: str, values: Sequence[float]) -> list[Line]:
    """Evaluations at steps 0, 10, 20, ..."""
    return [{"step": 10 * number, name: value} for number, value in enumerate(values)]


def named(lines: Sequence[Line], facts: Facts = FACTS) -> list[str]:
    """Names of the warnings of a history."""
    return [finding.name for finding in warnings_of(lines, facts)]


def only(lines: Sequence[Line], facts: Facts = FACTS) -> Finding:
    """The one warning of a history."""
    (found,) = warnings_of(lines, facts)
    return found


def test_chosen_falls() -> None:
    """Chosen answers lose 3.4 nats while the margin, 0.25 at beta 0.1, is 2.5 nats; since step 20, where it was 1."""
    falls = evaluated("eval_log_ratio/chosen", [0.0, -0.9, -1.0, -3.4])
    margins = evaluated("eval_rewards/margins", [0.0, 0.1, 0.2, 0.25])
    lines = [{**fall, **margin} for fall, margin in zip(falls, margins, strict=True)]
    found = only(lines)
    assert found == (20, "notice", "chosen_falls", found.text)
    assert found.text.startswith(
        "chosen answers fall while the margin rises: the policy gives held-out ones 1.00 nats less than the reference "
        "did, with a margin of 2.00 nats (since step 20). DPO often does this"
    )
    assert not named(lines[:2]), "0.9 nats are not told of"
    late = [{**line, "eval_rewards/margins": margin} for line, margin in zip(lines, (0, 0, -0.1, 0.1), strict=True)]
    assert only(late).step == 30 and "(since step 30)" in only(late).text, "before, no margin rose"
    assert not named([{**line, "eval_rewards/margins": 0.0} for line in lines]), "nothing was gained"


@pytest.mark.parametrize(("accuracy", "step", "expected"), [(0.56, 20, True), (0.57, 20, False), (0.56, 19, False)])
def test_held_out_small(accuracy: float, step: int, expected: bool) -> None:
    """Of 200 pairs 0.56 lies in [0.491, 0.627], 0.57 in [0.501, 0.637]; told from the middle of 40 steps on."""
    lines = [{"step": 0, "eval_rewards/accuracies": 0.5}, {"step": step, "eval_rewards/accuracies": accuracy}]
    assert named(lines) == ["held_out_small"] * expected
    if expected:
        assert "0.560 at step 20, of 200 pairs, so it may be anything from 0.491 to 0.627" in only(lines).text


def test_pairs_of_one_prompt_count_for_what_they_are_worth() -> None:
    """0.57 of 200 pairs would be told from 0.5; of 200 that are worth 40 it is not, nor is a correlation of 0.7, nor
    are labels swapped at 0.42."""
    lines = [{"step": 0, "eval_rewards/accuracies": 0.5}, {"step": 20, "eval_rewards/accuracies": 0.57}]
    few: Line = {"eval_effective_pairs": 40.0}
    words = "of 200 pairs that are worth 40, so it may be anything from 0.41"
    assert not named(lines) and words in only([lines[0], {**lines[1], **few}]).text
    long: list[Line] = [{"step": 20, "eval_margin_length_correlation": 0.7, "eval_longer_is_chosen": 0.8}]
    assert named(long) == ["length_explains"] and not named([{**long[0], **few}])
    wrong: list[Line] = [{"step": step, "eval_rewards/accuracies": 0.42} for step in (5, 10)]
    assert "swapped" in named(wrong) and "swapped" not in named([{**line, **few} for line in wrong])


def test_one_prompt_dominates() -> None:
    """From a fifth of the pairs on, at the first line."""
    lines = [{"step": 0, "loss": 0.7}, {"step": 1, "loss": 0.7}]
    assert only(lines, dataclasses.replace(FACTS, largest_prompt_share=0.2)).step == 0
    assert not named(lines, dataclasses.replace(FACTS, largest_prompt_share=0.19))


@pytest.mark.parametrize(
    ("correlation", "longer", "expected"),
    [(0.68, 0.6, False), (0.69, 0.55, True), (0.69, 0.54, False), (-0.69, 0.45, True), (-0.69, 0.46, False)],
)
def test_length_explains(correlation: float, longer: float, expected: bool) -> None:
    """Fisher: tanh(artanh(0.68) - 1.96 / sqrt(197)) = 0.599, of 0.69 0.611; and the labels have to go the same way."""
    lines = evaluated("eval_margin_length_correlation", [0.0, correlation])
    lines = [{**line, "eval_longer_is_chosen": longer} for line in lines]
    assert named(lines) == ["length_explains"] * expected
    if expected:
        assert f"so {'longer' if correlation > 0 else 'shorter'} answers are what is learned" in only(lines).text


def test_learned_by_heart() -> None:
    """Accuracy 1 over eight lines, held out 0.6, which is at most 0.666 of 200 pairs; 0.64 may be 0.703."""
    for held_out, expected in ((0.6, True), (0.64, False)):
        lines = [*trained("rewards/accuracies", [1.0] * 8), {"step": 8, "eval_rewards/accuracies": held_out}]
        assert named(lines) == ["memorised"] * expected
        assert not named([*lines[1:8], lines[-1]]), "seven lines are too few"
    lines = [*trained("rewards/accuracies", [0.9] + [1.0] * 7), {"step": 8, "eval_rewards/accuracies": 0.6}]
    assert not named(lines)


def test_saturated_without_gradient() -> None:
    """Nine tenths of the pairs, and a gradient norm of a tenth of what it was; with one of both nothing is said."""
    norms, shares = [2.0] * 8 + [0.2] * 8, [0.0] * 8 + [0.9] * 8
    lines = [
        {**norm, **share}
        for norm, share in zip(trained("grad_norm", norms), trained("rewards/saturated", shares), strict=True)
    ]
    found = only(lines)
    assert (found.step, found.name) == (16, "saturated") and "90%" in found.text and "(since step 9)" in found.text
    last = [*lines[:-2], {**lines[-2], "rewards/saturated": 1.0}, {**lines[-1], "rewards/saturated": 0.8}]
    assert named(last) == ["saturated"], "the mean of the eight counts, not the last one"
    assert not named([{**line, "rewards/saturated": 0.89} for line in lines])
    assert not named([{**line, "grad_norm": max(line["grad_norm"], 0.21)} for line in lines])


@pytest.mark.parametrize(
    ("before", "last", "expected"),
    [([1.0] * 8, 5.1, True), ([1.0] * 8, 5.0, False), ([1.0] * 7, 5.1, False), ([4.0] * 50 + [1.0] * 32, 7.9, False)],
)
def test_gradient_spikes(before: list[float], last: float, expected: bool) -> None:
    """More than five times the eight lines before; not where the norm was twice as large as that half of the time."""
    lines = trained("grad_norm", [*before, last])
    assert named(lines) == ["gradient_spikes"] * expected
    if expected:
        assert "jumps at step 9: 5.1, usually 1" in only(lines).text


def test_far_from_the_reference() -> None:
    """KL surely above half a nat a token, or chosen answers of 50 tokens that lost more than 50 nats."""
    lows = evaluated("samples/kl_low", [0.0, 0.5, 0.6])
    kl = [{**low, "samples/kl": 0.7, "eval_log_ratio/chosen": 0.0} for low in lows]
    assert only(kl).text.startswith(
        "the policy is far from the reference: KL 0.70 nats an answer token (since step 20)"
    )
    found = only(evaluated("eval_log_ratio/chosen", [0.0, -50.0, -55.0]))
    assert found.step == 20 and "has lost 1.10 nats (since step 20)" in found.text


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [([0.5, 0.49, 0.42], True), ([0.5, 0.4], False), ([0.5, 0.4, 0.44], False), ([0.5, 0.5, 0.4], False)],
)
def test_labels_look_swapped(accuracies: list[float], expected: bool) -> None:
    """0.42 of 200 is at most 0.489, 0.44 at most 0.509; one evaluation is too few, and 0.5 once is not throughout."""
    found = [name for name in named(evaluated("eval_rewards/accuracies", accuracies)) if name == "swapped"]
    assert found == ["swapped"] * expected


@pytest.mark.parametrize(("bits", "rates", "expected"), [(8, 1.8e-5, True), (8, 1.9e-5, False), (24, 1.8e-5, False)])
def test_a_rate_that_moves_nothing(bits: int, rates: float, expected: bool) -> None:
    """Around 0.02, in [2^-6, 2^-5), bf16's numbers are 2^-13 apart: 0.3 of half of that is 1.83e-5."""
    lines = [{"step": 0, "weights/median": 0.02, "weights/bits": bits}]
    assert named(lines, dataclasses.replace(FACTS, rates=rates)) == ["still"] * expected


@pytest.mark.parametrize(
    ("metric", "name", "fires", "boundary", "no_rise"),
    [
        ("repeated_trigrams", "answers_loop", (0.0, 0.3), (0.0, 0.29), (0.15, 0.3)),
        ("empty", "answers_empty", (0.25, 0.5), (0.0, 0.45), (0.3, 0.5)),
        ("ended", "answers_run_on", (1.0, 0.4), (1.0, 0.41), (0.75, 0.2)),
        ("unknown", "answers_unknown", (0.0, 0.05), (0.0, 0.04), (0.02, 0.05)),
    ],
)
def test_answers(
    metric: str, name: str, fires: Sequence[float], boundary: Sequence[float], no_rise: Sequence[float]
) -> None:
    """A level, and a change since step 0; without a line of step 0 nothing can be compared."""
    metric = f"samples/{metric}"
    found = only(evaluated(metric, fires))
    assert (found.step, found.level, found.name) == (10, "alarm", name) and "(since step 10)" in found.text
    assert not named(evaluated(metric, boundary)) and not named(evaluated(metric, no_rise))
    assert not named([{**line, "step": line["step"] + 10} for line in evaluated(metric, fires)])


@pytest.mark.parametrize(("empty", "expected"), [(0.5, []), (0.45, ["answers_run_on"])])
def test_what_ended_at_once_cannot_run_on(empty: float, expected: list[str]) -> None:
    """A start model whose answers were mostly empty had none that ended."""
    lines = evaluated("samples/ended", (1.0, 0.2))
    lines[0]["samples/empty"] = empty
    assert named(lines) == expected


def test_once_a_run_and_no_number_is_no_warning() -> None:
    """Three spikes are one warning; NaN and infinity are left out, words too."""
    lines = trained("grad_norm", [*([1.0] * 8), float("nan"), 9.0, float("inf"), 1.0, 9.0, 90.0])
    assert [finding.step for finding in warnings_of(lines, FACTS)] == [10]
    assert not warnings_of([], FACTS)


def test_each_alarm_says_when_and_what_to_try() -> None:
    """A sentence each, ASCII."""
    for check in CHECKS.values():
        assert check.when.isascii() and check.advice.isascii() and not check.advice.endswith(".")
