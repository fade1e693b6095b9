"""The DeepSpeed JSON: which ZeRO stage and dtype. Batch sizes, learning rate and clip come from DPOConfig alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import read_json
from simple_llama.common.paths import package_path
from simple_llama.common.settings import Bounds, PathText, Settings
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchConfig
from simple_llama.reinforcement_learning.rlhf.engine.ds_keys import check_keys, check_stage
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyConfig


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW (arXiv:1711.05101) and the clip of its gradient."""

    # === Optimizer ===
    weight_decay: Annotated[
        float,
        Bounds(0.0, 10.0),
        Doc("AdamW decay of matrices; norms, biases and embeddings (a tied head is these) have none"),
    ] = 0.0
    beta1: Annotated[float, Bounds(0.0, 0.99999)] = 0.9  # AdamW
    beta2: Annotated[float, Bounds(0.0, 0.999999)] = 0.95  # AdamW
    max_grad_norm: Annotated[float, Bounds(0.0, 1e9)] = 1.0  # clip of the global gradient norm; 0: no clip


@dataclass(frozen=True)
class EngineConfig(OptimizerConfig, BatchConfig, PolicyConfig):
    """What DeepSpeed is given: its own JSON, and from here the numbers that the JSON may not have."""

    # === Engine ===
    deepspeed_config: Annotated[PathText, Doc("DeepSpeed JSON: ZeRO stage, dtype, buckets")] = package_path(
        "ds_configs", "zero2_bf16.json"
    )
    reduce_once: Annotated[
        bool,
        Doc(
            "ranks exchange gradients once an optimizer step, not each micro-batch: less traffic, 4 more bytes a "
            "parameter on each rank"
        ),
    ] = False

    def check_rules(self) -> None:
        """UserError for an option without effect."""
        if self.reduce_once and not self.accumulates:
            raise UserError("reduce_once: expected grad_accum_steps above 1, found 1, where it changes nothing")


_CPU_BUCKET = 5_000_000  # weights, on a CPU at most
_OURS = {
    "train_batch_size": "batch_size, grad_accum_steps and the number of ranks",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "max_lr, beta1, beta2 and weight_decay",
    "scheduler": "schedule, warmup_iterations, max_lr and min_lr",
    "activation_checkpointing": "activation_checkpointing",
    "steps_per_print": "log_interval",
    "tensorboard": "log_dir",
}


def read_ds_config(config: EngineConfig) -> dict[str, Any]:
    """The user's DeepSpeed settings; UserError where one of them repeats what DPOConfig says, or was never tried."""
    source, found = config.deepspeed_config, read_json(config.deepspeed_config)
    if not isinstance(found, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(found).__name__}")
    for key, name in _OURS.items():
        if key in found:
            raise UserError(f"{source}: {key}: this number lives in DPOConfig ({name}); delete it from the JSON")
    if "bfloat16" in found:
        raise UserError(f"{source}: bfloat16: expected this section under its other name, bf16")
    check_keys(source, found)
    _check_together(source, found)
    stage = zero_stage(found)
    if config.reduce_once and stage != 2:
        raise UserError(
            f"reduce_once: expected ZeRO stage 2, found stage {stage} in {source}; in stage 3 no rank "
            "has the memory for whole gradients"
        )
    return found


def _check_together(source: str, found: dict[str, Any]) -> None:
    """Raises UserError for admitted keys that do not go together, or of which one is missing."""
    zero, sums = found.get("zero_optimization", {}), found.get("data_types", {}).get("grad_accum_dtype")
    if "stage" not in zero:  # 1 in bf16 is another optimizer class, without our state
        raise UserError(f"{source}: zero_optimization.stage: expected 2 or 3, found 0")
    check_stage(source, zero)
    if _enabled(found, "bf16") and sums != "fp32":
        raise UserError(
            f'{source}: data_types.grad_accum_dtype: expected "fp32" with bf16 (a bf16 sum of '
            f"micro-batches loses small gradients), found {sums!r}"
        )
    for section in ("offload_optimizer", "offload_param"):
        if section in zero and "device" not in zero[section]:
            raise UserError(f'{source}: zero_optimization.{section}.device: expected "cpu", found none')
    if "offload_optimizer" in zero and found.get("zero_force_ds_cpu_optimizer", True):
        raise UserError(
            f"{source}: zero_force_ds_cpu_optimizer: expected false with offload_optimizer (DeepSpeed's own CPU Adam "
            "would be compiled at run time), found true, the default"
        )


def full_ds_config(config: EngineConfig, world_size: int) -> dict[str, Any]:
    """What goes to `deepspeed.initialize`: the user's JSON and DPOConfig's batch and clip, each from one place."""
    pairs, parts = config.batch_size, config.grad_accum_steps
    if config.rows_per_micro_batch:
        pairs, parts = 1, pairs * parts  # the most micro-batches that a step can have; each says where the step ends
    return {
        **read_ds_config(config),
        "train_micro_batch_size_per_gpu": pairs,
        "gradient_accumulation_steps": parts,
        "train_batch_size": pairs * parts * world_size,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 2**31 - 1,  # our own log says it
    }


def ds_config_here(config: EngineConfig, world_size: int, device_type: str) -> dict[str, Any]:
    """`full_ds_config` with what ZeRO-2 is better given on these ranks. The shipped settings make the same numbers: on
    one or two ranks bit for bit, on more to the order in which a ring adds those of a bucket.

    Ranks on CPUs: buckets of a few megabytes, whose memory is touched again while it is in a cache, and no more of it.
    A rank that is alone sends nothing, so `fewer_passes` adds each gradient up where its sum lies: no buckets, and no
    overlap, whose end a GPU's host would wait for.
    """
    found = full_ds_config(config, world_size)
    if zero_stage(found) != 2:
        return found
    zero = found["zero_optimization"]
    if device_type == "cpu":
        zero = {**zero, "reduce_bucket_size": min(_CPU_BUCKET, zero.get("reduce_bucket_size", _CPU_BUCKET))}
    if world_size == 1 and "offload_optimizer" not in zero:
        zero = {**zero, "overlap_comm": False, "contiguous_gradients": False}
    return {**found, "zero_optimization": zero}


def model_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Dtype of the weights that compute: bfloat16 when the JSON enables bf16, else float32."""
    return torch.bfloat16 if _enabled(ds_config, "bf16") else torch.float32


def zero_stage(ds_config: dict[str, Any]) -> int:
    """ZeRO stage, 0 when none is set."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def _enabled(ds_config: dict[str, Any], key: str) -> bool:
    """Whether a DeepSpeed section is there and on."""
    return bool(ds_config.get(key, {}).get("enabled", False))
