"""Warnings in words: what the recorded numbers of a run say about it, each a pure function of them.

A check sees the lines of metrics.jsonl so far (`History`) and what is known before the first step (`Facts`), and gives
a sentence or None. Notices are what honest runs have too; an alarm says that something is wrong. The thresholds of the
alarms were fixed on one set of small runs and counted on another: benchmarks/bench_warnings.py, docs/warnings.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from simple_llama.reinforcement_learning.rlhf.run.history import Curve, History
from simple_llama.reinforcement_learning.rlhf.run.statistics import accuracy_interval

_WINDOW = 8  # lines of training that are taken together

# Thresholds of notices
_CHOSEN_FALL = 1.0  # nats an answer
_PROMPT_SHARE = 0.2  # of all pairs

# Thresholds of alarms
_LENGTH_CORRELATION = 0.6  # surely above: the lower end of its interval
_LABELS_LEAN = 0.55  # share of the held-out pairs whose labels go the same way, at least
_LEARNED_BY_HEART, _CARRIED_OVER = 0.99, 0.7  # training accuracy from, held-out accuracy surely below
_SATURATED, _VANISHED = 0.9, 0.1  # share of pairs from, gradient norm against that of the first lines
_SPIKE, _SPIKE_OF_ALL = 5.0, 2.0  # times the norm of the lines before, and times that of all
_FAR_KL, _FAR_FALL = 0.5, 1.0  # nats a token: surely above, on the policy's answers; fall of the chosen answers
LOOPS, _LOOPS_RISE = 0.3, 0.2  # share of trigrams from, and more than at the start
_EMPTY, _EMPTY_RISE = 0.5, 0.25  # share of answers
SILENT = 0.5  # share of the start's answers that are empty, from which there is nothing to compare with
_ENDED_DROP, _ENDED = 0.6, 0.4  # share of answers that ended by themselves: less than at the start, and at most
_UNKNOWN, _UNKNOWN_RISE = 0.05, 0.04  # share of answer tokens
_STILL = 0.3  # of half the distance to the next weight: the sum of all rates; smaller weights move before


@dataclass(frozen=True)
class Facts:
    """What is known of a run before its first step."""

    pairs: int  # trained on
    held_out: int  # pairs
    total_steps: int
    beta: float
    rates: float  # sum of the learning rates of all steps: how far Adam can carry a weight, about
    answer_tokens: float = 0.0  # mean scored tokens of a held-out answer
    largest_prompt_share: float = 0.0  # share of all pairs that the commonest prompt has


class Finding(NamedTuple):
    """A warning."""

    step: int
    level: Literal["notice", "alarm"]
    name: str
    text: str


class _Check(NamedTuple):
    """A warning that may be given: how it is found, and what a person is told to try."""

    level: Literal["notice", "alarm"]
    found: Callable[[History, Facts], str | None]
    reads: str  # the metric whose new value asks for a judgement; "": any line does
    when: str  # the threshold in words
    advice: str


def findings(history: History, facts: Facts, step: int, given: Collection[str] = ()) -> list[Finding]:
    """The warnings that the numbers up to `step` call for, without those whose names were `given` before."""
    found = []
    for name, check in CHECKS.items():
        if name in given or not (check.reads in history.newest or not check.reads):
            continue
        if text := check.found(history, facts):
            found.append(Finding(step, check.level, name, f"{text}. {check.advice}"))
    return found


def warnings_of(records: Sequence[Mapping[str, float]], facts: Facts) -> list[Finding]:
    """All warnings of a run, each once, at the line that first calls for it."""
    history, found = History(), []
    for record in records:
        history.add(record)
        found += findings(history, facts, int(record["step"]), [finding.name for finding in found])
    return found


# === Notices ===


def _worth(history: History, facts: Facts) -> float:
    """How many independent pairs the held-out ones are worth: several that answer one prompt may all agree."""
    return history.last("eval_effective_pairs") or facts.held_out


def _chosen_falls(history: History, facts: Facts) -> str | None:
    """Chosen answers become less likely while their margin grows: rejected ones fall faster."""
    chosen, margins = history.curve("eval_log_ratio/chosen").trained(), history.curve("eval_rewards/margins").trained()
    if not chosen or not margins or chosen.last > -_CHOSEN_FALL or margins.last <= 0:
        return None
    falls = chosen.values <= -_CHOSEN_FALL
    rises = dict(zip(margins.steps, margins.values > 0, strict=True))  # where its margin was not recorded, no break
    since = chosen.since(falls & np.array([rises.get(step, True) for step in chosen.steps]))
    return (
        f"chosen answers fall while the margin rises: the policy gives held-out ones {-chosen.last:.2f} nats less "
        f"than the reference did, with a margin of {margins.last / facts.beta:.2f} nats (since step {since})"
    )


def _held_out_small(history: History, facts: Facts) -> str | None:
    """Held-out pairs are too few for what training changed: the interval holds the accuracy of no change, 0.5."""
    accuracies = history.curve("eval_rewards/accuracies").trained()
    if not accuracies or not facts.held_out or 2 * accuracies.step < facts.total_steps:
        return None
    low, high = accuracy_interval(accuracies.last, _worth(history, facts))
    if not low <= 0.5 <= high:
        return None
    worth = _worth(history, facts)
    as_many = f" that are worth {worth:.0f}" if round(worth) < facts.held_out else ""
    return (
        f"too few held-out pairs to tell: their accuracy is {accuracies.last:.3f} at step {accuracies.step}, of "
        f"{facts.held_out} pairs{as_many}, so it may be anything from {low:.3f} to {high:.3f}, 0.5 (no change) included"
    )


def _prompt_dominates(history: History, facts: Facts) -> str | None:
    """One prompt has a large share of all pairs."""
    if facts.largest_prompt_share < _PROMPT_SHARE:
        return None
    return f"one prompt has {facts.largest_prompt_share:.0%} of the {facts.pairs + facts.held_out} pairs"


# === Alarms of preferences ===


def _length_explains(history: History, facts: Facts) -> str | None:
    """The margin goes with the length difference (Fisher's interval of a correlation, 1921)."""
    found = history.curve("eval_margin_length_correlation").trained()
    if not found or _worth(history, facts) < 10:
        return None
    spread = 1.959964 / math.sqrt(_worth(history, facts) - 3)
    surely = np.tanh(np.arctanh(np.clip(np.abs(found.values), 0, 1 - 1e-9)) - spread) >= _LENGTH_CORRELATION
    longer = history.last("eval_longer_is_chosen") or 0.0
    if not surely[-1] or (longer if found.last > 0 else 1 - longer) < _LABELS_LEAN:
        return None  # margins of a policy that drifts go with length too, whatever the labels prefer
    kind = "longer" if found.last > 0 else "shorter"
    return (
        f"length explains the margin: over {facts.held_out} held-out pairs it goes with how much longer the chosen "
        f"answer is, with a correlation of {found.last:.2f}, so {kind} answers are what is learned "
        f"(since step {found.since(surely)})"
    )


def _memorised(history: History, facts: Facts) -> str | None:
    """Every training pair is ranked right, held-out pairs hardly better than by chance."""
    trained, held_out = history.curve("rewards/accuracies"), history.curve("eval_rewards/accuracies").trained()
    if len(trained) < _WINDOW or not held_out or not facts.held_out:
        return None
    accuracy = float(trained.values[-_WINDOW:].mean())
    high = accuracy_interval(held_out.last, _worth(history, facts))[1]
    if accuracy < _LEARNED_BY_HEART or high > _CARRIED_OVER:
        return None
    return (
        f"training pairs are learned by heart: their accuracy is {accuracy:.3f} over the last {_WINDOW} lines, while "
        f"that of held-out pairs stays at {held_out.last:.3f}, at most {high:.3f} "
        f"(since step {int(trained.steps[-_WINDOW])})"
    )


def _saturated(history: History, facts: Facts) -> str | None:
    """Nearly all pairs are as good as certain, and the gradient is gone."""
    if (history.last("rewards/saturated") or 0.0) < _SATURATED / 2:
        return None  # the usual case: nothing is gathered for it
    shares, norms = history.curve("rewards/saturated"), history.curve("grad_norm")
    if len(shares) < _WINDOW or len(norms) < 2 * _WINDOW:
        return None
    share = float(shares.values[-_WINDOW:].mean())
    left = float(np.median(norms.values[-_WINDOW:]) / max(np.median(norms.values[:_WINDOW]), 1e-30))
    if share < _SATURATED or left > _VANISHED:
        return None
    return (
        f"margins are saturated: {share:.0%} of the training pairs have sigmoid(margin) above 0.99, and the gradient "
        f"norm is {left:.2g} of what it was (since step {int(shares.steps[-_WINDOW])}); the rest of the "
        "run changes little"
    )


def _gradient_spikes(history: History, facts: Facts) -> str | None:
    """The newest gradient norm stands far above those before it."""
    norms = history.curve("grad_norm")
    if not _spikes(norms):
        return None
    usual = float(np.median(norms.values[-4 * _WINDOW - 1 : -1]))
    return f"the gradient norm jumps at step {norms.step}: {norms.last:.3g}, usually {usual:.3g}"


def _spikes(norms: Curve) -> bool:
    """Whether the newest of these gradient norms is a spike."""
    if len(norms) <= _WINDOW:
        return False
    before = norms.values[-4 * _WINDOW - 1 : -1]
    if norms.last <= _SPIKE * before.min():
        return False  # the usual case: no need to sort
    return bool(norms.last > _SPIKE * np.median(before) and norms.last > _SPIKE_OF_ALL * np.median(norms.values[:-1]))


def _far(history: History, facts: Facts) -> str | None:
    """The policy is another model: KL on its own answers, or what it gives the chosen ones."""
    low, kl = history.curve("samples/kl_low").trained(), history.curve("samples/kl").trained()
    chosen = history.curve("eval_log_ratio/chosen").trained()
    if low and kl and low.last > _FAR_KL:
        since = low.since(low.values > _FAR_KL)
        return f"the policy is far from the reference: KL {kl.last:.2f} nats an answer token (since step {since})"
    if chosen and facts.answer_tokens and -chosen.last > _FAR_FALL * facts.answer_tokens:
        since = chosen.since(-chosen.values > _FAR_FALL * facts.answer_tokens)
        return (
            f"the policy is far from the reference: a token of a chosen held-out answer has lost "
            f"{-chosen.last / facts.answer_tokens:.2f} nats (since step {since})"
        )
    return None


def _swapped(history: History, facts: Facts) -> str | None:
    """Held-out pairs are ranked wrongly at every evaluation, and surely so at the last one."""
    accuracies = history.curve("eval_rewards/accuracies").trained()
    if len(accuracies) < 2 or not facts.held_out or not (accuracies.values < 0.5).all():
        return None
    if accuracy_interval(accuracies.last, _worth(history, facts))[1] >= 0.5:
        return None
    return (
        f"labels look swapped: held-out accuracy is {accuracies.last:.3f}, and was below 0.5 at all "
        f"{len(accuracies)} evaluations since step {int(accuracies.steps[0])}"
    )


def _still(history: History, facts: Facts) -> str | None:
    """All steps together cannot carry the median weight near the next number of its dtype."""
    medians, bits = history.curve("weights/median"), history.curve("weights/bits")
    if not medians or not bits or medians.last <= 0:
        return None
    half = 2.0 ** (math.floor(math.log2(medians.last)) - bits.last)  # half the distance to the next number
    if facts.rates >= _STILL * half:
        return None
    return (
        f"the rate is too small to move the weights: all {facts.total_steps} steps carry a weight by {facts.rates:.2g} "
        f"at most, and half of the weights need {half:.2g} or more to become another number of {bits.last:.0f} bits: "
        f"{half / facts.rates:.2g} times as much"
    )


# === Alarms of samples ===


class _Change(NamedTuple):
    """A metric of sample answers at the start and now, and the step since which it is beyond its threshold."""

    start: float
    now: float
    since: int


def _change(history: History, name: str, bound: float, least: float, falls: bool = False) -> _Change | None:
    """The metric's change since step 0 where it is now at `bound` or beyond, and has moved there by `least` or more;
    None where it is not, or where there is nothing to compare."""
    curve, sign = history.curve(name), -1.0 if falls else 1.0
    if len(curve) < 2 or curve.steps[0] != 0:
        return None
    start, trained = float(curve.values[0]), curve.trained()
    if sign * trained.last < sign * bound or sign * (trained.last - start) < least:
        return None
    return _Change(start, trained.last, trained.since(sign * trained.values >= sign * bound))


def _answers_loop(history: History, facts: Facts) -> str | None:
    """Sample answers repeat themselves, and did less at the start."""
    if not (found := _change(history, "samples/repeated_trigrams", LOOPS, _LOOPS_RISE)):
        return None
    return (
        f"answers loop: {found.now:.0%} of their trigrams stood in the same answer before, {found.start:.0%} at the "
        f"start (since step {found.since})"
    )


def _answers_empty(history: History, facts: Facts) -> str | None:
    """Sample answers end at once, and did less at the start."""
    if not (found := _change(history, "samples/empty", _EMPTY, _EMPTY_RISE)):
        return None
    return (
        f"answers are empty: {found.now:.0%} of them end at once, {found.start:.0%} at the start "
        f"(since step {found.since})"
    )


def _answers_run_on(history: History, facts: Facts) -> str | None:
    """Sample answers no longer end by themselves. Those that ended at once had no answer that could end."""
    at_start = history.curve("samples/empty").values[:1]
    if len(at_start) and at_start[0] >= SILENT:
        return None
    if not (found := _change(history, "samples/ended", _ENDED, _ENDED_DROP, falls=True)):
        return None
    return (
        f"answers no longer end: {found.now:.0%} of them end by themselves, {found.start:.0%} at the start "
        f"(since step {found.since})"
    )


def _answers_unknown(history: History, facts: Facts) -> str | None:
    """Sample answers have the token that stands for what the tokenizer does not know."""
    if not (found := _change(history, "samples/unknown", _UNKNOWN, _UNKNOWN_RISE)):
        return None
    return (
        f"answers have <UNK>: {found.now:.1%} of their tokens, {found.start:.1%} at the start "
        f"(since step {found.since})"
    )


CHECKS = {
    "chosen_falls": _Check(
        "notice",
        _chosen_falls,
        "eval_log_ratio/chosen",
        f"`eval_log_ratio/chosen` at most -{_CHOSEN_FALL:g} nats while `eval_rewards/margins` is above 0",
        "DPO often does this; where the answers suffer, try a larger beta, a smaller max_lr, or an SFT on the chosen "
        "answers first",
    ),
    "held_out_small": _Check(
        "notice",
        _held_out_small,
        "eval_rewards/accuracies",
        "in the second half of a run, the 95 % interval of the held-out accuracy holds 0.5",
        "Hold out more pairs (val_share), or train on more before you believe a difference",
    ),
    "prompt_dominates": _Check(
        "notice",
        _prompt_dominates,
        "",
        f"a prompt has at least {_PROMPT_SHARE:.0%} of all pairs",
        "Check whether the data are meant so; leave some of its pairs out",
    ),
    "length_explains": _Check(
        "alarm",
        _length_explains,
        "eval_margin_length_correlation",
        f"`eval_margin_length_correlation` surely at least {_LENGTH_CORRELATION:g} and `eval_longer_is_chosen` at "
        f"least {_LABELS_LEAN:g}, or surely at most -{_LENGTH_CORRELATION:g} and at most {1 - _LABELS_LEAN:g}",
        "Look at accuracy against length difference, balance the lengths of chosen and rejected answers, or try "
        "loss_type sigmoid_norm",
    ),
    "memorised": _Check(
        "alarm",
        _memorised,
        "eval_rewards/accuracies",
        f"training accuracy at least {_LEARNED_BY_HEART:g} over {_WINDOW} lines, held-out accuracy surely below "
        f"{_CARRIED_OVER:g}",
        "Fewer epochs, a smaller max_lr, more and other pairs; look whether pairs are repeated, and whether held-out "
        "pairs are of the same kind",
    ),
    "saturated": _Check(
        "alarm",
        _saturated,
        "rewards/saturated",
        f"`rewards/saturated` at least {_SATURATED:g} over {_WINDOW} lines, and `grad_norm` at most {_VANISHED:g} of "
        "that of the first lines",
        "Fewer epochs, a smaller max_lr or beta, or label_smoothing",
    ),
    "gradient_spikes": _Check(
        "alarm",
        _gradient_spikes,
        "grad_norm",
        f"`grad_norm` above {_SPIKE:g} times the median of the {4 * _WINDOW} lines before and {_SPIKE_OF_ALL:g} times "
        "that of all",
        "Look at the pairs of that step for garbage or extreme lengths; a smaller max_grad_norm or more pairs a step "
        "dampen what is left",
    ),
    "far": _Check(
        "alarm",
        _far,
        "eval_log_ratio/chosen",
        f"`samples/kl_low` above {_FAR_KL:g} nats a token, or `eval_log_ratio/chosen` below -{_FAR_FALL:g} a token",
        "A larger beta, a smaller max_lr or fewer epochs; read the sample answers before you use this model",
    ),
    "swapped": _Check(
        "alarm",
        _swapped,
        "eval_rewards/accuracies",
        "held-out accuracy below 0.5 at every evaluation, two at least, and surely so at the last one",
        "Compare some records with what they should prefer; training and held-out files may disagree on which answer "
        "is the chosen one",
    ),
    "still": _Check(
        "alarm",
        _still,
        "weights/median",
        f"the sum of all learning rates is less than {_STILL:g} of half the distance from `weights/median` to the next "
        "number of `weights/bits`",
        "A larger max_lr, a warm-up that ends (warmup_ratio 0.1), more epochs, or a DeepSpeed file that computes in "
        "fp32",
    ),
    "answers_loop": _Check(
        "alarm",
        _answers_loop,
        "samples/repeated_trigrams",
        f"`samples/repeated_trigrams` at least {LOOPS:g}, and {_LOOPS_RISE:g} more than at step 0",
        "Look for repetitions in the chosen answers; a larger beta or a smaller max_lr",
    ),
    "answers_empty": _Check(
        "alarm",
        _answers_empty,
        "samples/empty",
        f"`samples/empty` at least {_EMPTY:g}, and {_EMPTY_RISE:g} more than at step 0",
        "Look for empty or very short chosen answers; a larger beta or a smaller max_lr",
    ),
    "answers_run_on": _Check(
        "alarm",
        _answers_run_on,
        "samples/ended",
        f"`samples/ended` at most {_ENDED:g}, and {_ENDED_DROP:g} less than at step 0; not where `samples/empty` was "
        f"at least {SILENT:g} at step 0",
        "See whether chosen answers were cut off or lack the token that ends them; more sample_tokens where they are "
        "only longer",
    ),
    "answers_unknown": _Check(
        "alarm",
        _answers_unknown,
        "samples/unknown",
        f"`samples/unknown` at least {_UNKNOWN:g}, and {_UNKNOWN_RISE:g} more than at step 0",
        "The tokenizer lacks characters of the chosen answers: clean them, or take the tokenizer that belongs to the "
        "model",
    ),
}
