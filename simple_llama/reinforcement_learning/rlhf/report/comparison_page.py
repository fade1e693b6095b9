"""A comparison of runs as a page, with overlaid curves, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simple_llama.reinforcement_learning.rlhf.report.charts import Series, line_chart
from simple_llama.reinforcement_learning.rlhf.report.comparison import Group
from simple_llama.reinforcement_learning.rlhf.report.comparison_words import MEASURES, Table, differing
from simple_llama.reinforcement_learning.rlhf.report.evaluation_numbers import plain
from simple_llama.reinforcement_learning.rlhf.report.page import Page
from simple_llama.reinforcement_learning.rlhf.report.run_verdict import interval_of, log_ratio, margin_nats
from simple_llama.reinforcement_learning.rlhf.report.standing import Standing, distance_of

_MOST_CURVES = 8  # runs that colours and dashes tell apart in one chart
_MOST_BANDS = 4  # intervals in one chart; of more runs the best one's alone
_MOST_WARNINGS = 200  # shown
_GUARDS = {  # of the sampled answers: what breaks when the language does
    "samples/tokens": "tokens an answer",
    "samples/ended": "share that ends by itself",
    "samples/repeated_trigrams": "share of repeated trigrams",
    "samples/empty": "share of empty answers",
    "samples/unknown": "share of <UNK>",
}


def comparison_json(
    runs: Sequence[Standing], groups: Sequence[Group], verdicts: Sequence[str], notes: Sequence[str]
) -> dict[str, Any]:
    """What the page shows, as numbers: intervals as [value, low, high], null where something was not recorded."""
    found = {
        "verdict": list(verdicts),
        "notes": list(notes),
        "runs": [_run_json(run) for run in runs],
        "groups": [
            {
                "runs": [run.label for run in group.runs],
                "cannot_be_told_from_the_best": [run.label for run in group.level()],
                "differences": [
                    {**found._asdict(), "told_apart": key in group.told} for key, found in group.differences.items()
                ],
                "distance": MEASURES[group.measure],
                "frontier": [run.label for run in group.frontier()],
                "shared_distance": group.shared_distance(),
                "margin_at_shared_distance": group.margins_at_shared_distance(),
            }
            for group in groups
        ],
        "settings_that_differ": {
            name: {run.label: value for run, value in zip(runs, values, strict=True)}
            for name, values in differing(runs).items()
        },
    }
    return plain(found)


def _run_json(run: Standing) -> dict[str, Any]:
    """One run's numbers."""
    values, beta = run.values, run.run.beta
    return {
        "run": run.label,
        "folder": str(run.run.folder.absolute()),
        "finished": not run.unfinished,
        "step": run.run.steps,
        "best": dict(run.run.best),
        "pairs": run.pairs,
        "accuracy": run.accuracy,
        "margin_nats": run.margin,
        "log_ratio": {side: log_ratio(values, side, beta) for side in ("chosen", "rejected")} if run.pairs else None,
        "distance": distance_of(values, beta, "log-ratio") if run.pairs else None,
        "kl": run.kl,
        "loss": {"of": run.loss_name, "value": values.get("eval_loss")},
        "metrics": values,
        "warnings": [dict(zip(("level", "step", "text"), found, strict=True)) for found in run.run.warnings],
    }


def comparison_page(
    runs: Sequence[Standing],
    groups: Sequence[Group],
    verdicts: Sequence[str],
    notes: Sequence[str],
    tables: Sequence[Table],
) -> str:
    """The page: verdict, tables, curves of the first eight runs, warnings."""
    page = Page("Comparison of runs", f"{len(runs)} runs: {', '.join(run.label for run in runs)}")
    page.verdict([*verdicts, *notes])
    for table in tables:
        page.table(table.headers, table.rows, table.caption)
    page.paragraph(
        "Accuracy: share of held-out pairs whose chosen answer gained more than the rejected one; Wilson's interval. "
        "Log-ratio: log-prob of an answer less the reference's, mean over the held-out answers. Margin / beta: "
        "log-ratio of chosen less rejected; reward margins and losses scale with beta, and say nothing across betas. "
        "On the frontier is a run to which no other is both at least as accurate and at least as near to the reference."
    )
    shown = runs[:_MOST_CURVES]
    page.heading("Curves")
    if len(runs) > len(shown):
        page.paragraph(f"Of the best {len(shown)} runs; the tables have all {len(runs)}.")
    for svg, caption in _charts(shown, groups):
        page.figure(svg, caption)
    _add_warnings(page, runs)
    return page.html()


