"""All tests that need neither a GPU nor root, by three pytests at once that share the files out among themselves.

python tests/side_by_side.py    what `make test` runs

Two have half of the cores each, where tests of one process do as much as with all of them: of models as small as these
a second thread mostly waits. The third has all cores, and begins with tests/distributed, whose ranks wait for each
other and for timeouts half of the time. No list says which tests there are, or how long they take: whoever is done with
a file takes the next that nobody has. All go forward, as one pytest does: some tests of a floor need a process in which
those of higher floors have not run yet.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANKS = str(ROOT / "tests" / "distributed")
RANKS_FIRST, RANKS_LAST = "--ranks-first", "--ranks-last"  # the next argument is a file with the list of what is left
_NICER = 3  # those of one process: tests of several ranks are fewer, and would be the last to end


class Share:
    """A plugin of pytest: of all that is collected, the tests in files that no other process takes."""

    def __init__(self, ranks_first: bool, rest: str):
        """`rest` is the file with the list of those that are left, empty at first."""
        self._ranks_first, self._rest = ranks_first, rest

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """What pytest does with a list that is known beforehand, which is all that it says of errors in collecting."""
        if session.testsfailed or session.config.option.collectonly:
            return None
        tests = self._taken(session.items)
        test = next(tests, None)
        while test:
            following = next(tests, None)  # what both use stays set up
            test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            test = following
        return True

    def _taken(self, tests: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
        """The tests of one file after the other, until none is left."""
        by_file: dict[str, list[pytest.Item]] = {}
        for test in tests:
            by_file.setdefault(str(test.path), []).append(test)
        while path := self._take(list(by_file)):
            yield from by_file[path]

    def _take(self, paths: list[str]) -> str | None:
        """The next file, of all `paths` where nobody has taken one yet; None where all are taken."""
        with open(self._rest, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed, or its process ends
            text = file.read()
            left = json.loads(text) if text else paths
            liked = [path for path in left if path.startswith(RANKS) == self._ranks_first]
            taken = next(iter(liked or left), None)
            file.seek(0)
            file.truncate()
            json.dump([path for path in left if path != taken], file)
        return taken


def ended(arguments: Sequence[str]) -> int:
    """Runs the three with these arguments of pytest. The output of the one with all cores is seen as it comes, that of
    the others when they have ended. Returns the first status that is not 0."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [(RANKS_FIRST, cores, 0), *((RANKS_LAST, cores[half::2] or cores, _NICER) for half in range(2))]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # a thread that spins takes another one's core
    with ExitStack() as files:
        if environment.pop("PYTHONDONTWRITEBYTECODE", ""):  # hundreds of processes would compile the same modules
            environment["PYTHONPYCACHEPREFIX"] = files.enter_context(tempfile.TemporaryDirectory())
        rest = files.enter_context(tempfile.NamedTemporaryFile())
        outputs = [None, *(files.enter_context(tempfile.TemporaryFile()) for _ in shares[1:])]
        started = [
            subprocess.Popen(
                [sys.executable, __file__, order, rest.name, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                preexec_fn=partial(_settle, own, nicer),
            )
            for (order, own, nicer), output in zip(shares, outputs, strict=True)
        ]
        statuses = []
        try:
            for process, output in zip(started, outputs, strict=True):
                statuses.append(process.wait())
                if output:
                    output.seek(0)
                    sys.stdout.buffer.write(output.read())
                    sys.stdout.flush()
        finally:
            for process in started:  # none is left where this one is interrupted
                process.terminate()
    return next((status for status in statuses if status), 0)


def _settle(cores: Sequence[int], nicer: int) -> None:
    """Of a process that begins: where it runs, and how much it lets others go before it."""
    os.sched_setaffinity(0, cores)
    os.nice(nicer)


def main() -> int:
    """The three, or in one of them its share."""
    if sys.argv[1:2] not in ([RANKS_FIRST], [RANKS_LAST]):
        return ended(sys.argv[1:])
    order, rest, *arguments = sys.argv[1:]
    return pytest.main(arguments, plugins=[Share(order == RANKS_FIRST, rest)])


if __name__ == "__main__":
    sys.exit(main())
