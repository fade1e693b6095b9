"""The charts and the pairs of a run's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simple_llama.reinforcement_learning.rlhf.report.charts import (
    Bar,
    Series,
    bar_chart,
    histogram,
    line_chart,
    reliability_chart,
    scatter,
)
from simple_llama.reinforcement_learning.rlhf.report.evaluation_numbers import extremes
from simple_llama.reinforcement_learning.rlhf.report.page import Page, number
from simple_llama.reinforcement_learning.rlhf.report.read_run import (
    HeldOutPairs,
    RunFacts,
    from_project,
    value,
)
from simple_llama.reinforcement_learning.rlhf.report.run_verdict import (
    interval_of,
    last_interval,
    log_ratio,
    margin_nats,
)
from simple_llama.reinforcement_learning.rlhf.run.statistics import reliability

_STEP = "optimizer step"
_BINS = 8  # of the reliability curve
_EXTREMES = 4  # pairs shown at either end


class PairText(NamedTuple):
    """What a held-out pair says."""

    prompt: str
    chosen: str
    rejected: str


def add_rules(page: Page, facts: RunFacts) -> None:
    """The accuracy beside what it has to beat: bars."""
    first, last = facts.evaluations[0], facts.evaluations[-1]
    longer = value(last, "eval_longer_is_chosen")
    low, high = last_interval(facts)
    bars = [
        Bar("the policy", value(last, "eval_rewards/accuracies"), low, high),
        Bar("the start model finds it likelier", value(first, "eval_logps/accuracies")),
        Bar("the longer answer", longer),
        Bar("the shorter answer", 1 - longer),
        Bar("a coin", 0.5),
    ]
    page.figure(
        bar_chart("Which answer was chosen: shares told right", "share of held-out pairs", bars, most=1.0),
        f"Step {last['step']}; the whisker is the 95 % interval (Wilson).",
    )


def add_curves(page: Page, facts: RunFacts) -> None:
    """Curves over the steps, of training and of evaluations."""
    whose = "the prompts of a step, each the mean of its pairs" if facts.weighs_prompts else "the pairs of a step"
    page.figure(
        line_chart(
            "Loss",
            _STEP,
            "nats a pair",
            [Series("training", *facts.curve("loss")), Series("held out", *facts.curve("eval_loss"))],
        ),
        f"Mean over {whose}, and so over all that is held out.",
    )
    page.figure(_accuracy_chart(facts), "Held out with its 95 % interval (Wilson), beside rules that read nothing.")
    margins = [(line["step"], margin_nats(line, facts.beta)) for line in facts.evaluations]
    trained = [(line["step"], margin_nats(line, facts.beta, "")) for line in facts.intervals]
    page.figure(
        line_chart(
            "Margin",
            _STEP,
            "nats an answer",
            [_series("training", trained), _series("held out", margins)],
            y_from=0.0,
        ),
        "How much more the chosen answer gained than the rejected one: the reward margin without beta.",
    )
    page.figure(
        line_chart(
            f"Log-prob against {facts.reference}, held out",
            _STEP,
            "log pi / pi_ref, nats an answer",
            [
                _series(side, [(line["step"], log_ratio(line, side, facts.beta)) for line in facts.evaluations])
                for side in ("chosen", "rejected")
            ],
            levels={f"as {facts.reference}": 0.0},
        ),
        "Where both fall, the policy learns what to leave rather than what to say.",
    )
    _add_optimizer(page, facts)
    _add_samples(page, facts)


def _series(name: str, points: Sequence[tuple[float, float]]) -> Series:
    """A curve of (x, y); what is not recorded is left out."""
    known = [(x, y) for x, y in points if not math.isnan(y)]
    return Series(name, [x for x, _ in known], [y for _, y in known])


def _accuracy_chart(facts: RunFacts) -> str:
    """Accuracy of training pairs and of held-out ones with what they are compared with."""
    evaluations = facts.evaluations
    xs, ys = facts.curve("eval_rewards/accuracies")
    bounds = [interval_of(line) for line in evaluations if "eval_rewards/accuracies" in line]
    held_out = Series("held out", xs, ys, [low for low, _ in bounds], [high for _, high in bounds])
    levels = {}
    if evaluations:
        longer = value(evaluations[-1], "eval_longer_is_chosen")
        levels = {
            "longer" if not longer < 0.5 else "shorter": max(longer, 1 - longer),
            "start model's log-probs": value(evaluations[0], "eval_logps/accuracies"),
        }
    training = Series("training", *facts.curve("rewards/accuracies"))
    return line_chart("Accuracy", _STEP, "share of pairs", [training, held_out], levels=levels)


def _add_optimizer(page: Page, facts: RunFacts) -> None:
    """Gradient norm and learning rate."""
    norm = Series("gradient norm", *facts.curve("grad_norm"))
    clip = value(facts.settings, "max_grad_norm")
    levels = {"clipped above": clip} if clip > 0 else {}
    page.figure(line_chart("Gradient norm", _STEP, "before clipping", [norm], levels=levels, y_from=0.0))
    rate = Series("learning rate", *facts.curve("learning_rate"))
    page.figure(line_chart("Learning rate", _STEP, "", [rate], y_from=0.0))


def _add_samples(page: Page, facts: RunFacts) -> None:
    """What is measured on the policy's own answers, where there are any."""
    if not any("samples/tokens" in line for line in facts.history):
        return
    shares = {
        "ended by themselves": "samples/ended",
        "repeated trigrams": "samples/repeated_trigrams",
        "empty": "samples/empty",
        "unknown tokens": "samples/unknown",
    }
    curves = [Series(name, *facts.curve(metric)) for name, metric in shares.items()]
    page.figure(
        line_chart("Sample answers", _STEP, "share", [one for one in curves if one.xs], y_from=0.0),
        "Of greedy answers to fixed held-out prompts; repeated trigrams are a share of all trigrams, unknown tokens of "
        "all tokens.",
    )
    lengths = Series("mean length", *facts.curve("samples/tokens"))
    page.figure(line_chart("Length of sample answers", _STEP, "tokens", [lengths], y_from=0.0))
    distance = [facts.curve(f"samples/{name}") for name in ("kl", "kl_low", "kl_high")]
    if distance[0][0] and len({len(ys) for _, ys in distance}) == 1:
        (xs, kl), (_, low), (_, high) = distance
        page.figure(
            line_chart(
                f"Distance from {facts.reference}",
                _STEP,
                "KL(policy || reference), nats a token",
                [Series("KL", xs, kl, low, high)],
                levels={facts.reference: 0.0},
            ),
            "Estimated on answers that the policy sampled at temperature 1 (k3), with its 95 % interval.",
        )


