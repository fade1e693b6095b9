"""Compares runs: which is better, what their held-out pairs can tell, and what differs in their settings.

python launch/compare.py beta-0.05 beta-0.1 beta-0.5       # names below log_dir, folders, or patterns
python launch/compare.py "beta-*" --output comparison      # comparison.html and comparison.json go there
"""

from __future__ import annotations

import sys

try:
    import tyro

    from simple_llama.common.errors import UserError
    from simple_llama.reinforcement_learning.rlhf.compare import CompareConfig, compare_runs
except ModuleNotFoundError as missing:
    print(
        f"error: {missing} in {sys.executable}; `make demo` and `. .venv/bin/activate`, or pip install .",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> None:
    """Parses the command line, compares, prints; ends with status 2 and a message on bad input."""
    try:
        config = tyro.cli(CompareConfig, description=__doc__)
        print(compare_runs(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
