"""A comparison of runs in words and tables, for the terminal and the page alike."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from simple_llama.reinforcement_learning.rlhf.report.comparison import Difference, Group, pairs_needed
from simple_llama.reinforcement_learning.rlhf.report.run_verdict import above_rules, log_ratio
from simple_llama.reinforcement_learning.rlhf.report.standing import Standing
from simple_llama.reinforcement_learning.rlhf.run.statistics import Interval

MEASURES = {  # of the distance from the reference
    "kl": "KL to the reference, nats an answer token",
    "log-ratio": "|log-ratio|, nats an answer",
}
_OF_ONE_START = {"run_name", "log_dir", "ckpt_dir", "ref_cache_dir", "resume", "dry_run", "debug"}
_MOST_VALUE = 40  # characters of a setting in a table
_WIDTH = 120  # characters of a line of text
_NONE = "-"
_MOST_PAIRS = 10_000_000  # needed ones that are still called a number


class Table(NamedTuple):
    """Rows of text below their headers."""

    caption: str
    headers: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """With aligned columns, for a terminal."""
        lines = [self.headers, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*textwrap.wrap(self.caption, _WIDTH), *(line.rstrip() for line in shown)])


def verdict(group: Group) -> list[str]:
    """Which of the runs is better, or that the held-out pairs cannot tell, and how many could."""
    if len(group.runs) < 2:
        return [f"{group.runs[0].label} stands alone: no other finished run has its held-out pairs."]
    best, level, beaten = group.runs[0], group.level(), group.beaten()
    found = [_level_sentence(group, level)] if len(level) > 1 else []
    if len(level) == 1 and len(beaten) > 1:
        found.append(f"{best.label} is the best of {len(group.runs)}.")
    found += [
        f"{best.label} is better than {run.label}: {_difference(group.differences[best.label, run.label])}."
        for run in beaten
    ]
    if len(level) > 1:
        nearest = min(level, key=group.distance)
        found.append(
            f"Of those that cannot be told apart, {nearest.label} has moved least from its reference: "
            f"{group.distance(nearest):.3g} ({MEASURES[group.measure]})."
        )
    found.append(_at_equal_distance(group))
    if len(group.differences) > 1:
        found.append(
            f"Judged over all {len(group.differences)} comparisons together (Holm): 5 % for one wrong word among them."
        )
    return [*found, *_beware(best)]


def _level_sentence(group: Group, level: Sequence[Standing]) -> str:
    """That runs cannot be told apart; by how much the first two differ, and how many pairs would tell."""
    first = group.differences[level[0].label, level[1].label]
    needed = pairs_needed(first, len(group.differences))
    if needed is None:
        end = "their accuracies are equal"
    elif needed <= level[0].pairs:  # of so few the exact test asks for more than the normal distribution does
        end = f"you need more than these {level[0].pairs:,} pairs"
    else:
        count = f"{needed:,}" if needed <= _MOST_PAIRS else f"more than {_MOST_PAIRS:,}"
        two = "the first two" if len(level) > 2 else "them"
        end = f"to tell {two} apart you need about {count} pairs; there are {level[0].pairs:,}"
    many = len(group.differences) > 1
    chance = f", which {'among so many comparisons ' if many else ''}may be chance (p {first.p:.2g})"
    return (
        f"The held-out pairs cannot tell {_listed([run.label for run in level])} apart: {first.better} over "
        f"{first.worse} {_difference(first)}{chance if first.low > 0 else ''}; {end}."
    )


def _at_equal_distance(group: Group) -> str:
    """The margins where all runs had moved equally far, largest first."""
    margins = {label: margin for label, margin in group.margins_at_shared_distance().items() if margin is not None}
    words = [f"{label} {margin:.2f}" for label, margin in sorted(margins.items(), key=lambda each: -each[1])]
    distance = f"{group.shared_distance():.3g} ({MEASURES[group.measure]})"
    return f"Margins at the same distance from the reference, {distance}: {', '.join(words)} nats."


def _difference(found: Difference) -> str:
    """How much more accurate, with its interval and what that is of."""
    how = "unpaired" if found.differ is None else f"they differ on {found.differ:,} pairs"
    return f"accuracy {found.accuracy:+.3f} ({found.low:+.3f} to {found.high:+.3f}; {how})"


def _beware(best: Standing) -> Iterator[str]:
    """The alarms of the best run; what a rule without any model scores, where that run is not clearly above it."""
    if alarms := [text for level, _, text in best.run.warnings if level == "alarm"]:
        found = [text.partition(". ")[0].rstrip(".") for text in alarms]  # without what to try
        said = "; ".join(text if text.isprintable() else repr(text) for text in found)
        yield f"Beware: {best.label} gave {len(alarms)} {'alarm' if len(alarms) == 1 else 'alarms'}: {said}."
    rule = best.values.get("eval_longer_is_chosen")
    if rule is None or best.accuracy is None:
        return
    score, words = max((rule, "the longer answer is chosen"), (1 - rule, "the shorter answer is chosen"))
    if best.by_pair:
        found, told = above_rules(best.by_pair)[words]
        is_above = told and found.is_above
    else:
        is_above = best.accuracy.low > score
    if not is_above:
        yield (
            f'Beware: the rule "{words}" scores {score:.3f} on the same pairs, and {best.label}, with '
            f"{best.right:.3f}, is not shown to do better."
        )


def held_out_table(runs: Sequence[Standing], groups: Sequence[Group]) -> Table:
    """Where each run stands on its held-out pairs. Letters say which runs have the same ones, where not all have."""
    letters = {run.label: f" {chr(ord('A') + i % 26)}" for i, group in enumerate(groups) for run in group.runs}
    rows = []
    for run in runs:
        beta, values = run.run.beta, run.values
        chosen, rejected = (log_ratio(values, side, beta) if run.pairs else None for side in ("chosen", "rejected"))
        rows.append(
            {
                "run": run.label,
                "pairs": f"{run.pairs:,}{letters.get(run.label, '') if len(groups) > 1 else ''}",
                "accuracy": _interval(run.accuracy, "{:.3f}"),
                "margin / beta": _interval(run.margin, "{:.2f}"),
                "chosen": _value(chosen, "{:+.2f}"),
                "rejected": _value(rejected, "{:+.2f}"),
                "KL": _interval(run.kl, "{:.3g}"),
            }
        )
    return _table(
        "Held out, with 95 % intervals. Margin / beta and log-ratios (chosen, rejected): nats an answer. KL to the "
        "reference: nats an answer token",
        rows,
    )


def distance_table(runs: Sequence[Standing], groups: Sequence[Group]) -> Table:
    """What each run has for how far it went from its reference, and losses, each with what scales it."""
    by_run = {run.label: group for group in groups for run in group.runs if len(group.runs) > 1}
    rows = []
    for run in runs:
        group = by_run.get(run.label)
        rows.append(
            {
                "run": run.label,
                "distance": _value(group.distance(run), "{:.3g}") if group else _NONE,
                "margin at equal distance": _value(group and group.margins_at_shared_distance()[run.label], "{:.2f}"),
                "frontier": ("yes" if run in group.frontier() else "no") if group else _NONE,
                "loss": _value(run.values.get("eval_loss"), "{:.4f}"),
                "loss of": run.loss_name,
            }
        )
    measures = dict.fromkeys(MEASURES[group.measure] for group in by_run.values())
    equal = dict.fromkeys(f"{group.shared_distance():.3g}" for group in by_run.values())
    caption = f"Against the distance from the reference ({'; '.join(measures)}); equal distance: {', '.join(equal)}. "
    caption = caption if measures else ""
    return _table(f"{caption}Losses are not comparable across losses and betas", rows)


def _table(caption: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """A table of rows by their headers, without columns in which nothing stands."""
    headers = [name for name in rows[0] if any(row[name] != _NONE for row in rows)]
    return Table(caption, headers, [[row[name] for name in headers] for row in rows])


def best_elsewhere(run: Standing) -> str:
    """That a run names another checkpoint as its best than its last, by which it is compared; "" where it does not."""
    best = run.run.best
    if best.get("step") in (None, run.values.get("step")):
        return ""
    return (
        f"{run.label}: compared by its last evaluation; its best by {best.get('metric')} is step {best['step']} "
        f"({best.get('value')}): {best.get('weights')}"
    )


def course_table(runs: Sequence[Standing]) -> Table:
    """How each run went: state, warnings, answers, cost."""
    headers = ["run", "state", "alarms", "notices", "answer tokens", "ended", "repeated", "empty"]
    headers += ["steps, min", "pairs/s", "GB a process"]
    rows = []
    for run in runs:
        intervals, values = run.intervals, run.values
        speeds = [found["perf/pairs_per_second"] for found in intervals if "perf/pairs_per_second" in found]
        memory = [found["perf/peak_memory_gb"] for found in intervals if "perf/peak_memory_gb" in found]
        rows.append(
            [
                run.label,
                run.unfinished or f"finished, {run.run.steps} steps",
                str(run.count_warnings("alarm")),
                str(run.count_warnings("notice")),
                _value(values.get("samples/tokens"), "{:.1f}"),
                *(_value(values.get(f"samples/{name}"), "{:.0%}") for name in ("ended", "repeated_trigrams", "empty")),
                _value(run.run.step_seconds / 60, "{:.1f}"),
                _value(statistics.median(speeds) if speeds else None, "{:.3g}"),
                _value(max(memory, default=None), "{:.2f}"),
            ]
        )
    return Table("How they went", headers, rows)


def settings_table(runs: Sequence[Standing]) -> Table:
    """The settings, versions and DeepSpeed settings that differ: a column each, or a row each where they are many."""
    found = differing(runs)
    names = list(found)
    cells = {name: [_setting(value) for value in found[name]] for name in names}
    if len(names) > len(runs):
        rows = [[name, *cells[name]] for name in names]
        return Table("Settings that differ", ["setting", *(run.label for run in runs)], rows)
    rows = [[run.label, *(cells[name][i] for name in names)] for i, run in enumerate(runs)]
    return Table("Settings that differ", ["run", *names], rows)


def differing(runs: Sequence[Standing]) -> dict[str, list[Any]]:
    """Settings by name with their values run by run, where they are not all the same; None where a run has none.

    Left out: names and places of a run, and what holds for one start of it.
    """
    all_of = [
        {
            **{name: value for name, value in run.run.settings.items() if name not in _OF_ONE_START},
            **{f"data: {name}": run.run.data.get(name) for name in ("pairs", "held_out", "prompts")},
            **dict(_flat(run.run.ds_config, "deepspeed: ")),
            **dict(_flat(run.run.environment, "version: ")),
        }
        for run in runs
    ]
    names = dict.fromkeys(name for found in all_of for name in found)
    values = {name: [found.get(name) for found in all_of] for name in names}
    return {name: column for name, column in values.items() if any(value != column[0] for value in column)}


def _flat(found: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested objects under joined names."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _setting(value: Any) -> str:
    """A setting that fits a cell: of a long one its end, which tells paths apart."""
    text = _NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= _MOST_VALUE else f"...{text[3 - _MOST_VALUE :]}"


def _interval(found: Interval | None, form: str) -> str:
    """A number with its interval."""
    if found is None:
        return _NONE
    if math.isnan(found.low + found.high):
        return form.format(found.value)
    return f"{form.format(found.value)} ({form.format(found.low)} to {form.format(found.high)})"


def _value(value: float | None, form: str) -> str:
    """A number that may not have been recorded."""
    return _NONE if value is None or math.isnan(value) else form.format(value)


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
