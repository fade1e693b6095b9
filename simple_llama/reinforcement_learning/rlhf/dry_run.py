"""`--dry_run`: everything that can be said about a run before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from simple_llama.cluster.distributed import Ranks, barrier, fail_together, gather_objects
from simple_llama.finetune.chat_format import about_system
from simple_llama.ops.machine import peak_flops, release, resident_bytes
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import check_weights
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import DataConfig
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import full_ds_config, zero_stage
from simple_llama.reinforcement_learning.rlhf.foretell import duration
from simple_llama.reinforcement_learning.rlhf.foretell.fit import largest_that_fits
from simple_llama.reinforcement_learning.rlhf.foretell.memory import (
    Base,
    Moment,
    TrainedModel,
    describe_engine,
    measure_base,
    moments,
)
from simple_llama.reinforcement_learning.rlhf.foretell.probe import Probed, probe
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.cost import model_size, trained_part, useful_flops
from simple_llama.reinforcement_learning.rlhf.objective.policy import (
    PolicyConfig,
    require_gaps,
    require_rankings,
    trained_names,
)
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import missing_pairs
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from simple_llama.reinforcement_learning.rlhf.run.copy_room import copy_rooms
from simple_llama.reinforcement_learning.rlhf.run.health import warnings_of
from simple_llama.reinforcement_learning.rlhf.run.run_facts import weight_facts
from simple_llama.reinforcement_learning.rlhf.run.sampling import ANSWERS_OF_KL, sample_prompts
from simple_llama.reinforcement_learning.rlhf.run.saves import count_saves, saves_beside
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig, about_schedule
from simple_llama.reinforcement_learning.rlhf.run.start_warnings import (
    SavedBytes,
    expected_change,
    saved_bytes,
    start_warnings,
)
from simple_llama.reinforcement_learning.rlhf.run.watch_health import facts_of

_GIB = 2**30
_MOST_PROBES = 3  # of batches that --fit_gb may have to lower


class _Foretold(NamedTuple):
    """What is measured on every rank before the report is written."""

    base: Base  # of the rank that takes most
    rate: float  # FLOP/s of GEMMs, of the slowest rank
    probed: list[Probed]  # of each rank; none without --probe
    fitting: int | None  # a size of micro-batches (`_Job.sized_by`); None where nobody asks
    fit_words: str


def describe(config: DPOConfig, inputs: Inputs, ranks: Ranks) -> str:
    """The whole report as text (collective); writes nothing.

    Without `probe` no model is made: what Python and torch take, and the rate of GEMMs, are measured.
    """
    with fail_together(ranks):  # the run looks at them where it makes its models
        for start in filter(None, (inputs.start, inputs.other_reference)):
            check_weights(start.load(), inputs.dtype)
    job = _Job(config, inputs, ranks)
    foretold = job.foretell()
    pairs, plan, saved = inputs.data.train, job.plan(job.size_set), job.saved()
    warned, copies = job.warnings(saved), job.copies(foretold.base)
    sections = {
        "config": json.dumps(asdict(replace(config, max_seq_len=inputs.max_seq_len)), indent=2),
        "DeepSpeed": json.dumps(full_ds_config(config, ranks.world_size), indent=2),
        "data": f"{inputs.data.report}\n{len(pairs)} pairs train, {_about_held_out(config, inputs)}",
        "system prompt": about_system(inputs.chat),
        "batches": _batch_arithmetic(config, plan, pairs),
        "learning rate": f"{about_schedule(config)}\n{expected_change(config, job.steps[0], job.weights)}",
        "loss": _about_loss(job.loss_fn, inputs),
        "memory per rank": job.memory(foretold),
        "time": job.time(foretold, saved),
        "checkpoints": f"{_checkpoints(saved, inputs)}\n{copies}",
        "warnings": "\n".join(warned) or "none",
        "first pair (scored tokens in [[ ]])": _show_pair(inputs.chat.tokenizer, pairs[0]),
    }
    return "\n\n".join(f"== {title} ==\n{body}" for title, body in sections.items())


class _Job:
    """A run that is not started: what its parts of the report are counted from."""

    def __init__(self, config: DPOConfig, inputs: Inputs, ranks: Ranks):
        self.config, self.inputs, self.ranks = config, inputs, ranks
        shape, names = _trained(config, inputs)
        self.size, self.part = model_size(shape), trained_part(shape, names)
        self.matrices = [name for name, weight in shape.named_parameters() if weight.dim() == 2 and name in names]
        self.trained = sum(weight.numel() for name, weight in shape.named_parameters() if name in names)
        self.loss_fn = PreferenceLoss.of(config)
        require_gaps(self.loss_fn, inputs.data.pairs)
        require_rankings(self.loss_fn, inputs.data.pairs, config.pairs)
        self.reference = config.reference if self.loss_fn.needs_reference else "none"
        self.missing = np.empty(0, np.int64)  # positions of pairs
        if self.reference == "store":
            with fail_together(ranks):
                store = RefStore.open(config.ref_cache_dir, inputs.reference_id, make=False, mend=False)
                self.missing = missing_pairs(store, inputs.data.pairs, self.loss_fn.asks.fronts)

    @property
    def sized_by(self) -> str:
        """The setting that says how large a micro-batch is."""
        return "rows_per_micro_batch" if self.config.rows_per_micro_batch else "batch_size"

    @property
    def size_set(self) -> int:
        """What this setting is."""
        return getattr(self.config, self.sized_by)

    def sized(self, size: int) -> DPOConfig:
        """The run with micro-batches of another size."""
        return replace(self.config, **{self.sized_by: size})

    def plan(self, size: int) -> BatchPlan:
        """Who would train on what, with micro-batches of this size."""
        return BatchPlan.of(self.inputs.data.train, self.sized(size), self.config.seed, self.ranks.world_size)

    @property
    def steps(self) -> tuple[int, int]:
        """Of the whole run, and of an epoch."""
        an_epoch = self.plan(self.size_set).steps_per_epoch
        return self.config.total_steps(an_epoch), an_epoch

    def saved(self) -> SavedBytes:
        """The room of the checkpoints."""
        return saved_bytes(self.config, *self.steps, sum(self.size), self.trained, self.inputs.start)

    @cached_property
    def beside(self) -> bool:
        """Whether the run writes its saves while it trains on."""
        saved = self.saved()
        return saves_beside(self.config, saved.ends + saved.between)

    # === Measured ===

    def foretell(self) -> _Foretold:
        """Measures, and looks for the largest batch where that is asked for (collective)."""
        config, inputs, ranks = self.config, self.inputs, self.ranks
        mine = measure_base(ranks, inputs.dtype)
        barrier(ranks)  # so that all ranks multiply at once, as they will
        told = gather_objects([*mine, peak_flops(ranks.device, inputs.dtype)], ranks, list[float])
        base = Base(*(int(max(column)) for column in list(zip(*told, strict=True))[:2]))
        rate = min(one[2] for one in told)
        if not config.fit_gb:
            plan = self.plan(self.size_set)
            found = probe(config, inputs, plan, base, ranks, self.beside) if config.probe else []
            return _Foretold(base, rate, found, None, "")
        return self._fit(base, rate)

    def _fit(self, base: Base, rate: float) -> _Foretold:
        """The largest batch by arithmetic; with a probe lowered until what is measured fits (collective)."""
        config, inputs, ranks = self.config, self.inputs, self.ranks
        room, scale = config.fit_gb * _GIB, 1.0
        most = -(-len(inputs.data.train) // ranks.world_size)  # all of a rank
        if config.rows_per_micro_batch:
            most = -(-int(self.plan(self.size_set).rows_per_step(0).max()) // ranks.world_size)
        probed: list[Probed] = []
        fitting = most

        def fits(size: int) -> bool:
            return self.estimate(size, base).sum * scale <= room

        for left in reversed(range(_MOST_PROBES)):
            fitting = largest_that_fits(fits, min(most, fitting))
            if not (fitting and config.probe):
                break
            probed = probe(self.sized(fitting), inputs, self.plan(fitting), base, ranks, self.beside)
            taken = max(one.peak for one in probed)
            if taken <= room or not left:
                break
            release(ranks.device)  # or the next probe would stand on what this one left
            scale, fitting = taken / self.estimate(fitting, base).sum, max(1, fitting - 1)
        return _Foretold(base, rate, probed, fitting, self._fit_words(fitting, most, base, probed))

    def _fit_words(self, fitting: int, most: int, base: Base, probed: list[Probed]) -> str:
        """The answer to --fit_gb."""
        asked = self.config.fit_gb
        if not fitting:
            least = self.estimate(1, base).sum / _GIB
            return f"in {asked:g} GiB not even {self.sized_by} 1 fits: it takes {least:.3f} GiB (estimate)"
        taken, kind = self.estimate(fitting, base).sum / _GIB, "estimate"
        if probed:
            taken, kind = max(one.peak for one in probed) / _GIB, "probe"
        if taken > asked:
            return f"in {asked:g} GiB no {self.sized_by} was found: {fitting} takes {taken:.3f} GiB ({kind})"
        of_all = "all rows of a rank's step" if self.config.rows_per_micro_batch else "all pairs of a rank"
        everything = f", which are {of_all}" if fitting == most else ""
        return (
            f"in {asked:g} GiB fits {self.sized_by} {fitting}{everything}: it takes {taken:.3f} GiB ({kind}) and "
            f"leaves {asked - taken:.3f} GiB; the largest by arithmetic, {'probed' if probed else 'not probed'}"
        )

    # === Counted ===

    def moments(self, size: int, base: Base) -> list[Moment]:
        """What is in memory at the fullest moments of a run with micro-batches of this size."""
        config, inputs = self.config, self.inputs
        in_memory = self.reference == "online" and not inputs.without_adapters
        model = TrainedModel(
            self.size, self.trained, inputs.architecture, inputs.dtype, in_memory, head=self.part.head > 0
        )
        engine = describe_engine(config, self.ranks)._replace(copies=self.beside)
        return moments(model, engine, self.largest(size), base)

    def largest(self, size: int) -> PairBatch:
        """The largest micro-batch of the first epoch."""
        return PairBatch.pack([self.inputs.data.train[i] for i in self.plan(size).largest_micro_batch()])

    def estimate(self, size: int, base: Base) -> Moment:
        """The fullest of these."""
        return max(self.moments(size, base), key=lambda moment: moment.sum)

    def memory(self, foretold: _Foretold) -> str:
        """What a rank takes: counted, and probed."""
        found, batch = self.moments(self.size_set, foretold.base), self.largest(self.size_set)
        fullest = max(found, key=lambda moment: moment.sum)
        lines = [f"{name:22} {amount / _GIB:8.3f} GiB" for name, amount in fullest.parts.items() if amount]
        others = ", ".join(f"{one.name} {one.sum / _GIB:.3f}" for one in found if one is not fullest)
        hint = "" if foretold.probed else "; --probe measures it"
        lines.append(
            f"{'sum':22} {fullest.sum / _GIB:8.3f} GiB (estimate by arithmetic, at the fullest moment: {fullest.name}; "
            f"others: {others}{hint})"
        )
        if foretold.probed and not foretold.fit_words:
            lines.append(_told_probe(foretold.probed))
        if foretold.fit_words:
            lines.append(foretold.fit_words)
        weights = sum(self.size)
        lines.append(
            f"{weights:,} weights; largest micro-batch {len(batch.tokens_T)} rows, {len(batch.targets_N)} scored"
        )
        return "\n".join(lines)

    def copies(self, base: Base) -> str:
        """Whether saves are written beside training, the host memory that this takes, and whether it is there
        (collective)."""
        if not self.beside:
            why = "the only one is the last" if self.config.save_in_background else "save_in_background is off"
            return f"each save is waited for: {why}"
        fullest, on_cpu = self.estimate(self.size_set, base), self.ranks.device.type == "cpu"
        share = -(-self.trained // self.ranks.world_size)
        offloaded = 16 * share if describe_engine(self.config, self.ranks).offloads else 0
        still = fullest.sum - 12 * share - resident_bytes(self.ranks.device) if on_cpu else offloaded
        lines = ["saves are written while training goes on, the last one is waited for"]
        for room in copy_rooms(12 * share, max(0, still), self.ranks):
            taken = f"copies of masters and moments take {room.copies / _GIB:.3f} GiB of host memory"
            lines.append(room.refusal or f"host {room.host}, {room.ranks} ranks: {taken}, which is there (estimate)")
        return "\n".join(lines)

    def time(self, foretold: _Foretold, saved: SavedBytes) -> str:
        """A step, and the whole run."""
        config, inputs, ranks = self.config, self.inputs, self.ranks
        plan, batch = self.plan(self.size_set), self.largest(self.size_set)
        rows = float(plan.rows_per_step(0)[: max(1, len(plan.rows) // plan.units_per_step)].mean())
        rows /= ranks.world_size  # of a full step, on a rank
        device, weight_bytes = ranks.device, sum(self.size) * inputs.dtype.itemsize
        kind = "estimate"
        if foretold.probed and not foretold.fit_words:
            one = max(foretold.probed, key=lambda probed: probed.step_s(rows))
            kind, speed = "probe", one.speed(rows, weight_bytes, device, config.activation_checkpointing)
        else:
            row_flops = useful_flops(self.size, inputs.architecture, batch, True, self.part) / len(batch.tokens_T)
            flops = row_flops * (4 / 3 if config.activation_checkpointing else 1)
            speed = duration.estimated(flops * rows, row_flops, weight_bytes, foretold.rate, device)
        if self.loss_fn.couples:
            source = f"{speed.source}, and a pass without gradient before them, for {config.loss_type}"
            speed = speed._replace(step_s=speed.step_s + rows * speed.forward_row_s, source=source)
        (steps, steps_per_epoch), held_out = self.steps, inputs.data.validation
        prompts = sample_prompts(held_out, config.n_samples)
        prompt_rows, spoken_rows = sum(map(len, prompts)), 0
        if prompts and zero_stage(full_ds_config(config, ranks.world_size)) != 3:
            spoken_rows = prompt_rows + ANSWERS_OF_KL * config.sample_tokens
        work = duration.Work(
            steps=steps,
            missing_rows=float(inputs.data.pairs.select(self.missing).unit_rows.sum()) / ranks.world_size,
            evaluations=1 + sum(count_saves(steps, steps_per_epoch, config.eval_interval)),
            held_out_rows=float(held_out.unit_rows.sum()) / ranks.world_size if held_out else 0.0,
            prompt_rows=prompt_rows / ranks.world_size,
            spoken_rows=spoken_rows / ranks.world_size,
            sample_tokens=config.sample_tokens,
            saves=saved.ends + saved.between,
            save_bytes=saved.state + saved.export,
            copied=saved.state if self.beside else 0,
        )
        return duration.told(work, speed, kind)

    @cached_property
    def weights(self) -> dict[str, float]:
        """What the run will note of its trained weights (collective)."""
        with self.inputs.start.reading() as start:
            matrices = (start.state_dict[name] for name in self.matrices)
            return weight_facts(matrices, self.inputs.dtype, self.ranks.device)

    def warnings(self, saved: SavedBytes) -> list[str]:
        """All that the run would say at its start, by the functions that it calls, and what it would refuse
        (collective)."""
        config, data = self.config, self.inputs.data
        room = None if config.resume else saved
        found = list(data.warnings) + start_warnings(config, *self.steps, room, config.ckpt_dir)
        if refusal := config.refusal(len(data.validation)):
            found.append(refusal)
        if len(self.missing):
            lacks = f"{len(self.missing)} of {len(data.pairs)} pairs"
            lacks += ", or their sums over the common length, which ld_alpha reads" * self.loss_fn.asks.fronts
            found.append(
                f"{config.ref_cache_dir}: the reference store lacks {lacks}; "
                "launch/precompute_ref.py computes them (how long: under time), without them the run does not start"
            )
        facts = facts_of(config, data, self.steps[0], self.loss_fn.scale)
        return found + [f"{one.level}: {one.text}" for one in warnings_of([{"step": 0, **self.weights}], facts)]


def _told_probe(probed: list[Probed]) -> str:
    """What the ranks found, in the words of the one that takes most."""
    most = max(probed, key=lambda one: one.peak)
    start, passes, step = (amount / _GIB for amount in most[:3])
    return (
        f"{'probe':22} {most.peak / _GIB:8.3f} GiB (start {start:.3f}, passes {passes:.3f}, a step or save by "
        f"arithmetic on what is left {step:.3f})"
    )


def _batch_arithmetic(config: ScheduleConfig, plan: BatchPlan, pairs: PairSet) -> str:
    """Steps, pairs and tokens, with what sharing the prefix and packing save."""
    packed = int(plan.rows.sum(dtype=np.int64))
    whole = int(pairs.chosen_len.sum(dtype=np.int64) + pairs.rejected_len.sum(dtype=np.int64))
    total, steps = config.epochs * plan.steps_per_epoch, config.total_steps(plan.steps_per_epoch)
    ends = f", of which the run makes {steps} (max_steps)" if steps < total else ""
    last = len(plan.rows) - (plan.steps_per_epoch - 1) * plan.units_per_step
    units = "pairs" if pairs.groups is None else "prompts"
    of_last = units if last != 1 else units[:-1]
    size = f"{plan.batch_size} {units} a micro-batch x {plan.grad_accum_steps} micro-batches x {plan.world_size} ranks"
    within = ""
    if plan.most_rows:
        size = f"{plan.batch_size * plan.grad_accum_steps} {units} x {plan.world_size} ranks"
        within = f", in micro-batches of at most {plan.most_rows} rows, or those of the longest"
    amount = f"{len(pairs)} pairs" + (f" of {len(plan.rows)} prompts" if pairs.groups is not None else "")
    return "\n".join(
        [
            f"{size} = {plan.units_per_step} {units} an optimizer step{within}",
            f"{amount} = {plan.steps_per_epoch} steps an epoch (the last has {last} {of_last}); "
            f"{config.epochs} epochs = {total} steps{ends}; warm-up over {config.warmup_steps(steps)}",
            f"{packed} packed tokens an epoch; both chats whole would be {whole} ({whole / packed:.2f} times as many)",
        ]
    )


def _about_held_out(config: DataConfig, inputs: Inputs) -> str:
    """How many pairs are held out, and by what."""
    return f"{len(inputs.data.validation)} are held out by {'files' if config.validation_path else 'prompt'}"


def _about_loss(loss_fn: PreferenceLoss, inputs: Inputs) -> str:
    """Its options, and what it must be before the first step."""
    first = loss_fn.at_start()
    if not loss_fn.needs_reference:
        return f"{loss_fn}; reads no reference: no store is opened"
    if inputs.other_reference:
        return f"{loss_fn}; measured from {inputs.reference.path}, so nothing says what it is at the start"
    if first is None:
        return f"{loss_fn}; at the start of the sums in the store"
    held_out = inputs.data.validation
    weight = float(held_out.weights.sum() / held_out.total) if held_out else 1.0
    times = f" times the mean weight of the held-out pairs, {weight:g}" if held_out.is_weighted else ""
    return f"{loss_fn}; at the start {first * weight:.6f}{f', {first:.6f}{times}' if times else ''}"


def _trained(config: PolicyConfig, inputs: Inputs) -> tuple[LLaMaTransformer, set[str]]:
    """(the model without values, names of what of it is trained). UserError as the run's."""
    with torch.device("meta"):  # counts, no memory
        model = LLaMaTransformer(inputs.architecture)
    return model, trained_names(model, config.trainable, inputs.start.path, inputs.adapters is not None)


