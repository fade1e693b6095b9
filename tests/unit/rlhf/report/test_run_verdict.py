"""What a run's numbers say: each sentence by numbers made for it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simple_llama.reinforcement_learning.rlhf.report.read_run import HeldOutPairs, RunFacts
from simple_llama.reinforcement_learning.rlhf.report.run_verdict import (
    interval_of,
    last_interval,
    log_ratio,
    margin_nats,
    verdict,
)


def evaluation(step: int, accuracy: float, **others: float) -> dict[str, Any]:
    """A line of an evaluation of 100 pairs."""
    values = {"eval_rewards/accuracies": accuracy, "eval_pairs": 100.0, "eval_loss": 0.7 - accuracy / 2}
    return {"step": step, **values, "eval_longer_is_chosen": 0.6, "eval_logps/accuracies": 0.55, **others}


def facts_of(*history: dict[str, Any], **others: Any) -> RunFacts:
    """A run of these lines."""
    given: dict[str, Any] = {"samples": [], "warnings": [], "data": {}, "best": {}, "finished": {}, "held_out": None}
    return RunFacts(Path("run"), {"beta": 0.5}, {}, history, **{**given, **others})


def test_pairs_count_for_what_they_are_worth() -> None:
    """100 pairs that are worth 25: the interval of 25."""
    assert interval_of(evaluation(1, 0.8, eval_effective_pairs=25.0)) == interval_of(
        evaluation(1, 0.8, eval_pairs=25.0)
    )


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.80, "rose from 0.500 to 0.800 of 100 pairs (95 %: 0.71 to 0.87): beyond its interval"),
        (0.58, "went from 0.500 to 0.580 of 100 pairs (95 %: 0.48 to 0.67): where it began lies within the interval"),
        (0.30, "fell from 0.500 to 0.300 of 100 pairs (95 %: 0.22 to 0.40): beyond its interval"),
    ],
)
def test_accuracy_is_told_from_chance_by_its_interval(accuracy: float, words: str) -> None:
    """Wilson's interval of 80, 58 and 30 of 100."""
    assert words in verdict(facts_of(evaluation(0, 0.5), evaluation(9, accuracy)))[0]


def test_rules_that_read_nothing_stand_beside_it() -> None:
    """0.70 of 100 (0.60 to 0.78): above 0.55, not told apart from 0.65; a rule at 0.9 is better. The rule is "shorter"
    where fewer than half of the longer answers are chosen."""
    said = verdict(facts_of(evaluation(0, 0.5), evaluation(9, 0.7, eval_longer_is_chosen=0.35)))
    assert said[1].startswith('The rule "the shorter answer is chosen" scores 0.650 on the same pairs: 0.050 less than')
    assert "not told apart" in said[1]
    assert 'The rule "the start model finds it likelier" scores 0.550 on the same pairs: 0.150 less' in said[2]
    assert "beyond chance." in said[2]
    said = verdict(facts_of(evaluation(0, 0.5), evaluation(9, 0.7, eval_longer_is_chosen=0.9)))
    assert '"the longer answer is chosen" scores 0.900 on the same pairs: 0.200 more than the policy, beyond' in said[1]


def held_out(right: list[int], prompts: list[int]) -> HeldOutPairs:
    """Pairs of step 9 whose margin is 1 where `right`, else -1; the chosen answer is always the shorter one."""
    ref_N2 = np.zeros((len(right), 2), np.float32)
    logps_N2 = np.stack([2 * np.array(right, np.float32) - 1, ref_N2[:, 0]], 1)
    counts_N2 = np.tile(np.array([[3, 4]], np.int32), (len(right), 1))
    return HeldOutPairs(logps_N2, ref_N2, counts_N2, 9, tuple(map(str, prompts)), np.array(prompts))


