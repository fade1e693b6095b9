"""The readers: a record of a data file as a conversation with two answers, or several, one function a format.

A reader raises UserError (file, record, key, expected, found) for what does not fit its format, and Dropped for a sound
record without a usable pair. A format is one such function and its line in READERS, beside it how a record of it is
known: by its keys, and what kind of value they have. A file has one format, which its first records show; docs/data.md
has a sample of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.json_records import Record, json_type
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Ranking
from simple_llama.reinforcement_learning.rlhf.data.message_lists import (
    SHAREGPT_OTHERS,
    TRL_OTHERS,
    from_sharegpt,
    from_trl,
    is_list_of_messages,
)
from simple_llama.reinforcement_learning.rlhf.data.own_records import RANKING_KEYS, TEMPLATE_KEYS, from_template
from simple_llama.reinforcement_learning.rlhf.data.question_records import from_alpaca, from_orca, from_ultrafeedback
from simple_llama.reinforcement_learning.rlhf.data.record_checks import PAIR_KEYS, ReadOptions
from simple_llama.reinforcement_learning.rlhf.data.safety_records import PKU_OTHERS, from_pku
from simple_llama.reinforcement_learning.rlhf.data.transcripts import begins_a_transcript, from_hh

OWN = "Template"  # the name of this project's own format
DataFormat = Literal[
    "auto", "Template", "TRL", "HH-RLHF", "PKU-SafeRLHF", "UltraFeedback", "Orca", "ShareGPT", "Alpaca"
]
_Fields = Mapping[str, Any]
_KEYS_SHOWN = 12  # of a record of no known format


class Reader(NamedTuple):
    """A format of records."""

    keys: tuple[str, ...]  # by which people know it
    read: Callable[[Record, ReadOptions], Conversation | Ranking]
    looks_so: Callable[[_Fields], bool]  # whether a record is of this format, by its keys and their kinds of values
    others: tuple[str, ...] = ()  # keys that are read where they are there

    def passes_over(self, key: str) -> bool:
        """Whether nothing is read under a key."""
        return key not in self.keys and key not in self.others and key not in PAIR_KEYS


@dataclass
class Formats:
    """Which format each file has: the one that was asked for, or what its first records show."""

    asked: DataFormat = "auto"
    of_file: dict[str, str] = field(default_factory=dict)

    def of(self, record: Record) -> str:
        """The format of a record. UserError for none or several, and for another one than that of its file."""
        if self.asked != "auto":
            return self.of_file.setdefault(record.file, self.asked)
        known = self.of_file.get(record.file)
        if known and READERS[known].looks_so(record.fields):
            return known
        found = [name for name, reader in READERS.items() if reader.looks_so(record.fields)]
        if not known:
            if len(found) != 1:
                raise _undecided(record, found)
            self.of_file[record.file] = found[0]
            return found[0]
        if found:
            new = READERS[found[0]]
            keys = (key for key in (*new.keys, *new.others) if key in record.fields)
            key = next((key for key in keys if READERS[known].passes_over(key)), new.keys[-1])
            raise UserError(
                f"{record.origin}: expected the format {known} of the records before it, found {key} "
                f"({json_type(record.fields[key])}) as {found[0]} has it; put records of another format into a file of "
                "their own"
            )
        return known  # its reader says what is missing

    def has(self, name: str) -> bool:
        """Whether some file has this format."""
        return name in self.of_file.values()

    def said(self) -> str:
        """The formats of all files in words; nothing for this project's own."""
        names = sorted(set(self.of_file.values()))
        return f"; read as {', '.join(names)}" if names and names != [OWN] else ""


def without_nulls(record: Record) -> Record:
    """A record of another format than this project's own without the keys that have null: they are not there."""
    if None not in record.fields.values() or _looks_own(record.fields):
        return record
    fields = {key: value for key, value in record.fields.items() if value is not None}
    return Record(record.file, record.number, fields)


