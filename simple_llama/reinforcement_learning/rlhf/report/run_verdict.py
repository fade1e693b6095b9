"""What a run's numbers say, in words: pure functions of its records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simple_llama.reinforcement_learning.rlhf.report.page import number
from simple_llama.reinforcement_learning.rlhf.report.read_run import HeldOutPairs, RunFacts, value
from simple_llama.reinforcement_learning.rlhf.run.health import LOOPS, SILENT
from simple_llama.reinforcement_learning.rlhf.run.statistics import (
    Interval,
    accuracy_interval,
    paired_bootstrap,
    preferred,
    share_interval,
    sign_test,
)

# What a share of the sample answers may change before the language is said to have changed.
_REPEATED, _ENDED, _EMPTY = 0.10, 0.25, 0.10
_ERROR = 0.05  # of a sign test
_FLAT = 0.1  # of the margin: a log-ratio below is said not to have moved
_LIKELIER = "the start model finds it likelier"  # a rule


def verdict(facts: RunFacts) -> list[str]:
    """Sentences, the most important first: accuracy and whether it is chance, rules that read nothing, margin and
    log-ratios, the best step, language, warnings."""
    evaluations = facts.evaluations
    if not evaluations:
        return ["Nothing was held out, so nothing says whether the run helped.", *_training(facts), *_warned(facts)]
    first, last = evaluations[0], evaluations[-1]
    said = [
        *_accuracy(facts, first, last),
        *_rules(facts, first, last),
        *_margin(facts, first, last),
        *_best(facts, last),
    ]
    return [*said, *_language(facts), *_warned(facts)]


def interval_of(line: Mapping[str, Any]) -> tuple[float, float]:
    """Where the accuracy of an evaluation lies with 95 % confidence, several pairs of one prompt counted for what they
    are worth where that is recorded; NaN where the line does not tell."""
    accuracy, count = value(line, "eval_rewards/accuracies"), value(line, "eval_effective_pairs")
    count = count if math.isfinite(count) else value(line, "eval_pairs")
    if not (0 <= accuracy <= 1 and count >= 1):
        return math.nan, math.nan
    return accuracy_interval(accuracy, count)


def last_interval(facts: RunFacts) -> tuple[float, float]:
    """The interval of the last accuracy, by the pairs themselves where they are recorded."""
    pairs = facts.pairs_at_end
    if pairs is None:
        return interval_of(facts.evaluations[-1])
    found = share_interval(pairs.hits_N, pairs.groups_N)
    return found.low, found.high


def margin_nats(line: Mapping[str, Any], beta: float, prefix: str = "eval_") -> float:
    """How much more the chosen answer gained than the rejected one, nats, of a line of metrics; NaN where unknown."""
    chosen, rejected = (value(line, f"{prefix}log_ratio/{side}") for side in ("chosen", "rejected"))
    if math.isfinite(chosen - rejected):
        return chosen - rejected
    return value(line, f"{prefix}rewards/margins") / beta if beta > 0 else math.nan


def log_ratio(line: Mapping[str, Any], side: str, beta: float) -> float:
    """log pi / pi_ref of held-out answers of a side, nats an answer; NaN where it is not recorded."""
    found = value(line, f"eval_log_ratio/{side}")
    if math.isfinite(found) or not beta > 0:
        return found
    return value(line, f"eval_rewards/{side}") / beta


def _accuracy(facts: RunFacts, first: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[str]:
    """Whether the policy prefers the chosen answers of pairs that it was not trained on."""
    before, after = (value(line, "eval_rewards/accuracies") for line in (first, last))
    low, high = last_interval(facts)
    if not math.isfinite(low + after):
        yield "Held-out accuracy is not recorded."
        return
    pairs = f"{number(value(last, 'eval_pairs'))} pairs{_worth(last)}"
    found = f"from {before:.3f} to {after:.3f} of {pairs} (95 %: {low:.2f} to {high:.2f})"
    if last["step"] == first["step"]:
        yield f"Held-out accuracy is {after:.3f} at step {last['step']}: the only evaluation, with nothing to compare."
    elif low > before:
        yield f"Held-out accuracy rose {found}: beyond its interval, so chance does not explain it."
    elif high < before:
        yield (
            f"Held-out accuracy fell {found}: beyond its interval. The policy moved towards the rejected answers: "
            "look at the labels and at the learning rate."
        )
    else:
        yield (
            f"Held-out accuracy went {found}: where it began lies within the interval, so this run does not show that "
            "anything was learned. More held-out pairs (val_share) make the interval smaller."
        )


def _worth(line: Mapping[str, Any]) -> str:
    """How many independent pairs the held-out ones are worth, where they are fewer."""
    worth = value(line, "eval_effective_pairs")
    return f" that are worth {worth:.0f} independent ones" if worth < value(line, "eval_pairs") - 0.5 else ""


def _rules(facts: RunFacts, first: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[str]:
    """The accuracy beside those of rules that read nothing, and of the start model's own preference: on the same pairs
    where these are recorded, which tells more than the interval of the accuracy alone."""
    accuracy, (low, high) = value(last, "eval_rewards/accuracies"), last_interval(facts)
    longer, raw = value(last, "eval_longer_is_chosen"), value(first, "eval_logps/accuracies")
    by_length = "the longer answer is chosen" if not longer < 0.5 else "the shorter answer is chosen"
    differences = above_rules(facts.pairs_at_end) if facts.pairs_at_end else {}
    if not facts.starts_as_reference:  # whose sums of each pair are not recorded
        differences.pop(_LIKELIER, None)
    for rule, share in ((by_length, max(longer, 1 - longer)), (_LIKELIER, raw)):
        if not math.isfinite(share + low + accuracy):
            continue
        found, differ = differences.get(rule, (Interval(accuracy - share, low - share, high - share), True))
        less = f"{abs(found.value):.3f} {'less' if found.value > 0 else 'more'} than the policy"
        if not round(found.value, 3):
            words = "as much as the policy"
        elif differ and found.is_above:
            words = f"{less}, beyond chance"
        elif differ and found.is_below:
            words = f"{less}, beyond chance: who knows this rule alone does better"
        else:
            words = f"{less}, which chance may explain: not told apart"
        yield f'The rule "{rule}" scores {share:.3f} on the same pairs: {words}.'


def above_rules(pairs: HeldOutPairs) -> dict[str, tuple[Interval, bool]]:
    """How much more of the recorded pairs the policy tells right than each rule does, and whether a sign test over
    the prompts says so too, by the rules' names."""
    ref_N2, gaps_N = pairs.ref_N2.astype(np.float64), pairs.length_gaps_N
    rules = {
        "the longer answer is chosen": preferred(gaps_N),
        "the shorter answer is chosen": preferred(-gaps_N),
    }
    if pairs.has_reference:
        rules[_LIKELIER] = preferred(ref_N2[:, 0] - ref_N2[:, 1])
    hits_N, groups_N = pairs.hits_N, pairs.groups_N
    return {
        name: (paired_bootstrap(hits_N, rule_N, groups_N), sign_test(hits_N - rule_N, groups_N) <= _ERROR)
        for name, rule_N in rules.items()
    }