def test_pairs_of_one_prompt_are_no_independent_draws() -> None:
    """80 of 100 right: 0.71 to 0.87 where each pair has its own prompt. In ten prompts of ten pairs that are right or
    wrong together they are worth ten: 0.49 to 0.94, and nothing is shown."""
    right = [1] * 80 + [0] * 20
    lines = evaluation(0, 0.5), evaluation(9, 0.8)
    apart = facts_of(*lines, held_out=held_out(right, list(range(100))))
    assert last_interval(apart) == pytest.approx(interval_of(lines[1]))
    together = facts_of(*lines, held_out=held_out(right, [i // 10 for i in range(100)]))
    assert last_interval(together) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert "does not show that anything was learned" in verdict(together)[0]
    worth = evaluation(9, 0.8, eval_effective_pairs=10.0)
    assert "to 0.800 of 100 pairs that are worth 10 independent ones (95 %" in verdict(facts_of(lines[0], worth))[0]


def test_pairs_are_counted_by_the_rewards_of_the_loss() -> None:
    """A loss without a reference: 60 of 100 by its rewards, no margins (NaN); the interval is that of 60. Without
    rewards a margin that is not known is no wrong answer."""
    pairs = held_out([1] * 60 + [0] * 40, list(range(100)))
    free = dataclasses.replace(pairs, ref_N2=pairs.ref_N2 * np.nan, rewards_N2=pairs.logps_N2)
    lines = evaluation(0, 0.5), evaluation(9, 0.6)
    assert last_interval(facts_of(*lines, held_out=free)) == pytest.approx(interval_of(lines[1]))
    said = verdict(facts_of(*lines, held_out=free))
    assert any("the longer answer is chosen" in one and "0.600 less than the policy" in one for one in said)
    shorter = dataclasses.replace(pairs, rewards_N2=-pairs.logps_N2)  # as where a loss divides by lengths
    assert last_interval(facts_of(*lines, held_out=shorter))[1] < 0.5


def test_a_rule_is_compared_on_the_same_pairs() -> None:
    """The policy has 80 of 100 right, "the longer answer" none by the pairs, and the interval of the difference is the
    bootstrap's; pairs of another step, or another number of them, say
    nothing of the last evaluation."""
    lines = evaluation(0, 0.5), evaluation(9, 0.8, eval_longer_is_chosen=0.5)
    pairs = held_out([1] * 80 + [0] * 20, list(range(100)))
    assert "0.800 less than the policy, beyond chance" in verdict(facts_of(*lines, held_out=pairs))[1]
    for other in (dataclasses.replace(pairs, step=5), held_out([1] * 80, list(range(80)))):
        assert "0.300 less than the policy, beyond chance" in verdict(facts_of(*lines, held_out=other))[1]


def test_margins_are_in_nats_whichever_way_they_were_recorded() -> None:
    """Log-ratios -1 and -3 nats: 2 nats. Without them, a reward margin of 1.5 at beta 0.5 is 3; without both NaN."""
    line = {"eval_log_ratio/chosen": -1.0, "eval_log_ratio/rejected": -3.0, "eval_rewards/margins": 1.5}
    assert margin_nats(line, 0.5) == 2
    assert margin_nats({"eval_rewards/margins": 1.5}, 0.5) == 3
    assert math.isnan(margin_nats({}, 0.5)) and math.isnan(margin_nats({"eval_rewards/margins": 1.0}, math.nan))
    assert log_ratio(line, "chosen", 0.5) == -1 and log_ratio({"eval_rewards/chosen": -0.25}, "chosen", 0.5) == -0.5


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        (-1.0, -3.0, "Chosen answers became less likely too"),
        (0.5, -1.5, "Chosen answers became likelier"),
        (-0.1, -2.1, "Chosen answers stayed about as likely"),
        (-3.0, -1.0, "The rejected answers gained"),
    ],
)
def test_falling_log_probs_are_said(chosen: float, rejected: float, words: str) -> None:
    """A margin that grows while both fall is another thing than one of likelier answers."""
    ratios = {"eval_log_ratio/chosen": chosen, "eval_log_ratio/rejected": rejected}
    (said,) = [one for one in verdict(facts_of(evaluation(0, 0.5), evaluation(9, 0.8, **ratios))) if "margin is" in one]
    assert words in said
    assert f"{chosen:+.2f}, of rejected ones {rejected:+.2f} nats" in said
    if chosen == -1.0:
        assert said.endswith("too: it learned what to leave, more than what to say.")
        unsure = verdict(facts_of(evaluation(0, 0.5), evaluation(9, 0.55, **ratios)))
        assert any(one.endswith("Chosen answers became less likely too.") for one in unsure), "nothing says it learned"


def test_a_loss_that_rises_again_is_said_unless_the_run_names_its_best() -> None:
    """Lowest at step 5 of 9."""
    history = [evaluation(0, 0.5), evaluation(5, 0.8, eval_loss=0.4), evaluation(9, 0.8, eval_loss=0.6)]
    assert any(
        "was lowest at step 5 (0.4000); at the end, step 9, it is 0.6000" in one for one in verdict(facts_of(*history))
    )
    named = verdict(facts_of(*history, best={"step": 5}))
    assert any("names step 5 as its best: held-out loss 0.4; at the end, step 9, 0.6." in one for one in named)
    assert not any("was lowest" in one for one in named)
    worse = [evaluation(0, 0.5, eval_loss=0.69), evaluation(5, 0.6, eval_loss=0.8), evaluation(9, 0.6, eval_loss=0.7)]
    said = verdict(facts_of(*worse, best={"step": 9}))
    assert any(
        "below the held-out loss of the start, 0.6900: the lowest after it is 0.7000, at step 9." in one for one in said
    )


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({"samples/repeated_trigrams": 0.02}, "holds, as far as so few can tell"),
        ({"samples/repeated_trigrams": 0.4}, "they repeat themselves more"),
        ({"samples/ended": 0.1}, "fewer end by themselves"),
        ({"samples/empty": 0.5}, "more are empty"),
        ({"samples/unknown": 0.5}, "more tokens are <UNK>"),
    ],
)
def test_language_is_judged_by_its_guards(after: dict[str, float], words: str) -> None:
    """Each guard alone."""
    start = {"samples/tokens": 20.0, "samples/ended": 0.5, "samples/repeated_trigrams": 0.0}
    start |= {"samples/empty": 0.0, "samples/unknown": 0.0}
    said = verdict(facts_of(evaluation(0, 0.5, **start), evaluation(9, 0.8, **{**start, **after})))
    assert any(words in one for one in said)


