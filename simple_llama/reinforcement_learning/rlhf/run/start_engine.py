"""The model that a run starts from as a policy under DeepSpeed, with the weights that are to be trained marked."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from simple_llama.cluster.distributed import Ranks, fail_together
from simple_llama.cluster.start_phases import PHASES
from simple_llama.common.errors import UserError
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import Loaded, check_finite, empty_model
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import EngineConfig, read_ds_config, zero_stage
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine, dealt_model
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize, TrainedPart, model_size, trained_part
from simple_llama.reinforcement_learning.rlhf.objective.policy import (
    DPOPolicy,
    PolicyConfig,
    trained_names,
)
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss


class Started(NamedTuple):
    """What a run steps."""

    engine: Engine
    size: ModelSize  # of its model
    part: TrainedPart  # of it that a backward pass computes


def start_engine(config: EngineConfig, inputs: Inputs, loss_fn: PreferenceLoss, ranks: Ranks) -> Started:
    """The policy of the start weights under DeepSpeed (collective)."""
    with inputs.start.reading() as start:
        with fail_together(ranks):
            shape = empty_model(start)
            trained = trained_names(shape, config.trainable, start.path, inputs.adapters is not None)
        model = _start_model(config, inputs, start, ranks, unread=trained)
        with fail_together(ranks):
            policy = _build_policy(config, model, loss_fn, start.path, inputs.adapters is not None)
        size, part = model_size(shape), trained_part(shape, trained)
        PHASES.ended("weights")
        engine = Engine(policy, start.state_dict, config, ranks)
        PHASES.ended("masters")
        if not engine.partitioned:
            with fail_together(ranks):
                check_finite(start.path, inputs.dtype, engine.trainable)
    return Started(engine, size, part)


def _start_model(
    config: EngineConfig, inputs: Inputs, start: Loaded, ranks: Ranks, unread: Collection[str] = ()
) -> LLaMaTransformer:
    """The start model in the computing dtype (collective); of ZeRO-3 this rank's share of it. Otherwise weights named
    in `unread` are 0: the engine reads them once, for the masters, and makes the computing weights of these."""
    if zero_stage(read_ds_config(config)) == 3:
        return dealt_model(start, inputs.dtype, config, ranks)
    with fail_together(ranks):
        return inputs.build_model(start, ranks.device, config.dropout, unread)


def _build_policy(
    config: PolicyConfig, model: LLaMaTransformer, loss_fn: PreferenceLoss, source: Path, adapters: bool = False
) -> DPOPolicy:
    """The start model, of that file, as a policy, with the weights that are to be trained marked: `trained_names`."""
    model.activation_checkpointing = config.activation_checkpointing
    if loss_fn.couples and config.dropout > 0:  # what the coefficients are of is computed without
        raise UserError(f"dropout: expected 0 with a loss that couples pairs ({loss_fn}), found {config.dropout}")
    names = trained_names(model, config.trainable, source, adapters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return DPOPolicy(model, loss_fn)
