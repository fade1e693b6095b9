"""Talks to a model in the terminal: a .pth, a Hugging Face folder or a .gguf, from a run or not.

python launch/chat.py --model_path CKPT_DIR/RUN                      # the newest export of a run
python launch/chat.py --model_path CKPT_DIR/RUN --against start      # beside the model that it started from
echo "What is rain?" | python launch/chat.py --model_path my-model   # a line a turn; answers alone on stdout
"""

from __future__ import annotations

import sys

try:
    from simple_llama.common.errors import UserError
    from simple_llama.reinforcement_learning.rlhf.talk import talk
except ModuleNotFoundError as missing:
    print(
        f"error: {missing} in {sys.executable}; `make demo` and `. .venv/bin/activate`, or pip install .",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> None:
    """Talks; ends with status 2 and a message on bad input, with 130 on a Ctrl-C where nobody sits there."""
    try:
        talk(description=__doc__)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
