"""What an evaluation shows, in words: is it better, by how much, is it real, is it only length, does the language hold.

Pure functions of the numbers of evaluation_numbers.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from simple_llama.reinforcement_learning.rlhf.report.evaluation_numbers import START
from simple_llama.reinforcement_learning.rlhf.run.health import LOOPS, SILENT
from simple_llama.reinforcement_learning.rlhf.run.statistics import Interval

_CHANCE = 0.5
_ERROR = 0.05  # of a sign test
_MISCALIBRATED = 0.1  # calibration error
_MANY_EMPTY = 0.05  # a share of empty answers that is a fault, unless the start model has as many
_WORSE, _MORE_UNKNOWN = 0.1, 0.01  # rises of the shares of repeated trigrams and of <UNK> that are a fault


def percent(share: float | Interval) -> str:
    """`78.1 % (72.3 to 83.0)`, or of a number alone `78.1 %`."""
    if not isinstance(share, Interval):
        return f"{100 * share:.1f} %"
    if math.isnan(share.value):
        return "undefined"
    return f"{100 * share.value:.1f} %{_bounds(share, 100, 1)}"


def points(difference: Interval, sign: str = "+") -> str:
    """A difference of shares in percentage points."""
    return f"{100 * difference.value:{sign}.1f} points{_bounds(difference, 100, 1, sign)}"


def _size(number: Interval) -> Interval:
    """A number of either sign without it."""
    return Interval(-number.value, -number.high, -number.low) if number.value < 0 else number


def nats(number: Interval) -> str:
    """A number with its interval."""
    return f"{number.value:+.2f} nats{_bounds(number, 1, 2, '+')}"


def _bounds(number: Interval, scale: float, digits: int, sign: str = "") -> str:
    if math.isnan(number.low):
        return " (too few prompts for an interval)"
    return f" ({scale * number.low:{sign}.{digits}f} to {scale * number.high:{sign}.{digits}f})"


def verdict(
    which: str, numbers: Mapping[str, Any], answers: Mapping[str, Any], judged: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Sentences for a person, the most important first."""
    if not numbers["models"]:
        raw = percent(numbers["baselines"]["start_preference"])
        return [f"The start model alone gives the chosen answer the larger log-prob in {raw} of {which}."]
    found = _of_several(numbers)
    for name, model in numbers["models"].items():
        found += [_is_better(name, model, which), *_is_real(model, numbers, bool(answers)), *_is_length(model)]
        found += _language(name, answers)
        if name in judged:
            found.append(_judge(name, judged[name]))
    found += [_against(both) for both in numbers["compared"]]
    if numbers["prompts"] < numbers["pairs"]:
        found.append(
            f"{numbers['pairs']:,} pairs answer {numbers['prompts']:,} prompts; intervals count prompts, not pairs."
        )
    return found


def _of_several(numbers: Mapping[str, Any]) -> list[str]:
    """Of several models, which one is ahead, and whether that is real."""
    accuracies = {name: model["accuracy"].value for name, model in numbers["models"].items()}
    if len(accuracies) < 2:
        return []
    most = max(accuracies.values())
    best = [name for name, accuracy in accuracies.items() if accuracy == most]
    if len(best) > 1:
        return [f"Of {len(accuracies)} models {' and '.join(best)} have the same largest accuracy ({percent(most)})."]
    behind, comparisons = [], len(accuracies) - 1
    for both in numbers["compared"]:
        if best[0] in (both["model"], both["other"]) and both["accuracy_p"] * comparisons <= _ERROR:
            behind.append(both["other"] if both["model"] == best[0] else both["model"])
    others = [name for name in accuracies if name != best[0]]
    if behind:
        real = f"ahead of {', '.join(behind)} beyond chance"
    else:
        real = f"not told apart from {others[0] if len(others) == 1 else 'any of the others'}"
    return [f"Of {len(accuracies)} models {best[0]} has the largest accuracy ({percent(most)}), {real}."]


