"""The checkpoints of a run: when one is due, what goes into it, and what a resumed run must share with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
from typing_extensions import Doc

from simple_llama.cluster import watchdog
from simple_llama.cluster.background import Background, Job
from simple_llama.cluster.distributed import Ranks, broadcast_object, fail_together
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.common.settings import Count, CountOrNone, Settings
from simple_llama.interop.adapted_start import AdaptedStart
from simple_llama.ops.machine import peak_bytes, resident_bytes, trim_heap
from simple_llama.pretraining.start_model import StartChanged, StartModel
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchConfig
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import (
    SavedState,
    StateFacts,
    StateWeights,
    newest_state,
    write_state,
)
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.engine.state_copy import StateCopy
from simple_llama.reinforcement_learning.rlhf.inputs import TOKENIZER_KEY, Inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import LossConfig
from simple_llama.reinforcement_learning.rlhf.run.best import Best
from simple_llama.reinforcement_learning.rlhf.run.copy_room import copy_rooms
from simple_llama.reinforcement_learning.rlhf.run.exports import free_path, is_export, prune_exports, weights_name
from simple_llama.reinforcement_learning.rlhf.run.run_folder import environment
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig

# Settings that a resumed run must share with the saved one, beside its loss: they decide the data order or the update.
# Not reduce_once: like another number of ranks, it changes only the order in which fp32 sums are made.
_SAME_ON_RESUME = (
    "seed",
    "epochs",
    "max_steps",
    "schedule",
    "max_lr",
    "min_lr",
    "weight_decay",
    "beta1",
    "beta2",
    "max_grad_norm",
    "dropout",
    "trainable",
    "group_weight",
)
_ALONE_S = 20.0  # for what a rank that fails alone is writing: the others wait no longer for it


@dataclass(frozen=True)
class SavesConfig(Settings):
    """When a run saves, and what it keeps."""

    # === Saves ===
    save_interval: Annotated[
        CountOrNone, Doc("optimizer steps between checkpoints, beside those at each epoch's end; 0: only these")
    ] = 0
    keep_states: Count = 2  # resumable states kept, newest first
    keep_exports: Annotated[
        CountOrNone, Doc("newest exports kept of those between epochs' ends, which stay, as the best one does; 0: all")
    ] = 0
    save_in_background: Annotated[
        bool,
        Doc(
            "write checkpoints while training goes on, from a copy of masters and moments: 12 bytes of host memory a "
            "trained weight, dealt to the ranks; where it does not fit, the run says so and waits for each save"
        ),
    ] = True


@dataclass
class Position:
    """Where a run stands."""

    done: int = 0  # optimizer steps
    unfinished: bool = True  # whether something that is due after `done` steps is still to do
    last_loss: float = math.nan  # held-out; of the last interval where nothing is held out


def count_saves(total_steps: int, steps_per_epoch: int, *intervals: int) -> tuple[int, int]:
    """How many checkpoints a run makes: (at the ends of epochs and of the run, at other steps).

    Args: intervals: steps between those that are made beside epochs' ends; 0: none.
    """
    every = [steps_per_epoch, *filter(None, intervals)]
    some = (part for count in range(1, len(every) + 1) for part in combinations(every, count))
    multiples = sum((-1) ** (len(part) + 1) * (total_steps // math.lcm(*part)) for part in some)
    ends_between = all(total_steps % interval for interval in every)
    ends = -(-total_steps // steps_per_epoch)
    return ends, multiples + ends_between - ends


def saves_beside(config: SavesConfig, saves: int) -> bool:
    """Whether a run writes checkpoints while it trains on, if there is room for the copies: the last of its so many
    saves is waited for."""
    return config.save_in_background and saves > 1


def course_of(settings: dict[str, Any], units_per_step: int, total_steps: int, inputs: Inputs) -> dict[str, Any]:
    """What a resumed run must share with the saved one; the same pairs a step may be dealt to other ranks. A warm-up
    counts in steps, however it was given."""
    schedule = ScheduleConfig(**{field.name: settings[field.name] for field in fields(ScheduleConfig)})
    return {
        **{name: settings[name] for name in _SAME_ON_RESUME},
        "warmup_iterations": schedule.warmup_steps(total_steps),
        **_loss_course(LossConfig(**{field.name: settings[field.name] for field in fields(LossConfig)})),
        "pairs_per_step": units_per_step,
        "data": inputs.data_digest,
        "reference": inputs.reference_id,
        "start": inputs.start.digest,
        **({"adapters": inputs.adapters} if inputs.adapters else {}),
    }


def _loss_course(config: LossConfig) -> dict[str, Any]:
    """Of a run's course: its loss and the options that it has, as they are where they were not given."""
    return {"loss_type": config.loss_type, **config.own_options()}


