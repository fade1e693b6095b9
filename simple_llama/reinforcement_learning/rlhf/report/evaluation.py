"""The report of launch/evaluate.py: report.html for people, report.json for programs, of the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from simple_llama.common.files import atomic_write, atomic_write_json
from simple_llama.reinforcement_learning.rlhf.report.charts import (
    Series,
    histogram,
    line_chart,
    reliability_chart,
    scatter,
)
from simple_llama.reinforcement_learning.rlhf.report.evaluation_numbers import (
    START,
    Answers,
    ScoredPairs,
    answer_numbers,
    pair_numbers,
    plain,
)
from simple_llama.reinforcement_learning.rlhf.report.evaluation_words import nats, percent, points, verdict
from simple_llama.reinforcement_learning.rlhf.report.page import Page
from simple_llama.reinforcement_learning.rlhf.report.read_run import from_project
from simple_llama.reinforcement_learning.rlhf.run.statistics import Interval, ReliabilityBin

HTML, JSON = "report.html", "report.json"
_OWN = "the start's own ranking"
_MOST_ROWS = 40  # categories in a table
_MOST_ANSWERS = 24  # shown side by side; all are in report.json


class Example(NamedTuple):
    """A pair that moved far; log-prob sums (nats) of the chosen and the rejected answer."""

    origin: str  # file:record
    prompt: str
    answers: tuple[str, str]  # chosen, rejected
    before: tuple[float, float]
    after: tuple[float, float]

    @property
    def gain(self) -> float:
        """The margin d."""
        return (self.after[0] - self.before[0]) - (self.after[1] - self.before[1])


@dataclass(frozen=True)
class Evaluation:
    """All that is reported."""

    which: str  # the pairs, in words
    scored: ScoredPairs
    facts: Mapping[str, Any]  # what it takes to do it again
    examples: Mapping[str, tuple[Sequence[Example], Sequence[Example]]]  # by model: largest gain, largest loss
    prompts: Sequence[str]  # that were answered
    answers: Mapping[str, Mapping[str, Answers]]  # by model and form
    judged: Mapping[str, Mapping[str, Any]]  # by model


def write_evaluation(folder: Path, found: Evaluation) -> list[str]:
    """Writes report.json and report.html into `folder`, each whole or not at all, and returns the verdict. UserError
    where it cannot."""
    numbers, language = pair_numbers(found.scored), answer_numbers(found.answers, found.scored.seed)
    sentences = verdict(found.which, numbers, language, found.judged)
    said = {name: {form: one._asdict() for form, one in forms.items()} for name, forms in found.answers.items()}
    report = {
        "verdict": sentences,
        "which": found.which,
        **numbers,
        "language": language,
        "judge": found.judged,
        "examples": {
            name: {kind: [one._asdict() for one in some] for kind, some in zip(("gain", "loss"), both, strict=True)}
            for name, both in found.examples.items()
        },
        "asked": found.prompts,
        "answers": said,
        "made_by": found.facts,
    }
    atomic_write_json(folder / JSON, plain(report))
    atomic_write(folder / HTML, _page(found, numbers, language, sentences).encode())
    return sentences


def _page(found: Evaluation, numbers: Mapping[str, Any], language: Mapping[str, Any], sentences: Sequence[str]) -> str:
    """The page, from the verdict down to what it takes to do it again."""
    page = Page("Evaluation", f"{from_project(found.facts['data']['path'])}: {found.which}")
    page.verdict(sentences)
    if found.facts["doubts"]:
        page.warnings(("alarm", doubt) for doubt in found.facts["doubts"])
    if numbers["models"]:
        _add_pairs(page, found.scored, numbers)
    if found.judged:
        _add_judge(page, found.judged)
    if language:
        _add_answers(page, found, language)
    for name, (gains, losses) in found.examples.items():
        for title, some in (("largest gain", gains), ("largest loss", losses)):
            if some:
                page.heading(f"Pairs with the {title}: {name}")
                _add_examples(page, some)
    _add_origin(page, found.facts)
    return page.html()


def _add_pairs(page: Page, scored: ScoredPairs, numbers: Mapping[str, Any]) -> None:
    """Tables and charts of what comes from log-probs."""
    models, base = numbers["models"], numbers["baselines"]
    page.heading("Pairs")
    page.paragraph(
        "Accuracy: share of pairs in which the model, against the start model, moved towards the chosen answer. Own "
        "ranking: share in which its own log-prob of the chosen answer is the larger one. Margin: how far it moved "
        "(nats an answer). Behind each number its 95 % interval; differences by a paired bootstrap over prompts. "
        f"{numbers['pairs']:,} pairs, {numbers['prompts']:,} prompts."
    )
    page.table(
        ["model", "accuracy", "lengths weighed alike", "margin (nats)", "beta", "loss (ln 2 = 0.693)"],
        [
            [
                name,
                percent(one["accuracy"]),
                percent(one["balanced_accuracy"]),
                _bounded(one["margin"], 2),
                f"{one['beta']:g}",
                _bounded(one["loss"]),
            ]
            for name, one in models.items()
        ],
        "Against the start model. Lengths weighed alike: mean of the accuracies where the chosen answer is longer and "
        "where it is shorter; a rule that only counts tokens has 50 %. Losses of other betas are not comparable.",
    )
    page.table(
        ["model", "own ranking", "gained", "chosen (nats)", "rejected (nats)"],
        [
            [
                name,
                percent(one["preference"]),
                points(one["preference_gained"]),
                _bounded(one["log_ratio_chosen"], 2),
                _bounded(one["log_ratio_rejected"], 2),
            ]
            for name, one in models.items()
        ],
        "Gained: own ranking less the start model's. Chosen, rejected: change of the answer's log-prob.",
    )
    rules = {
        "longer": "the longer answer",
        "shorter": "the shorter answer",
        "start_preference": "the start's own ranking",
    }
    page.table(
        ["baseline", "accuracy", *(f"{name} above it" for name in models)],
        [
            *(
                [words, percent(base[rule]), *(points(one["above_baseline"][rule]) for one in models.values())]
                for rule, words in rules.items()
            ),
            ["random", percent(base["random"]), *(points(_above_chance(one["accuracy"])) for one in models.values())],
        ],
        "Rules that need no training, on the same pairs.",
    )
    if numbers["compared"]:
        _add_comparison(page, numbers["compared"])
    _add_charts(page, scored, numbers)
    _add_categories(page, models)


def _add_comparison(page: Page, compared: Sequence[Mapping[str, Any]]) -> None:
    """Models against each other."""
    page.table(
        ["difference", "accuracy", "own ranking", "margin", "loss"],
        [
            [
                f"{both['model']} - {both['other']}",
                points(both["accuracy"]),
                points(both["preference"]),
                nats(both["margin"]),
                _bounded(both["loss"]) if "loss" in both else "of other betas",
            ]
            for both in compared
        ],
        "Models against each other on the same pairs; paired bootstrap over prompts.",
    )


def _add_charts(page: Page, scored: ScoredPairs, numbers: Mapping[str, Any]) -> None:
    """Margins, calibration, length."""
    models = numbers["models"]
    margins = {name: scored.margins(name) for name in models}
    page.figure(
        histogram("Margins", "margin against the start model (nats)", {n: d.tolist() for n, d in margins.items()}),
        "Right of 0 the model moved towards the chosen answer.",
    )
    page.figure(
        reliability_chart(
            "Calibration",
            {name: [ReliabilityBin(**found) for found in one["calibration"]["bins"]] for name, one in models.items()},
        ),
        "Sigmoid of the reward margin is the model's probability that the chosen answer is better. Expected error: "
        + ", ".join(f"{name} {percent(one['calibration']['error'])}" for name, one in models.items())
        + ".",
    )
    some = next(iter(models.values()))["by_length"]
    rule = {
        "the longer answer": [part["longer"] for part in some],
        "the start's own ranking": [part["start_preference"] for part in some],
    }
    page.figure(
        line_chart(
            "Accuracy by length",
            "chosen minus rejected length (tokens)",
            "accuracy",
            [
                *(_length_series(name, one) for name, one in models.items()),
                *(Series(name, [part["mean"] for part in some], ys) for name, ys in rule.items()),
            ],
            y_from=0.0,
        ),
        "Each point is a group of pairs of like difference. A model that goes by length alone follows the rule's line.",
    )
    page.figure(
        scatter(
            "Margin and length",
            "chosen minus rejected length (tokens)",
            "margin (nats)",
            {name: (scored.longer_N.astype(float).tolist(), d.tolist()) for name, d in margins.items()},
        ),
        "Correlation: " + ", ".join(f"{name} {one['length_correlation']:+.2f}" for name, one in models.items()) + ".",
    )


def _length_series(name: str, model: Mapping[str, Any]) -> Series:
    """Accuracy by length difference."""
    parts = model["by_length"]
    found = [part["accuracy"] for part in parts]
    return Series(
        name,
        [part["mean"] for part in parts],
        [one.value for one in found],
        [one.low for one in found],
        [one.high for one in found],
    )


def _add_categories(page: Page, models: Mapping[str, Any]) -> None:
    """A table of each model by category, where there are several."""
    for name, model in models.items():
        rows = [
            [
                category,
                one["count"],
                percent(one["accuracy"]),
                nats(one["margin"]),
                percent(one["preference"]),
                percent(one["start_preference"]),
                percent(one["longer"]),
            ]
            for category, one in model["by_category"].items()
        ]
        if len(rows) > 1:
            more = f" The {_MOST_ROWS} with the most pairs of {len(rows)}." if len(rows) > _MOST_ROWS else ""
            page.table(
                ["category", "pairs", "accuracy", "margin", "own ranking", "start's own ranking", "the longer answer"],
                rows[:_MOST_ROWS],
                f"{name} by category: what a record calls its category, or the file that it stands in.{more}",
            )


def _add_judge(page: Page, judged: Mapping[str, Mapping[str, Any]]) -> None:
    """The judge's verdicts."""
    page.heading("Judge")
    page.table(
        ["model", "wins against the start model", "won", "tied", "lost", "went by the place"],
        [
            [name, percent(one["win_rate"]), one["won"], one["tied"], one["lost"], one["flipped"]]
            for name, one in judged.items()
        ],
        "Each pair of answers was judged in both orders; a verdict that goes by the place is a tie, a tie half a win.",
    )


