"""The DeepSpeed JSON: which ZeRO stage and dtype. Batch sizes, learning rate and clip come from DPOConfig alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import brief, read_json, shown
from simple_llama.common.paths import package_path
from simple_llama.common.settings import Bounds, PathText, Settings
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchConfig
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyConfig


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW (arXiv:1711.05101) and the clip of its gradient."""

    # === Optimizer ===
    weight_decay: Annotated[
        float, Bounds(0.0, 10.0), Doc("AdamW decay of matrices; norms, biases and embeddings have none")
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
        if self.reduce_once and self.grad_accum_steps == 1:
            raise UserError("reduce_once: expected grad_accum_steps above 1, found 1, where it changes nothing")


_OURS = {
    "train_batch_size": "batch_size, grad_accum_steps and the number of ranks",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "max_lr, beta1, beta2 and weight_decay",
    "scheduler": "warmup_iterations, max_lr and min_lr",
    "activation_checkpointing": "activation_checkpointing",
    "tensorboard": "log_dir",
}
# fmt: off
# All other names that DeepSpeed 0.19.8 knows; it ignores an unknown section without a word.
_KNOWN = (
    "amp", "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger", "communication_data_type", "compile",
    "compression_training", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "disable_allgather", "disable_python_gc", "dump_state", "eigenvalue", "elasticity", "expert_parallel",
    "flops_profiler", "fp16", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine",
    "load_universal_checkpoint", "log_level", "managed_gradient_accumulation", "memory_breakdown", "nebula",
    "pipeline", "prescale_gradients", "progressive_layer_drop", "seq_parallel_communication_data_type",
    "sparse_attention", "sparse_gradients", "steps_per_print", "tensor_parallel", "timers", "torch_autocast",
    "use_data_before_expert_parallelism", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)
_DTYPES = ("fp32", "fp16", "bf16")
# The ZeRO section, where DeepSpeed ends with a traceback for an unknown name and for another type.
_ZERO_SWITCHES = (
    "allgather_partitions", "contiguous_gradients", "elastic_checkpoint", "enable_sanity_checks",
    "ignore_unused_parameters", "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear",
    "overlap_comm", "override_module_apply", "parameter_alignment", "pipeline_loading_checkpoint", "reduce_scatter",
    "round_robin_gradients", "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights",
)
_ZERO_COUNTS = (
    "allgather_bucket_size", "reduce_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "sub_group_size", "zero_hpz_partition_size",
)
# fmt: on
_ZERO_SECTIONS = ("leaf_module", "offload_optimizer", "offload_param", "zenflow")


def read_ds_config(config: EngineConfig) -> dict[str, Any]:
    """The user's DeepSpeed settings; UserError where one of them repeats what DPOConfig says."""
    found = read_json(config.deepspeed_config)
    if not isinstance(found, dict):
        raise UserError(f"{config.deepspeed_config}: expected a JSON object, found {type(found).__name__}")
    for key, name in _OURS.items():
        if key in found:
            raise UserError(
                f"{config.deepspeed_config}: {key}: this number lives in DPOConfig ({name}); delete it from the JSON"
            )
    for key in ("bf16", "fp16", "amp", "data_types", "zero_optimization"):
        if not isinstance(found.get(key, {}), dict):
            raise UserError(f"{config.deepspeed_config}: {key}: expected a JSON object, found {shown(found[key])}")
    for key in ("bf16", "fp16", "amp"):
        if type(found.get(key, {}).get("enabled", False)) is not bool:
            wrong = brief(found[key]["enabled"])
            raise UserError(f"{config.deepspeed_config}: {key}.enabled: expected true or false, found {wrong}")
    if "bfloat16" in found:
        raise UserError(f"{config.deepspeed_config}: bfloat16: expected this section under its other name, bf16")
    for key in ("fp16", "amp"):
        if _enabled(found, key):
            raise UserError(f"{config.deepspeed_config}: {key}: expected bf16 or fp32 (no {key}), found it enabled")
    if _enabled(found, "bf16") and found.get("data_types", {}).get("grad_accum_dtype") != "fp32":
        raise UserError(
            f'{config.deepspeed_config}: data_types.grad_accum_dtype: expected "fp32" with bf16 (a bf16 sum of '
            f"micro-batches loses small gradients), found {found.get('data_types', {}).get('grad_accum_dtype')!r}"
        )
    stage = found.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (2, 3):  # 1 in bf16 is another optimizer class, without our state
        raise UserError(f"{config.deepspeed_config}: zero_optimization.stage: expected 2 or 3, found {shown(stage)}")
    if config.reduce_once and stage != 2:
        raise UserError(
            f"reduce_once: expected ZeRO stage 2, found stage {stage} in {config.deepspeed_config}; in stage 3 no rank "
            "has the memory for whole gradients"
        )
    if config.compile and stage != 2:
        raise UserError(
            f"compile: expected ZeRO stage 2, found stage {stage} in {config.deepspeed_config}; in stage 3 hooks fetch "
            "each layer's weights, and a compiled layer does not wait for them"
        )
    _check_names(config.deepspeed_config, found)
    _check_zero(f"{config.deepspeed_config}: zero_optimization", found["zero_optimization"])
    return found


def _check_names(source: str, found: dict[str, Any]) -> None:
    """Raises UserError for a name that DeepSpeed would ignore, and for a dtype that it does not know."""
    for key in found:
        if key not in _KNOWN:
            raise UserError(f"{source}: unknown key {shown(key)}; expected a section of DeepSpeed, such as bf16")
    dtypes = {"communication_data_type": found.get("communication_data_type")}
    dtypes["data_types.grad_accum_dtype"] = found.get("data_types", {}).get("grad_accum_dtype")
    for key, dtype in dtypes.items():
        if dtype is not None and dtype not in _DTYPES:
            raise UserError(f"{source}: {key}: expected one of {', '.join(_DTYPES)}, found {shown(dtype)}")


def _check_zero(source: str, zero: dict[str, Any]) -> None:
    """Raises UserError for a name or a type that DeepSpeed's ZeRO section does not have."""
    for key, value in zero.items():
        if key in _ZERO_SWITCHES and type(value) is not bool:
            raise UserError(f"{source}.{key}: expected true or false, found {shown(value)}")
        least = 1 if key == "reduce_bucket_size" else 0
        if key in _ZERO_COUNTS and not _is_count(value, least):
            raise UserError(f"{source}.{key}: expected a whole number of at least {least}, found {shown(value)}")
        if key in _ZERO_SECTIONS and not isinstance(value, dict):
            raise UserError(f"{source}.{key}: expected a JSON object, found {shown(value)}")
        if key not in (*_ZERO_SWITCHES, *_ZERO_COUNTS, *_ZERO_SECTIONS, "stage"):
            raise UserError(f"{source}: unknown key {shown(key)}; ds_configs/README.md has those that matter here")


def _is_count(value: Any, least: int) -> bool:
    """Whether a value is a whole number from `least`, written with or without an exponent (5e8)."""
    return type(value) in (int, float) and least <= value < 2**63 and value == int(value)


def full_ds_config(config: EngineConfig, world_size: int) -> dict[str, Any]:
    """What goes to `deepspeed.initialize`: the user's JSON and DPOConfig's batch and clip, each from one place."""
    return {
        **read_ds_config(config),
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps,
        "train_batch_size": config.batch_size * config.grad_accum_steps * world_size,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 2**31 - 1,  # our own log says it
    }


def without_communication(ds_config: dict[str, Any], keep_buckets: bool) -> dict[str, Any]:
    """ZeRO-2 for a rank that is alone, which sends nothing: no overlap, whose end a GPU's host would wait for.

    Without `keep_buckets` no buckets either, and no dtype of communication. With the shipped settings the same numbers
    bit for bit: a bf16 gradient that is widened, summed over one rank and rounded is itself. On a CPU, fresh buckets
    for each micro-batch cost more than the whole gradient in the model's dtype that stays in memory instead.
    """
    zero = ds_config["zero_optimization"]
    if zero_stage(ds_config) != 2 or "offload_optimizer" in zero:
        return ds_config
    if keep_buckets:
        return {**ds_config, "zero_optimization": {**zero, "overlap_comm": False}}
    alone = {name: value for name, value in ds_config.items() if name != "communication_data_type"}
    return {**alone, "zero_optimization": {**zero, "contiguous_gradients": False, "overlap_comm": False}}


def model_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Dtype of the weights that compute: bfloat16 when the JSON enables bf16, else float32."""
    return torch.bfloat16 if _enabled(ds_config, "bf16") else torch.float32


def zero_stage(ds_config: dict[str, Any]) -> int:
    """ZeRO stage, 0 when none is set."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def _enabled(ds_config: dict[str, Any], key: str) -> bool:
    """Whether a DeepSpeed section is there and on."""
    return bool(ds_config.get(key, {}).get("enabled", False))
