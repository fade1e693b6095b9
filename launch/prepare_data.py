"""Converts preference data of any known format (docs/data.md) into this project's own.

python launch/prepare_data.py --inputs hh_harmless.jsonl.gz --output hh_harmless.jsonl
python launch/prepare_data.py --inputs pku.parquet --output pku.jsonl --prefer safe
"""

from __future__ import annotations

import sys

try:
    import tyro

    from simple_llama.common.errors import UserError
    from simple_llama.reinforcement_learning.rlhf.data.convert import PrepareConfig, prepare
except ModuleNotFoundError as missing:
    print(
        f"error: {missing} in {sys.executable}; `make demo` and `. .venv/bin/activate`, or pip install .",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> None:
    """Parses the command line, converts, prints one line of counts; ends with status 2 and a message on bad input."""
    config = tyro.cli(PrepareConfig, description=__doc__)
    try:
        print(prepare(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
