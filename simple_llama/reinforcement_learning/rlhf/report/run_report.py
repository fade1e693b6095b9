"""The report that a run leaves in its folder: report.html to read, report.json for programs.

    python -m simple_llama.reinforcement_learning.rlhf.report.run_report RUN_FOLDER

makes it again, or for a run that has none: all but the texts of pairs comes from the run's own files, and those texts
from an earlier report.json.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

from simple_llama.cluster.watchdog import WatchConfig
from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write, atomic_write_json, read_json
from simple_llama.common.logging import LOGGER
from simple_llama.common.paths import package_path
from simple_llama.finetune.chat_format import ChatFormat, answer_text
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import default_options
from simple_llama.reinforcement_learning.rlhf.report.evaluation_numbers import plain
from simple_llama.reinforcement_learning.rlhf.report.page import Cell, Page
from simple_llama.reinforcement_learning.rlhf.report.read_run import (
    HeldOutPairs,
    RunFacts,
    from_project,
    read_run,
    value,
)
from simple_llama.reinforcement_learning.rlhf.report.run_charts import (
    PairText,
    add_curves,
    add_pairs,
    add_rules,
    shown_pairs,
)
from simple_llama.reinforcement_learning.rlhf.report.run_verdict import (
    interval_of,
    last_interval,
    log_ratio,
    margin_nats,
    verdict,
)
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig, with_warmup
from simple_llama.reinforcement_learning.rlhf.run.training_run import RunConfig

_NAME = "report.html"
_SHOWN_ANSWERS = 16  # prompts whose answers are shown
_FORMAT = 1  # of report.json

Texts = Callable[[HeldOutPairs], Mapping[int, PairText]]


def write_report(folder: Path, weights: Path, seconds: float, texts: Texts) -> tuple[Path | None, dict[str, float]]:
    """Writes report.html and report.json of the run in `folder`; returns where the page is, and the final metrics.

    Never raises for what lies in the records, or for a full disk: what was trained is done and saved, and a report can
    be made again. What went wrong is said, and the path is None.

    Args:
        weights: the run's newest export. seconds: of this start of the run.
        texts: gives the texts of pairs by their positions (see `texts_of`).
    """
    metrics: dict[str, float] = {}
    try:
        facts = read_run(folder)
        metrics = facts.final_metrics()
        shown = texts(facts.held_out) if facts.held_out else {}
        return _write(facts, str(weights), seconds, shown), metrics
    except UserError as error:
        LOGGER.warning("no report was made: %s", error)
    except Exception:  # noqa: BLE001 (whatever it is: a run of days must not fail at its last page)
        LOGGER.exception("no report was made; the run itself is done and saved")
    return None, metrics


def texts_of(chat: ChatFormat, held_out: PairSet) -> Texts:
    """Gives the texts of those pairs that a report shows: decoded from the run's own, where they are the same."""

    def texts(pairs: HeldOutPairs) -> dict[int, PairText]:
        if len(pairs.origins) != len(held_out):
            return {}
        wanted = [i for side in shown_pairs(pairs) for i in side]
        return {i: _pair_text(chat, held_out, i) for i in wanted if held_out.origin(i) == pairs.origins[i]}

    return texts


def _pair_text(chat: ChatFormat, held_out: PairSet, position: int) -> PairText:
    """A pair as text: the prompt with its special tokens, answers without."""
    pair = held_out[position]
    prompt = chat.spell(pair.prompt_ids.tolist())
    return PairText(prompt, *(answer_text(chat, ids.tolist()) for ids in pair.last_answers))


def _write(facts: RunFacts, weights: str, seconds: float | None, texts: Mapping[int, PairText]) -> Path:
    """Both files; the page comes last."""
    sentences = verdict(facts)
    commands = _commands(facts, weights)
    first, last = (facts.evaluations[0], facts.evaluations[-1]) if facts.evaluations else ({}, {})
    found = {
        "format": _FORMAT,
        "run": facts.name,
        "verdict": sentences,
        "weights": weights,
        "steps": facts.steps,
        "seconds": seconds,
        "start": dict(first),
        "last": dict(last),
        "best": dict(facts.at(facts.best.get("step"))),
        "accuracy_interval": last_interval(facts) if last else None,
        "final_metrics": facts.final_metrics(),
        "warnings": [{"level": level, "step": step, "text": text} for level, step, text in facts.warnings],
        "data": dict(facts.data),
        "changed_settings": {name: here for name, here, _ in _changed(facts.settings)},
        "environment": dict(facts.environment),
        "commands": commands,
        "pairs": {str(i): text._asdict() for i, text in texts.items()},
    }
    atomic_write_json(facts.folder / "report.json", plain(found))
    page = _page(facts, sentences, commands, seconds, texts)
    path = facts.folder / _NAME
    atomic_write(path, page.html().encode())
    return path


