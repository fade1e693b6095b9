"""Runs a launcher's command so that it always ends, and with status 0 only when the job has finished.

    python launch/supervise.py deepspeed launch/train_dpo.py [--flags]     # or deepspeed --hostfile hostfile launch/...
    python launch/supervise.py --grace_s 60 deepspeed ...      # seconds for the other hosts after the first has failed

Exit status: that of the first host that failed, or the launcher's own (of its ranks: 2 a mistake, 3 a rank was lost, 75
stopped and saved); 1 where it says 0 but the job did not say that it finished; 128 + n after signal n to the launcher.
"""

from __future__ import annotations

import argparse
import os
import sys

try:
    from simple_llama.cluster.supervisor import supervise
    from simple_llama.common.errors import UserError
except ModuleNotFoundError as missing:
    print(
        f"error: {missing} in {sys.executable}; `make demo` and `. .venv/bin/activate`, or pip install .",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> int:
    """Parses the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grace_s", type=float, default=15.0, help="seconds (default 15)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the launcher and its arguments")
    options = parser.parse_args()
    try:
        return supervise(options.command, options.grace_s)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    os._exit(main())  # all is said and flushed; a thread may still wait for a reader of the output
