"""The verdict: which sentence stands over which numbers."""

from __future__ import annotations

import numpy as np

from simple_llama.reinforcement_learning.rlhf.report import evaluation_words as words
from simple_llama.reinforcement_learning.rlhf.report.evaluation_numbers import (
    START,
    Answers,
    ScoredPairs,
    answer_numbers,
    judge_numbers,
    pair_numbers,
)
from simple_llama.reinforcement_learning.rlhf.run.statistics import Interval


def verdict(*margins: np.ndarray, longer: np.ndarray | None = None, start: float = -5.0) -> str:
    """All sentences for models whose margins against a start model are these, half of each from either answer."""
    count = len(margins[0])
    zero = np.stack([np.full(count, start), np.full(count, start + 0.1)], 1)
    moved = {f"m{i}": zero + np.stack([margin / 2, -margin / 2], 1) for i, margin in enumerate(margins)}
    gaps = np.tile([3, -3], count)[:count] if longer is None else longer
    counts = np.stack([10 + gaps, np.full(count, 10)], 1)
    scored = ScoredPairs(counts, np.arange(count), ["x"] * count, {START: zero, **moved}, dict.fromkeys(moved, 0.5), 0)
    return "\n".join(words.verdict("the pairs", pair_numbers(scored), {}, {}))


def test_better_worse_and_neither() -> None:
    """80 of 100 moved rightly by 1 nat, 80 wrongly, 50 of each."""
    good = np.array([1.0] * 80 + [-1.0] * 20)
    assert verdict(good).startswith(
        "m0 has learned the preference: against the start model it moved towards the chosen answer in 80.0 % (71.1 to "
        "86.7) of the pairs, by +0.60 nats (+0.44 to +0.76) on average.\nBy its own log-probs it ranks 80.0 % (71.1 to "
        "86.7) of the pairs rightly, the start model 0.0 % (0.0 to 3.7): +80.0 points"
    )
    assert "m0 has moved the wrong way" in verdict(-good)
    assert "m0 shows no change in preference beyond chance" in verdict(np.tile([1.0, -1.0], 50))
    assert "cannot be told from these pairs" in verdict(np.array([1.0]), longer=np.array([1]))


def test_only_length() -> None:
    """A model that follows length has 50 weighed alike; one that is right on both sides has more."""
    longer = np.array([3] * 90 + [-3] * 10)
    follows = verdict(np.where(longer > 0, 1.0, -1.0), longer=longer)
    assert "m0 has learned the preference" in follows and "Length may explain it: 50.0 %" in follows
    assert "It is not only length: 100.0 %" in verdict(np.ones(100), longer=longer)
    still = verdict(np.tile([1.0, -1.0], 50), longer=longer)
    assert "no change in preference" in still and "ength" not in still.replace("lengths", ""), "nothing to explain"
    level = verdict(np.array([1.0] * 82 + [-1.0] * 10 + [1.0] * 8), longer=longer)  # as many right as the rule has
    assert "It is not only length" in level and level.count("not told apart from that rule by accuracy alone") == 1
    assert "one kind is missing" in verdict(np.ones(4), longer=np.ones(4, int))


def test_of_several_models() -> None:
    """The one ahead, of whom beyond chance, and each difference."""
    good, half = np.array([1.0] * 80 + [-1.0] * 20), np.tile([1.0, -1.0], 50)
    assert verdict(half, good).startswith(
        "Of 2 models m1 has the largest accuracy (80.0 %), ahead of m0 beyond chance."
    )
    assert "m0 minus m1 on the same pairs: accuracy -30.0 points" in verdict(half, good)
    assert "m0 minus m1 on the same pairs" in verdict(half, good) and "chance explains: accuracy and margin" in verdict(
        half, good
    )
    assert verdict(good, half, good).startswith("Of 3 models m0 and m2 have the same largest accuracy (80.0 %).")
    one_more = good.copy()
    one_more[80:85] = 1  # five of five: 2 / 2^5 = 0.06, where a bootstrap leaves 0 out
    assert "m1 has the largest accuracy (85.0 %), not told apart from m0." in verdict(good, one_more)
    one_more[85] = 1  # 0.031, and too much for the best of three
    assert "ahead of m0 beyond chance" in verdict(good, one_more)
    assert "ahead of m2 beyond chance" in verdict(good, one_more, half)


def test_pairs_and_margins_that_disagree() -> None:
    """Most pairs a little wrong and few far right; margins alone below 0; pairs alone below one half."""
    few_far = np.array([-0.01] * 75 + [2.0] * 25)
    assert "m0 has moved some pairs far and most the other way" in verdict(few_far)
    assert "m0 has moved some pairs far and most the other way" in verdict(-few_far)
    assert "m0 has probably moved the wrong way" in verdict(np.array([1.0] * 50 + [-2.0] * 50))
    assert "m0 has probably moved the wrong way" in verdict(np.array([0.1] * 39 + [-0.1] * 60 + [2.2]))


