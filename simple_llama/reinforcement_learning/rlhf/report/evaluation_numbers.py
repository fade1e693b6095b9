"""The numbers of an evaluation: pure functions of log-prob sums, lengths, prompts and answers.

    d = (log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected))     the margin, nats

pi_ref is the start model. Shapes: N pairs, columns (chosen, rejected); Q prompts that were answered.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from simple_llama.reinforcement_learning.rlhf.run.statistics import (
    Interval,
    balanced_accuracy,
    correlation,
    length_bins,
    mean_interval,
    paired_bootstrap,
    preferred,
    reliability,
    share_interval,
    sign_test,
)

START = "start"  # the name of the start model among the models


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs with the sums of all models."""

    counts_N2: np.ndarray  # scored tokens
    groups_N: np.ndarray  # number of the prompt
    categories: Sequence[str]  # (N,)
    sums: Mapping[str, np.ndarray]  # (N, 2) nats by model, START the first
    betas: Mapping[str, float]  # by model but START: what its rewards multiply log-ratios by
    seed: int  # of the bootstrap

    def margins(self, name: str) -> np.ndarray:
        """d (N,) of a model."""
        ratios_N2 = self.sums[name].astype(np.float64) - self.sums[START]
        return ratios_N2[:, 0] - ratios_N2[:, 1]

    def preferences(self, name: str) -> np.ndarray:
        """log pi(chosen) - log pi(rejected) of a model (N,), no reference beside it."""
        sums_N2 = self.sums[name].astype(np.float64)
        return sums_N2[:, 0] - sums_N2[:, 1]

    @property
    def longer_N(self) -> np.ndarray:
        """Chosen minus rejected scored tokens."""
        return (self.counts_N2[:, 0] - self.counts_N2[:, 1]).astype(np.int64)

    @property
    def models(self) -> list[str]:
        """Names of the models beside the start model."""
        return [name for name in self.sums if name != START]


class Answers(NamedTuple):
    """A model's answers to Q prompts."""

    texts: tuple[str, ...]
    lengths: tuple[int, ...]  # tokens, without the one that ended it
    ended: tuple[bool, ...]  # by itself
    refused: tuple[bool, ...]
    repeated_trigrams: float  # share of all
    unknown: float  # share of <UNK> among all tokens


def pair_numbers(pairs: ScoredPairs) -> dict[str, Any]:
    """All numbers that come from log-probs, as JSON has them; an interval is a list of value, low, high."""
    groups, longer = pairs.groups_N, pairs.longer_N
    sizes = np.bincount(groups)
    rules = {"longer": preferred(longer), "shorter": preferred(-longer)}
    rules["start_preference"] = preferred(pairs.preferences(START))
    return {
        "pairs": len(groups),
        "prompts": len(sizes),
        "largest_prompt_share": float(sizes.max() / len(groups)),
        "baselines": {**{name: share_interval(hits, groups) for name, hits in rules.items()}, "random": 0.5},
        "models": {name: _of_model(pairs, name, rules) for name in pairs.models},
        "compared": [_compared(pairs, one, other) for one, other in combinations(pairs.models, 2)],
    }


