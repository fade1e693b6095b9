"""Charts: where values lie, and what is odd about them."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest

from simple_llama.reinforcement_learning.rlhf.report.axes import Axis
from simple_llama.reinforcement_learning.rlhf.report.charts import (
    Bar,
    Series,
    bar_chart,
    histogram,
    line_chart,
    reliability_chart,
    scatter,
)
from simple_llama.reinforcement_learning.rlhf.run.statistics import ReliabilityBin

NAN, INF = math.nan, math.inf


def texts(svg: str) -> list[str]:
    """All that is written in a chart; it is sound XML."""
    return [node.text or "" for node in ET.fromstring(svg).iter("text")]


def curves(svg: str) -> list[str]:
    """The paths of the curves, without those of the legend."""
    return re.findall(r'<path d="(M[^H"]*)" class="curve', svg)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0, 10), ("0", "2", "4", "6", "8", "10")),
        ((0, 1), ("0.0", "0.2", "0.4", "0.6", "0.8", "1.0")),
        ((-1, 1), ("-1.0", "-0.5", "0.0", "0.5", "1.0")),
        ((0, 5e-7), ("0", "1e-7", "2e-7", "3e-7", "4e-7", "5e-7")),
        ((0, 20_000), ("0", "5,000", "10,000", "15,000", "20,000")),
        ((1e12, 2e12), ("1.0e12", "1.2e12", "1.4e12", "1.6e12", "1.8e12", "2.0e12")),
        ((NAN, INF, 3, 7), ("3", "4", "5", "6", "7")),
    ],
)
def test_ticks_are_round_and_told_apart(values: tuple[float, ...], labels: tuple[str, ...]) -> None:
    """1, 2 or 5 times a power of ten; tiny and huge ones with an exponent; what is not finite has no say."""
    assert Axis.of(values).labels == labels


@pytest.mark.parametrize(
    "values", [(), (NAN,), (0,), (5, 5), (-3e-310,), (1e308, -1e308), (INF, -INF), (1.0, 1.0 + 1e-15)]
)
def test_an_axis_of_any_values_has_a_width(values: tuple[float, ...]) -> None:
    """None, one, all the same, the largest there are: a range with ticks in it, all finite."""
    axis = Axis.of(values, margin=0.04)
    assert axis.low < axis.high
    assert math.isfinite(axis.high - axis.low)
    assert len(axis.ticks) >= 2
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert all(len(label) <= 9 for label in axis.labels)  # there is room for it


def test_a_curve_goes_through_its_points_and_breaks_at_gaps() -> None:
    """Three finite points with a NaN between: two strokes, and the chart says that one is missing."""
    svg = line_chart("Loss", "step", "nats", [Series("train", [0, 1, 2, 3], [1.0, 2.0, NAN, 0.0])])
    (curve,) = curves(svg)
    assert curve.count("M") == 2
    assert curve.count("L") == 1
    assert "not shown: 1 that are no finite numbers" in texts(svg)
    points = [tuple(map(float, pair.split())) for pair in re.split("[ML]", curve)[1:]]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][1] < points[0][1] < points[2][1]  # the y axis of SVG points down


@pytest.mark.parametrize("ys", [(0, 0), ()])
def test_no_share_below_nothing(ys: tuple[float, ...]) -> None:
    """Curves that stay at the value that the axis is to show lie at its lower end: 0 to 1."""
    svg = line_chart("t", "step", "share", [Series("a", range(len(ys)), ys)], y_from=0.0)
    labels = [text for text in texts(svg) if re.fullmatch(r"-?\d\.\d", text)]
    assert labels[:3] == ["0.0", "0.5", "1.0"]


def test_a_band_lies_around_its_curve() -> None:
    """Its outline runs along the upper ends and back along the lower ones."""
    svg = line_chart("A", "step", "share", [Series("a", [0, 1], [0.5, 0.5], low=[0.4, 0.4], high=[0.6, 0.6])])
    (outline,) = re.findall(r'd="(M[^"]*)z" class="band', svg)
    ys = [float(pair.split()[1]) for pair in re.split("[ML]", outline)[1:]]
    middle = float(curves(svg)[0].split("L")[1].split()[1])
    assert len(ys) == 4
    assert ys[0] == ys[1] < middle < ys[2] == ys[3]


def test_long_curves_keep_their_spikes() -> None:
    """Of 100,000 points some hundred are drawn, among them the two that stand out."""
    ys = [5.0] * 100_000
    ys[77_777], ys[33_333] = 9.0, 1.0
    svg = line_chart("Norm", "step", "", [Series("norm", range(100_000), ys)])
    assert len(svg) < 12_000
    heights = [float(pair.split()[1]) for pair in re.split("[ML]", curves(svg)[0])[1:]]
    assert max(heights) - min(heights) > 180  # of 200
    assert {"2", "8"} <= set(texts(svg))  # ticks of the y axis


@pytest.mark.parametrize(
    "svg",
    [
        line_chart("T", "x", "y", []),
        line_chart("T", "x", "y", [Series("a", [], []), Series("b", [NAN], [NAN])]),
        histogram("T", "x", {"a": []}),
        histogram("T", "x", {}),
        scatter("T", "x", "y", {"a": ([], [])}),
        reliability_chart("T", {}),
        bar_chart("T", "x", []),
    ],
)
def test_nothing_is_said_to_be_nothing(svg: str) -> None:
    """Every kind of chart of no values says so."""
    assert "nothing recorded" in texts(svg)


def test_one_point_is_seen() -> None:
    """A marker, and a whisker for its interval, where a line would have no length."""
    svg = line_chart("T", "x", "y", [Series("a", [3], [0.5], low=[0.4], high=[0.6])])
    assert re.search(r'class="f0" transform="translate', svg)
    assert re.search(r'd="M[\d.]+ [\d.]+V[\d.]+" class="whisker', svg)


def test_words_of_users_are_escaped() -> None:
    """Names and titles come from run names and settings."""
    bad = "<script>alert(1)</script>&\"'"
    charts = [
        line_chart(bad, bad, bad, [Series(bad, [0], [1]), Series("b", [0], [1])], levels={bad: 1.0}),
        histogram(bad, bad, {bad: [1.0], "b": [2.0]}, unit=bad),
        scatter(bad, bad, bad, {bad: ([1.0], [1.0]), "b": ([1.0], [1.0])}),
        reliability_chart(bad, {bad: [ReliabilityBin(0.5, 0.6, 4, 0.5, 0.5)]}),
        bar_chart(bad, bad, [Bar(bad, 1.0, 0.5, 1.5)]),
    ]
    for svg in charts:
        assert "<script" not in svg
        assert {node.tag for node in ET.fromstring(svg).iter()} <= {"svg", "title", "desc", "path", "text", "g"}


def test_entries_of_a_legend_do_not_overlap() -> None:
    """Each stands right of the end of the one before it, or in a line below; none leaves the chart."""
    names = ["a", "a longer name", "x" * 100, "b", "another one of them", "c"]
    svg = line_chart("T", "x", "y", [Series(name, [0, 1], [0, i]) for i, name in enumerate(names)])
    entries = [
        (float(x), float(y), len(name))
        for x, y, name in re.findall(r'</g><text x="([\d.]+)" y="([\d.]+)">([^<]*)</text>', svg)
    ]
    assert len(entries) == len(names)
    for (x, y, letters), (next_x, next_y, _) in itertools.pairwise(entries):
        assert next_y > y or next_x - 28 >= x + 6 * letters
    assert all(x + 6 * letters <= 420 for x, _, letters in entries)


def test_series_are_told_apart_without_colour() -> None:
    """Eight series have eight dashes."""
    svg = line_chart("T", "x", "y", [Series(str(i), [0, 1], [0, i]) for i in range(8)])
    drawn = re.findall(r'class="curve c(\d)"( stroke-dasharray="[^"]*")?', svg)
    assert len(set(drawn)) == len({dash for _, dash in drawn}) == 8


def test_a_histogram_counts_each_value_once() -> None:
    """0 to 3 in four bins: 1, 2, 0 and 3 values, the largest in the last bin; its y axis ends at 3."""
    svg = histogram("T", "x", {"a": [0, 1, 1, 3, 3, 3, NAN]}, bins=4)
    steps = [float(y) for y in re.findall(r"V([\d.]+)H", curves_of_steps(svg))]
    bottom, top = max(steps), min(steps)
    assert [round(3 * (bottom - y) / (bottom - top)) for y in steps] == [1, 2, 0, 3]
    assert "not shown: 1 that are no finite numbers" in texts(svg)


def curves_of_steps(svg: str) -> str:
    """The outline of a histogram's group."""
    (outline,) = re.findall(r'<path d="(M[^"]*)" class="curve', svg)
    return outline


def test_a_scatter_draws_every_point() -> None:
    """Dots for one group, crosses for the other; those that are no numbers are said."""
    svg = scatter("T", "x", "y", {"a": ([0, 1, NAN], [0, 1, 1]), "b": ([0.5], [0.5])})
    dots, crosses = re.findall(r'<path d="(M[^"]*h0)" class="dots', svg), re.findall(r'd="(M[^"]*l5 5[^"]*)"', svg)
    assert dots[-1].count("h0") == 2  # the first is the legend's
    assert crosses[-1].count("l5 5") == 1
    assert "not shown: 1 that are no finite numbers" in texts(svg)


def test_bars_are_as_long_as_their_values() -> None:
    """0.8 is twice as long as 0.4; a value that is no number has a name and no bar."""
    svg = bar_chart("T", "share", [Bar("a", 0.8), Bar("b", 0.4), Bar("c", NAN)])
    spans = [float(right) - float(left) for left, right in re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)v11', svg)]
    assert spans == [pytest.approx(2 * spans[1], abs=0.3), spans[1]]
    assert "c: not a number" in texts(svg)
