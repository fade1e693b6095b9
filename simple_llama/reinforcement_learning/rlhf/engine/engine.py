"""The only importer of deepspeed: wraps the policy with ZeRO, steps it, and reads or sets its full fp32 state.

Shapes: B pairs of a micro-batch.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, fail_together
from simple_llama.cluster.start_phases import PHASES
from simple_llama.common.errors import UserError
from simple_llama.pretraining.beside import read_ahead
from simple_llama.pretraining.layers import adapters_off
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import Loaded, empty_model, fill
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.engine.communication import CommunicationMeter
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import (
    EngineConfig,
    ds_config_here,
    full_ds_config,
    zero_stage,
)
from simple_llama.reinforcement_learning.rlhf.engine.fewer_passes import use_fewer_passes
from simple_llama.reinforcement_learning.rlhf.objective.coupling import Pull
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, PolicyOutput, evaluating, pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss

_MOST_WORDS = 1000  # characters of an error of DeepSpeed's that are shown
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, beside the master weight: what a resumed run needs of a parameter


class Engine:
    """A policy under DeepSpeed. `model` computes with the current weights; call it for evaluation and sampling too.

    Master weights are fp32 and start as the checkpoint's own fp32 values, not as their bf16 rounding.
    """

    def __init__(
        self, policy: DPOPolicy, start_weights: Mapping[str, torch.Tensor], config: EngineConfig, ranks: Ranks
    ):
        """Wraps `policy` (already in its computing dtype), whose trained weights may be any numbers: they are made of
        the masters. Needs the process group that `init_ranks` made.

        Args:
            start_weights: fp32 values of the model's parameters by name, as the checkpoint has them.
        """
        deepspeed = import_deepspeed(ranks.device)
        self.utils, self.gathered = deepspeed.utils, deepspeed.zero.GatheredParameters
        self.ds_config = ds_config_here(config, ranks.world_size, ranks.device.type)
        self.stage = zero_stage(self.ds_config)
        trainable = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            decay_groups(trainable, config.weight_decay),
            lr=0.0,  # each step is given its own
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        with _starting(config):
            engine, zero_optimizer, _, _ = deepspeed.initialize(
                model=policy, optimizer=optimizer, config=self.ds_config, dist_init_required=False
            )
        self.engine: Any = engine
        self.optimizer: Any = zero_optimizer
        self.communication = CommunicationMeter(deepspeed.comm.comm.cdb, ranks.device)
        self.trainable = trainable
        self.reduce_once = config.reduce_once
        self.kept_sums = use_fewer_passes(zero_optimizer, deepspeed.comm.all_reduce if ranks.world_size > 1 else None)
        if self.reduce_once:
            self.accumulate_locally()
        self.make_moments()
        PHASES.ended("DeepSpeed")
        read = read_ahead(start_weights, trainable)
        self.load_full_state(((name, {"weight": tensor}) for name, tensor in read), optimizer_steps=0)

    @property
    def model(self) -> LLaMaTransformer:
        """The model with the current computing weights."""
        return self.engine.module.model

    @property
    def masters(self) -> list[int]:
        """Sizes of this rank's flat groups of master weights."""
        return [len(flat) for flat in self._flats]

    @property
    def _flats(self) -> list[torch.Tensor]:
        zero = self.optimizer
        return zero.fp32_partitioned_groups_flat if self.partitioned else zero.single_partition_of_fp32_groups

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the trained parameters by name."""
        return {name: _shape(parameter) for name, parameter in self.trainable.items()}

    @property
    def trained_weights(self) -> int:
        """How many weights are trained."""
        return sum(map(math.prod, self.trained_shapes.values()))

    @property
    def largest_parameter(self) -> int:
        """Weights of the largest trained parameter."""
        return max(math.prod(_shape(parameter)) for parameter in self.trainable.values())

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's states, and the gradients for them, lie on the host."""
        return "offload_optimizer" in self.ds_config.get("zero_optimization", {})

    @property
    def sums_in_one(self) -> bool:
        """Whether a step's sums of gradients lie in one tensor from the first micro-batch on."""
        return self.stage == 2 and not self.offloads and self.optimizer.dtype != torch.float32

    @property
    def partitioned(self) -> bool:
        """Whether no rank holds all weights (ZeRO-3): then every rank must make every forward call."""
        return self.stage == 3

    @property
    def loss_fn(self) -> PreferenceLoss:
        """The policy's loss."""
        return self.engine.module.loss_fn

    def backward(
        self, batch: PairBatch, ref_logps_B2: torch.Tensor, weight: float, last: bool, pull: Pull | None = None
    ) -> PolicyOutput:
        """Forward and backward of one micro-batch; its gradient is `weight` times that of the sum of losses.

        ZeRO divides by the number of ranks when it reduces, so a weight of ranks / pairs makes the step's gradient that
        of the mean over all pairs. `last` marks the step's last micro-batch. `pull` as for the policy.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        if self.reduce_once:  # the flags of DeepSpeed's coalesce_grad_reduction (0.19.8): no reduction while they stand
            self.engine.inside_no_sync_ctxt = self.optimizer._coalesce_grad_reduction = not last
        with self.communication.counting():
            out = self.engine(batch, ref_logps_B2, pull, weight)
            self.engine.backward(out.loss, scale_wrt_gas=False)
        return out

    def accumulate_locally(self) -> None:
        """Lets micro-batches add up in fp32 on this rank; the last one's backward pass reduces the sums, overlapped.

        DeepSpeed's coalesce_grad_reduction alone would add up in `.grad`, in bf16: each addition may lose half of a
        bf16 digit, 2^-9 of the sum. Instead the sums are kept in `grad_accum`, as ZeRO-1 does with an fp32
        accumulation dtype. What is reduced is then exact to the order of fp32 additions. Each trained parameter takes
        part in every micro-batch, so the last one hands over all sums.
        """
        for owner, flag in ((self.engine, "inside_no_sync_ctxt"), (self.optimizer, "_coalesce_grad_reduction")):
            if not hasattr(owner, flag):
                raise UserError(f"reduce_once: expected DeepSpeed 0.19.8 or one like it, found one without {flag}")
        if not self.optimizer.use_separate_grad_accum:
            return  # computing in fp32: `.grad` is such a sum already
        self.optimizer.use_grad_accum_attribute = True
        for parameter in self.trainable.values():  # at once, so that no second whole gradient exists in bf16
            parameter.register_post_accumulate_grad_hook(self.optimizer._fill_param_grad_accum_attribute)

    def logps(self, batch: PairBatch) -> torch.Tensor:
        """Log-prob sums (B, S) that the loss reads, with the current weights, as `policy.pair_logps`; with ZeRO-3 on
        every rank at once."""
        asked = self.engine.module.loss_fn.asks
        if not self.partitioned:
            return pair_logps(self.model, batch, asked)
        ignored_BS = torch.zeros(len(batch), asked.columns, device=batch.tokens_T.device)
        with torch.no_grad(), evaluating(self.engine.module):  # only the engine's forward gathers the head's weight
            return self.engine(batch, ignored_BS).sums_BS

    def logps_without_adapters(self, batch: PairBatch) -> torch.Tensor:
        """The same with the model's adapters off."""
        with adapters_off(self.model):
            return self.logps(batch)

    @contextlib.contextmanager
    def whole_head(self) -> Iterator[None]:
        """The model's vocabulary matrix is whole in the body (collective with ZeRO-3, without gradient)."""
        if not self.partitioned:
            yield
            return
        with self.gathered([self.model.head_weight]):
            yield

    def step(self, rate: float) -> float:
        """Clips by the global norm, makes one AdamW step at learning rate `rate`; returns the norm before the clip."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.set_gradient_accumulation_boundary(True)
        with self.communication.counting():
            self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def own_matrices(self, ranks: Ranks) -> Iterator[torch.Tensor]:
        """This rank's part of the computing weights of all trained matrices: the ranks' parts are all, each once."""
        matrices = [parameter for parameter in self.trainable.values() if len(_shape(parameter)) == 2]
        if not self.partitioned:
            yield from (parameter.detach() for parameter in matrices[ranks.rank :: ranks.world_size])
            return
        for parameter in matrices:
            piece: torch.Tensor = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
            left = math.prod(_shape(parameter)) - ranks.rank * piece.numel()  # behind it a piece is padding
            yield piece.detach().flatten()[: max(left, 0)]

    def make_room(self) -> None:
        """Gives back the memory of gradients, between two steps."""
        self.kept_sums.clear()

    def gathered_state(self, name: str) -> dict[str, torch.Tensor]:
        """{weight, exp_avg, exp_avg_sq} of a trained parameter, whole, fp32, from all ranks (collective): copies."""
        parameter: Any = self.trainable[name]
        state: dict[str, Any] = {key: self.utils.safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        return {**state, "weight": self.utils.safe_get_full_fp32_param(parameter)}

    def whole_here(self) -> list[str]:
        """The trained parameters whose masters and moments lie on this rank alone: with ZeRO-2 nearly all are such."""
        if self.partitioned:
            return []
        places = {name: getattr(parameter, "_hp_mapping", None) for name, parameter in self.trainable.items()}
        shapes = self.trained_shapes
        return [
            name for name, place in places.items() if place and place.hp_fragment.numel() == math.prod(shapes[name])
        ]

    def state_here(self, name: str) -> dict[str, torch.Tensor]:
        """The same of one of `whole_here`: the engine's own tensors, which the next step changes."""
        parameter: Any = self.trainable[name]
        kinds = {"weight": None, **{key: key for key in MOMENTS}}
        return {kind: parameter._hp_mapping.get_hp_fragment(key).view(_shape(parameter)) for kind, key in kinds.items()}

    def load_full_state(self, state: Iterable[tuple[str, dict[str, torch.Tensor]]], optimizer_steps: int) -> None:
        """Sets master weights, and moments where given, then the computing weights; AdamW's step count too.

        Raises UserError when a trained parameter is missing or has another shape.
        """
        missing = set(self.trainable)
        for name, tensors in state:
            if name not in self.trainable:
                raise UserError(f"state to load: expected only trained parameters, found {name}")
            parameter = self.trainable[name]
            shape = _shape(parameter)
            if tuple(tensors["weight"].shape) != shape:
                raise UserError(f"state of {name}: expected shape {shape}, found {tuple(tensors['weight'].shape)}")
            missing.discard(name)
            for key in tensors:
                self._set(parameter, key, tensors[key])
            del tensors  # before the next ones are read
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
        if whole := self.optimizer.persistent_parameters:  # small ones, of which every rank holds a whole copy
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def _set(self, parameter: Any, key: str, value: torch.Tensor) -> None:
        """Sets a parameter's master weight ("weight") or moment from its whole value, of any dtype.

        With ZeRO-3 this rank's part: DeepSpeed's own safe_set_full_* (0.19.8) fails on the last rank where the size is
        no multiple of the ranks. Only the part becomes fp32.
        """
        if self.partitioned:
            size = parameter.ds_tensor.ds_numel
            start = size * torch.distributed.get_rank()
            value = value.flatten()[start : start + size]
            value = torch.nn.functional.pad(value, (0, size - len(value)))
        value = value.to(device=parameter.device, dtype=torch.float32)
        utils, local = self.utils, self.partitioned
        if key == "weight":
            (utils.safe_set_local_fp32_param if local else utils.safe_set_full_fp32_param)(parameter, value)
        else:
            set_moment = utils.safe_set_local_optimizer_state if local else utils.safe_set_full_optimizer_state
            set_moment(parameter, value, key)

    def make_moments(self) -> None:
        """Gives AdamW its zero moments before the first step, and ZeRO its links to them.

        ZeRO-2 (0.19.8) links all groups after the first group's step, when the others have no moments yet: without
        this the state of a second group could be neither saved nor loaded.
        """
        zero, flats = self.optimizer, self._flats
        for flat in flats:
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            zero.optimizer.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if not self.partitioned:
            for group, flat in zip(zero.bit16_groups, flats, strict=True):
                self.utils.lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
            zero._hp_optimizer_states_linked = True