def _add_answers(page: Page, found: Evaluation, language: Mapping[str, Any]) -> None:
    """What tells whether the language holds, and the answers side by side."""
    page.heading("Answers")
    settings = found.facts["settings"]
    drawn = "the most likely token each time"
    if settings["temperature"]:
        drawn = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, seed {settings['seed']}"
    page.paragraph(
        f"{len(found.prompts):,} prompts of these pairs; {drawn}; at most {settings['max_new_tokens']} tokens."
    )
    rows = [
        [
            name,
            form,
            _bounded(one["tokens"], 1),
            percent(one["ended"]),
            percent(one["empty"]),
            percent(one["repeated_trigrams"]),
            percent(one["refused"]),
            percent(one["unknown"]),
        ]
        for form, models in language.items()
        for name, one in models.items()
    ]
    page.table(
        [
            "model",
            "form of the prompts",
            "tokens",
            "end by themselves",
            "empty",
            "repeated trigrams",
            "refusals",
            "<UNK>",
        ],
        rows,
        "Refusals: answers that begin with a phrase of a fixed list (simple_llama/inference/guards.py).",
    )
    for form in language:
        for name in found.scored.models:
            if len(language) > 1 or len(found.scored.models) > 1:
                page.heading(f"Answers of {name}, prompts in the form of {form}")
            both = zip(found.prompts, found.answers[START][form].texts, found.answers[name][form].texts, strict=True)
            for number, (prompt, before, after) in enumerate(both):
                if number == _MOST_ANSWERS:
                    page.paragraph(f"{len(found.prompts) - number} more are in {JSON}.")
                    break
                page.side_by_side(prompt, before, after, ("start model", name))