def _page(
    facts: RunFacts,
    sentences: Sequence[str],
    commands: Sequence[str],
    seconds: float | None,
    texts: Mapping[int, PairText],
) -> Page:
    """The page, from above to below."""
    model = _setting(facts.settings.get("model_path", "a model that is not recorded"))
    page = Page(f"Run {facts.name}", f"{facts.steps:,} optimizer steps from {model}")
    page.verdict(sentences)
    page.heading("Warnings")
    if facts.warnings:
        page.paragraph(
            "Each is given once, at the step where it was first sure; curves and answers show whether it has passed. "
            "Alarms say that something is wrong, notices are common in honest runs: docs/warnings.md."
        )
        page.warnings((level, f"step {step}: {text}") for level, step, text in facts.warnings)
    else:
        page.paragraph("None." if facts.data else "None are recorded: the run is of a version that gave none.")
    _add_before_and_after(page, facts)
    page.heading("Curves")
    add_curves(page, facts)
    _add_answers(page, facts)
    page.heading("Held-out pairs")
    if facts.held_out:
        add_pairs(page, facts, facts.held_out, texts)
    else:
        page.paragraph("Not recorded, pair by pair.")
    _add_data(page, facts)
    _add_time(page, facts, seconds)
    _add_settings(page, facts)
    page.heading("Commands")
    page.commands(commands)
    return page


def _add_before_and_after(page: Page, facts: RunFacts) -> None:
    """The start beside the last evaluation, and beside the best one where the run names it."""
    if not facts.evaluations:
        return
    lines = {"start": facts.evaluations[0], "last": facts.evaluations[-1]}
    if best := facts.at(facts.best.get("step")):
        lines["best"] = best
    page.heading("Before and after")
    rows: list[list[Cell]] = [["step", *(int(line["step"]) for line in lines.values()), "optimizer steps"]]
    for title, find, unit in _compared(facts):
        rows.append([title, *(_known(find(line)) for line in lines.values()), unit])
    intervals = {name: interval_of(line) for name, line in lines.items()} | {"last": last_interval(facts)}
    ties = facts.starts_as_reference
    shown = [_interval(line, *intervals[name], ties) for name, line in lines.items()]
    rows.insert(2, ["its 95 % interval", *shown, "Wilson's"])
    rows += _rows_of_sets(lines)
    page.paragraph(
        "Of pairs that training never saw. The policy is the model that is trained. An answer gains where the policy "
        f"finds it likelier than {facts.reference} does; nats are natural logarithms: +0.7 is twice as likely. "
        "Accuracy says whether the preference was learned, the margin how far it went, KL and sample answers what it "
        "cost. More: docs/evaluate.md, docs/curves.md."
    )
    page.table(["held out", *lines, "unit"], rows)
    add_rules(page, facts)


def _rows_of_sets(lines: Mapping[str, Mapping[str, Any]]) -> list[list[Cell]]:
    """Of each named validation set, which `eval_NAME/pairs` tells, what was found."""
    names = [key[len("eval_") : -len("/pairs")] for key in lines["last"] if re.fullmatch(r"eval_.+/pairs", key)]
    return [
        [f"{name}: {title}", *(_known(value(line, f"eval_{name}/{metric}")) for line in lines.values()), unit]
        for name in names
        for title, metric, unit in _OF_SETS
    ]


def _interval(line: Mapping[str, Any], low: float, high: float, ties: bool) -> str | None:
    """The interval of an evaluation's accuracy as text. Where at step 0 every pair is a tie, 0.5 is no estimate."""
    if line["step"] == 0 and ties:
        return "by definition"
    return f"{low:.3f} to {high:.3f}" if low == low else None


def _compared(facts: RunFacts) -> list[tuple[str, Callable[[Mapping[str, Any]], float], str]]:
    """(title, what it is of an evaluation's line, unit) of the lines of the table."""
    beta, against = facts.beta, f"nats an answer, against {facts.reference}"
    margins = [
        ("margin", lambda line: margin_nats(line, beta), against),
        ("log-ratio, chosen", lambda line: log_ratio(line, "chosen", beta), against),
        ("log-ratio, rejected", lambda line: log_ratio(line, "rejected", beta), against),
    ]
    others = [(title, lambda line, metric=metric: value(line, metric), unit) for title, metric, unit in _COMPARED]
    return others[:4] + margins + others[4:]