def dealt_model(start: Loaded, dtype: torch.dtype, config: EngineConfig, ranks: Ranks) -> LLaMaTransformer:
    """The start model for ZeRO-3, as `build_model` makes it (collective): each part's weights are dealt out as soon as
    they are read, so of the whole model a rank has its share and one part at a time."""
    deepspeed = import_deepspeed(ranks.device)
    ds_config = full_ds_config(config, ranks.world_size)
    with _starting(config):  # as `deepspeed.initialize` does: before, it would take each rank to be alone
        backend = deepspeed.accelerator.get_accelerator().communication_backend_name()
        deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    with fail_together(ranks):
        model = empty_model(start, config.dropout)
    parts: list[tuple[str, torch.nn.Module]] = []
    for name, child in model.named_children():  # of the list of blocks each is one
        parts += [(f"{name}.{number}", block) for number, block in child.named_children()] or [(name, child)]
    for name, part in parts:
        watchdog.beat(f"loading {name}")
        with fail_together(ranks):
            fill(part, f"{name}.", start, dtype, ranks.device)
        with _starting(config):
            deepspeed.zero.Init(module=part, config_dict_or_path=ds_config)
    return model


@contextlib.contextmanager
def _starting(config: EngineConfig) -> Iterator[None]:
    """One message for whatever DeepSpeed raises at its start: its checks of the settings raise half a dozen kinds."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError):
            watchdog.await_verdict()  # a peer that was killed looks like this
        raise UserError(_refusal(config.deepspeed_config, error)) from error


def import_deepspeed(device: torch.device) -> Any:
    """Imports deepspeed for this kind of device; late, since it looks for an accelerator and takes a second.

    It would otherwise choose a GPU by itself, also for a run that is told to use the CPU.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed
    import deepspeed.accelerator
    import deepspeed.comm.comm
    import deepspeed.ops
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's calls
    # On a CPU, DeepSpeed would compile a shared-memory op at start; gloo does without, and hosts need no compiler.
    # Set, not edited: reading this table would call the compiler to find out which ops could be built.
    ops: Any = deepspeed.ops
    ops.__compatible_ops__ = {}
    _import_muon()
    return deepspeed


def _import_muon() -> None:
    """Imports DeepSpeed's Muon as plain functions. ZeRO (0.19.8) imports it for whatever optimizer it is given, and
    `torch.compile` at its functions, which no run of ours calls, would import torch's compiler: a second or more."""
    from deepspeed.runtime import compiler

    compiled = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # of a version that has it elsewhere
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compiled


def _refusal(source: str, error: Exception) -> str:
    """What a person reads of an error that DeepSpeed raises at its start, at bounded length."""
    words = str(error)
    if len(words) > _MOST_WORDS:
        words = f"{words[:_MOST_WORDS]}..."
    return f"{source}: DeepSpeed does not start with these settings: {type(error).__name__}: {words} (--debug: where)"


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Of the whole parameter: one that ZeRO-3 has dealt out shows none itself."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def decay_groups(parameters: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups by name: matrices decay; norms, biases and embeddings, tied to the head or not, do not. One group
    where nothing decays."""
    if not weight_decay:
        return [{"params": list(parameters.values()), "weight_decay": 0.0}]
    decays = {name: len(_shape(p)) >= 2 and not name.startswith("embeddings.") for name, p in parameters.items()}
    groups = [
        {"params": [p for name, p in parameters.items() if decays[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if not decays[name]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
