"""The parts of a training run and what is done with them: start, a step, records. `apply_dpo.train` is the order.

Shapes: B pairs of a micro-batch, T packed rows.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.console import progress, set_up_log
from simple_llama.cluster.distributed import Ranks, all_reduce_sum, fail_together, gather_objects, require_same
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.pretraining.llama_transformer import compiled_graphs
from simple_llama.pretraining.weights import load_weights, save_weights
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan, MicroBatch, sweep
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine import checkpoint
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.cost import model_size, peak_flops, peak_memory_gb, useful_flops
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, compile_now
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss, step0_loss
from simple_llama.reinforcement_learning.rlhf.reference import ref_source
from simple_llama.reinforcement_learning.rlhf.run.evaluate import evaluate
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums, RunWriter, pair_statistics, rewind
from simple_llama.reinforcement_learning.rlhf.run.profiling import StepProfile
from simple_llama.reinforcement_learning.rlhf.run.run_folder import (
    append_samples,
    environment,
    mark_finished,
    read_samples,
    unmark_finished,
    write_records,
)
from simple_llama.reinforcement_learning.rlhf.run.sampling import answers, sample_page, sample_prompts
from simple_llama.reinforcement_learning.rlhf.run.schedule import learning_rate

# Settings that a resumed run must share with the saved one: they decide the data order, the loss or the update.
# Not reduce_once: like another number of ranks, it changes only the order in which fp32 sums are made.
SAME_ON_RESUME = (
    "seed",
    "epochs",
    "loss_type",
    "beta",
    "label_smoothing",
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


# Largest honest difference of the step-0 loss from its paper's value, relative where that is above 1.
STEP0_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class TrainingStopped(UserError):
    """The loss or the gradient is no longer a finite number."""


class Run:
    """One training run: the policy under DeepSpeed, its data, its reference, and where its records go."""

    def __init__(self, config: DPOConfig, inputs: Inputs, ranks: Ranks, name: str, check_lock: Callable[[], object]):
        """Sets all up (collective). `check_lock` raises where another run has taken over the checkpoint folder."""
        self.config, self.inputs, self.ranks = config, inputs, ranks
        self.name, self.check_lock = name, check_lock
        self.pairs, self.held_out = inputs.train_pairs, inputs.validation_pairs
        self.plan = BatchPlan(
            tuple(pair.rows for pair in self.pairs),
            config.seed,
            ranks.world_size,
            config.batch_size,
            config.grad_accum_steps,
        )
        self.total_steps = self.plan.steps_per_epoch * config.epochs
        self.loss_fn = PreferenceLoss(config.loss_type, config.beta, config.label_smoothing)
        self.ref_logps, store_digest = self.open_reference()
        require_same("reference store (digest)", store_digest, ranks)

        self.log_folder, self.ckpt_folder = Path(config.log_dir) / self.name, Path(config.ckpt_dir) / self.name
        with fail_together(ranks):
            self.saved = checkpoint.newest_state(self.ckpt_folder) if config.resume else None
        require_same("state to resume from", self.saved.facts if self.saved else None, ranks)
        if self.saved:
            checkpoint.check_same_run(self.saved.facts, self.must_agree(), self.total_steps, self.saved.folder)
        done = self.saved.facts["step"] if self.saved else 0
        self.profile = StepProfile(config, self.log_folder, ranks, done, self.total_steps)
        self.engine = self.build_engine()
        if self.saved:
            checkpoint.load_state(self.saved, self.engine)
        self.open_records()  # last: a run that is refused leaves the records as they were
        LOGGER.info(
            "run %s: %d pairs, %d held out, %d steps", self.name, len(self.pairs), len(self.held_out), self.total_steps
        )
        LOGGER.info("to watch: tensorboard --logdir %s --host localhost", config.log_dir)
        if config.warmup_iterations >= self.total_steps:
            LOGGER.warning(
                "warmup_iterations is %d, but the run has %d steps: max_lr is never reached",
                config.warmup_iterations,
                self.total_steps,
            )
        self.peak = peak_flops(ranks.device, inputs.dtype) * ranks.world_size
        self.sums = MetricSums(ranks.device)
        self.grad_norm, self.last_loss = 0.0, math.nan
        self.since, self.steps_since = time.perf_counter(), 0  # of the current interval of metrics
        self.last_path = self.ckpt_folder  # of an exported .pth, once there is one
        self.done, self.saved_step = 0, -1  # optimizer steps, of this moment and of the newest state on disk
        self.unfinished = True  # whether something that is due after `done` steps is still to do
        self.prompts = sample_prompts(inputs.data.validation, config.n_samples)

    # === Start ===

    def open_records(self) -> None:
        """The run's folder on rank 0: settings and versions once, the log, the curves up to the step resumed from."""
        done = self.saved.facts["step"] if self.saved else -1
        evaluated = not (self.saved and self.saved.facts.get("unfinished"))
        with fail_together(self.ranks):
            if self.ranks.is_main and not self.saved:
                resolved = replace(self.config, run_name=self.name, max_seq_len=self.inputs.max_seq_len)
                write_records(self.log_folder, resolved, self.engine.ds_config)
            if self.ranks.is_main:
                unmark_finished(self.log_folder)
                rewind(self.log_folder / "samples.jsonl", done, evaluated)
            set_up_log(self.log_folder / "train.log", self.ranks)
            self.writer = RunWriter(self.log_folder, self.ranks.is_main, done, evaluated)
        LOGGER.info("%s: %s", self.config.rlhf_dataset_path, self.inputs.data.report)

    def open_reference(self) -> tuple[ref_source.RefLogps, str]:
        """Where reference log-probs come from, and a digest of what will be looked up."""
        if self.config.reference == "online":
            frozen = self.inputs.build_model(self.ranks.device).requires_grad_(False)
            compile_now(frozen, self.pairs[0], self.ranks.device, backward=False)
            return ref_source.from_model(frozen), "online"
        store = ref_source.open_store(self.config.ref_cache_dir, self.inputs.reference, self.ranks)
        with fail_together(self.ranks):
            content = store.content_digest(self.pairs + self.held_out)  # raises where pairs are missing
        return ref_source.from_store(store), content

    def build_engine(self) -> Engine:
        """The start model as a policy under DeepSpeed, with the weights that are to be trained marked."""
        model = self.inputs.build_model(self.ranks.device, dropout=self.config.dropout)
        model.activation_checkpointing = self.config.activation_checkpointing
        if self.config.trainable == "lora":
            if not self.inputs.model_config.use_lora:
                raise UserError(
                    f"trainable: expected a checkpoint with LoRA for 'lora', found none in {self.inputs.start_path}"
                )
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("_lora_layer." in name)
        self.size = model_size(model)
        start_weights = load_weights(self.inputs.start_path).state_dict
        engine = Engine(DPOPolicy(model, self.loss_fn), start_weights, self.config, self.ranks)
        compile_now(model, self.pairs[0], self.ranks.device, backward=True)
        if self.config.compile:
            LOGGER.info("compiled the decoder layers: %d graphs", compiled_graphs())
        return engine

    def check_start(self) -> None:
        """Step-0 facts: the untrained policy is the reference, so margins are 0 and the loss is known."""
        worst = ref_source.audit(self.engine.logps, self.ref_logps, self.pairs, self.inputs.dtype, self.ranks.device)
        LOGGER.info("step-0 audit: policy and reference differ by at most %.2g nats a token", worst)
        self.evaluate(0)
        if self.held_out:
            expected = step0_loss(self.config.loss_type, self.config.beta, self.config.label_smoothing)
            LOGGER.info("step-0 held-out loss %.6f, expected %.6f", self.last_loss, expected)
            if not abs(self.last_loss - expected) <= STEP0_TOLERANCE[self.inputs.dtype] * max(expected, 1.0):
                raise UserError(
                    f"step 0: the held-out loss is {self.last_loss:.6f}, expected {expected:.6f} while the policy "
                    "is the reference; the store does not belong to this model or machine: delete its folder under "
                    "ref_cache_dir and run launch/precompute_ref.py again"
                )
        self.start_interval()

    def start_interval(self) -> None:
        """Starts the sums and the clock of the next interval of metrics."""
        self.sums.reset()
        self.engine.communication.reset()
        self.since, self.steps_since = time.perf_counter(), 0

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """The body's time counts for no step."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def restore(self) -> None:
        """Goes on where the saved run was; the engine has its state already."""
        assert self.saved is not None
        facts = self.saved.facts
        self.last_loss = math.nan if facts["loss"] is None else facts["loss"]
        self.last_path = self.ckpt_folder / facts["weights"]
        self.done = self.saved_step = int(facts["step"])
        self.unfinished = bool(facts.get("unfinished", False))
        LOGGER.info("resumed from %s at step %d", self.saved.folder, self.done)
        self.start_interval()

    def must_agree(self) -> dict[str, Any]:
        """What a resumed run must share with the saved one; the same pairs a step may be dealt to other ranks."""
        return {
            **{name: getattr(self.config, name) for name in SAME_ON_RESUME},
            "pairs_per_step": self.plan.pairs_per_step,
            "data": self.inputs.data_digest,
            "reference": self.inputs.reference,
        }

    # === A step ===

    def rate(self, index: int) -> float:
        """Learning rate of optimizer step `index` (from 0)."""
        config = self.config
        return learning_rate(index, self.total_steps, config.warmup_iterations, config.max_lr, config.min_lr)

    def accumulate(self, index: int) -> None:
        """Forward and backward of this rank's micro-batches of one step; the gradient is that of the step's mean loss.

        Raises TrainingStopped, naming the pairs, when the loss is not finite: before the weights change.
        """
        if self.config.dropout > 0:  # a resumed run must drop the same units
            torch.manual_seed(self.config.seed + 1_000_003 * index + self.ranks.rank)
        step = self.plan.step(index)
        pairs_in_step = sum(len(micro_batch) for rank in step for micro_batch in rank)
        mine, losses = step[self.ranks.rank], []
        for place, micro_batch in enumerate(self.stoppable(mine, f"step {index + 1}")):
            # Where a short step's pairs do not go round, a rank computes any pair, with weight 0.
            chosen = [self.pairs[i] for i in micro_batch or step[0][0]]
            weight = self.ranks.world_size / pairs_in_step if micro_batch else 0.0
            batch = PairBatch.pack(chosen).to(self.ranks.device)
            ref_B2 = self.ref_logps(chosen, batch)
            out = self.engine.backward(batch, ref_B2, weight, last=place == len(mine) - 1)
            if micro_batch:
                rewards_B2 = self.loss_fn.rewards(out.logps_B2, ref_B2)
                flops = useful_flops(self.size, self.inputs.model_config, batch, backward=True)
                self.sums.add(pair_statistics(out.losses_B, out.logps_B2, rewards_B2), len(batch.tokens_T), flops)
                losses.append(out.losses_B)
        self.stop_if_not_finite(index, mine, losses)
        watchdog.started()

    def stoppable(self, micro_batches: Iterable[MicroBatch], place: str) -> Iterator[MicroBatch]:
        """The micro-batches, of which each rank has as many (collective); between two of them the run may stop."""
        for micro_batch in micro_batches:
            watchdog.beat(place)
            stopping.agree(self.ranks)
            yield micro_batch

    def stop_if_not_finite(self, index: int, mine: tuple[MicroBatch, ...], losses: list[torch.Tensor]) -> None:
        """One reduction and one host read a step (collective)."""
        total = (
            torch.stack([loss.sum() for loss in losses]).sum() if losses else torch.zeros((), device=self.ranks.device)
        )
        if math.isfinite(all_reduce_sum(total).item()):
            return
        micro_batches = [micro_batch for micro_batch in mine if micro_batch]
        bad = [
            self.inputs.data.train[i].origin
            for micro_batch, loss_B in zip(micro_batches, losses, strict=True)
            for i, finite in zip(micro_batch, loss_B.isfinite().tolist(), strict=True)
            if not finite
        ]
        named = [origin for rank in gather_objects(bad, self.ranks) for origin in rank]
        raise TrainingStopped(
            f"step {index + 1}: the loss of {len(named)} pairs is not finite: {', '.join(named[:8])}; weights were not "
            f"changed by this step; {self.last_good()}"
        )

    def last_good(self) -> str:
        """Where to go on from after a stop."""
        try:
            return f"last good checkpoint: {checkpoint.newest_state(self.ckpt_folder).folder}"
        except UserError:
            return f"no checkpoint was saved yet in {self.ckpt_folder}"

    def update(self, step: int, rate: float) -> None:
        """Clips, steps AdamW, keeps the gradient norm before the clip; TrainingStopped when that is not finite."""
        self.grad_norm = self.engine.step(rate)
        if not (math.isfinite(self.grad_norm) and self.grad_norm >= 0):
            raise TrainingStopped(f"step {step}: the gradient norm is {self.grad_norm}; {self.last_good()}")
        self.steps_since += 1
        self.done, self.unfinished = step, True
        watchdog.beat(f"after step {step}")

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` steps are whole epochs."""
        return step > 0 and step % self.plan.steps_per_epoch == 0

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return self.ends_epoch(step) or (step > 0 and due(step, self.config.save_interval))

    # === Records ===

    def log(self, step: int, rate: float) -> None:
        """Reduces the interval's sums over all ranks and writes them (collective)."""
        means = self.sums.means()
        traffic = self.engine.communication
        traffic.settle(wait=True)
        mine = (peak_memory_gb(self.ranks.device), traffic.sent_bytes, traffic.seconds)
        peak_gb, sent_bytes, communicating_s = zip(*gather_objects(mine, self.ranks), strict=True)
        seconds = time.perf_counter() - self.since
        values = {name: value for name, value in means.items() if name not in ("pairs", "tokens", "useful_flops")}
        values |= {
            "grad_norm": self.grad_norm,
            "learning_rate": rate,
            "epoch": step / self.plan.steps_per_epoch,
            "perf/pairs_per_second": means["pairs"] / seconds,
            "perf/tokens_per_second": means["tokens"] / seconds,
            "perf/mfu": means["useful_flops"] / seconds / self.peak,
            "perf/step_time_s": seconds / self.steps_since,
            "perf/comm_time_s": sum(communicating_s) / self.ranks.world_size / self.steps_since,
            "perf/comm_mb": sum(sent_bytes) / self.ranks.world_size / self.steps_since / 1e6,
            "perf/peak_memory_gb": max(peak_gb),
        }
        if self.config.compile:
            values["perf/compiled_graphs"] = compiled_graphs()  # stays level: a rise is a recompilation
        self.writer.scalars(step, values)
        self.log_line(f"step {step}/{self.total_steps}", values)
        if not self.held_out:
            self.last_loss = values["loss"]
        self.start_interval()

    def log_line(self, head: str, values: dict[str, float], prefix: str = "") -> None:
        """One line of train.log."""
        shown = {
            "loss": "loss %.4f",
            "rewards/accuracies": "accuracy %.3f",
            "rewards/margins": "margin %.4f",
            "grad_norm": "grad norm %.3f",
            "learning_rate": "lr %.3g",
            "perf/pairs_per_second": "%.2f pairs/s",
        }
        parts = [form % values[prefix + name] for name, form in shown.items() if prefix + name in values]
        LOGGER.info("%s  %s", head, "  ".join(parts))

    def evaluate(self, step: int) -> None:
        """Held-out metrics and sample answers after `step` steps (collective)."""
        if self.held_out:
            rows = [pair.rows for pair in self.held_out]
            mine = sweep(rows, self.config.batch_size, self.ranks.world_size)[self.ranks.rank]
            mine = progress(
                self.stoppable(mine, f"evaluation at step {step}"), total=len(mine), desc="evaluate", ranks=self.ranks
            )
            values = evaluate(self.engine.logps, self.loss_fn, self.ref_logps, self.held_out, mine, self.ranks.device)
            self.last_loss = values["eval_loss"]
            self.writer.scalars(step, values)
            self.log_line(f"evaluation at step {step}", values, "eval_")
        if self.prompts:
            self.sample(step)

    def sample(self, step: int) -> None:
        """Answers the fixed prompts (collective): shared out over the ranks, or together under ZeRO-3."""
        tokenizer, ranks = self.inputs.tokenizer, self.ranks
        share = slice(None) if self.engine.partitioned else slice(ranks.rank, None, ranks.world_size)
        mine = answers(self.engine.model, tokenizer, self.prompts[share], self.config.sample_tokens)
        gathered = gather_objects(mine, ranks)
        if not ranks.is_main:
            return
        now = (
            mine
            if self.engine.partitioned
            else [gathered[i % len(gathered)][i // len(gathered)] for i in range(len(self.prompts))]
        )
        prompts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in self.prompts]
        append_samples(self.log_folder, step, prompts, now)
        first = read_samples(self.log_folder)[0]
        start = dict(zip(first["prompts"], first["answers"], strict=True)) if first["step"] == 0 else {}
        for index, (prompt, after) in enumerate(zip(prompts, now, strict=True)):
            before = start.get(prompt, "(not recorded at step 0)")
            self.writer.text(step, f"samples/prompt_{index}", sample_page(prompt, before, after))
            LOGGER.info("sample %d, start model: %r", index, before)
            LOGGER.info("sample %d, step %d: %r", index, step, after)

    def save(self, step: int) -> None:
        """Exports the `.pth` and saves the state to resume from (collective)."""
        epochs = step / self.plan.steps_per_epoch
        self.last_path = self.ckpt_folder / checkpoint.weights_name(epochs, self.last_loss, self.inputs.max_seq_len)
        metadata = {
            "run": self.name,
            "step": step,
            "epochs": epochs,
            "loss": self.last_loss,
            "dpo_config": asdict(self.config),
            "reference": self.inputs.reference,
            "environment": environment(),
        }

        def export(weights: dict[str, torch.Tensor]) -> None:
            start = load_weights(self.inputs.start_path)  # parameters that are not trained keep their fp32 values
            state_dict = {name: weights.get(name, tensor) for name, tensor in start.state_dict.items()}
            save_weights(self.last_path, state_dict, start.config, metadata)

        self.save_state(export, self.last_path.name)
        LOGGER.info("saved %s", self.last_path)

    def save_stopped(self) -> None:
        """Saves the last whole step of a run that is to stop, unless it is on disk (collective); no `.pth`."""
        if self.saved_step != self.done:
            self.save_state(lambda weights: None, "")
        LOGGER.info("stopped after step %d; --resume goes on from there", self.done)

    def save_state(self, export: Callable[[dict[str, torch.Tensor]], None], weights_name: str) -> None:
        """Saves the state after `done` steps (collective), if no other run has taken over the folder."""

        def checked_export(weights: dict[str, torch.Tensor]) -> None:
            self.check_lock()
            export(weights)

        facts = {"step": self.done, "optimizer_steps": self.done, "weights": weights_name}
        facts |= {"loss": None if math.isnan(self.last_loss) else self.last_loss, "unfinished": self.unfinished}
        facts |= self.must_agree()
        keep = self.config.keep_states
        with watchdog.patience(f"saving step {self.done}"):
            write = checkpoint.complete_state if self.saved_step == self.done else checkpoint.save_state
            write(self.ckpt_folder, self.engine, facts, keep, self.ranks, checked_export)
            self.writer.flush()
        self.saved_step = self.done

    def finish(self) -> None:
        """Leaves the mark of success in the run's folder (collective)."""
        with fail_together(self.ranks):
            if self.ranks.is_main:
                mark_finished(self.log_folder, self.done, self.last_path)
        LOGGER.info("finished: %s", self.last_path)


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after `step` steps."""
    return interval > 0 and step % interval == 0
