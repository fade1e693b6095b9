"""How often each alarm is given where its fault is, and where there is none: thousands of small runs.

python -m benchmarks.bench_warnings

For each fault 60 runs at each of three strengths, and 200 runs without any, whose seeds the thresholds were not fixed
on (`--calibration`: those that they were fixed on). The numbers that runs recorded are kept in
tests/golden/warnings.npz, so that what today's thresholds make of them is counted again in seconds; the table goes to
docs/warnings.md.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro

from benchmarks import measure
from benchmarks.small_runs import FAULTS, STRENGTHS, Made, Spec, drawn, run
from simple_llama.cluster.distributed import close_ranks, init_ranks
from simple_llama.common.files import atomic_path
from simple_llama.common.paths import root_path
from simple_llama.reinforcement_learning.rlhf.run.health import CHECKS, Facts, warnings_of

KEPT = Path(root_path("tests", "golden", "warnings.npz"))
PAGE = Path(root_path("docs", "warnings.md"))
COUNTED_SEEDS, CALIBRATION_SEEDS = 20_000, 10_000  # the first of each
# Of faults that were changed after their first seeds had been counted: others, which nobody had seen.
_ANEW = {(fault, strength): 4000 for fault in ("spikes", "swapped") for strength in STRENGTHS} | {("swapped", 2): 6000}
# What checks read; all else that a run records is not kept.
TRAINED = ("rewards/accuracies", "rewards/saturated", "grad_norm")
EVALUATED = (
    "eval_rewards/accuracies",
    "eval_rewards/margins",
    "eval_log_ratio/chosen",
    "eval_margin_length_correlation",
    "eval_longer_is_chosen",
    "samples/repeated_trigrams",
    "samples/empty",
    "samples/ended",
    "samples/unknown",
    "samples/kl",
    "samples/kl_low",
    "weights/median",
    "weights/bits",
)


@dataclass(frozen=True)
class Bench:
    """What is run."""

    runs: int = 60  # with each fault at each strength
    clean: int = 200  # runs without a fault
    calibration: bool = False  # with the seeds that thresholds were fixed on; nothing is written


def which_runs(bench: Bench) -> Iterator[tuple[int, str, int]]:
    """Seed, fault and strength of all runs, those without a fault first."""
    first = CALIBRATION_SEEDS if bench.calibration else COUNTED_SEEDS
    yield from ((first + number, "", 0) for number in range(bench.clean))
    for place, fault in enumerate(FAULTS):
        for strength in STRENGTHS:
            start = first + 1000 + 200 * place + 60 * (strength - 1) + _ANEW.get((fault, strength), 0)
            yield from ((start + number, fault, strength) for number in range(bench.runs))


def alarms(run: Made) -> list[str]:
    """Names of the alarms that a run gives."""
    return [finding.name for finding in warnings_of(run.lines, run.facts) if finding.level == "alarm"]


# === Kept numbers ===


def keep(runs: Sequence[Made], path: Path) -> None:
    """Writes what checks read of the runs: half precision, a row a line."""
    trained = [_rows(one, "grad_norm", TRAINED) for one in runs]
    evaluated = [_rows(one, "eval_rewards/accuracies", EVALUATED) for one in runs]
    with atomic_path(path) as temp, temp.open("wb") as file:
        np.savez_compressed(
            file,
            who=np.array(
                [(one.spec.seed, [*FAULTS, ""].index(one.spec.fault), one.spec.strength) for one in runs], np.int32
            ),
            facts=np.array([astuple(one.facts) for one in runs], np.float32),
            lengths=np.array(
                [(len(train), len(held)) for train, held in zip(trained, evaluated, strict=True)], np.int32
            ),
            trained=np.concatenate(trained).astype(np.float16),
            evaluated=np.concatenate(evaluated).astype(np.float16),
        )


def _rows(one: Made, mark: str, names: Sequence[str]) -> np.ndarray:
    """Step and metrics of the lines that have `mark`; NaN where one was not recorded."""
    lines = [line for line in one.lines if mark in line]
    return np.array([[line["step"], *(line.get(name, np.nan) for name in names)] for line in lines])


def kept(path: Path = KEPT) -> list[Made]:
    """The runs that were kept, their numbers as they were rounded; of what they were, seed, fault and strength."""
    with np.load(path) as file:
        who, facts, lengths = file["who"].tolist(), file["facts"].tolist(), file["lengths"]
        ends = lengths.cumsum(axis=0)
        tables = [
            [rows.astype(np.float64).tolist() for rows in np.split(file[name], ends[:-1, column])]
            for column, name in enumerate(("trained", "evaluated"))
        ]
    found = []
    for (seed, fault, strength), numbers, trained, evaluated in zip(who, facts, *tables, strict=True):
        lines = [*_lines(trained, TRAINED), *_lines(evaluated, EVALUATED)]
        lines.sort(key=lambda line: line["step"])  # stable: an evaluation comes after its step
        pairs, held_out, steps, *others = numbers
        facts_of_run = Facts(int(pairs), int(held_out), int(steps), *others)
        found.append(Made(Spec(seed, [*FAULTS, ""][fault], strength), facts_of_run, lines))
    return found


def _lines(rows: list[list[float]], names: Sequence[str]) -> Iterator[dict[str, float]]:
    for step, *values in rows:
        yield {"step": step, **{name: value for name, value in zip(names, values, strict=True) if value == value}}


# === Tables ===


class Counted(NamedTuple):
    """What alarms made of the runs."""

    runs: dict[tuple[str, int], int]  # by fault and strength
    recall: dict[tuple[str, int], float]  # share of these with the fault's own alarm
    clean: int  # runs without a fault
    false: Counter[str]  # alarms of these
    with_any: int  # of these


def count(runs: Sequence[Made]) -> Counted:
    """Judges all runs."""
    found: dict[tuple[str, int], list[bool]] = {}
    false: Counter[str] = Counter()
    clean = with_any = 0
    for one in runs:
        names = alarms(one)
        if one.spec.fault:
            found.setdefault((one.spec.fault, one.spec.strength), []).append(FAULTS[one.spec.fault].alarm in names)
        else:
            clean, with_any = clean + 1, with_any + bool(names)
            false.update(names)
    recall = {key: sum(hits) / len(hits) for key, hits in found.items()}
    return Counted({key: len(hits) for key, hits in found.items()}, recall, clean, false, with_any)


def recall_table(counted: Counted) -> str:
    """A row a fault: what causes it, and how many of its runs its alarm finds."""
    rows = [["alarm", "cause", "strengths", "recall, weakest", "middle", "strongest"]]
    for name, fault in FAULTS.items():
        shares = [counted.recall[name, strength] for strength in STRENGTHS]
        rows.append([f"`{fault.alarm}`", fault.cause, fault.strengths, *(f"{share:.3f}" for share in shares)])
    return measure.table(rows)


def clean_lines(counted: Counted) -> str:
    """What alarms made of runs without a fault."""
    named = ", ".join(f"`{name}` {times}" for name, times in counted.false.most_common()) or "none"
    return f"Runs without a fault: {counted.clean}; with any alarm: {counted.with_any} ({named})."


def warnings_table(level: str) -> str:
    """A row a warning of that level: when it is given, and what to try."""
    rows = [["warning", "given when", "what to try"]]
    rows += [[f"`{name}`", check.when, check.advice] for name, check in CHECKS.items() if check.level == level]
    return measure.table(rows)


def page(counted: Counted, made_by: str) -> str:
    """docs/warnings.md."""
    return f"""# Warnings

