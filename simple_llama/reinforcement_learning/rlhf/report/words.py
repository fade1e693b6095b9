"""Which words of two answers differ, marked for a page. N words of the first answer, M of the second."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

import numpy as np

_MOST_WORDS = 2000  # of a side that are compared: 0.1 s and 8 MB
_REST = '<span class="aside">(from here on the words are not compared)</span> '
_LONE = "\u3040-\u9fff\uac00-\ud7af\uff00-\uffef"  # letters of scripts that put no blanks between words
_PIECE = re.compile(rf"\s*(?:[{_LONE}]|[^\s{_LONE}]+)")  # a word with the blanks before it


def marked_differences(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML, escaped: words of `before` alone in <del>, words of `after` alone in <mark>.

    Compared by a longest common subsequence of words, in bounded time: words past the first 2,000 that differ (counted
    without a common beginning and end) stay unmarked, and the text says so.
    """
    left, right = _PIECE.findall(before.rstrip()), _PIECE.findall(after.rstrip())
    same_left, same_right = _same([piece.strip() for piece in left], [piece.strip() for piece in right])
    ends = [text[len(text.rstrip()) :] for text in (before, after)]
    return "".join(_marked(left, same_left, "del")) + ends[0], "".join(_marked(right, same_right, "mark")) + ends[1]


def _same(left: Sequence[str], right: Sequence[str]) -> tuple[list[bool | None], list[bool | None]]:
    """For each word whether the other side has it too, in its order; None where that was not looked at."""
    shortest = min(len(left), len(right))
    head = next((i for i in range(shortest) if left[i] != right[i]), shortest)
    rest = shortest - head
    tail = next((i for i in range(rest) if left[-1 - i] != right[-1 - i]), rest)
    middles = [list(words[head : len(words) - tail][:_MOST_WORDS]) for words in (left, right)]
    found = _common(*middles)
    sides: list[list[bool | None]] = []
    for words, middle, inside in zip((left, right), middles, found, strict=True):
        unseen = len(words) - head - tail - len(middle)
        sides.append([True] * head + _without_strays(middle, inside) + [None] * unseen + [True] * tail)
    return sides[0], sides[1]


def _common(left: Sequence[str], right: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """For each word whether it is in a longest common subsequence: O(N M) along the table's diagonals, in NumPy."""
    numbers = {word: number for number, word in enumerate({*left, *right})}
    left_N = np.array([numbers[word] for word in left], dtype=np.int64)
    right_M = np.array([numbers[word] for word in right], dtype=np.int64)
    n, m = len(left), len(right)
    longest = np.zeros((n + 1, m + 1), dtype=np.int16)  # [i, j]: of the words from left i and right j on
    for diagonal in range(n + m - 2, -1, -1):
        i = np.arange(max(0, diagonal - m + 1), min(n, diagonal + 1))
        j = diagonal - i
        passed = np.maximum(longest[i + 1, j], longest[i, j + 1])
        longest[i, j] = np.where(left_N[i] == right_M[j], longest[i + 1, j + 1] + 1, passed)
    in_left, in_right = [False] * n, [False] * m
    i = j = 0
    while i < n and j < m:
        if left[i] == right[j]:
            in_left[i] = in_right[j] = True
            i, j = i + 1, j + 1
        elif longest[i + 1, j] >= longest[i, j + 1]:
            i += 1
        else:
            j += 1
    return in_left, in_right


def _without_strays(words: Sequence[str], same: Sequence[bool]) -> list[bool | None]:
    """A short word alone between two that differ counts as different: "a" is in most sentences, and says nothing."""

    def stray(i: int) -> bool:
        return len(words[i]) <= 3 and 0 < i < len(words) - 1 and not (same[i - 1] or same[i + 1])

    return [found and not stray(i) for i, found in enumerate(same)]


def _marked(pieces: Sequence[str], same: Sequence[bool | None], tag: str) -> Iterator[str]:
    """The text with each run of words that differ in one `tag`, part by part."""
    open_, told = False, False
    for piece, found in zip(pieces, same, strict=True):
        word = piece.lstrip()
        blanks = piece[: len(piece) - len(word)]
        if open_ and found is not False:
            yield f"</{tag}>"
        yield blanks
        if found is None and not told:
            yield _REST
            told = True
        if found is False and not open_:
            yield f"<{tag}>"
        open_ = found is False
        yield html.escape(word)
    if open_:
        yield f"</{tag}>"
