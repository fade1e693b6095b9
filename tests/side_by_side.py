"""All tests that need neither a GPU nor root: those of one process in two halves at once, then those of several ranks.

python tests/side_by_side.py    what `make test` runs

Each half is a pytest of its own on half of the cores, where it does as much as with all of them: of models as small as
these a second thread mostly waits. No list says which tests there are: a half is some folders, or all but those.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from tiny_job import ROOT

UNIT, RANKS = "tests/unit/rlhf", "tests/distributed"
FIRST = [f"{UNIT}/engine", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / UNIT).glob("test_*.py"))]
SECOND = ["tests", *(f"--ignore={path}" for path in (RANKS, *FIRST))]


def ended(*runs: Sequence[str]) -> int:
    """Runs pytest with these arguments, each list in a process of its own with its share of the cores, all at once.

    The first one's output is seen as it comes, that of the others when they have ended. Returns the first status that
    is not 0.
    """
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as files:
        outputs = [None, *(files.enter_context(tempfile.TemporaryFile()) for _ in runs[1:])]
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "pytest", *arguments],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                preexec_fn=partial(os.sched_setaffinity, 0, cores[place :: len(runs)] or cores),
            )
            for place, (arguments, output) in enumerate(zip(runs, outputs, strict=True))
        ]
        statuses = []
        for process, output in zip(started, outputs, strict=True):
            statuses.append(process.wait())
            if output:
                output.seek(0)
                sys.stdout.buffer.write(output.read())
                sys.stdout.flush()
    return next((status for status in statuses if status), 0)


def main() -> int:
    """The halves, and if they are green the rest."""
    arguments = sys.argv[1:]
    return ended([*FIRST, *arguments], [*SECOND, *arguments]) or ended([RANKS, *arguments])


if __name__ == "__main__":
    sys.exit(main())
