"""The best checkpoint of a run by a held-out metric, and the end of a run that finds no better one.

    best.json    step, metric, value, and the path of the export: in the run's log folder

Looked at are the evaluations after which a checkpoint is made; with `early_stop` all of them, and one that is better
makes a checkpoint. The start is none of them. What was found is in each state, so a run that resumes has it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from typing_extensions import Doc

from simple_llama.cluster.distributed import Ranks, broadcast_object
from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write_json, shown
from simple_llama.common.logging import LOGGER
from simple_llama.common.settings import CountOrNone, Settings
from simple_llama.pretraining.start_model import StartModel
from simple_llama.reinforcement_learning.rlhf.run.exports import is_export
from simple_llama.reinforcement_learning.rlhf.run.run_folder import BEST

_LOWER = {"eval_loss"}  # metrics of which less is better


@dataclass(frozen=True)
class BestConfig(Settings):
    """Which checkpoint is the best, and whether a run that finds no better one ends."""

    # === Best checkpoint ===
    best_metric: Annotated[
        Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"],
        Doc("held-out metric by which best.json names a checkpoint: the lowest loss, or the highest of the others"),
    ] = "eval_loss"
    early_stop: Annotated[
        CountOrNone,
        Doc(
            "evaluations without a better best_metric after which the run ends; each better one is saved then; 0: never"
        ),
    ] = 0

    def refusal(self, held_out: int) -> str:
        """What is wrong with these settings for a run with so many held-out pairs; "" where nothing is."""
        if self.early_stop and not held_out:
            return f"early_stop: expected held-out pairs (val_share) or 0, found {self.early_stop} and no such pairs"
        return ""


class _Found(NamedTuple):
    """The best checkpoint so far."""

    metric: str
    step: int
    value: float
    weights: str  # name of its export, once it has one
    since: int  # evaluations after it


class Best:
    """What a run has found of its best checkpoint, the same on all ranks."""

    def __init__(self, config: BestConfig, log_folder: Path, ranks: Ranks, saved: Any = None, place: str = ""):
        """Args:
        saved: what a state keeps of it, see `to_json`; None: nothing. place: names the state.

        UserError where a state keeps what is none.
        """
        self.config, self.path, self.ranks = config, log_folder / BEST, ranks
        self._found = None if saved is None else _checked(saved, place)
        if self._found and self._found.metric != config.best_metric:
            was = self._found.metric
            LOGGER.warning("best_metric was %s, is now %s: the best is looked for anew", was, config.best_metric)
            self._found = None

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of an evaluation (collective: rank 0's word)."""
        metric = self.config.best_metric
        value = float(broadcast_object(float(values[metric]), self.ranks, float))
        sign = -1.0 if metric in _LOWER else 1.0
        if self._found is None or sign * value > sign * self._found.value:
            if math.isfinite(value):
                self._found = _Found(metric, step, value, "", 0)
        else:
            self._found = self._found._replace(since=self._found.since + 1)

    def is_at(self, step: int) -> bool:
        """Whether the best is that of `step`."""
        return self._found is not None and self._found.step == step

    @property
    def ends(self) -> bool:
        """Whether the run is to end for want of a better one."""
        return bool(self.config.early_stop and self._found and self._found.since >= self.config.early_stop)

    def __str__(self) -> str:
        if self._found is None:
            return "none"
        return f"{self._found.metric} {self._found.value:.6g} at step {self._found.step}"

    @property
    def weights(self) -> str:
        """The name of its export; "" for none."""
        return self._found.weights if self._found else ""

    def name(self, step: int, weights: str) -> None:
        """Notes the export of `step`, which is about to be made."""
        if self._found and self._found.step == step:
            self._found = self._found._replace(weights=weights)

    def to_json(self) -> dict[str, Any] | None:
        """For a state."""
        return self._found._asdict() if self._found else None

    def write(self, folder: Path, start: StartModel) -> None:
        """Brings best.json to what was found, for rank 0: it names no export that is not in `folder`."""
        found = self._found
        if found and found.weights and is_export(folder / found.weights, found.step, start):
            said = {"step": found.step, "metric": found.metric, "value": found.value}
            atomic_write_json(self.path, {**said, "weights": str(folder / found.weights)})
            return
        if found and found.weights:
            LOGGER.warning("%s: the best checkpoint (%s) is no longer there", folder / found.weights, self)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def _checked(saved: Any, place: str) -> _Found:
    """What a state keeps of the best checkpoint."""
    try:
        found = _Found(**saved)
        kinds = (str, int, float, str, int)
        if all(type(value) is kind for value, kind in zip(found, kinds, strict=True)):
            return found
    except TypeError:
        pass
    raise UserError(f"{place}: best: expected a step, its metric, value and export, found {shown(saved)}")
