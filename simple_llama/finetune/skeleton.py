"""What of a rendered chat is the template's, and what are messages.

A template is rendered with placeholders in the messages' places: what stands around them is its skeleton. A rendering
of a real chat is held against it (`align`), so a template that changes, drops or reorders messages is found out; and
the tokens that the template put in are known apart from those that a message spells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

_PLACEHOLDER = re.compile("\ufdd0mG([0-9]+)x\ufdd1")  # noncharacters; letters whose case a template would have changed
_MARKUP = re.compile(r"<{1,2}[|/]*[^<>\s]{1,40}>{1,2}|\[{1,2}/?[A-Za-z_]{1,40}\]{1,2}|#{2,} ?\w+:?")
_SPEAKER = re.compile(r"\b[A-Z]\w{2,20}:")  # where no token stands between two messages


class Token(NamedTuple):
    """An added token that a template put in, with the white space that it takes in there."""

    id: int
    text: str
    lstrip: bool  # also takes in that of a message before it
    rstrip: bool


Segment = tuple[str | Token, ...]


class Skeleton(NamedTuple):
    """What a template writes around messages: a segment in front of each, and one behind the last."""

    segments: tuple[Segment, ...]
    places: tuple[int, ...]  # which message stands between them

    @property
    def plain_marks(self) -> frozenset[str]:
        """What marks turns and is no token: a message can spell it."""
        found: set[str] = set()
        for segment in self.segments:
            texts = [part for part in segment if isinstance(part, str)]
            patterns = [_MARKUP] if len(texts) < len(segment) else [_MARKUP, _SPEAKER]
            found.update(match for text in texts for pattern in patterns for match in pattern.findall(text))
        return frozenset(found)


class Pieces(NamedTuple):
    """A chat as a template rendered it: what it wrote around the messages, and the messages as it wrote them."""

    segments: tuple[Segment, ...]
    messages: tuple[str, ...]  # one fewer

    @property
    def text(self) -> str:
        """The rendering."""
        return written(self.segments[0]) + "".join(
            message + written(segment) for message, segment in zip(self.messages, self.segments[1:], strict=True)
        )

    @property
    def up_to_last_message(self) -> Pieces:
        """Without the last message and what stands behind it."""
        return Pieces(self.segments[:-1], self.messages[:-1])

    @property
    def last_message(self) -> Pieces:
        """The last message with what stands behind it."""
        return Pieces(((), self.segments[-1]), self.messages[-1:])


def placeholder(number: int) -> str:
    """What stands for a message."""
    return f"\ufdd0mG{number}x\ufdd1"


def read_skeleton(rendered: str, tokenizer: Tokenizer, added: Mapping[int, AddedToken]) -> Skeleton:
    """The skeleton in a rendering of placeholders; `added` are the tokens that count as structure."""
    encoding = tokenizer.encode(rendered, add_special_tokens=False)
    spans = [
        (*span, Token(number, rendered[span[0] : span[1]], added[number].lstrip, added[number].rstrip))
        for number, span in zip(encoding.ids, encoding.offsets, strict=True)
        if number in added
    ]
    segments, places, start = [], [], 0
    for match in _PLACEHOLDER.finditer(rendered):
        segments.append(_segment(rendered, start, match.start(), spans))
        places.append(int(match[1]))
        start = match.end()
    segments.append(_segment(rendered, start, len(rendered), spans))
    return Skeleton(tuple(segments), tuple(places))


def align(skeleton: Skeleton, rendered: str, messages: Sequence[str]) -> Pieces | None:
    """The pieces of a rendering of `messages`; None where it is anything else than the skeleton around them.

    A message may have lost white space at its ends.
    """
    texts = list(map(written, skeleton.segments))
    if not rendered.startswith(texts[0]):
        return None
    found, at = [], len(texts[0])
    for number, place in enumerate(skeleton.places, 1):
        for message in _stripped(messages[place]):
            end = at + len(message)
            behind = end + len(texts[number])
            at_end = number < len(skeleton.places) or behind == len(rendered)
            if at_end and rendered.startswith(message, at) and rendered.startswith(texts[number], end):
                break
        else:
            return None
        found.append(message)
        at = behind
    return Pieces(skeleton.segments, tuple(found))


def written(segment: Segment) -> str:
    """A segment as text."""
    return "".join(part if isinstance(part, str) else part.text for part in segment)


def _segment(rendered: str, start: int, end: int, spans: Sequence[tuple[int, int, Token]]) -> Segment:
    """What stands between two places of a rendering: tokens at `spans`, and text between them."""
    parts: list[str | Token] = []
    for first, last, token in spans:
        if first >= start and last <= end:
            parts += [rendered[start:first], token]
            start = last
    parts.append(rendered[start:end])
    return tuple(part for part in parts if part)


def _stripped(message: str) -> list[str]:
    """A message as templates write it: whole, or without the white space or line breaks at its ends."""
    if message == message.strip():
        return [message]
    ways = (message, message.strip(), message.lstrip(), message.rstrip())
    return list(dict.fromkeys((*ways, message.strip("\n"), message.lstrip("\n"), message.rstrip("\n"))))
