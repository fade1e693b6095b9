"""`--dry_run`: everything that can be said about a run before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from simple_llama.finetune.chat_format import about_system
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch, TokenizedPair
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import EngineConfig, full_ds_config, zero_stage
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize, estimate_memory, model_size
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyConfig
from simple_llama.reinforcement_learning.rlhf.run.saves import count_saves
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig
from simple_llama.reinforcement_learning.rlhf.run.training_run import RunConfig

_STATE_BYTES = 12  # a weight: fp32, with AdamW's two moments


def describe(config: DPOConfig, inputs: Inputs, world_size: int) -> str:
    """The whole report as text; computes nothing on a device and writes nothing."""
    pairs = inputs.data.train
    plan = BatchPlan(pairs.rows, config.seed, world_size, config.batch_size, config.grad_accum_steps)
    ds_config = full_ds_config(config, world_size)
    sections = {
        "config": json.dumps(asdict(replace(config, max_seq_len=inputs.max_seq_len)), indent=2),
        "DeepSpeed": json.dumps(ds_config, indent=2),
        "data": f"{inputs.data.report}\n{len(pairs)} pairs train, {len(inputs.data.validation)} are held out by prompt",
        "system prompt": about_system(inputs.chat),
        "batches": _batch_arithmetic(config, plan, pairs),
        "memory per rank (estimate)": _memory_table(config, config.reference, inputs, plan, ds_config),
        "checkpoints": _checkpoints(config, inputs, plan.steps_per_epoch),
        "first pair (scored tokens in [[ ]])": _show_pair(inputs.chat.tokenizer, pairs[0]),
    }
    return "\n\n".join(f"== {title} ==\n{body}" for title, body in sections.items())


def _batch_arithmetic(config: ScheduleConfig, plan: BatchPlan, pairs: PairSet) -> str:
    """Steps, pairs and tokens, with what sharing the prefix and packing save."""
    packed = int(plan.rows.sum(dtype=np.int64))
    whole = int(pairs.chosen_len.sum(dtype=np.int64) + pairs.rejected_len.sum(dtype=np.int64))
    steps = plan.steps_per_epoch * config.epochs
    last = len(pairs) - (plan.steps_per_epoch - 1) * plan.pairs_per_step
    return "\n".join(
        [
            f"{plan.batch_size} pairs a micro-batch x {plan.grad_accum_steps} micro-batches x {plan.world_size} "
            f"ranks = {plan.pairs_per_step} pairs an optimizer step",
            f"{len(pairs)} pairs = {plan.steps_per_epoch} steps an epoch (the last has {last} pairs); "
            f"{config.epochs} epochs = {steps} steps; warm-up over {config.warmup_iterations}",
            f"{packed} packed tokens an epoch; both chats whole would be {whole} ({whole / packed:.2f} times as many)",
        ]
    )


def _memory_table(
    config: EngineConfig, reference: str, inputs: Inputs, plan: BatchPlan, ds_config: dict[str, Any]
) -> str:
    """Weights, gradients, optimizer shard and activations of the largest micro-batch of the first epoch, in GiB."""
    batch = PairBatch.pack([inputs.data.train[i] for i in plan.largest_micro_batch()])
    size, trained = _sizes(config, inputs)
    estimate = estimate_memory(
        size,
        trained,
        inputs.architecture,
        batch,
        inputs.dtype,
        plan.world_size,
        zero_stage(ds_config),
        config.activation_checkpointing,
        config.reduce_once,
    )
    if reference == "online":
        estimate = estimate._replace(weights=estimate.weights + sum(size) * inputs.dtype.itemsize)
    lines = [f"{name:12} {amount / 2**30:8.3f} GiB" for name, amount in estimate._asdict().items()]
    lines.append(f"{'sum':12} {sum(estimate) / 2**30:8.3f} GiB")
    lines.append(
        f"{sum(size):,} weights; largest micro-batch {len(batch.tokens_T)} rows, {len(batch.targets_N)} scored"
    )
    return "\n".join(lines)


def _sizes(config: PolicyConfig, inputs: Inputs) -> tuple[ModelSize, int]:
    """(weights of the model, how many of them are trained)."""
    with torch.device("meta"):  # counts, no memory
        model = LLaMaTransformer(inputs.architecture)
    lora = sum(p.numel() for name, p in model.named_parameters() if "_lora_layer." in name)
    size = model_size(model)
    return size, lora if config.trainable == "lora" else sum(size)


def _checkpoints(config: RunConfig, inputs: Inputs, steps_per_epoch: int) -> str:
    """How often the run saves, and the room that this takes on the disk."""
    size, trained = _sizes(config, inputs)
    ends, between = count_saves(steps_per_epoch, config.epochs, config.save_interval)
    exports = ends + (min(between, config.keep_exports) if config.keep_exports else between)
    states = min(ends + between, config.keep_states)
    export_bytes = inputs.start.export_dtype.itemsize * sum(size)
    export, state = (count / 2**30 for count in (export_bytes, _STATE_BYTES * trained))
    kind = f"{inputs.start.export_suffix} files" if inputs.start.export_suffix else "Hugging Face folders"
    return "\n".join(
        [
            f"{ends + between} saves: {ends} at epochs' ends, {between} between (save_interval)",
            f"{exports} {kind} stay (keep_exports), {export:.3f} GiB each, {exports * export:.3f} GiB",
            f"{states} states stay (keep_states), {state:.3f} GiB each, {states * state:.3f} GiB; one more in a save",
        ]
    )


def _show_pair(tokenizer: Tokenizer, pair: TokenizedPair) -> str:
    """Both chats decoded, special tokens shown, scored tokens between [[ and ]]."""
    lines = []
    for (ids, scored), side in zip(pair.without_sharing(), ("chosen", "rejected"), strict=True):
        head, tail = (
            tokenizer.decode(part.tolist(), skip_special_tokens=False) for part in (ids[:-scored], ids[-scored:])
        )
        lines.append(f"{side} ({len(ids)} tokens, {scored} scored): {head}[[{tail}]]")
    return "\n".join(lines)