def _checkpoints(saved: SavedBytes, inputs: Inputs) -> str:
    """How often the run saves, and the room that this takes on the disk."""
    export, state = saved.export / _GIB, saved.state / _GIB
    kind = f"{inputs.start.export_suffix} files" if inputs.start.export_suffix else "Hugging Face folders"
    return "\n".join(
        [
            f"{saved.ends + saved.between} saves: {saved.ends} at epochs' ends, {saved.between} between "
            "(save_interval)",
            f"{saved.exports} {kind} stay (keep_exports), {export:.3f} GiB each, {saved.exports * export:.3f} GiB"
            + (f"; at the end the merged model, {saved.merged / _GIB:.3f} GiB" if saved.merged else ""),
            f"{saved.states} states stay (keep_states), {state:.3f} GiB each, {saved.states * state:.3f} GiB; one more "
            "in a save",
        ]
    )


def _show_pair(tokenizer: Tokenizer, pair: TokenizedPair) -> str:
    """Both chats decoded, special tokens shown, scored tokens between [[ and ]]."""
    lines = []
    for ids, spans, side in zip(pair.wholes, pair.scored_spans, ("chosen", "rejected"), strict=True):
        text, done = "", 0
        for start, stop in spans:
            parts = (ids[done:start].tolist(), ids[start:stop].tolist())
            head, scored = (tokenizer.decode(part, skip_special_tokens=False) for part in parts)
            text, done = f"{text}{head}[[{scored}]]", stop
        lines.append(f"{side} ({len(ids)} tokens, {sum(b - a for a, b in spans)} scored): {text}")
    return "\n".join(lines)