def _of_model(pairs: ScoredPairs, name: str, rules: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What is said of one model against the start model."""
    groups, margins, seed = pairs.groups_N, pairs.margins(name), pairs.seed
    hits, raw = preferred(margins), preferred(pairs.preferences(name))
    ratios_N2 = pairs.sums[name].astype(np.float64) - pairs.sums[START]
    beta = pairs.betas[name]
    losses = np.logaddexp(0, -beta * margins)
    calibration = reliability(beta * margins)
    return {
        "beta": beta,
        "accuracy": share_interval(hits, groups),
        "margin": mean_interval(margins, groups),
        "loss": mean_interval(losses, groups),
        "preference": share_interval(raw, groups),
        "preference_changed": int(np.count_nonzero(raw - rules["start_preference"])),
        "preference_gained": paired_bootstrap(raw, rules["start_preference"], groups, seed),
        "preference_gained_p": sign_test(raw - rules["start_preference"], groups),
        "log_ratio_chosen": mean_interval(ratios_N2[:, 0], groups),
        "log_ratio_rejected": mean_interval(ratios_N2[:, 1], groups),
        "above_baseline": {rule: paired_bootstrap(hits, theirs, groups, seed) for rule, theirs in rules.items()},
        "balanced_accuracy": balanced_accuracy(hits, pairs.longer_N, groups, seed),
        "length_correlation": correlation(margins, pairs.longer_N.astype(float)),
        "by_length": _by_length(pairs, hits),
        "by_category": _by_category(pairs, hits, raw, margins),
        "calibration": {
            "error": calibration.error,
            "surplus": mean_interval(calibration.surplus_N, groups),
            "bins": [one._asdict() for one in calibration.bins],
        },
    }


def _by_length(pairs: ScoredPairs, hits: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy where the chosen answer is so much longer (tokens)."""
    longer, found = pairs.longer_N, []
    for places in length_bins(longer):
        some = longer[places]
        facts = {"low": int(some.min()), "high": int(some.max()), "mean": float(some.mean()), "count": len(places)}
        found.append({**facts, **_accuracies(pairs, places, hits)})
    return found


def _by_category(pairs: ScoredPairs, hits: np.ndarray, raw: np.ndarray, margins: np.ndarray) -> dict[str, Any]:
    """The numbers of each category, those with the most pairs first."""
    categories, found = np.array(pairs.categories), {}
    for name, count in Counter(pairs.categories).most_common():
        places = np.flatnonzero(categories == name)
        found[name] = {
            "count": count,
            **_accuracies(pairs, places, hits),
            "preference": share_interval(raw[places], _renumbered(pairs.groups_N[places])),
            "margin": mean_interval(margins[places], _renumbered(pairs.groups_N[places])),
        }
    return found


def _accuracies(pairs: ScoredPairs, places: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
    """The accuracy of some pairs, with the baselines of these."""
    return {
        "accuracy": share_interval(hits[places], _renumbered(pairs.groups_N[places])),
        "longer": float(preferred(pairs.longer_N[places]).mean()),
        "start_preference": float(preferred(pairs.preferences(START)[places]).mean()),
    }


def _renumbered(groups: np.ndarray) -> np.ndarray:
    """The same groups, numbered without gaps."""
    return np.unique(groups, return_inverse=True)[1]


def _compared(pairs: ScoredPairs, one: str, other: str) -> dict[str, Any]:
    """One model minus another on the same pairs; losses only where both have one beta, which scales them."""
    margins = pairs.margins(one), pairs.margins(other)
    measures = {
        "accuracy": [preferred(margin) for margin in margins],
        "preference": [preferred(pairs.preferences(name)) for name in (one, other)],
        "margin": list(margins),
    }
    if pairs.betas[one] == pairs.betas[other]:
        measures["loss"] = [np.logaddexp(0, -pairs.betas[one] * margin) for margin in margins]
    differences = {
        name: paired_bootstrap(ours, theirs, pairs.groups_N, pairs.seed) for name, (ours, theirs) in measures.items()
    }
    ours, theirs = measures["accuracy"]
    return {"model": one, "other": other, **differences, "accuracy_p": sign_test(ours - theirs, pairs.groups_N)}


def extremes(margins_N: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """Positions of the pairs with the largest margins, and of those with the smallest; of few pairs none is in both."""
    order, count = np.argsort(-margins_N, kind="stable"), min(count, len(margins_N) // 2)
    return order[:count].tolist(), order[::-1][:count].tolist()


def answer_numbers(answers: Mapping[str, Mapping[str, Answers]], seed: int) -> dict[str, Any]:
    """What tells whether the language holds, by the form of the prompts and model, each with its change from the start
    model's (paired bootstrap over the prompts)."""
    found: dict[str, Any] = {}
    for name, forms in answers.items():
        for form, said in forms.items():
            features, theirs = _features(said), _features(answers[START][form])
            groups = np.arange(len(said.texts))
            entry: dict[str, Any] = {
                "answers": len(said.texts),
                "repeated_trigrams": said.repeated_trigrams,
                "unknown": said.unknown,
                "tokens": mean_interval(features["tokens"], groups),
                **{key: share_interval(features[key], groups) for key in ("ended", "empty", "refused")},
            }
            if name != START:
                entry["change"] = {key: paired_bootstrap(features[key], theirs[key], groups, seed) for key in features}
            found.setdefault(form, {})[name] = entry
    return found


def _features(said: Answers) -> dict[str, np.ndarray]:
    """Numbers of each answer (Q,)."""
    empty = [not text.strip() for text in said.texts]
    columns = {"tokens": said.lengths, "ended": said.ended, "empty": empty, "refused": said.refused}
    return {name: np.array(column, float) for name, column in columns.items()}


def judge_numbers(scores: Sequence[float], flipped: Sequence[bool]) -> dict[str, Any]:
    """The win rate against the start model, a tie one half; one prompt, one duel."""
    return {
        "win_rate": share_interval(np.array(scores), np.arange(len(scores))),
        "won": sum(score > 0.5 for score in scores),
        "tied": sum(score == 0.5 for score in scores),
        "lost": sum(score < 0.5 for score in scores),
        "flipped": sum(flipped),
    }


def plain(value: Any) -> Any:
    """As JSON has it: intervals as lists, no number as null."""
    if isinstance(value, Interval | list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
