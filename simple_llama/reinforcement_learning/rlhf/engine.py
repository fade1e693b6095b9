"""The only importer of deepspeed: wraps the policy with ZeRO, steps it, and reads or sets its full fp32 state."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils import logger as deepspeed_logger

from simple_llama.common.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.ds_config import full_ds_config, zero_stage
from simple_llama.reinforcement_learning.rlhf.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.policy import DPOPolicy, PolicyOutput

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, beside the master weight: what a resumed run needs of a parameter


class Engine:
    """A policy under DeepSpeed. `model` computes with the current weights; call it for evaluation and sampling too.

    Master weights are fp32 and start as the checkpoint's own fp32 values, not as their bf16 rounding.
    """

    def __init__(self, policy: DPOPolicy, start_weights: Mapping[str, torch.Tensor], config: DPOConfig, ranks: Ranks):
        """Wraps `policy` (already in its computing dtype). Needs the process group that `init_ranks` made.

        Args:
            start_weights: fp32 values of the model's parameters by name, as the checkpoint has them.
        """
        deepspeed_logger.setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's calls
        # On a CPU, DeepSpeed would compile a shared-memory op at start; gloo does without, and hosts need no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.ds_config: dict[str, Any] = full_ds_config(config, ranks.world_size)
        self.stage = zero_stage(self.ds_config)
        trainable = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            decay_groups(list(trainable.values()), config.weight_decay),
            lr=config.max_lr,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        engine, zero_optimizer, _, _ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=self.ds_config, dist_init_required=False
        )
        self.engine: Any = engine
        self.optimizer: Any = zero_optimizer
        self.trainable = trainable
        make_moments(self.optimizer, self.stage)
        self.load_full_state(((name, {"weight": start_weights[name]}) for name in trainable), optimizer_steps=0)

    @property
    def model(self) -> LLaMaTransformer:
        """The model with the current computing weights."""
        return self.engine.module.model

    @property
    def partitioned(self) -> bool:
        """Whether no rank holds all weights (ZeRO-3): then every rank must make every forward call."""
        return self.stage == 3

    def backward(self, batch: PairBatch, ref_logps_B2: torch.Tensor, weight: float, last: bool) -> PolicyOutput:
        """Forward and backward of one micro-batch; its gradient is `weight` times that of the sum of losses.

        ZeRO divides by the number of ranks when it reduces, so a weight of ranks / pairs makes the step's gradient that
        of the mean over all pairs. `last` marks the step's last micro-batch.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        out = self.engine(batch, ref_logps_B2)
        self.engine.backward(out.loss * weight, scale_wrt_gas=False)
        return out

    def step(self, rate: float) -> float:
        """Clips by the global norm, makes one AdamW step at learning rate `rate`; returns the norm before the clip."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def full_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """(name, {weight, exp_avg, exp_avg_sq}) of each trained parameter, whole, fp32, one at a time (collective)."""
        for name, parameter in self.trainable.items():
            state: dict[str, Any] = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            state["weight"] = safe_get_full_fp32_param(parameter)
            yield name, state

    def load_full_state(self, state: Iterable[tuple[str, dict[str, torch.Tensor]]], optimizer_steps: int) -> None:
        """Sets master weights, and moments where given, then the computing weights; AdamW's step count too.

        Raises UserError when a trained parameter is missing or has another shape.
        """
        missing = set(self.trainable)
        for name, tensors in state:
            if name not in self.trainable:
                raise UserError(f"state to load: expected only trained parameters, found {name}")
            parameter = self.trainable[name]
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # a ZeRO-3 parameter shows no shape itself
            if tuple(tensors["weight"].shape) != shape:
                raise UserError(f"state of {name}: expected shape {shape}, found {tuple(tensors['weight'].shape)}")
            missing.discard(name)
            for key, tensor in tensors.items():
                value = tensor.to(device=parameter.device, dtype=torch.float32)
                if self.partitioned:
                    set_local_part(parameter, value, None if key == "weight" else key)
                elif key == "weight":
                    safe_set_full_fp32_param(parameter, value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        if missing:
            raise UserError(f"state to load: expected all trained parameters, missing {', '.join(sorted(missing)[:4])}")
        self.round_to_computing_weights()
        for moments in self.optimizer.optimizer.state.values():
            moments["step"].fill_(optimizer_steps)

    def round_to_computing_weights(self) -> None:
        """Makes the computing weights from the masters, as an optimizer step does."""
        if not self.partitioned:
            self.optimizer.update_lp_params()
            return
        flats, masters = self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat
        for flat, master in zip(flats, masters, strict=True):
            flat.data.copy_(master.data)


def set_local_part(parameter: Any, value: torch.Tensor, moment: str | None) -> None:
    """Sets this rank's part of a ZeRO-3 parameter's master weight or moment from the whole fp32 value.

    DeepSpeed's own safe_set_full_* (0.19.8) fails on the last rank where the size is no multiple of the ranks.
    """
    size = parameter.ds_tensor.ds_numel
    start = size * torch.distributed.get_rank()
    part = value.flatten()[start : start + size]
    part = torch.nn.functional.pad(part, (0, size - len(part)))
    if moment is None:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, moment)


def decay_groups(parameters: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay, vectors (norms, biases) do not. One group where nothing decays."""
    if not weight_decay:
        return [{"params": parameters, "weight_decay": 0.0}]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_moments(optimizer: Any, stage: int) -> None:
    """Gives AdamW its zero moments before the first step, and ZeRO its links to them.

    ZeRO 1/2 (0.19.8) links all groups after the first group's step, when the others have no moments yet: without this
    the state of a second group could be neither saved nor loaded.
    """
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        step = torch.zeros((), dtype=torch.float32, device=flat.device)
        optimizer.optimizer.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
    if stage != 3:
        for group, flat in zip(optimizer.bit16_groups, flats, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)
        optimizer._hp_optimizer_states_linked = True
