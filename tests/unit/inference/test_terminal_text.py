"""Text as tokens come, and side by side."""

from __future__ import annotations

from collections.abc import Sequence

from simple_llama.inference.terminal_text import TextStream, _wrapped, printable, side_by_side


def utf8(ids: Sequence[int]) -> str:
    """A byte a token."""
    return bytes(ids).decode("utf-8", errors="replace")


def test_no_half_character_is_given_out() -> None:
    """A euro sign is three bytes: nothing for two of them. What never becomes a character is given out at the end, and
    in the middle once text follows."""
    stream = TextStream(utf8)
    assert [stream.add(byte) for byte in "a\u20acb".encode()] == ["a", "", "", "\u20ac", "b"]
    assert [stream.add(byte) for byte in b"\xe2\x82"] == ["", ""]
    assert stream.add(ord("c")) == "\ufffdc" and stream.close() == ""
    stream.add(0xE2)
    assert stream.close() == "\ufffd" and stream.text == "a\u20acb\ufffdc\ufffd"


def test_white_space_at_the_end_waits_for_text() -> None:
    """A decoder that strips, as chats' do: what is given out adds up to its text."""
    stream = TextStream(lambda ids: utf8(ids).strip())
    given = [stream.add(byte) for byte in b" a \n b \n"]
    assert given == ["", "a", "", "", "", " \n b", "", ""] and stream.close() == ""


def test_a_decoder_that_takes_something_back() -> None:
    """One that drops the space before a full stop, two tokens later: nothing is taken back, and all stands there anew
    at the end."""
    texts = {1: "a", 2: "a ", 3: "a.", 4: "a.b"}
    stream = TextStream(lambda ids: texts[len(ids)])
    assert [stream.add(0) for _ in range(4)] == ["a", " ", "", ""]
    assert stream.close() == "\na.b"


def test_what_steers_a_terminal_is_spelled_out() -> None:
    """Escape, bell, a C1 control, half of a surrogate pair; not tabs, line ends, nor letters."""
    assert printable("\u202eabc\u2066\u05d0\u200f") == "\\u202eabc\\u2066\u05d0\u200f"
    assert printable("a\x1b[2J\x07\x9b\ud800\t\u00e9\n") == "a\\x1b[2J\\x07\\x9b\\ud800\t\u00e9\n"


def test_lines_fit() -> None:
    """Broken at spaces; within a word of 7 at width 5; wide characters take two columns, an accent none."""
    assert _wrapped("one two  three", 7) == ["one two", "three"]
    assert _wrapped("abcdefg hi\n\n  x", 5) == ["abcde", "fg hi", "", "  x"]
    assert _wrapped("\u6f22\u5b57\u6f22\u5b57", 5) == ["\u6f22\u5b57", "\u6f22\u5b57"]
    assert _wrapped("e\u0301" * 5, 5) == ["e\u0301" * 5]
    assert _wrapped("", 5) == [""]


def test_two_columns() -> None:
    """35 columns: 16 each and a bar between. 34 are too few: one under the other."""
    found = side_by_side(["one", "two"], ["some words that are long", "\u6f22 x"], 35)
    assert found.split("\n") == [
        "one              | two",
        "---------------- | ----------------",
        "some words that  | \u6f22 x",
        "are long         |",
    ]
    assert side_by_side(["one", "two"], ["a", "b"], 34).split("\n") == ["one", "-" * 34, "a", "", "two", "-" * 34, "b"]