def add_pairs(page: Page, facts: RunFacts, pairs: HeldOutPairs, texts: Mapping[int, PairText]) -> None:
    """What the run did to each held-out pair: charts over all, then those that gained and lost most."""
    if not pairs.has_reference:
        page.paragraph("The loss of this run reads no reference: by how much it moved a pair is not recorded.")
        return
    margins_N, gaps_N = pairs.margins_N, pairs.length_gaps_N
    ratios_N2 = pairs.ratios_N2
    chosen, rejected = ratios_N2[:, 0].tolist(), ratios_N2[:, 1].tolist()
    page.figure(
        histogram("Margins of held-out pairs", "margin, nats an answer", {"pairs": margins_N.tolist()}),
        f"Right of 0 the policy moved towards the chosen answer. Step {pairs.step}.",
    )
    page.figure(
        histogram(
            f"Log-probs against {facts.reference}", "log pi / pi_ref, nats", {"chosen": chosen, "rejected": rejected}
        ),
        "How much likelier each answer became.",
    )
    right = margins_N > 0
    groups = {
        name: (gaps_N[where].tolist(), margins_N[where].tolist())
        for name, where in (("towards the chosen answer", right), ("the other way", ~right))
    }
    page.figure(
        scatter("Margin against length", "chosen less rejected, scored tokens", "margin, nats", groups),
        "A slope says that the policy goes by length.",
    )
    if facts.beta > 0:
        rewards_N2 = pairs.rewards_N2
        rewards_N = facts.beta * margins_N if rewards_N2 is None else rewards_N2[:, 0] - rewards_N2[:, 1]
        page.figure(
            reliability_chart("Calibration", {"policy": reliability(rewards_N, _BINS).bins}),
            "Of the pairs on which the policy is so sure, how many it gets right, with 95 % intervals.",
        )
    _add_extremes(page, pairs, texts)


def shown_pairs(pairs: HeldOutPairs) -> tuple[list[int], list[int]]:
    """Positions of the pairs whose margin is largest, and smallest; no pair is in both."""
    return extremes(pairs.margins_N, _EXTREMES)


def _add_extremes(page: Page, pairs: HeldOutPairs, texts: Mapping[int, PairText]) -> None:
    """The pairs of `shown_pairs` with their log-probs before and after, and their texts where these are known."""
    for title, positions in zip(("Largest gain", "Largest loss"), shown_pairs(pairs), strict=True):
        rows = [_pair_row(pairs, i) for i in positions]
        headers = ["pair", "margin", "chosen: before", "after", "rejected: before", "after", "tokens"]
        page.table(headers, rows, f"{title}: margin and log p of the answers, nats; scored tokens, chosen and rejected")
        for i in positions:
            if i in texts:
                text = texts[i]
                note = f"{from_project(pairs.origins[i])}: margin {pairs.margins_N[i]:+.2f} nats"
                page.side_by_side(text.prompt, text.rejected, text.chosen, ("rejected", "chosen"), note)


def _pair_row(pairs: HeldOutPairs, i: int) -> list[Any]:
    """A line of the table of `_add_extremes`."""
    (before_chosen, before_rejected), (chosen, rejected) = pairs.ref_N2[i].tolist(), pairs.logps_N2[i].tolist()
    tokens = " / ".join(number(int(count)) for count in pairs.counts_N2[i])
    numbers = (pairs.margins_N[i], before_chosen, chosen, before_rejected, rejected)
    return [Path(pairs.origins[i]).name, *(round(float(found), 2) for found in numbers), tokens]