def _margin(facts: RunFacts, first: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[str]:
    """What the margin is made of."""
    margin = margin_nats(last, facts.beta)
    chosen, rejected = (log_ratio(last, side, facts.beta) for side in ("chosen", "rejected"))
    if not math.isfinite(margin):
        yield "The margin is not recorded."
        return
    said = f"The margin is {margin:.2f} nats an answer (chosen against rejected, each against {facts.reference})"
    if not math.isfinite(chosen + rejected):
        yield f"{said}."
        return
    parts = f"log-prob of chosen answers {chosen:+.2f}, of rejected ones {rejected:+.2f} nats"
    if margin <= 0:
        words = "The rejected answers gained"
    elif chosen < -_FLAT * margin:
        words = "Chosen answers became less likely too"
        if last_interval(facts)[0] > value(first, "eval_rewards/accuracies"):
            words += ": it learned what to leave, more than what to say"
    else:
        words = (
            f"Chosen answers {'became likelier' if chosen > _FLAT * margin else 'stayed about as likely as they were'}"
        )
    yield f"{said}: {parts}. {words}."


def _best(facts: RunFacts, last: Mapping[str, Any]) -> Iterator[str]:
    """Whether the run went on past its best."""
    named = facts.at(facts.best.get("step"))
    if named and named is not last:
        metric, kept = str(facts.best.get("metric", "eval_loss")), Path(str(facts.best.get("weights", ""))).name
        words = "held-out loss" if metric == "eval_loss" else metric
        where = f" ({kept})" if kept else ""
        then = f"; at the end, step {last['step']}, {number(value(last, metric))}"
        yield f"The run names step {named['step']}{where} as its best: {words} {number(value(named, metric))}{then}."
    lowest = min(facts.evaluations, key=lambda line: _or_inf(value(line, "eval_loss")))
    loss, final = value(lowest, "eval_loss"), value(last, "eval_loss")
    first = facts.evaluations[0]
    if lowest is first and first is not last and first["step"] == 0 and final > loss:
        after = min(facts.evaluations[1:], key=lambda line: _or_inf(value(line, "eval_loss")))
        yield (
            f"No evaluation is below the held-out loss of the start, {loss:.4f}: the lowest after it is "
            f"{value(after, 'eval_loss'):.4f}, at step {after['step']}."
        )
    elif lowest is not last and final > loss and not named:
        yield (
            f"The held-out loss was lowest at step {lowest['step']} ({loss:.4f}); at the end, step {last['step']}, it "
            f"is {final:.4f}: fewer steps or a smaller rate may do as well."
        )


def _or_inf(found: float) -> float:
    return found if math.isfinite(found) else math.inf


def _language(facts: RunFacts) -> Iterator[str]:
    """Whether sample answers still are language, by the guards at the start and at the end."""
    seen = [line for line in facts.evaluations if "samples/tokens" in line]
    if not seen:
        yield "No sample answers were made: nothing says whether the language holds."
        return
    first, last = seen[0], seen[-1]
    count = len(facts.samples[-1]["prompts"]) if facts.samples else 0
    changes = {
        name: (value(first, f"samples/{name}"), value(last, f"samples/{name}"))
        for name in ("repeated_trigrams", "ended", "empty", "unknown")
    }
    had_none = changes["empty"][0] >= SILENT
    troubles = [
        words
        for name, words, sign, most in _GUARDS
        if sign * (changes[name][1] - changes[name][0]) > most and not (had_none and name in _OF_ANSWERS)
    ]
    if had_none and changes["repeated_trigrams"][1] >= LOOPS:
        troubles.append("they repeat themselves")
    told = ", ".join(
        f"{words} {before:.0%} then {after:.0%}"
        for (before, after), words in zip(changes.values(), _SAID, strict=True)
        if math.isfinite(before + after)
    )
    lengths = f"mean length {value(first, 'samples/tokens'):.0f} then {value(last, 'samples/tokens'):.0f} tokens"
    of = f"of {count} sample answers" if count else "of the sample answers"
    if troubles:
        yield f"The language {of} changed for the worse: {' and '.join(troubles)} ({told}, {lengths})."
    elif had_none or value(first, "samples/tokens") == 0:
        yield (
            f"The start model's sample answers were mostly empty: nothing to compare the language with ({told}, "
            f"{lengths})."
        )
    else:
        yield f"The language {of} holds, as far as so few can tell: {told}, {lengths}."


_OF_ANSWERS = ("repeated_trigrams", "ended")
_SAID = ("repeated trigrams", "ended by themselves", "empty", "unknown tokens")
_GUARDS = (
    ("repeated_trigrams", "they repeat themselves more", 1, _REPEATED),
    ("ended", "fewer end by themselves", -1, _ENDED),
    ("empty", "more are empty", 1, _EMPTY),
    ("unknown", "more tokens are <UNK>", 1, _EMPTY),
)


def _training(facts: RunFacts) -> Iterator[str]:
    """The training loss, where nothing else is there."""
    losses = [value(line, "loss") for line in facts.intervals]
    if losses:
        yield f"The training loss went from {losses[0]:.4f} to {losses[-1]:.4f}."


def _warned(facts: RunFacts) -> Iterator[str]:
    """How many warnings there are."""
    alarms = sum(level == "alarm" for level, _, _ in facts.warnings)
    notices = len(facts.warnings) - alarms
    if facts.warnings:
        parts = [
            f"{count} {word}{'s' * (count > 1)}" for count, word in ((alarms, "alarm"), (notices, "notice")) if count
        ]
        yield f"The run gave {' and '.join(parts)}, below."
