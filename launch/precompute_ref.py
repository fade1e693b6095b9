"""Computes the frozen reference's log-probs of all pairs on all ranks and keeps them on disk.

    deepspeed launch/precompute_ref.py [--config FILE.json] [--flags]

Once for each model and data set; a second run, or one after a crash, computes only what is missing.
"""

from __future__ import annotations

import sys

try:
    from simple_llama.reinforcement_learning.rlhf.command import run_command
    from simple_llama.reinforcement_learning.rlhf.precompute import precompute
except ModuleNotFoundError as missing:
    print(
        f"error: {missing} in {sys.executable}; `make demo` and `. .venv/bin/activate`, or pip install .",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    run_command(precompute, __doc__)
