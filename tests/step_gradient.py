"""A rank that writes the reduced gradient of a run's first optimizer step, before the clip: <ckpt_dir>/gradient.pt.

Started like a launch script, with the settings of a run; `reference` is `online`, so that no store is needed.
"""

from __future__ import annotations

from pathlib import Path

import torch

from simple_llama.cluster.distributed import Ranks, close_ranks, init_ranks, leave
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums
from simple_llama.reinforcement_learning.rlhf.run.start_engine import _build_policy, _start_model
from simple_llama.reinforcement_learning.rlhf.run.start_reference import open_reference
from simple_llama.reinforcement_learning.rlhf.run.step import accumulate, portions


def gradient(config: DPOConfig, ranks: Ranks) -> torch.Tensor:
    """The flat gradient of step 1 that the ranks hold in parts, fp32 (collective)."""
    inputs = load_inputs(config, ranks)
    pairs = inputs.data.train
    with inputs.start.reading() as start:
        model = _start_model(config, inputs, start, ranks)
        policy = _build_policy(config, model, PreferenceLoss.of(config), start.path)
        engine = Engine(policy, start.state_dict, config, ranks)
    plan = BatchPlan.of(pairs, config, config.seed, ranks.world_size)
    ref_logps = open_reference(config, inputs, ranks).logps
    accumulate(engine, portions(plan.step(0), ranks.rank, pairs), ref_logps, MetricSums(ranks.device), ranks.device)
    zero = engine.optimizer
    if zero.cpu_offload:
        mine = [partition.grad for partition in zero.single_partition_of_fp32_groups]
    else:
        mine = [torch.cat([part.flatten() for part in group]) for group in zero.averaged_gradients.values()]
    assert len(mine) == 1  # nothing decays: one group of parameters
    parts = [torch.empty_like(mine[0], dtype=torch.float32) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(parts, mine[0].float())
    return torch.cat(parts)


def main() -> None:
    """One step's forward and backward passes."""
    config = parse_config()
    ranks = init_ranks(config.device, config.start_timeout_s)
    found = gradient(config, ranks)
    if ranks.is_main:
        Path(config.ckpt_dir).mkdir(parents=True, exist_ok=True)
        torch.save(found, Path(config.ckpt_dir) / "gradient.pt")
    close_ranks()
    leave(0)


if __name__ == "__main__":
    main()
