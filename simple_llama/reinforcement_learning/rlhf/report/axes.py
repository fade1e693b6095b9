"""The frame of a chart: ranges, round ticks, title, legend, and where a value lies. Lengths are SVG units, about a
pixel of a phone."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WIDTH = 420.0
_PLOT_HEIGHT = 200.0
_LETTER = 6.6  # width of a letter of 12.5 units, roughly the mean
_LINE = 17.0  # from one line of text to the next
_HUGE = 1e300  # beyond it the width of a range is no number any more
DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4", "4 2", "1 4", "10 2 2 2 2 2")


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    @classmethod
    def of(cls, values: Iterable[float], most_ticks: int = 5, margin: float = 0.0, whole: bool = False) -> Axis:
        """The axis of the finite ones among `values`, wider by `margin` of their range at both ends.

        Args: whole: ticks at whole numbers alone.
        """
        finite = [min(max(float(value), -_HUGE), _HUGE) for value in values if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
        size = max(abs(low), abs(high))
        if high - low <= 1e-9 * size or high - low < _HUGE**-1:  # one value: room around it
            room = 0.1 * size if size > _HUGE**-1 else 0.5
            low, high = low - room, high + room
        else:
            low, high = low - margin * (high - low), high + margin * (high - low)
        step = _round_step((high - low) / most_ticks, whole)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        ticks = tuple(i * step for i in range(first, last + 1))
        return cls(low, high, ticks, tuple(_tick_labels(ticks, step)))

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the lower end, 1 at the upper one; beyond them at the nearer."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


def _round_step(least: float, whole: bool) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= least * (1 - 1e-9)), 10 * power)
    return max(step, 1.0) if whole else step


def _tick_labels(ticks: Sequence[float], step: float) -> list[str]:
    """Ticks as text, all with as many digits as tell neighbours apart."""
    size = max(map(abs, ticks), default=0.0)
    if size >= 1e6 or 0 < size < 1e-3:
        digits = max(0, math.floor(math.log10(size)) - math.floor(math.log10(step) + 1e-9))
        return [_scientific(tick, digits) for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{0.0 if abs(tick) < step / 2 else tick:,.{decimals}f}" for tick in ticks]


def _scientific(value: float, digits: int) -> str:
    """2e-7 instead of 2.000e-07."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True)
class Entry:
    """A line of the legend: a name, and how what it names is drawn."""

    name: str
    sample: str  # SVG of 22 by 10 units around its own middle


class Frame:
    """A chart's frame: everything but what is measured. `x` and `y` say where a value lies."""

    def __init__(
        self,
        title: str,
        labels: tuple[str, str],
        axes: tuple[Axis, Axis],
        legend: Sequence[Entry] = (),
        square: bool = False,
        height: float = _PLOT_HEIGHT,
    ):
        """Args: labels: of the axes, x and y, with their units. square: both axes as long. height: of the y axis."""
        self.x_axis, self.y_axis = axes
        self._parts: list[str] = []
        self.title = title
        top = self._text_above(title, labels[1], legend)
        longest = max((len(label) for label in self.y_axis.labels), default=1)
        self.left = 10 + min(_LETTER * 1.1 * longest, 90.0)
        self.right = _WIDTH - 12
        self.top = top + 11
        self.bottom = self.top + (min(self.right - self.left, 300.0) if square else height)
        if square:
            self.right = self.left + self.bottom - self.top
        self._draw_axes(labels[0])

    def x(self, value: float) -> float:
        """Units from the left."""
        return round(self.left + self.x_axis.share(value) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """Units from above."""
        return round(self.bottom - self.y_axis.share(value) * (self.bottom - self.top), 1)

    def add(self, *parts: str) -> None:
        """Draws SVG over what is there."""
        self._parts.extend(parts)

    def svg(self, description: str, left_out: int = 0) -> str:
        """The chart; `description` says in words what is in it, to those who do not see it.

        Args: left_out: values that are no finite numbers, which the chart says below.
        """
        height = self.bottom + 42
        if left_out:
            height += _LINE
            note = f"not shown: {left_out:,} that are no finite numbers"
            self.add(f'<text x="6" y="{height - 6:g}" class="soft">{note}</text>')
        return (
            f'<svg viewBox="0 0 {_WIDTH:g} {height:.0f}" role="img"><title>{html.escape(self.title)}</title>'
            f"<desc>{html.escape(description)}</desc>{''.join(self._parts)}</svg>"
        )

    def _text_above(self, title: str, y_label: str, legend: Sequence[Entry]) -> float:
        """Title, legend and the label of the y axis from above to below; returns where they end."""
        at = 16.0
        for line in _wrapped(title, 52):
            self.add(f'<text x="6" y="{at:g}" class="title">{html.escape(line)}</text>')
            at += _LINE
        left = 6.0
        for number, entry in enumerate(legend):
            name = _cut(entry.name, 54)
            width = 30 + _LETTER * len(name) + 14
            if number and left + width > _WIDTH:
                left, at = 6.0, at + _LINE
            self.add(
                f'<g transform="translate({left + 11:g} {at - 4:g})">{entry.sample}</g>'
                f'<text x="{left + 28:g}" y="{at:g}">{html.escape(name)}</text>'
            )
            left += width
        if legend:
            at += _LINE
        if y_label:
            self.add(f'<text x="6" y="{at:g}" class="soft">{html.escape(_cut(y_label, 60))}</text>')
        return at

    def _draw_axes(self, x_label: str) -> None:
        """Lines and ticks."""
        for tick, label in zip(self.y_axis.ticks, self.y_axis.labels, strict=True):
            y = self.y(tick)
            self.add(
                f'<path d="M{self.left:g} {y:g}H{self.right:g}" class="grid"/>'
                f'<text x="{self.left - 6:g}" y="{y + 4:g}" text-anchor="end" class="soft">{label}</text>'
            )
        shown, last = [], -math.inf
        for tick, label in zip(self.x_axis.ticks, self.x_axis.labels, strict=True):
            x, half = self.x(tick), _LETTER * len(label) / 2
            if x - half > last + 6 and x + half <= _WIDTH:
                shown.append((x, label))
                last = x + half
        for x, label in shown:
            self.add(
                f'<path d="M{x:g} {self.bottom:g}v4" class="axis"/>'
                f'<text x="{x:g}" y="{self.bottom + 18:g}" text-anchor="middle" class="soft">{label}</text>'
            )
        self.add(f'<path d="M{self.left:g} {self.bottom:g}H{self.right:g}" class="axis"/>')
        middle = (self.left + self.right) / 2
        label = html.escape(_cut(x_label, 55))
        self.add(f'<text x="{middle:g}" y="{self.bottom + 36:g}" text-anchor="middle" class="soft">{label}</text>')

    def say_empty(self) -> None:
        """Where nothing is to be drawn."""
        x, y = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        self.add(f'<text x="{x:g}" y="{y:g}" text-anchor="middle" class="soft">nothing recorded</text>')


def _cut(text: str, most: int) -> str:
    """Text that has room."""
    return text if len(text) <= most else text[: most - 3] + "..."


def _wrapped(text: str, most: int) -> list[str]:
    """Lines of at most `most` letters, two of them."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return [_cut(line, most) for line in (lines if len(lines) <= 2 else [lines[0], " ".join(lines[1:])])]