def _add_examples(page: Page, some: Sequence[Example]) -> None:
    """Pairs with their log-probs before and after."""
    page.table(
        ["pair", "gain (nats)", "chosen before", "chosen after", "rejected before", "rejected after"],
        [
            [
                Path(one.origin).name,
                f"{one.gain:+.2f}",
                *(f"{number:.2f}" for number in (one.before[0], one.after[0], one.before[1], one.after[1])),
            ]
            for one in some
        ],
        "Log-probs of the whole answers (nats); gain: change of chosen minus change of rejected.",
    )
    for one in some:
        page.side_by_side(
            one.prompt,
            *one.answers,
            (f"chosen {one.after[0] - one.before[0]:+.2f} nats", f"rejected {one.after[1] - one.before[1]:+.2f} nats"),
        )


def _add_origin(page: Page, facts: Mapping[str, Any]) -> None:
    """Everything needed to do it again."""
    page.heading("To do it again")
    page.commands([facts["command"]])
    page.table(
        ["model", "path", "weights (digest)", "tokenizer (digest)", "computed in"],
        [
            [name, from_project(one["path"]), one["weights"], one["tokenizer"], one["numerics"]["dtype"]]
            for name, one in facts["models"].items()
        ],
        "Models.",
    )
    data = facts["data"]
    page.table(
        ["data", "value"],
        [
            ["path", from_project(data["path"])],
            ["digest of all pairs", data["digest"]],
            ["digest of the pairs evaluated on", data["digest_of_these_pairs"]],
            ["reader", data["report"]],
            *(["warning", warning] for warning in data["warnings"]),
        ],
        "Data.",
    )
    made = {**facts["environment"], "ranks": facts["ranks"], "seconds": facts["seconds"]}
    page.table(["what", "value"], [[name, str(value)] for name, value in made.items()], "Versions and machine.")
    page.table(
        ["setting", "value"],
        [[name, from_project(str(value))] for name, value in facts["settings"].items()],
        "Settings.",
    )


def _bounded(number: Interval, digits: int = 3) -> str:
    """A number with its bounds."""
    return f"{number.value:.{digits}f} ({number.low:.{digits}f} to {number.high:.{digits}f})"


def _above_chance(accuracy: Interval) -> Interval:
    """Its distance from one half."""
    return Interval(*(bound - 0.5 for bound in accuracy))
