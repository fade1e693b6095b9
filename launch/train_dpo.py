"""Trains a policy by Direct Preference Optimization on all ranks; the reference store must be filled.

    deepspeed launch/train_dpo.py [--config FILE.json] [--flags]

Also starts with torchrun, srun or plain python (one rank). See --help for every setting.
"""

from __future__ import annotations

from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.command import run_command

if __name__ == "__main__":
    run_command(train, __doc__)
