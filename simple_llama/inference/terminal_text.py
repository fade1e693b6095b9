"""Text for a terminal: answers as their tokens come, and two of them side by side."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

_HALF = "\ufffd"  # what a decoder makes of the bytes of an unfinished character
_TURNING = {*map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))}  # embeddings, overrides, isolates
_GAP = " | "
_NARROWEST = 16  # columns of a text beside another; below, they stand one under the other


class TextStream:
    """The text of an answer, a token at a time: what is given out is never taken back, nor half a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        """Args: decode: of all tokens of an answer."""
        self._decode, self._given = decode, ""
        self.ids: list[int] = []

    @property
    def text(self) -> str:
        """All of it so far."""
        return self._decode(self.ids)

    def add(self, token: int) -> str:
        """What one more token adds to what was given out."""
        self.ids.append(token)
        ready = self.text.rstrip(_HALF)
        if not ready.startswith(self._given):  # a decoder that looks ahead: the end shows what it was
            return ""
        return self._give(ready)

    def close(self) -> str:
        """What is left at the end of the answer; all of it anew where a decoder has changed its mind."""
        text = self.text
        return self._give(text) if text.startswith(self._given) else f"\n{text}"

    def _give(self, text: str) -> str:
        found, self._given = text[len(self._given) :], text
        return found


def printable(text: str) -> str:
    """`text` without what would steer a terminal: control characters, but for tabs and line ends, and those that turn
    the direction of what follows are spelled out."""
    steering = {c for c in text if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in _TURNING}
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in steering})


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns; broken at spaces, and within a word that is wider alone."""
    lines: list[str] = []
    for line in text.expandtabs(4).split("\n"):
        now = ""
        for word in _words(line):
            if now and _columns(now + word.rstrip(" ")) > width:
                lines.append(now.rstrip(" "))
                now = ""
            for piece in _pieces(word, width):
                if now and _columns(now + piece.rstrip(" ")) > width:
                    lines.append(now.rstrip(" "))
                    now = ""
                now += piece
        lines.append(now.rstrip(" "))
    return lines


def side_by_side(titles: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Two texts in columns that fit `width` together, each under its title; one under the other where that is too
    narrow."""
    column = (width - len(_GAP)) // 2
    if column < _NARROWEST:
        parts = [f"{title}\n{'-' * max(width, 1)}\n{text}" for title, text in zip(titles, texts, strict=True)]
        return "\n\n".join("\n".join(_wrapped(part, max(width, 2))) for part in parts)
    sides = [
        [*_wrapped(title, column), "-" * column, *_wrapped(text, column)]
        for title, text in zip(titles, texts, strict=True)
    ]
    rows = zip_longest(*sides, fillvalue="")
    return "\n".join(_GAP.join((left + " " * (column - _columns(left)), right)).rstrip() for left, right in rows)


def _words(line: str) -> Iterator[str]:
    """Words with the spaces behind them; spaces in front of the first one are a word."""
    start = 0
    for place in range(1, len(line)):
        if line[place] != " " and line[place - 1] == " ":
            yield line[start:place]
            start = place
    if line:
        yield line[start:]


def _pieces(word: str, width: int) -> Iterator[str]:
    """A word, cut where it is wider than a line."""
    now = ""
    for character in word:
        if now and character != " " and _columns(now + character) > width:
            yield now
            now = ""
        now += character
    yield now


def _columns(text: str) -> int:
    """Columns that a text takes: wide characters two, accents none."""
    wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return wide - sum(unicodedata.combining(c) > 0 for c in text)
