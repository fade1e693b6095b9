"""The checkpoints of a run: when one is due, what goes into it, and what a resumed run must share with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.common.settings import Count, CountOrNone, Settings
from simple_llama.pretraining.weights import save_weights
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import (
    SavedState,
    StateFacts,
    newest_state,
    weights_name,
    writing_state,
)
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import LossConfig
from simple_llama.reinforcement_learning.rlhf.run.run_folder import environment

# Settings that a resumed run must share with the saved one: they decide the data order, the loss or the update.
# Not reduce_once: like another number of ranks, it changes only the order in which fp32 sums are made.
_SAME_ON_RESUME = (
    "seed",
    "epochs",
    *(field.name for field in fields(LossConfig)),
    "warmup_iterations",
    "max_lr",
    "min_lr",
    "weight_decay",
    "beta1",
    "beta2",
    "max_grad_norm",
    "dropout",
    "trainable",
)


@dataclass(frozen=True)
class SavesConfig(Settings):
    """When a run saves, and what it keeps."""

    # === Saves ===
    save_interval: Annotated[
        CountOrNone, Doc("optimizer steps between checkpoints, beside those at each epoch's end; 0: only these")
    ] = 0
    keep_states: Count = 2  # resumable states kept, newest first


@dataclass
class Position:
    """Where a run stands."""

    done: int = 0  # optimizer steps
    unfinished: bool = True  # whether something that is due after `done` steps is still to do
    last_loss: float = math.nan  # held-out; of the last interval where nothing is held out


def course_of(settings: dict[str, Any], pairs_per_step: int, inputs: Inputs) -> dict[str, Any]:
    """What a resumed run must share with the saved one; the same pairs a step may be dealt to other ranks."""
    return {
        **{name: settings[name] for name in _SAME_ON_RESUME},
        "pairs_per_step": pairs_per_step,
        "data": inputs.data_digest,
        "reference": inputs.reference_id,
    }


class Saves:
    """The checkpoint folder of a run, and what every checkpoint says of it."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        inputs: Inputs,
        course: dict[str, Any],
        reference_values: dict[str, Any] | None,
        settings: dict[str, Any],
        keep_states: int,
        check_lock: Callable[[], object],
        ranks: Ranks,
    ):
        """Args:
        course: see `course_of`.
        reference_values: what each state keeps of them; see `KeptValues`.
        settings: all of the run, for the metadata of each `.pth`.
        check_lock: raises where another run has taken over the folder.
        """
        self.folder, self.engine, self.inputs, self.ranks = folder, engine, inputs, ranks
        self.course, self.settings, self.keep_states, self.check_lock = course, settings, keep_states, check_lock
        self.reference_values = reference_values
        self.newest_step = -1  # of the newest state on disk that this run saved or loaded
        self.newest_path = folder  # of an exported .pth, once there is one

    def resume(self, saved: SavedState) -> Position:
        """Where the saved run was; the engine has its state already."""
        facts = saved.facts
        self.newest_step, self.newest_path = facts.step, self.folder / facts.weights
        LOGGER.info("resumed from %s at step %d", saved.folder, facts.step)
        return Position(facts.step, facts.unfinished, math.nan if facts.loss is None else facts.loss)

    def save(self, at: Position, epochs: float) -> None:
        """Exports the `.pth` and saves the state to resume from (collective). Args: epochs: done, as a fraction."""
        path = self.folder / weights_name(epochs, at.last_loss, self.inputs.max_seq_len)
        metadata = {
            "run": self.folder.name,
            "step": at.done,
            "epochs": epochs,
            "loss": at.last_loss,
            "dpo_config": self.settings,
            "reference": self.inputs.reference_id,
            "environment": environment(),
        }
        self._write(at, path, metadata)
        self.newest_path = path
        LOGGER.info("saved %s", path)

    def save_stopped(self, at: Position) -> None:
        """Saves the last whole step of a run that is to stop, unless it is on disk (collective); no `.pth`."""
        if self.newest_step != at.done:
            self._write(at, None, {})
        LOGGER.info("stopped after step %d; --resume goes on from there", at.done)

    def _write(self, at: Position, path: Path | None, metadata: dict[str, Any]) -> None:
        """Saves the state after `at.done` steps (collective), with its `.pth` where it has a path."""
        loss = None if math.isnan(at.last_loss) else at.last_loss
        facts = StateFacts(at.done, path.name if path else "", loss, at.unfinished, self.course, self.reference_values)
        again = self.newest_step == at.done
        with (
            watchdog.patience(f"saving step {at.done}"),
            writing_state(self.folder, self.engine, facts, self.keep_states, self.ranks, again) as weights,
        ):
            if self.ranks.is_main:
                self.check_lock()
                if path:
                    start = self.inputs.start  # what is not trained keeps its fp32 values
                    save_weights(path, start.merged(weights), start.config, metadata)
        self.newest_step = at.done

    def last_good(self) -> str:
        """Where to go on from after a stop."""
        try:
            return f"last good checkpoint: {newest_state(self.folder).folder}"
        except UserError:
            return f"no checkpoint was saved yet in {self.folder}"