def _charts(runs: Sequence[Standing], groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(chart, caption) of all curves."""
    measure = "kl" if groups and all(group.measure == "kl" for group in groups) else "log-ratio"
    banded = len(runs) if len(runs) <= _MOST_BANDS else 1
    found = [
        (
            line_chart(
                "Held-out accuracy",
                "step",
                "share of pairs",
                [_accuracy(run, i < banded) for i, run in enumerate(runs)],
            ),
            f"With the 95 % interval of {'each run alone' if banded == len(runs) else runs[0].label}; two runs on the "
            "same pairs differ by less chance than it says.",
        ),
        (
            line_chart("Margin / beta", "step", "nats a pair", [_curve(run, margin_nats) for run in runs]),
            "Log-ratio of chosen less rejected on held-out pairs, the same in all betas.",
        ),
        *(
            (
                line_chart(
                    f"Log-ratio of {side} answers",
                    "step",
                    "nats an answer",
                    [_curve(run, lambda values, beta, side=side: log_ratio(values, side, beta)) for run in runs],
                ),
                "log pi / pi_ref of held-out answers; below 0 the policy finds them less likely than its reference.",
            )
            for side in ("chosen", "rejected")
        ),
        *(
            (
                line_chart(
                    f"{name} against distance", MEASURES[measure], unit, [_path(run, measure, value) for run in runs]
                ),
                "Each run's way from its reference, evaluation by evaluation: higher at the same distance is better.",
            )
            for name, unit, value in (
                ("Accuracy", "share of pairs", lambda values, _: values["eval_rewards/accuracies"]),
                ("Margin / beta", "nats a pair", margin_nats),
            )
        ),
    ]
    return [*found, *_loss_charts(runs), *_guard_charts(runs)]


def _accuracy(run: Standing, banded: bool) -> Series:
    """Accuracy of each evaluation, `banded` with its interval."""
    found = run.evaluations
    bounds = [interval_of(values) for values in found]
    return Series(
        run.label,
        [values["step"] for values in found],
        [values["eval_rewards/accuracies"] for values in found],
        [low for low, _ in bounds] if banded else None,
        [high for _, high in bounds] if banded else None,
    )


def _curve(run: Standing, value: Callable[[Mapping[str, float], float], float]) -> Series:
    """A number of each evaluation over the steps."""
    found = run.evaluations
    return Series(run.label, [values["step"] for values in found], [value(values, run.run.beta) for values in found])


def _path(run: Standing, measure: str, value: Callable[[Mapping[str, float], float], float]) -> Series:
    """A number of each evaluation over the distance from the reference."""
    found = run.points(measure)
    return Series(run.label, [distance for distance, _ in found], [value(values, run.run.beta) for _, values in found])


def _loss_charts(runs: Sequence[Standing]) -> list[tuple[str, str]]:
    """Held-out losses, a chart for each loss and beta."""
    kinds = dict.fromkeys(run.loss_name for run in runs)
    return [
        (
            line_chart(
                f"Held-out loss: {kind}",
                "step",
                "loss",
                [_named(run, "eval_loss") for run in runs if run.loss_name == kind],
            ),
            "Comparable within this chart alone: " + ", ".join(run.label for run in runs if run.loss_name == kind),
        )
        for kind in kinds
    ]


def _guard_charts(runs: Sequence[Standing]) -> list[tuple[str, str]]:
    """What tells whether the language of the sampled answers breaks, where it was ever more than 0."""
    return [
        (
            line_chart(f"Sample answers: {words}", "step", words, [_named(run, name) for run in runs]),
            "Of the answers to a few held-out prompts at each evaluation.",
        )
        for name, words in _GUARDS.items()
        if any(values.get(name) for run in runs for values in run.evaluations)
    ]


def _named(run: Standing, name: str) -> Series:
    """A metric of the evaluations over the steps."""
    found = [values for values in run.evaluations if math.isfinite(values.get(name, math.nan))]
    return Series(run.label, [values["step"] for values in found], [values[name] for values in found])


def _add_warnings(page: Page, runs: Sequence[Standing]) -> None:
    """All warnings of all runs, alarms first."""
    found = [(level, f"{run.label}, step {step}: {text}") for run in runs for level, step, text in run.run.warnings]
    found.sort(key=lambda each: each[0] != "alarm")
    if not found:
        return
    page.heading("Warnings of the runs")
    page.warnings(found[:_MOST_WARNINGS])
    if len(found) > _MOST_WARNINGS:
        page.paragraph(f"{len(found) - _MOST_WARNINGS:,} more are in comparison.json.")
