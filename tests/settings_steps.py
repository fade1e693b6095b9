"""A rank that makes two optimizer steps under each of many DeepSpeed files; plain_steps.py has what they are held to.
In bf16 under ZeRO-2 a third, whose gradient is not finite on one rank alone, changes no weight of any; a fourth does.

Started like a launch script. `<ckpt_dir>/cases.json` has (name, DeepSpeed file, changed settings, `twice`) of each;
rank 0 leaves what came out in `<ckpt_dir>/steps.pt`: the fields of a `Steps` by name.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from simple_llama.cluster.distributed import Ranks, close_ranks, gather_objects, init_ranks, leave
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import model_dtype, read_ds_config
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums
from simple_llama.reinforcement_learning.rlhf.run.start_engine import _build_policy, _start_model
from simple_llama.reinforcement_learning.rlhf.run.step import (
    Learner,
    Portion,
    accumulate,
    optimizer_step,
    portions,
)

RATE = 1e-3
State = dict[str, torch.Tensor]  # weight, exp_avg and exp_avg_sq, each of all parameters in one, fp32


@dataclass
class Steps:
    """Two steps."""

    norms: list[float]  # before the clip
    states: list[State]  # after each
    logps: torch.Tensor  # (4, 2) of some pairs, with the computing weights after both
    again: float | None  # the norm of the second step, made once more from the loaded state after the first


def two_steps(config: DPOConfig, inputs: Inputs, ranks: Ranks, twice: bool) -> Steps:
    """Trains the start model for two steps under DeepSpeed (collective); `twice`: the second is made again."""
    with inputs.start.reading() as start:
        model = _start_model(config, inputs, start, ranks)
        policy = _build_policy(config, model, PreferenceLoss.of(config), start.path)
        engine = Engine(policy, start.state_dict, config, ranks)
    pairs, plan = inputs.data.train, plan_of(config, inputs, ranks.world_size)
    norms, saved = [step(engine, portions(plan.step(0), ranks.rank, pairs))], full_state(engine, ranks)
    saved = {name: {key: tensor.clone() for key, tensor in tensors.items()} for name, tensors in saved.items()}
    norms.append(step(engine, portions(plan.step(1), ranks.rank, pairs)))
    again = None
    if twice:
        engine.load_full_state(saved.items(), optimizer_steps=1)
        again = step(engine, portions(plan.step(1), ranks.rank, pairs))
    states = [flat(saved.values()), flat(full_state(engine, ranks).values())]
    logps = engine.logps(PairBatch.pack([pairs[i] for i in range(4)]))
    if engine.sums_in_one:
        no_step_at_infinity(engine, plan, pairs, ranks)
    engine.engine.destroy()
    return Steps(norms, states, logps, again)


def no_step_at_infinity(engine: Engine, plan: BatchPlan, pairs: PairSet, ranks: Ranks) -> None:
    """A value of the last rank's share of the gradient is infinite: no rank changes a weight, and each does in the step
    after it (collective)."""
    for spoiled in (True, False):
        parts, sums = portions(plan.step(1), ranks.rank, pairs), MetricSums(ranks.device)
        accumulate(engine, parts, lambda batch: torch.zeros(len(batch), 2), sums, ranks.device)
        if spoiled and ranks.rank == ranks.world_size - 1:
            engine.optimizer.averaged_gradients[0].flat_partition[0] = torch.inf
        before = [flat.detach().clone() for flat in engine._flats]
        assert (engine.step(RATE) == torch.inf) == spoiled
        assert {torch.equal(flat, was) for flat, was in zip(engine._flats, before, strict=True)} == {spoiled}


def full_state(engine: Engine, ranks: Ranks) -> dict[str, State]:
    """All masters and moments by parameter (collective); what a rank has alone is the same there, and on no other."""
    found = {name: engine.gathered_state(name) for name in engine.trainable}
    here = engine.whole_here()
    for name in here:
        state = engine.state_here(name)
        assert state.keys() == found[name].keys()
        assert all(torch.equal(tensor.cpu(), found[name][key].cpu()) for key, tensor in state.items()), name
    alone = [name for names in gather_objects(here, ranks, list[str]) for name in names]
    assert len(alone) == len(set(alone))
    return found


def plan_of(config: DPOConfig, inputs: Inputs, world_size: int) -> BatchPlan:
    """Which pairs, when."""
    return BatchPlan(inputs.data.train.rows, config.seed, world_size, config.batch_size, config.grad_accum_steps)


def step(learner: Learner, parts: Iterable[Portion]) -> float:
    """One optimizer step with reference log-probs of 0, so that margins are far from 0; the norm before the clip."""
    device = torch.device("cpu")
    return optimizer_step(learner, parts, lambda batch: torch.zeros(len(batch), 2), RATE, MetricSums(device), device)


def flat(state: Iterable[dict[str, torch.Tensor]]) -> State:
    """The tensors of all parameters, each kind in one."""
    every = list(state)
    return {
        key: torch.cat([tensors[key].flatten() for tensors in every]) for key in ("weight", "exp_avg", "exp_avg_sq")
    }


def main() -> None:
    """All cases in turn, in one process."""
    base = parse_config()
    ranks = init_ranks(base.device, base.start_timeout_s)
    inputs, folder, found = load_inputs(base, ranks), Path(base.ckpt_dir), {}
    gc.freeze()  # each ZeRO-3 engine collects garbage, among all that is imported
    for name, file, changes, twice in json.loads((folder / "cases.json").read_text()):
        config: Any = replace(base, deepspeed_config=file, **changes)
        found[name] = vars(two_steps(config, replace(inputs, dtype=model_dtype(read_ds_config(config))), ranks, twice))
    if ranks.is_main:
        torch.save(found, folder / "steps.pt")
    close_ranks()
    leave(0)


if __name__ == "__main__":
    main()
