"""Several runs beside each other, and which of them is better: launch/compare.py."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write, atomic_write_json, listed, shown
from simple_llama.common.paths import root_path
from simple_llama.common.settings import PathText, Settings
from simple_llama.reinforcement_learning.rlhf.report.comparison import groups_of
from simple_llama.reinforcement_learning.rlhf.report.comparison_page import comparison_json, comparison_page
from simple_llama.reinforcement_learning.rlhf.report.comparison_words import (
    best_elsewhere,
    course_table,
    distance_table,
    held_out_table,
    settings_table,
    verdict,
)
from simple_llama.reinforcement_learning.rlhf.report.read_run import read_run
from simple_llama.reinforcement_learning.rlhf.report.standing import Standing

_RECORDS = ("config.json", "metrics.jsonl")  # without which nothing can be said


@dataclass(frozen=True)
class CompareConfig(Settings):
    """What is compared, and where that goes."""

    # === Comparison ===
    runs: tyro.conf.Positional[
        tuple[str, ...]
    ]  # names of runs below log_dir, folders of runs, or patterns such as "beta-*"
    log_dir: PathText = root_path("runs")  # where the runs of these names lie
    output: str = ""  # folder for comparison.html and comparison.json; empty: log_dir


def compare_runs(config: CompareConfig) -> str:
    """Writes comparison.html and comparison.json and returns what the terminal shows.

    UserError for fewer than two runs, one that is named twice, or one without the records of a run.
    """
    folders, notes = _folders(config)
    runs = _standings(folders)
    groups, uncompared = groups_of(runs)
    notes += [
        f"{run.label}: held_out.npz cannot be read; compared by its accuracy alone"
        for run in runs
        if not run.run.held_out and os.path.lexists(run.run.folder / "held_out.npz")
    ]
    notes += [found for run in runs if (found := best_elsewhere(run))]
    notes += uncompared
    order = [run for group in groups for run in group.runs]
    runs = order + [run for run in runs if run not in order]
    verdicts = [sentence for group in groups for sentence in verdict(group)]
    if not any(len(group.runs) > 1 for group in groups):
        verdicts.insert(0, "No two finished runs have the same held-out pairs: nothing says which is better.")
    tables = [held_out_table(runs, groups), distance_table(runs, groups), settings_table(runs), course_table(runs)]
    output = Path(config.output or config.log_dir)
    atomic_write_json(output / "comparison.json", comparison_json(runs, groups, verdicts, notes))
    page = comparison_page(runs, groups, verdicts, notes, tables)
    atomic_write(output / "comparison.html", page.encode())
    return "\n\n".join(
        [
            *(table.text() for table in tables),
            "\n".join([*verdicts, *(f"note: {note}" for note in notes)]),
            f"page: {output / 'comparison.html'}",
        ]
    )


def _folders(config: CompareConfig) -> tuple[list[Path], list[str]]:
    """The folders of the runs, in the order of the command line, and notes on what patterns met beside them."""
    found: list[Path] = []
    notes: list[str] = []
    for text in config.runs:
        folders, others = _matches(text, Path(config.log_dir))
        if others:
            notes.append(f"{text}: not runs, left out: {listed(others)}")
        found += folders
    seen: dict[str, Path] = {}
    for folder in found:
        place = os.path.realpath(folder)
        if place in seen:
            raise UserError(f"{folder}: the same run twice, also as {seen[place]}; name it once")
        seen[place] = folder
    if len(found) < 2:
        raise UserError(
            f"expected at least two runs, found {len(found)}; give names of runs below {config.log_dir}, their folders "
            'or a pattern such as "beta-*"'
        )
    return found, notes


def _matches(text: str, log_dir: Path) -> tuple[list[Path], list[str]]:
    """(folders of runs, other folders) that one argument names: a run below log_dir goes before a folder from here."""
    places = [Path(text)] if os.path.isabs(text) else [log_dir / text, Path(text)]
    for place in places:
        if _is_run(place):
            return [place], []
    for place in places:
        matched = (
            sorted(Path(path) for path in glob.glob(str(place)) if os.path.isdir(path)) if glob.has_magic(text) else []
        )
        if runs := [path for path in matched if _is_run(path)]:
            return runs, [path.name for path in matched if path not in runs]
    there = [str(place) for place in places if place.is_dir()]
    inside = sorted(path.name for place in there for path in Path(place).iterdir() if _is_run(path))
    if inside:
        raise UserError(
            f"{there[0]}: expected a run, found a folder of runs ({listed(inside)}); name them, or {text}/*"
        )
    what = f"found none in {there[0]}" if there else f"found no {' and no '.join(map(str, places))}"
    raise UserError(f"{text}: expected a run's folder with config.json and metrics.jsonl, {what}")


def _is_run(folder: Path) -> bool:
    """Whether a folder looks like that of a run."""
    return any(os.path.lexists(folder / name) for name in _RECORDS)


def _standing(label: str, folder: Path) -> Standing:
    """The run in a folder. UserError where its records are not there, or do not say its beta."""
    if missing := [name for name in _RECORDS if not os.path.lexists(folder / name)]:
        raise UserError(f"{folder}: expected the records of a run, found no {' and no '.join(missing)}")
    run = read_run(folder)
    if not 0 < run.beta < math.inf:
        raise UserError(
            f"{folder / _RECORDS[0]}: expected a loss with a reference and settings with beta above 0, found "
            f"{shown(run.settings.get('loss_type', 'sigmoid'))}, {shown(run.settings.get('beta'))}"
        )
    return Standing(label, run)


def _standings(folders: Sequence[Path]) -> list[Standing]:
    """The runs, read, under the shortest names that tell them apart. UserError naming all that cannot be read."""
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    labels = [label if label.isprintable() else repr(label) for label in labels]
    runs, problems = [], []
    for label, folder in zip(labels, folders, strict=True):
        try:
            runs.append(_standing(label, folder))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return runs