def test_few_prompts_tell_nothing() -> None:
    """Two pairs with 1 and 0.9 nats: 0.95 -+ 12.7 * 0.05, and 2 of 2 is no proof of anything."""
    found = verdict(np.array([1.0, 0.9]), start=-5)
    assert "by +0.95 nats (+0.31 to +1.59)" in found
    assert "too few prompts." in found and "more than chance" not in found
    assert "more than chance explains" in verdict(np.ones(6)) and "more than chance explains" not in verdict(np.ones(5))


def test_chosen_answers_that_fall() -> None:
    """Said where the log-prob of the chosen answers falls; a start model alone has its own ranking."""
    assert "The chosen answers have become less likely" in verdict(np.full(10, -1.0))
    assert "the start model 0.0 % (0.0 to 27.8): not one pair changed." in verdict(np.full(10, 0.01))
    assert "right more often than sigmoid of the reward margin says, on average by 37.8 points" in verdict(
        np.full(10, 1.0)
    )
    assert "right less often than sigmoid of the reward margin says, on average by 62.2 points" in verdict(
        np.full(10, -1.0)
    )
    # right 5 of 10 where it is sure by 0.62: -12.2 points, and an interval that holds 0
    assert "no probabilities" not in verdict(np.tile([1.0, -1.0], 5))
    assert "The chosen answers have become less likely" not in verdict(np.full(10, 1.0))
    alone = ScoredPairs(np.ones((4, 2), int), np.arange(4), ["x"] * 4, {START: np.tile([[-1.0, -2]], (4, 1))}, {}, 0)
    [only] = words.verdict("the pairs", pair_numbers(alone), {}, {})
    assert only.startswith("The start model alone gives the chosen answer the larger log-prob in 100.0 %")


BEFORE = Answers(("fine",) * 10, (4,) * 10, (True,) * 9 + (False,), (False,) * 10, 0.05, 0.0)
SILENT = Answers(("",) * 10, (0,) * 10, (True,) * 10, (False,) * 10, 0.0, 0.0)


def language(after: Answers, before: Answers = BEFORE) -> str:
    """The sentence on a model whose start model ends nine of ten answers, none empty."""
    found = answer_numbers({START: {"training": before}, "m": {"training": after}}, 0)
    [sentence] = words._language("m", found)
    return sentence


def test_language_that_holds_and_breaks() -> None:
    """As before; loops; runs on; falls silent; no letters that it knows."""
    good = Answers(("fine",) * 10, (4,) * 10, (True,) * 9 + (False,), (False,) * 10, 0.05, 0.0)
    assert "holds as far as counting can tell" in language(good)
    assert "it repeats itself more than before" in language(good._replace(repeated_trigrams=0.3))
    assert "fewer answers end by themselves" in language(good._replace(ended=(False,) * 10))
    assert "holds as far as counting" in language(good._replace(ended=(True,) * 8 + (False,) * 2))
    assert "30.0 % (10.8 to 60.3) of the answers are empty" in language(good._replace(texts=("",) * 3 + ("fine",) * 7))
    assert "5.0 % of the tokens are <UNK>" in language(good._replace(unknown=0.05))


def test_a_silent_start_is_nothing_to_compare_with() -> None:
    """Empty before and after; answers where there were none; a fault that needs no start is one all the same."""
    assert "has nothing to compare with: 100.0 % (72.2 to 100.0) of the start model's answers are empty" in language(
        SILENT, SILENT
    )
    loops = BEFORE._replace(repeated_trigrams=0.3, ended=(False,) * 10)
    assert "needs a look: it repeats itself." in language(loops, SILENT), "as the alarm has it"
    assert "has nothing to compare with" in language(loops._replace(repeated_trigrams=0.29), SILENT)
    assert "needs a look: 5.0 % of the tokens are <UNK>" in language(BEFORE._replace(unknown=0.05), SILENT)


def test_what_both_forms_say_is_said_once() -> None:
    """The forms of the prompts are named where there are several."""
    forms = {"training": BEFORE, "serving": BEFORE}
    [both] = words._language("m", answer_numbers({START: forms, "m": forms}, 0))
    assert "holds as far as counting can tell, prompts as in training and in serving." in both
    others = {**forms, "serving": SILENT}
    training, serving = words._language("m", answer_numbers({START: forms, "m": others}, 0))
    assert ", prompts as in training." in training and ", prompts as in serving." in serving


def test_judge_and_numbers_in_words() -> None:
    """Whom the judge prefers; intervals that are none."""
    assert words._judge("m", judge_numbers([1.0] * 20, [False] * 20)).startswith(
        "The judge prefers it: m wins 100.0 % (83.9 to 100.0) (won 20, tied 0, lost 0)."
    )
    assert "sees no difference" in words._judge("m", judge_numbers([0.5] * 4, [True] * 4))
    assert "4 verdicts went by the place" in words._judge("m", judge_numbers([0.5] * 4, [True] * 4))
    assert words.nats(Interval(1, float("nan"), float("nan"))) == "+1.00 nats (too few prompts for an interval)"
    assert words.percent(0.5) == "50.0 %"
    assert words.percent(Interval(*[float("nan")] * 3)) == "undefined"
