"""Where the time goes from the start of a process, or of its launcher, to its first step."""

from __future__ import annotations

import os
import time
from pathlib import Path

from simple_llama.cluster.processes import ancestors, command_line, stat_fields

_LAUNCHER = "launcher"
_DEPTH = 3  # of the `deepspeed` command above a rank: its launcher on this host, a shell, the command
_SHOWN_S = 0.05  # a phase of less is left out
_START_TIME = 19  # place in stat_fields


class _StartPhases:
    """Seconds by name of what this process did before its first step, one phase behind the other."""

    def __init__(self) -> None:
        age_s = _age_s(os.getpid())
        oldest = max((_age_s(pid) for pid in ancestors(_DEPTH) if _is_launcher(command_line(pid))), default=0.0)
        self.seconds = {_LAUNCHER: max(0.0, oldest - age_s)}
        self._since = time.monotonic() - age_s

    def ended(self, name: str) -> None:
        """What was done since the phase before was `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def told(self) -> str:
        """All of it in a line; the next phases are another start's."""
        parts = [f"{name} {seconds:.1f}" for name, seconds in self.seconds.items() if seconds >= _SHOWN_S]
        line = f"{sum(self.seconds.values()):.1f} s ({', '.join(parts)})"
        self.seconds.clear()
        return line


def _is_launcher(words: list[str]) -> bool:
    """Whether these are the words of DeepSpeed's command, or of the launcher that it starts on each host."""
    return any(Path(word).name == "deepspeed" or word.startswith("deepspeed.launcher") for word in words[:4])


def _age_s(pid: int) -> float:
    """Seconds since a process began; 0 where the system does not tell."""
    fields = stat_fields(pid)
    if len(fields) <= _START_TIME:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_START_TIME]) / os.sysconf("SC_CLK_TCK"))


PHASES = _StartPhases()  # of this process
