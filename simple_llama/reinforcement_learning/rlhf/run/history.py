"""The recorded numbers of a run as columns, for those who judge them: metrics.jsonl, line after line."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    """One metric: the steps that it was recorded at, rising, and its values there. N points."""

    steps: np.ndarray  # (N,) float64
    values: np.ndarray  # (N,) float64

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    @property
    def step(self) -> int:
        """The newest step."""
        return int(self.steps[-1])

    def since(self, holds: np.ndarray) -> int:
        """The step from which on `holds` (N,) is true without a break; it has to be true at the end."""
        assert holds[-1]
        broken = np.flatnonzero(~holds)
        return int(self.steps[broken[-1] + 1 if len(broken) else 0])

    def trained(self) -> Curve:
        """The points after step 0."""
        kept = self.steps > 0
        return Curve(self.steps[kept], self.values[kept])


class History:
    """Columns that grow line by line."""

    def __init__(self) -> None:
        self.newest: Collection[str] = ()  # names of the newest line
        self._columns: dict[str, tuple[array[float], array[float]]] = {}

    def add(self, record: Mapping[str, float]) -> None:
        """Adds a line; what is no finite number is left out."""
        step, self.newest = record["step"], record.keys()
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = self._columns.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(value)

    def last(self, name: str) -> float | None:
        """The newest value of a metric; None where it was never recorded."""
        return self._columns[name][1][-1] if name in self._columns else None

    def curve(self, name: str) -> Curve:
        """A metric, without points where it was never recorded."""
        steps, values = self._columns.get(name, (array("d"), array("d")))
        return Curve(np.array(steps), np.array(values))
