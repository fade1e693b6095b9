"""Trains a policy by Direct Preference Optimization on all ranks; the reference store must be filled.

    deepspeed --hostfile hostfile launch/train_dpo.py [--config FILE.json] [--flags]

Also starts with torchrun, srun or plain python (one rank). See --help for every setting.
"""

from __future__ import annotations

from simple_llama.common.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.command import run_command
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.dry_run import describe
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs


def main(config: DPOConfig, ranks: Ranks) -> None:
    """Reads the inputs, then trains or, with --dry_run, says what it would do."""
    inputs = load_inputs(config, ranks)
    if config.dry_run:
        if ranks.is_main:
            print(describe(config, inputs, ranks.world_size))
        return
    train(config, inputs, ranks)


if __name__ == "__main__":
    run_command(main, __doc__)
