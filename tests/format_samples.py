"""Samples of preference data: those of docs/data.md, and message lists that TRL reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
# The small ByteLevel tokenizer cuts a line break off two in front of a word, and prompts of these end with two.
SENTENCE_PIECE = ("Llama 3", "Qwen3")
_BLOCK = re.compile(
    r"^## (?P<name>[^\n]+)$|^```json(?P<becomes> becomes)?\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


class Sample(NamedTuple):
    """A record of a format, and the one of this project's own format that it becomes; itself where none is shown."""

    name: str
    record: dict[str, Any]
    becomes: dict[str, Any]


def page_samples() -> list[Sample]:
    """The samples of docs/data.md."""
    name, found = "", []
    for block in _BLOCK.finditer(PAGE.read_text()):
        if block["name"]:
            name = block["name"]
        elif block["becomes"]:
            found[-1] = found[-1]._replace(becomes=json.loads(block["text"]))
        else:
            record = json.loads(block["text"])
            found.append(Sample(name, record, record))
    return found


def tokenizer_kind(template: str) -> str:
    """Which of chat_templates.py's tokenizers a template is tried with: one that lets a chat begin with its prompt."""
    return "Metaspace first" if template in SENTENCE_PIECE else "ByteLevel"


def message(role: str, content: str) -> dict[str, str]:
    """One of a chat."""
    return {"role": role, "content": content}


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of a user and an assistant by turns."""
    said = [message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    return said if system is None else [message("system", system), *said]


def _answers(chosen: str, rejected: str) -> dict[str, list[dict[str, str]]]:
    return {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}


TRL: list[dict[str, Any]] = [
    *(s.record for s in page_samples() if s.name == "TRL" and isinstance(s.record.get("prompt", []), list)),
    {"prompt": chat("Hi"), **_answers("Hello there.", "Go.")},
    {"prompt": chat("Hi", system="Be kind."), **_answers("line\n\nline", " two  spaces ")},
    {"prompt": chat("a", "b", "line\n\nline"), **_answers("1 + 1 = 2!", "\u00e9\u2019")},
    {"chosen": chat("a", "Yes, so.", system="S"), "rejected": chat("a", "Yes, not.", system="S")},
    {"chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "x", "c", "e")},
    {"prompt": chat("a"), "chosen": chat("a", "b", "c", "d")[1:], "rejected": chat("a", "b", "c", "e")[1:]},
    {"prompt": chat("Hi", system="S"), **_answers("same start, one", "same start, other")},
]
