"""Charts as SVG, by hand: curves with bands, histograms, points, reliability, bars.

They follow the colours of style.py; series are told apart by dashes and markers too. A value that is no finite number
is left out, and the chart says how many were. N values of a series.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simple_llama.reinforcement_learning.rlhf.report.axes import DASHES, Axis, Entry, Frame
from simple_llama.reinforcement_learning.rlhf.report.page import number
from simple_llama.reinforcement_learning.rlhf.run.statistics import ReliabilityBin, accuracy_interval

_COLOURS = 8
_MOST_POINTS = 400  # of a curve: of more, the lowest and the highest of each stretch are drawn
_MARKED = 30  # points of a curve that have markers, at most
_MOST_DOTS = 2000  # of a group of points
_MARKERS = (  # around (0, 0)
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3.2 -3.2h6.4v6.4h-6.4z",
    "M0 -4.2l4.2 7.2h-8.4z",
    "M0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z",
)


@dataclass(frozen=True)
class Series:
    """A curve: N points in the order of x, with a band from `low` to `high` where these are given."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    levels: Mapping[str, float] | None = None,
    y_from: float | None = None,
) -> str:
    """Curves over a common x. A point that is no number is a gap.

    Args:
        levels: values drawn as level lines, by name: what the curves are compared with.
        y_from: a value that the y axis shows too, such as 0.
    """
    levels = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    thin = [_thinned(one) for one in series]
    xs = [x for one in thin for x in one.xs]
    bounds = [value for one in thin for side in (one.ys, one.low or (), one.high or ()) for value in side]
    extra = [] if y_from is None else [y_from]
    if extra and all(value == y_from for value in (*bounds, *levels.values()) if math.isfinite(value)):
        extra.append(extra[0] + 1)  # level curves: an axis around 0 would show shares and counts below it
    axes = (
        Axis.of(xs, 6, whole=all(float(x).is_integer() for x in xs if math.isfinite(x))),
        Axis.of([*bounds, *levels.values(), *extra], margin=0.04),
    )
    legend = (
        [Entry(one.name, _curve_sample(i)) for i, one in enumerate(series)] if len(series) + len(levels) > 1 else []
    )
    legend += [Entry(f"{name}: {number(value, 3)}", _level_sample(i)) for i, (name, value) in enumerate(levels.items())]
    frame = Frame(title, (x_label, y_label), axes, legend)
    for i, value in enumerate(levels.values()):
        frame.add(f'<path d="M{frame.left:g} {frame.y(value):g}H{frame.right:g}" class="level"{_dash(i + 2)}/>')
    for i, one in enumerate(thin):
        _draw_curve(frame, one, i)
    if not any(_points(one) for one in thin):
        frame.say_empty()
    told = [*map(_described, series), *(f"{name}: {number(value)}" for name, value in levels.items())]
    return frame.svg("; ".join([f"{y_label} over {x_label}", *told]), sum(map(_left_out, series)))


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    diagonal: bool = False,
) -> str:
    """Points of each group (xs, ys). `diagonal`: the line where x and y are equal, drawn over common ranges."""
    kept = {name: _finite_points(xs, ys) for name, (xs, ys) in groups.items()}
    xs, ys = ([point[i] for points in kept.values() for point in points] for i in range(2))
    if diagonal:
        xs = ys = [*xs, *ys]
    legend = [Entry(name, _dots([(0.0, 0.0)], i)) for i, name in enumerate(groups)] if len(groups) > 1 else []
    frame = Frame(title, (x_label, y_label), (Axis.of(xs, margin=0.03), Axis.of(ys, margin=0.03)), legend, diagonal)
    if frame.x_axis.low < 0 < frame.x_axis.high:
        frame.add(f'<path d="M{frame.x(0):g} {frame.top:g}V{frame.bottom:g}" class="level"{_dash(2)}/>')
    if diagonal:
        frame.add(f'<path d="M{frame.left:g} {frame.bottom:g}L{frame.right:g} {frame.top:g}" class="level"{_dash(1)}/>')
    for i, points in enumerate(kept.values()):
        stride = -(-len(points) // _MOST_DOTS) or 1
        frame.add(_dots([(frame.x(x), frame.y(y)) for x, y in points[::stride]], i))
    if not xs:
        frame.say_empty()
    told = [f"{name}: {len(points)} points" for name, points in kept.items()]
    left_out = sum(len(xs) - len(kept[name]) for name, (xs, _) in groups.items())
    return frame.svg("; ".join([f"{y_label} against {x_label}", *told]), left_out)


def histogram(
    title: str, x_label: str, groups: Mapping[str, Sequence[float]], bins: int = 24, unit: str = "pairs"
) -> str:
    """How many values of each group lie where: outlines over common bins. `unit`: what is counted."""
    finite = {name: [float(value) for value in values if math.isfinite(value)] for name, values in groups.items()}
    together = [value for values in finite.values() for value in values]
    axis = Axis.of(together)
    counts = {name: _counted(values, axis, bins) for name, values in finite.items()}
    tallest = max((count for group in counts.values() for count in group), default=0)
    legend = [Entry(name, _curve_sample(i, marker=False)) for i, name in enumerate(groups)] if len(groups) > 1 else []
    frame = Frame(title, (x_label, unit), (axis, Axis.of([0, max(tallest, 1)], whole=True)), legend)
    if axis.low < 0 < axis.high:
        frame.add(f'<path d="M{frame.x(0):g} {frame.top:g}V{frame.bottom:g}" class="level"{_dash(2)}/>')
    for i, group in enumerate(counts.values()):
        edges = [axis.low + (axis.high - axis.low) * k / bins for k in range(bins + 1)]
        steps = "".join(f"V{frame.y(count):g}H{frame.x(edges[k + 1]):g}" for k, count in enumerate(group))
        outline = f"M{frame.left:g} {frame.bottom:g}{steps}V{frame.bottom:g}"
        colour = i % _COLOURS
        frame.add(
            f'<path d="{outline}z" class="band f{colour}"/><path d="{outline}" class="curve c{colour}"{_dash(i)}/>'
        )
    if not together:
        frame.say_empty()
    told = [f"{name}: {len(values)} values{_extent(values)}" for name, values in finite.items()]
    left_out = sum(len(values) - len(finite[name]) for name, values in groups.items())
    return frame.svg("; ".join([f"number of {unit} by {x_label}", *told]), left_out)


def reliability_chart(title: str, models: Mapping[str, Sequence[ReliabilityBin]]) -> str:
    """How often each model is right where it is about so sure, with Wilson's intervals, beside the diagonal of honest
    ones."""
    labels = ("probability by the model, sigmoid of the reward margin", "share of pairs it gets right")
    series = [_reliability_series(name, bins) for name, bins in models.items()]
    lowest = min((y for one in series for side in (one.xs, one.ys, one.low or ()) for y in side), default=0.0)
    axis = Axis.of((0.5 if lowest >= 0.5 else 0.0, 1.0))
    legend = [Entry(one.name, _curve_sample(i)) for i, one in enumerate(series)]
    frame = Frame(title, labels, (axis, axis), [*legend, Entry("as often as stated", _level_sample(0))], square=True)
    frame.add(f'<path d="M{frame.left:g} {frame.bottom:g}L{frame.right:g} {frame.top:g}" class="level"{_dash(2)}/>')
    for i, one in enumerate(series):
        _draw_curve(frame, one, i, whiskers=True)
    if not any(_points(one) for one in series):
        frame.say_empty()
    told = [f"{labels[1]} over {labels[0]}", *map(_described, series)]
    return frame.svg("; ".join(told), sum(map(_left_out, series)))


def _reliability_series(name: str, bins: Sequence[ReliabilityBin]) -> Series:
    """The bins as points."""
    bounds = [accuracy_interval(one.accuracy, one.count) for one in bins]
    lows, highs = [low for low, _ in bounds], [high for _, high in bounds]
    return Series(name, [one.confidence for one in bins], [one.accuracy for one in bins], lows, highs)


@dataclass(frozen=True)
class Bar:
    """A named value, with its interval where there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def bar_chart(title: str, value_label: str, bars: Sequence[Bar], most: float = 0.0) -> str:
    """Bars from 0, each below its name, with intervals as whiskers. `most`: a value that the axis shows too."""
    known = [value for bar in bars for value in (bar.value, bar.low, bar.high) if value is not None]
    rows = Axis(0.0, max(len(bars), 1), (), ())
    axes = (Axis.of([0.0, most, *known], 6), rows)
    frame = Frame(title, (value_label, ""), axes, height=36.0 * max(len(bars), 1))
    for i, bar in enumerate(bars):
        top = frame.top + 36 * i
        shown = number(bar.value, 3)
        frame.add(f'<text x="{frame.left + 2:g}" y="{top + 12:g}">{html.escape(bar.name[:50])}: {shown}</text>')
        if not math.isfinite(bar.value):
            continue
        left, right = sorted((frame.x(0.0), frame.x(bar.value)))
        frame.add(f'<path d="M{left:g} {top + 17:g}H{right:g}v11H{left:g}z" class="f0" opacity=".75"/>')
        if bar.low is not None and bar.high is not None and math.isfinite(bar.low + bar.high):
            low, high = frame.x(bar.low), frame.x(bar.high)
            frame.add(f'<path d="M{low:g} {top + 18:g}v9m0 -4.5H{high:g}m0 -4.5v9" class="error"/>')
    if not bars:
        frame.say_empty()
    told = [f"{bar.name}: {number(bar.value, 3)}" for bar in bars]
    return frame.svg("; ".join([value_label, *told]))


# === Parts ===


def _points(one: Series) -> list[tuple[float, float]]:
    """The points of a curve that can be drawn."""
    return _finite_points(one.xs, one.ys)


def _finite_points(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]


def _thinned(one: Series) -> Series:
    """A curve of at most some hundred points: of each stretch the lowest and the highest, so that spikes stay."""
    count = len(one.xs)
    if count <= _MOST_POINTS:
        return one
    stretches = _MOST_POINTS // 2
    kept: list[int] = []
    for k in range(stretches):
        inside = [i for i in range(count * k // stretches, count * (k + 1) // stretches) if math.isfinite(one.ys[i])]
        if inside:
            kept += sorted({min(inside, key=one.ys.__getitem__), max(inside, key=one.ys.__getitem__)})

    def chosen(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [values[i] for i in kept]

    return Series(one.name, chosen(one.xs) or [], chosen(one.ys) or [], chosen(one.low), chosen(one.high))


def _draw_curve(frame: Frame, one: Series, index: int, whiskers: bool = False) -> None:
    """A curve with its band or whiskers, and markers where its points are few."""
    colour = index % _COLOURS
    if one.low is not None and one.high is not None:
        spans = [
            (frame.x(x), frame.y(low), frame.y(high))
            for x, low, high in zip(one.xs, one.low, one.high, strict=True)
            if math.isfinite(x) and math.isfinite(low) and math.isfinite(high)
        ]
        if whiskers or len(spans) == 1:
            lines = "".join(f"M{x:g} {low:g}V{high:g}" for x, low, high in spans)
            frame.add(f'<path d="{lines}" class="whisker c{colour}"/>')
        elif spans:
            there = "L".join(f"{x:g} {high:g}" for x, _, high in spans)
            back = "L".join(f"{x:g} {low:g}" for x, low, _ in reversed(spans))
            frame.add(f'<path d="M{there}L{back}z" class="band f{colour}"/>')
    line, gap = "", True
    for x, y in zip(one.xs, one.ys, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            line += f"{'M' if gap else 'L'}{frame.x(x):g} {frame.y(y):g}"
            gap = False
        else:
            gap = True
    if line:
        frame.add(f'<path d="{line}" class="curve c{colour}"{_dash(index)}/>')
    points = _points(one)
    if len(points) <= _MARKED:
        shape = _MARKERS[index % len(_MARKERS)]
        frame.add(
            *(
                f'<path d="{shape}" class="f{colour}" transform="translate({frame.x(x):g} {frame.y(y):g})"/>'
                for x, y in points
            )
        )


def _dots(points: Sequence[tuple[float, float]], index: int) -> str:
    """Points as one path: round ones, and crosses for the second group."""
    colour = index % _COLOURS
    if index % 2:
        crosses = "".join(f"M{x - 2.5:.1f} {y - 2.5:.1f}l5 5m0 -5l-5 5" for x, y in points)
        return f'<path d="{crosses}" class="whisker c{colour}"/>'
    return f'<path d="{"".join(f"M{x:g} {y:g}h0" for x, y in points)}" class="dots c{colour}"/>'


def _curve_sample(index: int, marker: bool = True) -> str:
    """A piece of curve for a legend."""
    colour = index % _COLOURS
    shape = f'<path d="{_MARKERS[index % len(_MARKERS)]}" class="f{colour}"/>' if marker else ""
    return f'<path d="M-11 0H11" class="curve c{colour}"{_dash(index)}/>{shape}'


def _level_sample(index: int) -> str:
    """A piece of a level line."""
    return f'<path d="M-11 0H11" class="level"{_dash(index + 2)}/>'


def _dash(index: int) -> str:
    """The dash of a series as an attribute."""
    dash = DASHES[index % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _counted(values: Sequence[float], axis: Axis, bins: int) -> list[int]:
    """How many values lie in each of `bins` equal parts of the axis; an upper end belongs to its bin's right."""
    counts = [0] * bins
    for value in values:
        counts[min(int(axis.share(value) * bins), bins - 1)] += 1
    return counts


def _described(one: Series) -> str:
    """A curve in words."""
    points = _points(one)
    if not points:
        return f"{one.name}: nothing recorded"
    ends = f"{number(points[0][1])} at {number(points[0][0])} to {number(points[-1][1])} at {number(points[-1][0])}"
    return f"{one.name}: {len(points)} points, from {ends}"


def _left_out(one: Series) -> int:
    """Points of a curve that cannot be drawn."""
    return len(one.xs) - len(_points(one))


def _extent(values: Sequence[float]) -> str:
    return f" from {number(min(values))} to {number(max(values))}" if values else ""