def meant_by_lack(course: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a state's course means that lacks an entry of a run's, for settings that came after it was written."""
    loss = {**_loss_course(LossConfig(course["loss_type"])), "loss_type": LossConfig().loss_type}
    own = {name: getattr(ScheduleConfig(), name) for name in ("max_steps", "schedule")}
    return {**loss, **own, "group_weight": BatchConfig().group_weight, "start": start_digest(saved), "adapters": None}


def uncompiled(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state's course as that of a run whose layers are not compiled, which versions before could do.

    Its reference rounds elsewhere: a store of its own keeps the log-probs of before.
    """
    reference = saved.get("reference")
    numerics = reference.get("numerics") if isinstance(reference, Mapping) else None
    if not (isinstance(reference, Mapping) and isinstance(numerics, Mapping) and "compiled" in numerics):
        return dict(saved)
    LOGGER.warning("the run's layers were compiled; from here on they are not: log-probs are rounded elsewhere")
    kept = {name: value for name, value in numerics.items() if name != "compiled"}
    return {**saved, "reference": {**reference, "numerics": kept}}


def start_digest(found: Mapping[str, Any]) -> Any:
    """Of the model that a run started from, by a state's course or an export's metadata; earlier ones had no other
    reference."""
    reference = found.get("reference")
    return found.get("start", reference.get("weights") if isinstance(reference, Mapping) else None)


class Saves:
    """The checkpoint folder of a run, and what every checkpoint says of it.

    A save takes a copy of what is trained. From it threads write the state while training goes on, then from the state
    its export; `poll` leads them from one to the next. One save at a time: the next one waits, and so does an end.

    A state is on disk before its export is begun: where this fails, nothing that was trained is lost, and the run that
    resumes makes it.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        inputs: Inputs,
        course: dict[str, Any],
        reference_values: dict[str, Any] | None,
        settings: SavesConfig,
        best: Best,
        steps_per_epoch: int,
        check_lock: Callable[[], object],
        ranks: Ranks,
        beside: bool,
    ):
        """Args:
        course: see `course_of`.
        reference_values: what each state keeps of them; see `KeptValues`.
        settings: all of the run, which go into the metadata of each export.
        check_lock: raises where another run has taken over the folder.
        beside: whether saves are to go on while training does, see `saves_beside`.
        """
        self.folder, self.engine, self.inputs, self.ranks = folder, engine, inputs, ranks
        self.course, self.settings, self.best, self.steps_per_epoch = course, settings, best, steps_per_epoch
        self.reference_values, self.check_lock = reference_values, check_lock
        self.newest: SavedState | None = None  # of those on disk that this run saved or loaded
        self.newest_path = folder  # of an export, once there is one
        self.refused: list[str] = []  # exports that were due and could not be made; on rank 0
        self._beside, self._copy, self._background = beside, StateCopy(engine, ranks), Background(ranks)

    def resume(self, saved: SavedState, measured: bool) -> Position:
        """Where the saved run was; the engine has its state already. Makes an export that is missing, and best.json
        what it was (collective).

        Args: measured: whether a loss was after the saved step.
        """
        facts, start = saved.facts, self.inputs.start
        self.newest, self.newest_path = saved, self.folder / facts.weights
        LOGGER.info("resumed from %s at step %d", saved.folder, facts.step)
        at = Position(facts.step, facts.unfinished, math.nan if facts.loss is None else facts.loss)
        missing = bool(facts.weights) and self.ranks.is_main and not is_export(self.newest_path, facts.step, start)
        if broadcast_object(missing, self.ranks):
            LOGGER.info("%s is missing; it is made from the state", self.newest_path)
            self._save(at, measured, facts.weights)
            self.wait()
        with fail_together(self.ranks):
            if self.ranks.is_main:
                self.best.write(self.folder, start)
        return at

    def save(self, at: Position, measured: bool) -> None:
        """Saves the state to resume from and exports the weights (collective). Where they are written beside training,
        this returns when the copy is taken.

        Args: measured: whether `at.last_loss` is of this step, and so belongs into the name.
        """
        loss, suffix = at.last_loss if measured else None, self.inputs.start.export_suffix
        self._save(at, measured, weights_name(at.done, self.steps_per_epoch, loss, self.inputs.max_seq_len, suffix))

    def save_merged(self, at: Position, measured: bool) -> None:
        """The whole model, once, at the end of a run that exports adapters alone (collective)."""
        start = self.inputs.start
        if not (isinstance(start, AdaptedStart) and start.as_adapters and self.newest):
            return
        self.wait()
        found = ""
        with watchdog.patience("merging the adapters"), fail_together(self.ranks):
            if self.ranks.is_main:
                name = self.newest.facts.weights.removesuffix(start.export_suffix) + f"_merged{start.export_suffix}"
                path = free_path(self.folder, name, at.done, start)
                weights = StateWeights(self.newest)
                whole = start.whole()
                if is_export(path, at.done, start) or self._export(weights, path, at, measured, self.best, whole):
                    found = path.name
        if found := broadcast_object(found, self.ranks):
            self.newest_path = self.folder / found
            LOGGER.info("saved %s", self.newest_path)

    def save_stopped(self, at: Position) -> None:
        """Saves the last whole step of a run that is to stop, unless it is on disk (collective); no export. A save that
        fails meanwhile is only said: what it was to write is saved here."""
        self.settle()
        if self.newest is None or self.newest.facts.step != at.done:
            with watchdog.patience(f"saving step {at.done}"):
                self._begin(lambda sums_stay: self._state(at, "", sums_stay), beside=False)
        LOGGER.info("stopped after step %d; --resume goes on from there", at.done)

    def check_exported(self) -> None:
        """Raises UserError where exports that were due were refused: the run is not done. For rank 0."""
        if self.refused:
            raise UserError(
                f"{self.inputs.start.path}: the start checkpoint changed during the run, so {', '.join(self.refused)} "
                f"could not be written to {self.folder}; all that was trained is in its state/. Put the checkpoint "
                "back as it was, then --resume writes the newest"
            )

    # === While training goes on ===

    def poll(self) -> None:
        """Lets a save under way go on (collective while there is one): its errors come here."""
        self._background.poll()

    def wait(self) -> None:
        """Returns when no save is under way (collective)."""
        if self._background.is_busy:
            with watchdog.patience("waiting for a save"):
                self._background.wait()

    def end(self) -> None:
        """The same after the last one (collective), whose copy is needed no more."""
        self.wait()
        self._copy.drop()

    def settle(self) -> None:
        """The same before an error that ends the run on all ranks (collective): what goes wrong here is only said."""
        try:
            self.wait()
        except Exception as error:  # noqa: BLE001 - another error ends the run, on all ranks alike
            LOGGER.error("a save under way failed: %s: %s", type(error).__name__, error)

    def let_end(self, error: Exception) -> None:
        """Before an error ends the run, lets a save under way come to its end: a good state, so go on from there.

        Of an error that others may not have, only what this rank's thread is writing, for a while: a state whose shards
        are not all there is none.
        """
        if self.ranks.world_size == 1 or (isinstance(error, UserError) and error.everywhere):
            self.settle()
        else:
            with watchdog.patience("waiting for a save"):
                self._background.wait_alone(_ALONE_S)

    # === A save ===

    def _save(self, at: Position, measured: bool, name: str) -> None:
        """The state, then the export of that name or, where something else has it, of one that tells the step."""
        self.wait()
        with fail_together(self.ranks):
            name = free_path(self.folder, name, at.done, self.inputs.start).name if self.ranks.is_main else ""
        name = broadcast_object(name, self.ranks)
        self.best.name(at.done, name)
        at, best = replace(at), copy(self.best)  # as they are now
        with watchdog.patience(f"saving step {at.done}"):
            self._begin(lambda sums_stay: self._state_and_export(at, measured, name, best, sums_stay), self._fits())

    def _fits(self) -> bool:
        """Whether this save goes on beside training (collective). The first one finds out whether its memory is there,
        beside what the run took at its fullest so far; that it is not is said once."""
        if self._beside and not self._copy.is_there:
            host = torch.device("cpu")
            still = max(0, peak_bytes(host) - resident_bytes(host))
            refusals = [room.refusal for room in copy_rooms(self._copy.size, still, self.ranks) if room.refusal]
            for refusal in refusals:
                LOGGER.warning("%s", refusal)
            self._beside = not refusals
        return self._beside

    def _begin(self, save: Callable[[bool], Generator[Job, Future[Any], Any]], beside: bool) -> None:
        """Begins a save and, unless it goes on beside training, waits for its end (collective).

        Args: save: given whether the sums of gradients keep their memory.
        """
        if not beside:
            trim_heap()  # a state is held whole on its way to the disk: on a CPU it is a run's fullest moment
        self._background.begin(save(beside))
        if not beside:
            self._background.wait()
            self._copy.drop()
            trim_heap()

    def _state_and_export(
        self, at: Position, measured: bool, name: str, best: Best, sums_stay: bool
    ) -> Generator[Job, Future[Any], None]:
        """Work for a `Background` (collective)."""
        saved = yield from self._state(at, name, sums_stay)
        path = self.folder / name
        done = yield lambda: self.ranks.is_main and self._export(StateWeights(saved), path, at, measured, best)
        with fail_together(self.ranks):
            exported = done.result()
        if broadcast_object(exported, self.ranks, bool):
            self.newest_path = path
            LOGGER.info("saved %s", path)

    def _state(self, at: Position, name: str, sums_stay: bool) -> Generator[Job, Future[Any], SavedState]:
        """The state after `at.done` steps, which names its export ("": none): work for a `Background` (collective)."""
        loss = None if math.isnan(at.last_loss) else at.last_loss
        values, best = self.reference_values, self.best.to_json()
        facts = StateFacts(at.done, name, loss, at.unfinished, self.course, values, best)
        keep, before = self.settings.keep_states, self.newest
        self.newest = yield from write_state(
            self.folder, self._copy, facts, keep, self.ranks, before, self.check_lock, sums_stay
        )
        return self.newest

    def _export(
        self,
        weights: Mapping[str, torch.Tensor],
        path: Path,
        at: Position,
        measured: bool,
        best: Best,
        start: StartModel | None = None,
    ) -> bool:
        """Exports, and deletes what `keep_exports` does not keep. Gives False, and says so, where the start
        checkpoint is needed and is not what it was: what is trained is in the state, so the run may go on. For rank 0,
        in any thread.

        Args: best: as it was when the save began. start: by whose form, if not by the start model's as it is.
        """
        start = start or self.inputs.start
        metadata = {
            "run": self.folder.name,
            "file": path.name,
            "step": at.done,
            "epochs": at.done / self.steps_per_epoch,
            "loss": at.last_loss if measured else None,
            "dpo_config": asdict(self.settings),
            "reference": self.inputs.reference_id,
            "start": self.inputs.start.digest,
            "environment": environment(),
        }
        if self.inputs.kept_digest:
            metadata[TOKENIZER_KEY] = self.inputs.kept_digest
        try:
            # what is not trained keeps its values
            start.export(path, weights, metadata, tokenizer=self.inputs.given_tokenizer)
        except StartChanged as changed:
            self.refused.append(path.name)
            LOGGER.warning(
                "%s is not written: %s; what is not trained would be another model's. The state of step %d is saved; "
                "put the checkpoint back as it was",
                path,
                changed,
                at.done,
            )
            return False
        self.refused.clear()  # the checkpoint is back, and this is the newest
        best.write(self.folder, self.inputs.start)
        keep = self.settings.keep_exports
        prune_exports(self.folder, keep, self.steps_per_epoch, at.done, self.inputs.start, best.weights)
        return True

    def last_good(self) -> str:
        """Where to go on from after a stop."""
        try:
            return f"last good checkpoint: {newest_state(self.folder).folder}"
        except UserError:
            return f"no checkpoint was saved yet in {self.folder}"
