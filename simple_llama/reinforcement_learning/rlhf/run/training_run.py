"""The parts of a training run, set up and looked after: data order, engine, reference, metrics, saves, records.

`apply_dpo.run_steps` is what happens with them, `step.optimizer_step` what a step computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.console import note_on_bar, progress, set_up_log
from simple_llama.cluster.distributed import Ranks, fail_together, gather_objects, require_same, shared
from simple_llama.cluster.start_phases import PHASES
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.common.settings import with_absolute_paths
from simple_llama.ops.machine import peak_flops
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan, sweep_of
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import with_held_out
from simple_llama.reinforcement_learning.rlhf.engine import checkpoint
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, InputsConfig, settle_models
from simple_llama.reinforcement_learning.rlhf.objective.cost import useful_flops
from simple_llama.reinforcement_learning.rlhf.objective.policy import require_gaps, require_rankings
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import LossConfig, PreferenceLoss, resolved
from simple_llama.reinforcement_learning.rlhf.reference import ref_source
from simple_llama.reinforcement_learning.rlhf.reference.audit import Bound
from simple_llama.reinforcement_learning.rlhf.reference.first_step import FirstStep
from simple_llama.reinforcement_learning.rlhf.run.agenda import Agenda
from simple_llama.reinforcement_learning.rlhf.run.best import Best, BestConfig
from simple_llama.reinforcement_learning.rlhf.run.evaluate import EvaluationConfig, HeldOut, evaluate, of_sets
from simple_llama.reinforcement_learning.rlhf.run.interval import Interval, IntervalConfig
from simple_llama.reinforcement_learning.rlhf.run.profiling import ProfileConfig, StepProfile
from simple_llama.reinforcement_learning.rlhf.run.records import WARNINGS, RunWriter, log_line, rewind
from simple_llama.reinforcement_learning.rlhf.run.run_facts import (
    drop_held_out,
    effective_pairs,
    histograms_of,
    weight_facts,
    write_data_facts,
    write_held_out,
)
from simple_llama.reinforcement_learning.rlhf.run.run_folder import (
    FolderConfig,
    folders_of,
    keep_settings,
    mark_finished,
    unmark_finished,
    write_records,
)
from simple_llama.reinforcement_learning.rlhf.run.sampling import Samples
from simple_llama.reinforcement_learning.rlhf.run.saves import (
    Position,
    Saves,
    SavesConfig,
    course_of,
    meant_by_lack,
    saves_beside,
    uncompiled,
)
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig, about_schedule, with_warmup
from simple_llama.reinforcement_learning.rlhf.run.start_engine import start_engine
from simple_llama.reinforcement_learning.rlhf.run.start_reference import (
    audit_other,
    audit_reference,
    is_rounding,
    open_reference,
    reference_values,
    through_policy,
)
from simple_llama.reinforcement_learning.rlhf.run.start_warnings import expected_change, saved_bytes, start_warnings
from simple_llama.reinforcement_learning.rlhf.run.step import NotFinite, PackedAhead, Portion
from simple_llama.reinforcement_learning.rlhf.run.trackers import (
    TENSORBOARD,
    TrackerConfig,
    check_trackers,
    open_trackers,
    tracker_names,
)
from simple_llama.reinforcement_learning.rlhf.run.watch_health import (
    HealthWatch,
    StepSums,
    costliest,
    facts_of,
)

# Largest honest difference of the step-0 loss from its paper's value, relative where that is above 1.
_STEP0_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Item = TypeVar("Item")


@dataclass(frozen=True)
class RunConfig(
    ProfileConfig,
    SavesConfig,
    BestConfig,
    EvaluationConfig,
    TrackerConfig,
    IntervalConfig,
    FolderConfig,
    ScheduleConfig,
    ref_source.ReferenceConfig,
    LossConfig,
    InputsConfig,
):
    """What a training run may read: the settings of all its parts."""


class TrainingRun:
    """One training run: the policy under DeepSpeed, its data, its reference, and where its records go."""

    def __init__(self, config: RunConfig, inputs: Inputs, ranks: Ranks, name: str, check_lock: Callable[[], object]):
        """Sets all up (collective). `check_lock` raises where another run has taken over the checkpoint folder."""
        with fail_together(ranks):
            if ranks.is_main:
                check_trackers(config)
            if refusal := config.refusal(len(inputs.data.validation)):
                raise UserError(refusal)
        self.config = config = with_held_out(with_warmup(resolved(config)))
        self.inputs, self.ranks = inputs, ranks
        self.pairs, self.held_out = inputs.data.train, inputs.data.validation
        self.plan = BatchPlan.of(self.pairs, config, config.seed, ranks.world_size)
        self.total_steps = config.total_steps(self.plan.steps_per_epoch)
        self.loss_fn = PreferenceLoss.of(config)
        require_gaps(self.loss_fn, inputs.data.pairs)
        require_rankings(self.loss_fn, inputs.data.pairs, config.pairs)
        ckpt_folder, log_folder = folders_of(config, name)
        # while the model's digest is still being made; behind the audit of another reference: there are never both
        started = None if inputs.other_reference else start_engine(config, inputs, self.loss_fn, ranks)
        settle_models(inputs, ranks)
        course = course_of(asdict(config), self.plan.units_per_step, self.total_steps, inputs)
        # before the store is looked into: of another model's nobody should be asked to fill one
        saved = _state_to_resume(ckpt_folder, course, self.total_steps, ranks) if config.resume else None
        needed, fronts = self.loss_fn.needs_reference, self.loss_fn.asks.fronts
        self.reference = open_reference(config, inputs, ranks, needed, fronts)
        require_same("reference store (digest)", self.reference.content, ranks)
        PHASES.ended("reference")
        self.bound = Bound.here(inputs.dtype, ranks.device.type)
        with fail_together(ranks):
            values = reference_values(self.reference, inputs.data.pairs, self.bound, saved)
            self.profile = StepProfile(config, log_folder, ranks, saved.facts.step if saved else 0, self.total_steps)
        if inputs.other_reference and self.loss_fn.needs_reference and not saved:
            audit_other(config, self.reference, inputs, ranks)
        self.engine, size, part = started or start_engine(config, inputs, self.loss_fn, ranks)
        self.reference = through_policy(self.reference, self.engine, inputs, ranks)
        work = partial(useful_flops, size, inputs.architecture, backward=True, trained=part)
        steps, trained = self.plan.steps_per_epoch, self.engine.trained_weights
        room = saved_bytes(config, self.total_steps, steps, sum(size), trained, inputs.start)
        self.saved_bytes = None if saved else room
        if saved:
            checkpoint.load_state(saved, self.engine)
        self.log_folder = log_folder
        self.best = Best(
            config, log_folder, ranks, saved.facts.best if saved else None, str(saved.folder) if saved else ""
        )
        self.due = Agenda(config, self.plan.steps_per_epoch, len(self.held_out), self.best)
        self.writer = self.open_records(name, saved)  # last: a run that is refused leaves the records as they were
        self.say_start(name)
        peak = peak_flops(ranks.device, inputs.dtype) * ranks.world_size
        self.sums = StepSums(ranks.device, work)
        self.interval = Interval(self.sums, self.engine.communication, peak, ranks)
        self.samples = Samples(
            inputs, self.engine, config, ranks, log_folder, self.writer, config.seed, self.reference.model
        )
        facts = facts_of(config, inputs.data, self.total_steps, self.loss_fn.scale)
        with fail_together(ranks):
            self.health = HealthWatch(log_folder, facts, self.writer, ranks)
        own, beside = (self.best, steps, check_lock, ranks), saves_beside(config, room.ends + room.between)
        self.saves = Saves(ckpt_folder, self.engine, inputs, course, values, config, *own, beside)
        self.at = self.saves.resume(saved, self.due.measures_at(saved.facts.step)) if saved else Position()
        PHASES.ended("records")

    # === Start ===

    def open_records(self, name: str, saved: checkpoint.SavedState | None) -> RunWriter:
        """The run's folder on rank 0: settings and versions once, the log, the curves up to the step resumed from."""
        done = saved.facts.step if saved else -1
        evaluated = not (saved and saved.facts.unfinished)
        with fail_together(self.ranks):
            if self.ranks.is_main:
                found = {"max_seq_len": self.inputs.max_seq_len, "model_path": str(self.inputs.start.path)}
                if self.config.reference_path:
                    found["reference_path"] = str(self.inputs.reference.path.absolute())
                if self.config.adapter_path:
                    found["adapter_path"] = str(Path(self.config.adapter_path).absolute())
                settings = with_absolute_paths(replace(self.config, run_name=name, **found))
                if not (saved and (self.log_folder / "environment.json").exists()):
                    write_records(self.log_folder, settings, self.engine.ds_config)
                keep_settings(self.config, name, settings)
                unmark_finished(self.log_folder)
                for of_evaluations in ("samples.jsonl", WARNINGS):
                    rewind(self.log_folder / of_evaluations, done, evaluated)
                drop_held_out(self.log_folder, done)
                write_data_facts(self.log_folder, self.inputs.data)
            set_up_log(self.log_folder / "train.log", self.ranks)
            trackers = open_trackers(self.log_folder, self.config, done) if self.ranks.is_main else ()
            on_board = TENSORBOARD in tracker_names(self.config)
            return RunWriter(self.log_folder, self.ranks.is_main, done, evaluated, self.config, trackers, on_board)

    def say_start(self, name: str) -> None:
        """What the run is about to do."""
        counts = len(self.pairs), len(self.held_out), self.total_steps
        LOGGER.info("run %s: %d pairs, %d held out, %d steps", name, *counts)
        LOGGER.info("loss: %s; learning rate: %s", self.loss_fn, about_schedule(self.config))
        if self.inputs.adapters:
            LOGGER.info("adapters: %s; %d weights are trained", self.inputs.about_adapters, self.engine.trained_weights)
            if not self.inputs.other_reference:
                whose = "without them" if self.inputs.without_adapters else "as it starts, with them"
                LOGGER.info("the reference is the model %s", whose)
        if self.loss_fn.couples:
            LOGGER.info("it couples the pairs of a step: a pass without gradient before each, about a third slower")
        if TENSORBOARD in tracker_names(self.config):
            LOGGER.info("to watch: tensorboard --logdir %s --host localhost", self.config.log_dir)
        steps = self.total_steps, self.plan.steps_per_epoch
        for warning in start_warnings(self.config, *steps, self.saved_bytes, self.config.ckpt_dir):
            LOGGER.warning("%s", warning)

    def check_start(self) -> None:
        """Step-0 facts: the untrained policy is the reference, so margins are 0 and the loss is known."""
        if not self.loss_fn.needs_reference:
            LOGGER.info("step 0: %s reads no reference; step 1 is compared with chats alone", self.config.loss_type)
        elif other := self.inputs.other_reference:
            LOGGER.info("step 0: rewards are measured from %s, so margins are not 0", other.path)
        else:
            logps = self.engine.logps if self.inputs.starts_as_reference else self.engine.logps_without_adapters
            audit_reference(self.config, self.reference, logps, self.inputs, self.ranks)
        PHASES.ended("audit")
        found = self.evaluate(0)
        weights = weight_facts(self.engine.own_matrices(self.ranks), self.inputs.dtype, self.ranks.device)
        LOGGER.info("%s", expected_change(self.config, self.total_steps, weights))
        self.writer.scalars(0, weights)
        self.health.see(0, weights)
        self._check_first_loss(found)
        PHASES.ended("evaluation and samples")
        self.interval.start()

    def _check_first_loss(self, found: HeldOut | None) -> None:
        """The held-out loss of step 0 is what the loss gives of log-ratios of 0, or of the reference's sums
        (collective)."""
        if not (found and self.loss_fn.needs_reference) or self.inputs.other_reference:
            return
        if not self.inputs.starts_as_reference:
            LOGGER.info("step 0: the policy is not the reference: nothing says beforehand what the loss must be")
            return
        if self.loss_fn.asks.squares:
            LOGGER.info("step 0: pairs are weighted by the policy; step 1 is compared with chats alone")
            return
        expected, sums_NS, held_out = self.loss_fn.at_start(), found.ref_N2, self.held_out
        if expected is not None:
            expected *= float(held_out.weights.sum() / held_out.total)
        with fail_together(self.ranks):
            if expected is None:
                entries = held_out.entries(self.loss_fn.asks.fronts)
                if self.reference.store:
                    sums_NS = entries.sums(self.reference.store.lookup(entries.keys))
                elif self.loss_fn.asks.fronts:
                    return
                parts = (sums_NS, held_out.keys["counts"], held_out.weights, held_out.gaps, held_out.group_numbers)
                tensors = (torch.from_numpy(np.array(part)) for part in parts)
                expected = self.loss_fn.foretold(*tensors, total=held_out.total)
        LOGGER.info("step-0 held-out loss %.6f, expected %.6f", self.at.last_loss, expected)
        near = _STEP0_TOLERANCE[self.inputs.dtype] * max(expected, 1.0)
        if abs(self.at.last_loss - expected) <= near:
            return
        if is_rounding(self.loss_fn, found, held_out, self.bound, self.at.last_loss, near):
            LOGGER.info("it is that of the sums that were found, whose rounding this loss multiplies")
        else:
            problem = UserError(
                f"step 0: the held-out loss is {self.at.last_loss:.6f}, expected {expected:.6f} while the policy "
                "is the reference; the store does not belong to this model or machine: delete its folder under "
                "ref_cache_dir and run launch/precompute_ref.py again"
            )
            raise shared(problem, self.ranks)

    # === A step ===

    def rate(self, index: int) -> float:
        """Learning rate of optimizer step `index` (from 0)."""
        return self.config.rate(index, self.total_steps)

    @cached_property
    def _packed(self) -> PackedAhead:
        return PackedAhead(self.plan, self.ranks.rank, self.pairs, self.ranks.device)

    def portions(self, index: int) -> Iterator[Portion]:
        """This rank's micro-batches of step `index` (from 0); between two of them the run may stop (collective)."""
        if self.config.dropout > 0:  # a resumed run must drop the same units
            torch.manual_seed(self.config.seed + 1_000_003 * index + self.ranks.rank)
        self.sums.begin_step()
        yield from self.stoppable(self._packed.of(index), f"step {index + 1}")
        watchdog.started()

    def first_step(self, index: int) -> FirstStep | None:
        """What step `index` (from 0) is compared with where it is the first (collective); None for all others.

        What cannot be foretold is said.
        """
        if index > 0:
            return None
        mine = [micro_batch for micro_batch in self.plan.step(index)[self.ranks.rank] if micro_batch]
        drops = self.config.dropout > 0
        at_reference = not drops and self.loss_fn.needs_reference and self.inputs.starts_as_reference
        store = self.reference.store
        first = FirstStep(self.pairs, mine, self.loss_fn, self.bound, self.ranks, at_reference, store)
        if drops:
            why = "dropout leaves out other units each time"
            LOGGER.info("step 1: its log-probs cannot be foretold, only what the loss makes of them: %s", why)
        else:
            first.compute_anew(self.engine.logps)
        return first

    def stoppable(self, items: Iterable[Item], place: str) -> Iterator[Item]:
        """Micro-batches, of which each rank has as many (collective); between two of them the run may stop."""
        for item in items:
            watchdog.beat(place)
            stopping.agree(self.ranks)
            self.saves.poll()
            yield item

    @contextlib.contextmanager
    def naming_pairs(self, index: int) -> Iterator[None]:
        """Says of a loss or gradient that is not finite at which pairs, and where to go on (collective if so)."""
        try:
            yield
        except NotFinite as found:
            self.saves.settle()
            if found.losses is None:
                problem = NotFinite(f"step {index + 1}: {found}; {self.saves.last_good()}")
                raise shared(problem, self.ranks) from found
            mine = (micro_batch for micro_batch in self.plan.step(index)[self.ranks.rank] if micro_batch)
            bad = [
                self.pairs.origin(i)
                for micro_batch, loss_B in zip(mine, found.losses, strict=True)
                for i, finite in zip(micro_batch, loss_B.isfinite().tolist(), strict=True)
                if not finite
            ]
            named = [origin for rank in gather_objects(bad, self.ranks, list[str]) for origin in rank]
            problem = NotFinite(
                f"step {index + 1}: the loss of {len(named)} pairs is not finite: {', '.join(named[:8])}; weights "
                f"were not changed by this step; {self.saves.last_good()}"
            )
            raise shared(problem, self.ranks) from found

    def made(self, step: int, grad_norm: float) -> None:
        """Notes that `step` steps are done."""
        self.interval.count(grad_norm)
        self.at.done, self.at.unfinished = step, True
        watchdog.beat(f"after step {step}")

    # === Records ===

    def log(self, step: int, rate: float) -> None:
        """Writes the interval's metrics over all ranks, and begins the next (collective)."""
        values = self.interval.values(rate, step / self.plan.steps_per_epoch)
        if self.pairs.is_weighted:
            values["pair_weight"] = self.sums.mean_weight()
        self.writer.scalars(step, values)
        log_line(f"step {step}/{self.total_steps}", values)
        note_on_bar("train", f"loss {values['loss']:.4f}, accuracy {values['rewards/accuracies']:.3f}")
        mine = self.plan.step(step - 1)[self.ranks.rank]
        self.health.see(step, values, lambda: costliest(self.pairs, mine, self.sums.losses, self.ranks))
        if not self.held_out:
            self.at.last_loss = values["loss"]
        self.interval.start()

    def evaluate(self, step: int) -> HeldOut | None:
        """Held-out metrics and sample answers after `step` steps (collective); None without held-out pairs."""
        ranks = self.ranks
        if self.held_out:
            sizes = self.config.batch_size, ranks.world_size, self.config.rows_per_micro_batch
            mine = sweep_of(self.held_out, *sizes)[ranks.rank]
            parts = self.stoppable(mine, f"evaluation at step {step}")
            shown = progress(parts, total=len(mine), desc="evaluate", ranks=ranks)
            ref_logps = self.reference.logps
            found = evaluate(self.engine.logps, self.loss_fn, ref_logps, self.held_out, shown, ranks.device)
            values = found.metrics
            values["eval_longer_is_chosen"] = self.held_out.longer_is_chosen
            values |= effective_pairs(found, self.held_out)
            values |= of_sets(found, self.held_out, self.inputs.data.validation_sets)
            if self.held_out.is_weighted:
                values["eval_pair_weight"] = float(self.held_out.weights.sum() / self.held_out.total)
            self.at.last_loss = values["eval_loss"]
            if self.due.judges_at(step):
                self.best.see(step, values)
            log_line(f"evaluation at step {step}", values, "eval_")
            for name in self.inputs.data.validation_sets:
                log_line(f"evaluation at step {step}, {name}", values, f"eval_{name}/")
            self.writer.histograms(step, histograms_of(found))
            if self.due.ends_epoch(step):
                with fail_together(ranks):
                    if ranks.is_main:
                        write_held_out(self.log_folder, step, found, self.held_out)
            values |= self.samples.take(step)
            self.writer.scalars(step, values)
            self.health.see(step, values)
            return found
        return None

    def save(self) -> None:
        """A checkpoint of where the run stands, begun if not made (collective)."""
        self.saves.save(self.at, self.due.measures_at(self.at.done))
        self.flush()

    def save_stopped(self) -> None:
        """Saves the last whole step of a run that is to stop (collective)."""
        self.saves.save_stopped(self.at)
        self.flush()

    def flush(self) -> None:
        """Brings the curves to disk."""
        with watchdog.patience("writing the curves"):
            self.writer.flush()

    def finish(self, report: Path | None, metrics: dict[str, float], seconds: float) -> None:
        """Leaves the mark of success in the run's folder (collective). UserError where an export is missing.

        Args: see `mark_finished`; on rank 0.
        """
        why = self.due.why_ended(self.at.done)
        with fail_together(self.ranks):
            if self.ranks.is_main:
                self.saves.check_exported()
                done, weights = self.at.done, self.saves.newest_path
                mark_finished(self.log_folder, done, why, weights, report, metrics, seconds)
        LOGGER.info("finished (%s): %s; best: %s", why, self.saves.newest_path, self.best)


def _state_to_resume(folder: Path, course: dict[str, Any], total_steps: int, ranks: Ranks) -> checkpoint.SavedState:
    """The newest state of a run, the same one on all ranks (collective). UserError where this run would not be its
    continuation."""
    with fail_together(ranks):
        saved = checkpoint.newest_state(folder)
    require_same("state to resume from", {**saved.facts.to_json(), "files": saved.files}, ranks)
    with fail_together(ranks):
        later = meant_by_lack(course, saved.facts.course)
        saved = saved._replace(facts=replace(saved.facts, course=uncompiled(saved.facts.course)))
        checkpoint.check_same_run(saved, {"adapters": None, **course}, total_steps, later=later)
    return saved
