"""Numbers of a bench as they come: each a line on stdout at once, and one of JSON that outlives a bench that is killed.

And the bench's own time: it stops between two measurements, before somebody has to kill it.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path


class _Kept:
    """What this process has measured so far, and how long it may go on."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._command = ""
        self._end = math.inf

    def begin(self, command: str, results: str, minutes: float) -> None:
        """From now on lines are kept beside `results` ("": only printed), in a file that earlier benches' lines are in
        too, and time is over after `minutes` (0: never)."""
        self._path = Path(results).with_suffix(".partial.jsonl") if results else None
        self._command = command
        self._end = time.monotonic() + 60 * minutes if minutes else math.inf

    def keep(self, what: str, **numbers: object) -> None:
        """A measured number, or several, with what they are of."""
        print(f"{what}: {', '.join(f'{name} {_shown(value)}' for name, value in numbers.items())}", flush=True)
        if self._path:
            line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "command": self._command, "what": what, **numbers}
            with self._path.open("a") as file:  # closed at once: then only the system's end can lose it
                file.write(f"{json.dumps(line, default=str)}\n")

    def is_over(self, needed_s: float = 0.0) -> bool:
        """Whether less than `needed_s` seconds are left."""
        return time.monotonic() + needed_s >= self._end


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


KEPT = _Kept()  # of this process