def _undecided(record: Record, found: list[str]) -> UserError:
    """Of a record that is of no known format, or of several."""
    fields = record.fields
    if found:
        return UserError(
            f"{record.origin}: expected a record of one format, found keys of {' and '.join(found)}; give the one that "
            f"is meant: --data_format {found[0]}"
        )
    keys = [f"{shown(key)} ({json_type(value)})" for key, value in list(fields.items())[:_KEYS_SHOWN]]
    if isinstance(fields.get("chosen"), str) and isinstance(fields.get("rejected"), str):
        return UserError(
            f"{record.origin}: expected transcripts that begin with Human: (HH-RLHF), or a prompt beside two answers, "
            f"found {', '.join(keys)}; --data_format TRL takes what chosen and rejected begin with alike for the "
            "prompt, --data_format HH-RLHF reads transcripts"
        )
    known = ", ".join(f"{name} ({', '.join(reader.keys)})" for name, reader in READERS.items())
    return UserError(
        f"{record.origin}: expected the keys of a known format, found {', '.join(keys) or 'none'}; known are {known}; "
        "docs/data.md has a sample of each"
    )


def _strings(fields: _Fields, *keys: str) -> bool:
    """Whether text stands under each of these keys."""
    return all(isinstance(fields.get(key), str) for key in keys)


def _looks_own(fields: _Fields) -> bool:
    return any(key in fields for key in (*TEMPLATE_KEYS, "Responses"))


def _looks_trl(fields: _Fields) -> bool:
    lists = all(is_list_of_messages(fields.get(key)) for key in ("chosen", "rejected"))
    return lists or ("prompt" in fields and _strings(fields, "chosen", "rejected"))


def _looks_hh(fields: _Fields) -> bool:
    sides = [fields.get("chosen"), fields.get("rejected")]
    return "prompt" not in fields and all(isinstance(s, str) for s in sides) and any(map(begins_a_transcript, sides))


def _looks_pku(fields: _Fields) -> bool:
    return "response_0" in fields and "response_1" in fields


def _looks_ultrafeedback(fields: _Fields) -> bool:
    return "instruction" in fields and "completions" in fields


def _looks_orca(fields: _Fields) -> bool:
    asked = "question" in fields or ("input" in fields and not {"instruction", "prompt"} & fields.keys())
    return asked and _strings(fields, "chosen", "rejected")


def _looks_sharegpt(fields: _Fields) -> bool:
    return "conversations" in fields and all(isinstance(fields.get(key), dict) for key in ("chosen", "rejected"))


def _looks_alpaca(fields: _Fields) -> bool:
    return "instruction" in fields and _strings(fields, "chosen", "rejected")


_PAIR, _CATEGORY = ("chosen", "rejected"), ("category",)
READERS = {
    OWN: Reader(TEMPLATE_KEYS, from_template, _looks_own, RANKING_KEYS),
    "TRL": Reader(("prompt", *_PAIR), from_trl, _looks_trl, TRL_OTHERS + _CATEGORY),
    "HH-RLHF": Reader(_PAIR, from_hh, _looks_hh, _CATEGORY),
    "PKU-SafeRLHF": Reader(("prompt", "response_0", "response_1"), from_pku, _looks_pku, PKU_OTHERS + _CATEGORY),
    "UltraFeedback": Reader(("instruction", "completions"), from_ultrafeedback, _looks_ultrafeedback, _CATEGORY),
    "Orca": Reader(("question", *_PAIR), from_orca, _looks_orca, ("input", "system", *_CATEGORY)),
    "ShareGPT": Reader(("conversations", *_PAIR), from_sharegpt, _looks_sharegpt, SHAREGPT_OTHERS + _CATEGORY),
    "Alpaca": Reader(
        ("instruction", *_PAIR), from_alpaca, _looks_alpaca, ("input", "history", *SHAREGPT_OTHERS, *_CATEGORY)
    ),
}