_COMPARED = (
    ("accuracy", "eval_rewards/accuracies", "share of pairs whose chosen answer gained more; 0.5 at the start"),
    ("accuracy of raw log-probs", "eval_logps/accuracies", "share of pairs whose chosen answer is likelier"),
    ("the longer answer is chosen", "eval_longer_is_chosen", "share of pairs: a rule that reads nothing"),
    ("loss", "eval_loss", "nats a pair"),
    ("reward margin", "eval_rewards/margins", "beta times nats"),
    ("margin and length", "eval_margin_length_correlation", "correlation over pairs"),
    ("KL to the reference", "samples/kl", "nats a token, on sampled answers"),
    ("answers ended by themselves", "samples/ended", "share of sample answers"),
    ("repeated trigrams", "samples/repeated_trigrams", "share, in sample answers"),
    ("length of answers", "samples/tokens", "tokens, mean of sample answers"),
    ("empty answers", "samples/empty", "share of sample answers"),
)


_OF_SETS = (  # of a named validation set
    ("accuracy", "rewards/accuracies", "share of pairs whose chosen answer gained more"),
    ("loss", "loss", "nats a pair"),
    ("reward margin", "rewards/margins", "beta times nats"),
    ("pairs", "pairs", ""),
)


def _known(found: float) -> float | None:
    """None for a number that is not recorded."""
    return None if found != found else found


def _add_answers(page: Page, facts: RunFacts) -> None:
    """Answers to the fixed prompts, by the start model and at the end."""
    page.heading("Answers, before and after")
    if not facts.samples:
        page.paragraph("No sample answers were made (n_samples).")
        return
    first, last = facts.samples[0], facts.samples[-1]
    same = first["step"] == 0 and len(first["answers"]) == len(last["answers"])
    before = first["answers"] if same else ["(not recorded at step 0)"] * len(last["answers"])
    page.paragraph(
        f"Greedy answers to held-out prompts that were fixed in advance, at step {first['step']} and at step "
        f"{last['step']}. Words that stand on one side alone are marked."
    )
    together = [*zip(last["prompts"], before, last["answers"], strict=True)]
    for prompt, old, answer in together[:_SHOWN_ANSWERS]:
        page.side_by_side(prompt, old, answer, ("start model", f"policy, step {last['step']}"))
    if len(together) > _SHOWN_ANSWERS:
        page.paragraph(f"{len(together) - _SHOWN_ANSWERS} more are in samples.jsonl.")


def _add_data(page: Page, facts: RunFacts) -> None:
    """What is known of the pairs."""
    page.heading("Data")
    rows = [[title, _cell(facts.data.get(name))] for title, name in _DATA]
    if facts.data:
        page.table(["", ""], rows, _setting(facts.settings.get("rlhf_dataset_path", "")))
    else:
        page.paragraph(f"{facts.settings.get('rlhf_dataset_path', 'Not recorded')}; its facts are not recorded.")
    if isinstance(found := facts.data.get("warnings"), list) and found:
        page.warnings(("notice", str(text)) for text in found)
    if report := facts.data.get("report"):
        page.quotation(str(report), "What the loader kept, dropped and ignored")
    files = facts.data.get("files")
    if isinstance(files, list) and files:
        page.quotation("\n".join(from_project(str(file)) for file in files), "Files")


_DATA = (
    ("training pairs", "pairs"),
    ("held-out pairs", "held_out"),
    ("different prompts", "prompts"),
    ("share of the most frequent prompt", "largest_prompt_share"),
    ("share of the training pairs whose longer answer is chosen", "longer_is_chosen"),
)


def _cell(found: Any) -> Cell:
    """A value of a file as a cell."""
    return found if found is None or isinstance(found, (str, int, float)) else str(found)


def _add_time(page: Page, facts: RunFacts, seconds: float | None) -> None:
    """How long it took, how fast it went, what memory it had."""
    page.heading("Time and memory")
    lines = facts.intervals

    def middle(name: str) -> float | None:
        known = [found for found in (value(line, name) for line in lines) if found == found]
        return median(known) if known else None

    memory = [found for found in (value(line, "perf/peak_memory_gb") for line in lines) if found == found]
    page.table(
        ["", "", "unit"],
        [
            ["this start of the run, with evaluations and saves", seconds, "s"],
            ["optimizer steps, all starts together", _known(facts.step_seconds), "s"],
            ["a step, median", middle("perf/step_time_s"), "s"],
            ["pairs", middle("perf/pairs_per_second"), "a second, median"],
            ["tokens", middle("perf/tokens_per_second"), "a second, median"],
            ["share of the machine's peak", middle("perf/mfu"), "of FLOP/s, median"],
            ["communication", middle("perf/comm_time_s"), "s a step, median of ranks' means"],
            ["memory", max(memory, default=None), "GiB, the largest of a rank"],
        ],
    )


