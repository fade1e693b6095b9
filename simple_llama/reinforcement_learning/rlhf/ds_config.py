"""The DeepSpeed JSON: which ZeRO stage and dtype. Batch sizes, learning rate and clip come from DPOConfig alone."""

from __future__ import annotations

from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import read_json
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig

OURS = {
    "train_batch_size": "batch_size, grad_accum_steps and the number of ranks",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "max_lr, beta1, beta2 and weight_decay",
    "scheduler": "warmup_iterations, max_lr and min_lr",
    "activation_checkpointing": "activation_checkpointing",
    "tensorboard": "log_dir",
}


def read_ds_config(config: DPOConfig) -> dict[str, Any]:
    """The user's DeepSpeed settings; UserError where one of them repeats what DPOConfig says."""
    found = read_json(config.deepspeed_config)
    if not isinstance(found, dict):
        raise UserError(f"{config.deepspeed_config}: expected a JSON object, found {type(found).__name__}")
    for key, name in OURS.items():
        if key in found:
            raise UserError(
                f"{config.deepspeed_config}: {key}: this number lives in DPOConfig ({name}); delete it from the JSON"
            )
    for key in ("bf16", "fp16", "amp", "data_types", "zero_optimization"):
        if not isinstance(found.get(key, {}), dict):
            raise UserError(f"{config.deepspeed_config}: {key}: expected a JSON object, found {found[key]!r}")
    if "bfloat16" in found:
        raise UserError(f"{config.deepspeed_config}: bfloat16: expected this section under its other name, bf16")
    for key in ("fp16", "amp"):
        if enabled(found, key):
            raise UserError(f"{config.deepspeed_config}: {key}: expected bf16 or fp32 (no {key}), found it enabled")
    if enabled(found, "bf16") and found.get("data_types", {}).get("grad_accum_dtype") != "fp32":
        raise UserError(
            f'{config.deepspeed_config}: data_types.grad_accum_dtype: expected "fp32" with bf16 (a bf16 sum of '
            f"micro-batches loses small gradients), found {found.get('data_types', {}).get('grad_accum_dtype')!r}"
        )
    stage = found.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (2, 3):  # 1 in bf16 is another optimizer class, without our state
        raise UserError(f"{config.deepspeed_config}: zero_optimization.stage: expected 2 or 3, found {stage!r}")
    return found


def full_ds_config(config: DPOConfig, world_size: int) -> dict[str, Any]:
    """What goes to `deepspeed.initialize`: the user's JSON and DPOConfig's batch and clip, each from one place."""
    return {
        **read_ds_config(config),
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps,
        "train_batch_size": config.batch_size * config.grad_accum_steps * world_size,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 2**31 - 1,  # our own log says it
    }


def model_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Dtype of the weights that compute: bfloat16 when the JSON enables bf16, else float32."""
    return torch.bfloat16 if enabled(ds_config, "bf16") else torch.float32


def zero_stage(ds_config: dict[str, Any]) -> int:
    """ZeRO stage, 0 when none is set."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def enabled(ds_config: dict[str, Any], key: str) -> bool:
    """Whether a DeepSpeed section is there and on."""
    return bool(ds_config.get(key, {}).get("enabled", False))
