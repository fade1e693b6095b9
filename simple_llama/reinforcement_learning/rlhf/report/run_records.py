"""A run as its folder tells it: settings, curves, held-out pairs, warnings. Nothing here needs its model or data.

Shapes: N held-out pairs; column 0 is chosen, column 1 rejected.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.files import open_file, read_json, shown
from simple_llama.reinforcement_learning.rlhf.report.statistics import groups_of, preferred
from simple_llama.reinforcement_learning.rlhf.run.records import read_records

_SETTINGS, _CURVES = "config.json", "metrics.jsonl"
_EVALUATED = {"eval_pairs", *(f"eval_rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected"))}


@dataclass(frozen=True)
class HeldOutPairs:
    """held_out.npz: what the policy after `step` steps and its reference say of each held-out pair."""

    step: int
    logps_N2: np.ndarray  # log-prob sums of the policy (nats)
    ref_N2: np.ndarray  # of the reference
    counts_N2: np.ndarray  # scored tokens
    origins: np.ndarray  # `file:record` of each pair
    groups_N: np.ndarray  # which pairs answer one prompt; each its own where that was not written

    @property
    def ratios_N2(self) -> np.ndarray:
        """log pi / pi_ref of each answer (nats)."""
        return self.logps_N2.astype(np.float64) - self.ref_N2

    @property
    def margins_N(self) -> np.ndarray:
        """Log-ratio of chosen less that of rejected (nats)."""
        return self.ratios_N2[:, 0] - self.ratios_N2[:, 1]

    @property
    def right_N(self) -> np.ndarray:
        """1 where the chosen answer has the larger log-ratio, 0 where the rejected one has, one half in a tie."""
        return preferred(self.margins_N)

    def same_pairs(self, other: HeldOutPairs) -> bool:
        """Whether both are of the same pairs, tokenized alike."""
        return np.array_equal(self.origins, other.origins) and np.array_equal(self.counts_N2, other.counts_N2)


@dataclass(frozen=True)
class RunRecords:
    """What a run's folder holds."""

    folder: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    ds_config: dict[str, Any]
    data: dict[str, Any]  # facts of its pairs
    records: list[dict[str, Any]]  # of metrics.jsonl
    warnings: list[dict[str, Any]]
    finished: bool
    held_out: HeldOutPairs | None

    @classmethod
    def read(cls, folder: Path) -> RunRecords:
        """The records in a folder. UserError, naming all that is missing, where it holds none."""
        missing = [name for name in (_SETTINGS, _CURVES) if not os.path.lexists(folder / name)]
        if missing:
            raise UserError(f"{folder}: expected the records of a run, found no {' and no '.join(missing)}")
        run = cls(
            folder,
            settings=_object_of(folder / _SETTINGS),
            environment=_object_of(folder / "environment.json"),
            ds_config=_object_of(folder / "ds_config.json"),
            data=_object_of(folder / "data.json"),
            records=read_records(folder / _CURVES),
            warnings=read_records(folder / "warnings.jsonl"),
            finished=os.path.lexists(folder / "finished.json"),
            held_out=_held_out_of(folder / "held_out.npz"),
        )
        beta = run.settings.get("beta")
        if not isinstance(beta, (int, float)) or not 0 < beta < math.inf:
            raise UserError(f"{folder / _SETTINGS}: beta: expected a number above 0, found {shown(beta)}")
        return run

    @property
    def beta(self) -> float:
        """That of its loss: rewards are beta times log-ratios."""
        return float(self.settings["beta"])

    @cached_property
    def evaluations(self) -> list[dict[str, float]]:
        """Records of evaluations of held-out pairs, in their order."""
        found = [_numbers(record) for record in self.records]
        return [
            numbers
            for numbers in found
            if numbers.keys() >= _EVALUATED
            and 0 <= numbers["eval_rewards/accuracies"] <= 1
            and numbers["eval_pairs"] >= 1
        ]

    @cached_property
    def intervals(self) -> list[dict[str, float]]:
        """Records of training between two lines, in their order."""
        return [_numbers(record) for record in self.records if "loss" in record]

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, by the share of an epoch that a step is; None before the first one."""
        epochs = self.settings.get("epochs")
        for record in reversed(self.intervals):
            if record.get("epoch", 0) > 0 and isinstance(epochs, int):
                return round(record["step"] / record["epoch"] * epochs)
        return None

    def count_warnings(self, level: str) -> int:
        """How many warnings of a level it gave."""
        return sum(warning.get("level") == level for warning in self.warnings)


def is_run(folder: Path) -> bool:
    """Whether a folder looks like that of a run."""
    return any(os.path.lexists(folder / name) for name in (_SETTINGS, _CURVES))


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _object_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    if not os.path.lexists(path):
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _held_out_of(path: Path) -> HeldOutPairs | None:
    """The held-out pairs of a run; None where it left none. UserError for a damaged file."""
    if not os.path.lexists(path):
        return None
    try:
        with open_file(path) as file, np.load(file, allow_pickle=False) as found:
            origins = found["origins"]
            prompts = found["prompts"].tolist() if "prompts" in found else range(len(origins))
            pairs = HeldOutPairs(
                int(found["step"]),
                *(found[name] for name in ("logps_N2", "ref_N2", "counts_N2")),
                origins=origins,
                groups_N=groups_of(prompts),
            )
        arrays = (pairs.logps_N2, pairs.ref_N2, pairs.counts_N2)
        if {array.shape for array in arrays} != {(len(pairs.groups_N), 2)} or origins.shape != pairs.groups_N.shape:
            raise ValueError("its arrays are of different numbers of pairs")
        if {array.dtype.kind for array in arrays} - set("fiu"):
            raise ValueError("its arrays hold no numbers")
        return pairs
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: expected log-probs of held-out pairs, found a damaged file ({error}); remove it: the run is then "
            "compared by its accuracy alone, not pair by pair"
        ) from error
