"""Writes a model, or what a run has trained so far, in another form or dtype.

python launch/export.py --source dpo_2E_0.5312L_2048MSQ.pth --output my-model   # LoRA merged; loads in transformers
python launch/export.py --source CKPT_DIR/RUN --output my-model --dtype bfloat16  # the newest state of a run
python launch/export.py --source CKPT_DIR/RUN --output my-model --average 3       # the mean of its last three epochs
python launch/export.py --source my-model --output my-model.pth     # where a SimpleLLaMA checkpoint can say the model
"""

from __future__ import annotations

import sys

try:
    import tyro

    from simple_llama.common.errors import UserError
    from simple_llama.reinforcement_learning.rlhf.export import ExportConfig, export_model
except ModuleNotFoundError as missing:
    print(
        f"error: {missing} in {sys.executable}; `make demo` and `. .venv/bin/activate`, or pip install .",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> None:
    """Parses the command line, writes, prints one line; ends with status 2 and a message on bad input."""
    try:
        config = tyro.cli(ExportConfig, description=__doc__)
        print(export_model(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
