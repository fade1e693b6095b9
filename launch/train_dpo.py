"""Trains a policy by Direct Preference Optimization on all ranks; the reference store must be filled.

    deepspeed launch/train_dpo.py [--config FILE.json] [--flags]

Also starts with torchrun, srun or plain python (one rank). See --help for every setting.
"""

from __future__ import annotations

import sys

try:
    from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
    from simple_llama.reinforcement_learning.rlhf.command import run_command
except ModuleNotFoundError as missing:
    print(
        f"error: {missing} in {sys.executable}; `make demo` and `. .venv/bin/activate`, or pip install .",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    run_command(train, __doc__)