A run judges its own numbers as it records them and says in words what they show, each warning once: in the log, in
`runs/<run_name>/warnings.jsonl`, on TensorBoard's text page `warnings` and in the report. A warning says what was
found, how far it went, since which step, and what to try. It changes nothing about the run.

None is taken back: whether it has passed since, the report's curves and later sample answers show. Look into an alarm
before you use the model or go on with the settings; a notice asks for nothing while the answers are good.

Names in backticks below are those of [curves.md](curves.md). "Surely" means by the end of a 95 % interval.

## Notices: honest runs have them too

{warnings_table("notice")}

## Alarms: something is wrong

{warnings_table("alarm")}

`gradient_spikes` names the pairs of its step with the largest losses, by file and record. The distance that `still`
compares with is that between neighbouring numbers of the dtype that computes: DeepSpeed adds small updates up in fp32
masters, so what counts is whether all steps together reach the next bf16 number.

## How often they are right

{made_by}

Each run trains a one-layer model of a made-up language on made-up preferences, by the project's own step, loss,
evaluation and metrics; `benchmarks/small_runs.py` says how. Faults are causes, not edited numbers. The thresholds were
fixed on other seeds (`--calibration`). What the runs recorded is kept in `tests/golden/warnings.npz`, and a test
counts it again. Of `gradient_spikes` and `swapped` the faults, and of `swapped` the rule too, were changed after a
first count missed the mark, the middle strength of `swapped` after a second one too; they were then counted on seeds
that nobody had looked at. The threshold of `still` came down to 0.3, and its strengths with it, after a run that
learned had got it: `make demo`, at 0.46.

Recall is the share of runs with the fault that gave the fault's own alarm:

{recall_table(counted)}

{clean_lines(counted)} They differ in seed, start model, pairs (160 to 256), held-out pairs (200 to 240), epochs, pairs
a step, beta (0.1 to 0.5), rate, label noise and dtype.

These models are small: how often an alarm is right about a model of billions, these numbers do not say.
"""


def main(bench: Bench) -> None:
    """Makes all runs, keeps what they recorded, and writes the page."""
    init_ranks("cpu")
    torch.set_num_threads(1)  # more only get in each other's way: the largest matrix has 2,000 numbers
    started, every = time.monotonic(), [drawn(*which) for which in which_runs(bench)]
    runs = []
    for number, spec in enumerate(every, 1):
        runs.append(run(spec))
        if number % 50 == 0 or number == len(every):
            print(f"{number} of {len(every)} runs, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    close_ranks()
    if bench.calibration:
        counted = count(runs)
        print(recall_table(counted), clean_lines(counted), sep="\n\n")
        return
    keep(runs, KEPT)
    minutes = (time.monotonic() - started) / 60
    made_by = (
        f"`python -m benchmarks.bench_warnings`: {len(runs):,} runs in {minutes:.0f} minutes, in one process, on "
        f"{measure.machine(torch.device('cpu'))}"
    )
    PAGE.write_text(page(count(kept()), made_by))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