def _moved(model: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether margin or accuracy went up, and whether one went down, chance apart."""
    accuracy, margin = model["accuracy"], model["margin"]
    return margin.is_above or accuracy.low > _CHANCE, margin.is_below or accuracy.high < _CHANCE


def _is_better(name: str, model: Mapping[str, Any], which: str) -> str:
    """Whether, and by how much."""
    accuracy, margin, (up, down) = model["accuracy"], model["margin"], _moved(model)
    if math.isnan(margin.low):
        word = "cannot be told from these pairs: too few prompts"
    elif accuracy.low > _CHANCE and margin.is_above:
        word = "has learned the preference"
    elif accuracy.high < _CHANCE and margin.is_below:
        word = "has moved the wrong way"
    elif up and down:
        word = "has moved some pairs far and most the other way"
    elif up:
        word = "has probably learned some of the preference"
    elif down:
        word = "has probably moved the wrong way"
    else:
        word = "shows no change in preference beyond chance"
    return (
        f"{name} {word}: against the start model it moved towards the chosen answer in {percent(accuracy)} of {which}, "
        f"by {nats(margin)} on average."
    )


def _is_real(model: Mapping[str, Any], numbers: Mapping[str, Any], answered: bool) -> list[str]:
    """Whether it now ranks more pairs rightly, and whether it beats what needs no training."""
    gained, start = model["preference_gained"], numbers["baselines"]["start_preference"]
    real = "more than chance explains" if model["preference_gained_p"] <= _ERROR else "chance may explain it"
    change = "not one pair changed" if not model["preference_changed"] else f"{points(gained)}, {real}"
    chosen, rejected = model["log_ratio_chosen"].value, model["log_ratio_rejected"].value
    found = [
        f"By its own log-probs it ranks {percent(model['preference'])} of the pairs rightly, the start model "
        f"{percent(start)}: {change}."
    ]
    if model["log_ratio_chosen"].is_below:
        way = "" if answered else ", and answers (--generate) show whether it hurts"
        found.append(
            f"The chosen answers have become less likely themselves ({chosen:+.2f} nats; the rejected ones "
            f"{rejected:+.2f}): common in honest runs{way}."
        )
    surplus = model["calibration"]["surplus"]
    if model["calibration"]["error"] > _MISCALIBRATED and (surplus.is_above or surplus.is_below):
        found.append(
            f"Its rewards are no probabilities: at its beta, {model['beta']:g}, it is right "
            f"{'more' if surplus.is_above else 'less'} often than sigmoid of the reward margin says, on average by "
            f"{points(_size(surplus), '')}."
        )
    return found


def _is_length(model: Mapping[str, Any]) -> list[str]:
    """Whether length alone may explain what changed; nothing where nothing did."""
    return [_by_length(model)] if any(_moved(model)) or math.isnan(model["margin"].low) else []


def _by_length(model: Mapping[str, Any]) -> str:
    """Whether length alone may explain it."""
    balanced, longer = model["balanced_accuracy"], model["above_baseline"]["longer"]
    if math.isnan(balanced.value):
        return "Whether length explains it cannot be told: of longer and shorter chosen answers one kind is missing."
    if math.isnan(balanced.low):
        return "Whether length explains it cannot be told: too few prompts."
    rule = f'against the rule "longer" {points(longer)}, margin and length correlate {model["length_correlation"]:+.2f}'
    if balanced.low > _CHANCE:
        yet = "" if longer.is_above else ", though not told apart from that rule by accuracy alone"
        return (
            f"It is not only length: {percent(balanced)} with longer and shorter chosen answers weighed alike; "
            f"{rule}{yet}."
        )
    return (
        f"Length may explain it: {percent(balanced)} with longer and shorter chosen answers weighed alike, where a "
        f"rule that only counts tokens has 50; {rule}."
    )


def _language(name: str, answers: Mapping[str, Any]) -> list[str]:
    """Whether the answers still are language, by the form of the prompts."""
    found: dict[tuple[str, str], list[str]] = {}  # forms of which the same is said
    for form, models in answers.items():
        now, start = models[name], models[START]
        faults = _faults(now, start)
        word = f"needs a look: {'; '.join(faults)}" if faults else "holds as far as counting can tell"
        if start["empty"].value >= SILENT and not faults:
            word = f"has nothing to compare with: {percent(start['empty'])} of the start model's answers are empty"
            word += f", {percent(now['empty'])} of its own"
        facts = (
            f"{percent(now['repeated_trigrams'])} of trigrams repeated (start {percent(start['repeated_trigrams'])}), "
            f"{percent(now['ended'].value)} of answers end by themselves ({percent(start['ended'].value)}), "
            f"{now['tokens'].value:.0f} tokens each ({start['tokens'].value:.0f}), "
            f"{percent(now['refused'].value)} refuse ({percent(start['refused'].value)})"
        )
        found.setdefault((word, f"{now['answers']} answers: {facts}."), []).append(form)
    said = []
    for (word, counted), forms in found.items():
        where = f", prompts as in {' and in '.join(forms)}" if len(answers) > 1 else ""
        said.append(f"The language of {name} {word}{where}. {counted}")
    return said


def _faults(now: Mapping[str, Any], start: Mapping[str, Any]) -> list[str]:
    """What is worse than with the start model, beyond chance or by a share that nobody would accept."""
    faults, change = [], now["change"]
    had_some = start["empty"].value < SILENT
    if had_some and now["repeated_trigrams"] - start["repeated_trigrams"] > _WORSE:
        faults.append("it repeats itself more than before")
    if not had_some and now["repeated_trigrams"] >= LOOPS:
        faults.append("it repeats itself")
    if had_some and change["ended"].is_below:
        faults.append("fewer answers end by themselves")
    if now["empty"].value > max(_MANY_EMPTY, start["empty"].value) or change["empty"].is_above:
        faults.append(f"{percent(now['empty'])} of the answers are empty")
    if now["unknown"] - start["unknown"] > _MORE_UNKNOWN:
        faults.append(f"{percent(now['unknown'])} of the tokens are <UNK>")
    return faults


def _judge(name: str, judged: Mapping[str, Any]) -> str:
    """What the judge says."""
    rate = judged["win_rate"]
    word = (
        "prefers it"
        if rate.low > _CHANCE
        else "prefers the start model"
        if rate.high < _CHANCE
        else "sees no difference"
    )
    flipped = (
        f"; {judged['flipped']} verdicts went by the place of the answer and count as ties" if judged["flipped"] else ""
    )
    return (
        f"The judge {word}: {name} wins {percent(rate)} (won {judged['won']}, tied {judged['tied']}, lost "
        f"{judged['lost']}){flipped}."
    )


def _against(both: Mapping[str, Any]) -> str:
    """One model against another."""
    accuracy, margin = both["accuracy"], both["margin"]
    parts = {"accuracy": both["accuracy_p"] <= _ERROR, "margin": margin.is_above or margin.is_below}
    sure = [name for name, told in parts.items() if told]
    real = f"more than chance explains: {' and '.join(sure)}" if sure else "chance may explain it"
    return (
        f"{both['model']} minus {both['other']} on the same pairs: accuracy {points(accuracy)}, margin {nats(margin)}; "
        f"{real}."
    )