def _changed(settings: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of the settings that are not at their defaults; those of the command itself left out."""
    defaults = {field.name: field.default for kind in (RunConfig, WatchConfig) for field in fields(kind)}
    defaults["warmup_iterations"] = with_warmup(ScheduleConfig()).warmup_iterations
    defaults |= default_options(str(settings.get("loss_type", defaults["loss_type"])))
    return [
        (name, found, defaults[name])
        for name, found in settings.items()
        if name in defaults and _plain(found) != _plain(defaults[name])
    ]


def _setting(found: Any) -> str:
    """A setting as text."""
    return from_project(found) if isinstance(found, str) else str(found)


def _plain(found: Any) -> Any:
    """A value as JSON has it."""
    return list(found) if isinstance(found, tuple) else found


def _add_settings(page: Page, facts: RunFacts) -> None:
    """What is not at its default, and what computed."""
    page.heading("Settings and versions")
    changed = [[name, _setting(found), _setting(default)] for name, found, default in _changed(facts.settings)]
    if changed:
        page.table(["setting", "here", "default"], changed, "Settings that are not at their defaults; all: config.json")
    else:
        page.paragraph("All settings are at their defaults." if facts.settings else "Settings are not recorded.")
    versions = [[name, _cell(found) if found is not None else "none"] for name, found in facts.environment.items()]
    page.table(["", "version"], versions or [["", None]], "What computed")


def _commands(facts: RunFacts, weights: str) -> list[str]:
    """What to type next, from the project's folder."""
    settings = facts.settings
    config = shlex.quote(from_project(str(facts.folder / "config.json")))
    model = shlex.quote(from_project(weights))
    again = f"--config {config} --run_name {shlex.quote(facts.name + '-again')}"
    if settings.get("resume") is True:
        again += " --no_resume"
    folder = shlex.quote(from_project(str(Path(str(settings.get("ckpt_dir", ""))) / facts.name)))
    named = str(facts.best.get("weights", weights))
    another = named != weights and facts.best.get("step") != facts.steps  # adapters lie beside the merged model
    best = ["# or to the checkpoint that was best", chat_command(settings, named)] if another else []
    return [
        "# talk to the result, beside the model that it began as",
        f"{chat_command(settings, weights)} --against start",
        *best,
        "# evaluate it on the pairs that the run held out, or on others (--rlhf_dataset_path)",
        f"python launch/evaluate.py --models {folder}",
        "# its curves",
        f"tensorboard --logdir {shlex.quote(from_project(str(facts.folder)))} --host localhost",
        "# the weights in another form or dtype",
        f"python launch/export.py --source {model} --output exported",
        "# the same run again, under another name; put the number of processes behind deepspeed (--num_gpus)",
        f"deepspeed launch/precompute_ref.py --config {config}",
        f"deepspeed launch/train_dpo.py {again}",
        "# this page again, from the run's files",
        f"python -m {_MODULE} {shlex.quote(from_project(str(facts.folder)))}",
    ]


_MODULE = "simple_llama.reinforcement_learning.rlhf.report.run_report"


def chat_command(settings: Mapping[str, Any], weights: str) -> str:
    """The command that talks to a model of a run with these settings."""
    command = f"python launch/chat.py --model_path {shlex.quote(from_project(weights))}"
    tokenizer = str(settings.get("tokenize_path", ""))
    if tokenizer and Path(tokenizer).parts[-3:] != Path(package_path("dataset", "bpe_8k.json")).parts[-3:]:
        command += f" --tokenize_path {shlex.quote(from_project(tokenizer))}"
    return command


def _made_again(folder: Path) -> Path:
    """The report of a run that ended, or did not, from its files. UserError where these cannot be read."""
    facts = read_run(folder)
    kept = _kept(folder)
    seconds = value(facts.finished, "seconds")
    weights = str(facts.finished.get("weights", "") or kept.get("weights", "") or "CHECKPOINT")
    texts = {
        int(i): PairText(*(str(text.get(name, "")) for name in PairText._fields))
        for i, text in kept.get("pairs", {}).items()
        if isinstance(text, dict) and str(i).isdecimal()
    }
    return _write(facts, weights, _known(seconds), texts)


def _kept(folder: Path) -> Mapping[str, Any]:
    """An earlier report.json."""
    path = folder / "report.json"
    found = read_json(path) if path.exists() else {}
    return found if isinstance(found, dict) and isinstance(found.get("pairs", {}), dict) else {}


def main(arguments: Sequence[str]) -> None:
    """Makes the report of a run's folder again, and says where it is."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError(f"expected one folder of a run, found {len(arguments)} arguments; {__doc__}")
    print(_made_again(Path(arguments[0])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
