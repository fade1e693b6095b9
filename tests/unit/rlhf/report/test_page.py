"""A page: one file, everything from outside escaped."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from simple_llama.reinforcement_learning.rlhf.report.charts import Series, line_chart
from simple_llama.reinforcement_learning.rlhf.report.page import Page, number

BAD = "<script>alert('x')</script><img src=x onerror=alert(1)> & \" \0 \ud800"
VOID = {"meta"}


class Elements(HTMLParser):
    """Collects tags, and finds those that are left open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def whole_page(text: str) -> Page:
    """A page with every part, each of which says `text`."""
    page = Page(text, text)
    page.verdict([text, text])
    page.heading(text)
    page.paragraph(text)
    page.quotation(text, text)
    page.warnings([("alarm", text), (text, text)])
    page.table([text, "n"], [[text, 1.5], [None, math.nan]], text)
    page.figure(line_chart("Loss", "step", "nats", [Series("a", [0, 1], [1, 0])]), text)
    page.side_by_side(text, text, text + " more", (text, text), text)
    page.commands([text])
    return page


def test_nothing_from_outside_becomes_an_element() -> None:
    """No part lets a tag or an attribute through; the file is UTF-8, and its elements are closed in order."""
    html = whole_page(BAD).html()
    elements = Elements(html)
    assert elements.open == []
    assert not {"script", "img", "link", "iframe", "object", "base"} & set(elements.tags)
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name in ("src", "href")]
    assert "\0" not in html
    html.encode()


def test_a_page_needs_no_network_and_fits_any_screen() -> None:
    """No address in it; a viewport, both schemes of colour, a form for paper, tables that scroll."""
    html = whole_page("text").html()
    assert not re.search(r"https?://|url\(|@import", html)
    for needed in ('name="viewport"', "prefers-color-scheme: dark", "@media print", 'class="scroll"', 'lang="en"'):
        assert needed in html


def test_a_text_stays_what_it_was() -> None:
    """Read back, a prompt is the prompt, with its line breaks; an answer of blanks has ended at once."""
    page = Page("t")
    page.side_by_side("a <b>\n\n  c", "", " \n")
    html = page.html()
    assert '<div class="prompt text">a &lt;b&gt;\n\n  c</div>' in html
    assert html.count("(ended at once)") == 2


def test_a_very_long_answer_is_cut_and_said() -> None:
    """A page of a gigabyte serves nobody."""
    page = Page("t")
    page.side_by_side("p", "x" * 1_000_000, "y")
    html = page.html()
    assert len(html) < 60_000
    assert "(980,000 more characters)" in html


def test_charts_in_a_row_share_a_grid() -> None:
    """Two figures, a paragraph, one figure: two grids, none open at the end."""
    page = Page("t")
    for part in ("a", "b"):
        page.figure("<svg></svg>", part)
    page.paragraph("p")
    page.figure("<svg></svg>", "c")
    assert page.html().count('<div class="figures">') == page.html().count('<div class="figures">') == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.6931472, "0.6931"),
        (1234567, "1,234,567"),
        (1234.5, "1,234"),
        (5e-7, "5e-07"),
        (2.0, "2"),
        (1.5e12, "1,500,000,000,000"),
        (1.5e20, "1.500e+20"),
        (-0.25, "-0.25"),
        (True, "yes"),
        (None, "not recorded"),
        (math.nan, "not a number"),
        (-math.inf, "-infinite"),
    ],
)
def test_numbers_for_a_reader(value: float | None, shown: str) -> None:
    """Four digits that count."""
    assert number(value) == shown