def test_a_silent_start_has_no_language_to_compare_with() -> None:
    """Where most answers of the start are empty, answers that repeat themselves are no change for the worse."""
    start = {"samples/tokens": 2.0, "samples/ended": 1.0, "samples/repeated_trigrams": 0.0, "samples/empty": 0.6}
    after = {"samples/tokens": 20.0, "samples/ended": 0.1, "samples/repeated_trigrams": 0.29, "samples/empty": 0.0}
    said = verdict(facts_of(evaluation(0, 0.5, **start), evaluation(9, 0.8, **after)))
    assert any("were mostly empty: nothing to compare the language with" in one for one in said)
    loops = verdict(
        facts_of(evaluation(0, 0.5, **start), evaluation(9, 0.8, **{**after, "samples/repeated_trigrams": 0.3}))
    )
    assert any("changed for the worse: they repeat themselves" in one for one in loops), "as the alarm has it"
    worse = {**start, "samples/empty": 0.8}
    assert any(
        "more are empty" in one for one in verdict(facts_of(evaluation(0, 0.5, **start), evaluation(9, 1, **worse)))
    )


def test_what_is_not_recorded_is_said() -> None:
    """Nothing held out; an evaluation without numbers; one evaluation alone; warnings are counted."""
    assert verdict(facts_of({"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}))[1].endswith("0.7000 to 0.5000.")
    assert verdict(facts_of({"step": 0, "eval_loss": "x"}))[:2] == [
        "Held-out accuracy is not recorded.",
        "The margin is not recorded.",
    ]
    assert "the only evaluation" in verdict(facts_of(evaluation(0, 0.5)))[0]
    assert all(map(math.isnan, interval_of({"eval_rewards/accuracies": 0.5})))
    warned = facts_of(evaluation(0, 0.5), warnings=[("alarm", 3, "a"), ("notice", 4, "b"), ("notice", 5, "c")])
    assert verdict(warned)[-1] == "The run gave 1 alarm and 2 notices, below."
