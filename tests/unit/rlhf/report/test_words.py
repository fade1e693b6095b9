"""Which words of two answers differ."""

from __future__ import annotations

import re
import time

import pytest

from simple_llama.reinforcement_learning.rlhf.report.words import marked_differences


def test_words_that_differ_are_marked_in_runs() -> None:
    """By hand: "a grain" against "the seed", "20" against "12"; the rest is the same, blanks and line breaks stay."""
    before = "Rice is a grain.\n\nBoil it 20 minutes"
    after = "Rice is the seed.\n\nBoil it 12 minutes, please"
    assert marked_differences(before, after) == (
        "Rice is <del>a grain.</del>\n\nBoil it <del>20 minutes</del>",
        "Rice is <mark>the seed.</mark>\n\nBoil it <mark>12 minutes, please</mark>",
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("", "", ("", "")),
        ("", "Yes. ", ("", "<mark>Yes.</mark> ")),
        ("same  words ", "same  words ", ("same  words ", "same  words ")),
        ("one two", "one", ("one <del>two</del>", "one")),
        ("\u4f60\u597d", "\u4f60\u4eec", ("\u4f60<del>\u597d</del>", "\u4f60<mark>\u4eec</mark>")),
    ],
)
def test_ends_of_texts(before: str, after: str, expected: tuple[str, str]) -> None:
    """Nothing, blanks alone, the same, a longer one, a script without blanks."""
    assert marked_differences(before, after) == expected


def test_a_short_word_between_two_that_differ_is_no_match() -> None:
    """ "a" is common to both, but neither sentence shares more with the other."""
    assert marked_differences("dogs a cats", "birds a fish") == ("<del>dogs a cats</del>", "<mark>birds a fish</mark>")


def test_text_is_escaped() -> None:
    """Neither side brings a tag into the page."""
    for side in marked_differences("<script>x</script> a&b", "<b onload='x'> c"):
        assert set(re.findall(r"<[^>]*>", side)) <= {"<del>", "</del>", "<mark>", "</mark>"}


def test_long_answers_take_bounded_time() -> None:
    """What loops is the worst for a comparison: 50,000 words of two kinds each, of which 2,000 are compared."""
    started = time.perf_counter()
    before, after = marked_differences("a b " * 25_000 + "x", "a a b b " * 12_500 + "y")
    assert time.perf_counter() - started < 2
    assert before.count("not compared") == after.count("not compared") == 1
    assert re.sub(r"<span.*?</span> |</?del>", "", before) == "a b " * 25_000 + "x"


def test_every_word_stands_in_the_marked_text() -> None:
    """Without the marks, both texts are what they were; words outside of the marks are the same on both sides."""
    before, after = "the cat sat on the mat and slept", "a cat lay on a mat and then slept well"
    left, right = marked_differences(before, after)
    assert (re.sub("<[^>]*>", "", left), re.sub("<[^>]*>", "", right)) == (before, after)
    outside = [re.sub(r"<(del|mark)>.*?</\1>", " ", side).split() for side in (left, right)]
    assert outside == [["mat", "and", "slept"]] * 2  # "cat" and "on" are strays
