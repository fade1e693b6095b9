"""What a run left in its folder, read for a report. A file that is not there, or damaged, is said and missing.

Everything is read back from the files: a resumed run reports what came before it too. N held-out pairs.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.files import read_json
from simple_llama.common.logging import LOGGER
from simple_llama.common.paths import root_path
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import reads_reference
from simple_llama.reinforcement_learning.rlhf.run.evaluate import PairSums
from simple_llama.reinforcement_learning.rlhf.run.records import WARNINGS, read_records
from simple_llama.reinforcement_learning.rlhf.run.run_folder import BEST
from simple_llama.reinforcement_learning.rlhf.run.statistics import groups_of, preferred


@dataclass(frozen=True)
class HeldOutPairs(PairSums):
    """The held-out pairs at the last evaluation that kept them."""

    step: int
    origins: tuple[str, ...]  # file:record
    prompts_N: np.ndarray | None = None  # pairs that answer one prompt have one number; None where none were written
    rewards_N2: np.ndarray | None = None  # fp32: implicit rewards; None where none were written

    @property
    def has_reference(self) -> bool:
        """Whether margins in nats are known: the loss reads a reference."""
        return not np.isnan(self.ref_N2).any()

    @property
    def hits_N(self) -> np.ndarray:
        """1 where the policy prefers the chosen answer by the rewards of its loss, 1/2 for a tie: a loss may divide by
        lengths, or read no reference."""
        return preferred(self.margins_N if self.rewards_N2 is None else self.rewards_N2[:, 0] - self.rewards_N2[:, 1])

    @property
    def groups_N(self) -> np.ndarray:
        """The number of each pair's prompt, from 0; each pair's own where prompts were not written."""
        return groups_of(range(len(self.origins)) if self.prompts_N is None else self.prompts_N.tolist())


@dataclass(frozen=True)
class RunFacts:
    """A run's records."""

    folder: Path
    settings: Mapping[str, Any]  # config.json
    environment: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]  # metrics.jsonl
    samples: Sequence[Mapping[str, Any]]
    warnings: Sequence[tuple[str, int, str]]  # level, step, text
    data: Mapping[str, Any]
    best: Mapping[str, Any]  # the step that the run names as its best, where it does
    finished: Mapping[str, Any]  # finished.json of an earlier report
    held_out: HeldOutPairs | None
    ds_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's."""
        return str(self.settings.get("run_name") or self.folder.name)

    @property
    def beta(self) -> float:
        """What an implicit reward is divided by to have nats; NaN where it is not known, or the loss has no
        reference."""
        known = reads_reference(str(self.settings.get("loss_type", "sigmoid")))
        return value(self.settings, "beta") if known else math.nan

    @property
    def weighs_prompts(self) -> bool:
        """Whether its loss is a mean over prompts, rather than over pairs."""
        return self.settings.get("group_weight") == "prompt"

    @property
    def starts_as_reference(self) -> bool:
        """Whether its rewards are measured from the model that it started from."""
        return not self.settings.get("reference_path")

    @property
    def reference(self) -> str:
        """The model that its rewards are measured from, in words."""
        return "the start model" if self.starts_as_reference else "the reference"

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """Lines of evaluations, in order."""
        return [line for line in self.history if "eval_loss" in line]

    @property
    def intervals(self) -> list[Mapping[str, Any]]:
        """Lines of training."""
        return [line for line in self.history if "loss" in line]

    @property
    def steps(self) -> int:
        """Optimizer steps that are recorded."""
        return max((line["step"] for line in self.history), default=0)

    @property
    def pairs_at_end(self) -> HeldOutPairs | None:
        """The held-out pairs of the last evaluation, where that kept them."""
        last, pairs = self.evaluations[-1] if self.evaluations else {}, self.held_out
        same = pairs and pairs.step == last.get("step") and len(pairs.origins) == value(last, "eval_pairs")
        return pairs if same else None

    @property
    def step_seconds(self) -> float:
        """Seconds of the optimizer steps alone, all starts together; NaN where they were not recorded."""
        before, total = 0, 0.0
        for line in self.intervals:
            total += value(line, "perf/step_time_s") * (line["step"] - before)
            before = line["step"]
        return total if before else math.nan

    def at(self, step: Any) -> Mapping[str, Any]:
        """The evaluation after `step` steps; empty where there was none."""
        return next((line for line in self.evaluations if line["step"] == step), {})

    def curve(self, name: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, times `scale`."""
        found = [(line["step"], scale * value(line, name)) for line in self.history if name in line]
        return [step for step, _ in found], [number for _, number in found]

    def final_metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation and of the last interval of training, by name; numbers alone."""
        lines = [*self.intervals[-1:], *self.evaluations[-1:]]
        return {
            name: found
            for line in lines
            for name, found in line.items()
            if name != "step" and isinstance(found, (int, float)) and math.isfinite(found)
        }


def value(record: Mapping[str, Any], name: str) -> float:
    """A metric of a record; NaN where it has none that is a number."""
    found = record.get(name)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else math.nan


def from_project(path: str) -> str:
    """A path from the project's folder, where commands are typed; as it is where it lies elsewhere."""
    found = Path(path)
    return str(found.relative_to(root_path())) if found.is_relative_to(root_path()) else path


def read_run(folder: Path) -> RunFacts:
    """All records of the run in `folder`. UserError where it has no metrics.jsonl that can be read."""
    if not os.path.lexists(folder / "metrics.jsonl"):
        raise UserError(f"{folder}: expected a run's folder with its metrics.jsonl, found none")
    warnings = [
        (str(line.get("level", "notice")), line["step"], str(line.get("text", "")))
        for line in _records(folder / WARNINGS)
    ]
    return RunFacts(
        folder=folder,
        settings=_object(folder / "config.json"),
        environment=_object(folder / "environment.json"),
        history=read_records(folder / "metrics.jsonl"),
        samples=[line for line in _records(folder / "samples.jsonl") if _is_sample(line)],
        warnings=warnings,
        data=_object(folder / "data.json"),
        best=_object(folder / BEST),
        finished=_object(folder / "finished.json"),
        held_out=_held_out(folder / "held_out.npz"),
        ds_config=_object(folder / "ds_config.json"),
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; none, with a warning, where it cannot be read."""
    try:
        return read_records(path)
    except UserError as error:
        LOGGER.warning("left out of the report: %s", error)
        return []


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none, with a warning where what is there is none."""
    if not os.path.lexists(path):
        return {}
    try:
        found = read_json(path)
        if isinstance(found, dict):
            return found
        problem = f"{path}: expected a JSON object, found {type(found).__name__}"
    except UserError as error:
        problem = str(error)
    LOGGER.warning("left out of the report: %s", problem)
    return {}


def _is_sample(line: Mapping[str, Any]) -> bool:
    """Whether a line has as many answers as prompts, all of them texts."""
    prompts, answers = line.get("prompts"), line.get("answers")
    if not (isinstance(prompts, list) and isinstance(answers, list) and len(prompts) == len(answers)):
        return False
    return all(isinstance(text, str) for text in (*prompts, *answers))


def _held_out(path: Path) -> HeldOutPairs | None:
    """The pairs of held_out.npz; None where there is none, with a warning where it is damaged."""
    if not os.path.lexists(path):
        return None
    problem = "not arrays of one length"
    with contextlib.ExitStack() as stack:
        try:
            arrays = stack.enter_context(np.load(path, allow_pickle=False))
            step = int(arrays["step"])
            logps_N2, ref_N2, counts_N2 = (arrays[name] for name in ("logps_N2", "ref_N2", "counts_N2"))
            origins = tuple(map(str, arrays["origins"]))
            prompts_N = arrays.get("prompts")
            rewards_N2 = arrays.get("rewards_N2")
            lengths = {len(origins), len(origins if prompts_N is None else prompts_N)}
            shapes = {each.shape for each in (logps_N2, ref_N2, counts_N2, rewards_N2) if each is not None}
            if rewards_N2 is None and np.isnan(ref_N2).any():
                problem = "neither rewards nor log-probs of a reference"
            elif shapes == {(length, 2) for length in lengths}:
                return HeldOutPairs(logps_N2, ref_N2, counts_N2, step, origins, prompts_N, rewards_N2)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            problem = str(error) or type(error).__name__
    LOGGER.warning("left out of the report: %s: %s", path, problem)
    return None
