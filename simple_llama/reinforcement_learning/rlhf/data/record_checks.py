"""What every reader asks of a record: values of a type, messages that can be seen, numbers within bounds.

A record of any format may also say how much its pair counts, and how much better the chosen answer is:

    "weight": 2.0     factor of the pair's loss, a number above 0; 1 where it is not given
    "gap": 1.5        reward of the chosen answer less that of the rejected one, for a loss that reads it
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.json_records import Record, json_type
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Dropped

_Value = TypeVar("_Value", str, int, bool)
PAIR_KEYS = ("weight", "gap")  # a record of each format may have them
Preferred = Literal["helpful", "safe", "both"]
LARGEST = 1e30  # of what they may be, and its inverse is the least: fp32 holds it, and what losses make of it
_INVISIBLE = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))  # categories of Unicode: controls, formats, separators
# letters and marks that are shown as nothing; the last ones choose the form of the letter before them
_FILLERS = frozenset((*"\u034f\u115f\u1160\u2800\u3164\uffa0", *map(chr, range(0xFE00, 0xFE10))))


@dataclass(frozen=True)
class ReadOptions:
    """What readers leave to the caller; each format looks at those that it has a use for."""

    default_system: str | None = DEFAULT_SYSTEM_PROMPT  # for "CUSTOM", and for records without a system prompt
    prefer: Preferred | None = None  # which label of PKU-SafeRLHF decides
    keep_unsafe: bool = False  # also pairs of PKU-SafeRLHF whose preferred answer is marked unsafe
    guess_prompt: bool = False  # what two plain texts begin with alike is their prompt
    clean: Callable[[str], str] = str  # applied to each message of others' forms before it is judged


def typed(record: Record, key: str, kind: type[_Value]) -> _Value:
    """The value under `key`, which has to be of type `kind` exactly (true is no number)."""
    expected = {str: "a string", int: "a whole number", bool: "true or false"}[kind]
    if key not in record.fields:
        raise UserError(f"{record.origin}: expected key {key!r} with {expected}, found {shown(list(record.fields))}")
    value = record.fields[key]
    if type(value) is not kind:
        raise UserError(f"{record.origin}: {key}: expected {expected}, found {json_type(value)}")
    return value


def usable(
    record: Record,
    options: ReadOptions,
    *messages: Sequence[str],
    system: str | None = None,
    gap: float | None = None,
) -> Conversation:
    """The conversation of (users, chosen, rejected) that others have written. Dropped for what cannot be trained on.

    Without a system message it has the default one. A `gap` counts where the record gives none itself.
    """
    users, chosen, rejected = (tuple(map(options.clean, texts)) for texts in messages)
    if any(map(is_blank, users)):
        raise Dropped("with an empty user message")
    if any(map(is_blank, chosen + rejected)):
        raise Dropped("with an empty answer")
    if chosen == rejected:
        raise Dropped("with identical answers")
    if chosen[-1] == rejected[-1]:
        raise Dropped("with the same last answer")
    system = options.default_system if system is None else options.clean(system)
    if any(map(has_half_a_pair, (system or "", *users, *chosen, *rejected))):
        raise Dropped("with half of a surrogate pair")
    weight, own_gap = strength(record)
    gap = gap if own_gap is None else own_gap
    return Conversation(system, users, chosen, rejected, record.file, record.number, weight, gap)


def strength(record: Record) -> tuple[float, float | None]:
    """The record's (weight, gap). UserError where one is no such number."""
    weight = number_in(record, "weight", 1 / LARGEST) if "weight" in record.fields else 1.0
    return weight, number_in(record, "gap") if "gap" in record.fields else None


def number_in(record: Record, key: str, least: float = -LARGEST) -> float:
    """The number under `key`, from `least` to LARGEST."""
    value = record.fields[key]
    if type(value) not in (int, float) or not least <= value <= LARGEST:
        expected = f"a number from {least:g} to {LARGEST:g}"
        raise UserError(f"{record.origin}: {key}: expected {expected}, found {json_type(value)}")
    return float(value)


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen."""
    seen = text.strip()
    if seen[:1].isalnum() and seen[0] not in _FILLERS:
        return False
    return all(character in _FILLERS or unicodedata.category(character) in _INVISIBLE for character in seen)


def has_half_a_pair(text: str) -> bool:
    """Whether half of a surrogate pair stands in a text, which has no UTF-8 form."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
