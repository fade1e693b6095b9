"""Whether the machine was left to a bench while it measured: what others had of its cores (Linux alone says)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

MOST_OTHERS = 0.05  # of the cores' time that others may have had, other guests of the host among them
_LEAST_SECONDS = 0.1  # of theirs that can be told from the system's ticks
_TICKS = 100.0  # a second, as /proc/stat counts (man 5 proc, USER_HZ)


@dataclass(frozen=True)
class Share:
    """What was had of the cores' time."""

    cpu: float  # CPU seconds of this process, its threads and its children that have ended
    others: float  # share of other processes of this machine
    steal: float  # share of other guests of its host
    load: float  # processes that wanted to run, on average over the last minute
    seconds: float = 1.0  # CPU seconds of all these others
    is_known: bool = True  # False where the system does not say

    @property
    def is_quiet(self) -> bool:
        """Whether times that were taken meanwhile can be compared."""
        return self.others + self.steal <= MOST_OTHERS or self.seconds < _LEAST_SECONDS

    def __str__(self) -> str:
        if not self.is_known:
            return "what others had is not known"
        return f"others {self.others:.1%} of the cores, steal {self.steal:.1%}, load {self.load:.1f}"


class CoreWatch:
    """Looks at the cores from its making on."""

    def __init__(self) -> None:
        self._start, self._own, self._counted = time.perf_counter(), own_cpu(), _counted()

    def share(self) -> Share:
        """Of the time until now."""
        own, counted = own_cpu() - self._own, _counted()
        cores_s = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        if counted is None or self._counted is None or cores_s <= 0:
            return Share(own, 0.0, 0.0, 0.0, is_known=False)
        busy, steal = (now - before for now, before in zip(counted, self._counted, strict=True))
        others = max(0.0, busy - own)
        return Share(own, others / cores_s, steal / cores_s, os.getloadavg()[0], others + steal)


def own_cpu() -> float:
    """CPU seconds of this process, its threads and its children that have ended."""
    return sum(os.times()[:4])


def _counted() -> tuple[float, float] | None:
    """Seconds that all cores were busy, and that the host gave to others; None where the system does not say."""
    try:
        # user nice system idle iowait irq softirq steal
        fields = [float(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq) / _TICKS, steal / _TICKS
