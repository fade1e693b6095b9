"""Shows what training changed: models against preference pairs, and their answers, in one report.

    python launch/evaluate.py --models CKPT_DIR/RUN                          # on the pairs that the run held out
    deepspeed launch/evaluate.py --models a.pth,b.pth --model_path start.pth --rlhf_dataset_path pairs.jsonl
    python launch/evaluate.py --models CKPT_DIR/RUN --generate 64 --judge "python judge.py"

Several ranks give the same numbers as one. See --help for every setting, docs/evaluate.md for what they mean.
"""

from __future__ import annotations

import sys
from functools import partial

try:
    from simple_llama.reinforcement_learning.rlhf.assess.assess import assess
    from simple_llama.reinforcement_learning.rlhf.assess.evaluate_config import parse_evaluate
    from simple_llama.reinforcement_learning.rlhf.command import run_any
except ModuleNotFoundError as missing:
    print(
        f"error: {missing} in {sys.executable}; `make demo` and `. .venv/bin/activate`, or pip install .",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    run_any(assess, partial(parse_evaluate, description=__doc__))
