"""Computes the frozen reference's log-probs of all pairs on all ranks and keeps them on disk.

    deepspeed --hostfile hostfile launch/precompute_ref.py [--config FILE.json] [--flags]

Once for each model and data set; a second run, or one after a crash, computes only what is missing.
"""

from __future__ import annotations

from simple_llama.common.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.command import run_command
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.dry_run import describe
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.precompute import precompute


def main(config: DPOConfig, ranks: Ranks) -> None:
    """Reads the inputs, then fills the store or, with --dry_run, says what there is."""
    inputs = load_inputs(config, ranks)
    if config.dry_run:
        if ranks.is_main:
            print(describe(config, inputs, ranks.world_size))
        return
    precompute(config, inputs, ranks)


if __name__ == "__main__":
    run_command(main, __doc__)
