"""The readers: a record of a data file as a conversation with two answers, one function a format.

    {"Template": ["CUSTOM"], "User": ["Hi"], "Accepted": ["Hello!"], "Rejected": ["Go away."]}

`Template` is a list with one system prompt, or the same one for each turn; "CUSTOM" is the default system prompt.
`User`, `Accepted` and `Rejected` are lists of strings of equal length, one entry a turn; the last answers are compared.
A reader raises UserError (file, record, key, expected, found) for what does not fit its format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.json_records import Record, Tally, json_type
from simple_llama.finetune.format_llm_prompt import format_chat

KEYS = ("Template", "User", "Accepted", "Rejected")


class PairText(NamedTuple):
    """The two chats of a pair as text. A chat is the whole conversation; it ends with its suffix, the scored part."""

    accepted_chat: str
    accepted_suffix: str  # the last answer and <EOA>: what is scored
    rejected_chat: str
    rejected_suffix: str


@dataclass(frozen=True)
class Conversation:
    """What a record says: a system prompt, user turns, and two answers to each of them."""

    system: str
    users: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    file: str
    record: int  # from 1: place in a .json list, line of a .jsonl file

    @property
    def origin(self) -> str:
        """`file:record`, for messages."""
        return f"{self.file}:{self.record}"

    @property
    def text(self) -> PairText:
        """Both chats, formatted."""
        chosen_chat = format_chat(self.system, self.users, self.chosen)
        rejected_chat = format_chat(self.system, self.users, self.rejected)
        return PairText(chosen_chat, self.chosen[-1] + "<EOA>", rejected_chat, self.rejected[-1] + "<EOA>")


def parse_record(record: Record, default_system: str, extra_keys: Tally) -> Conversation:
    """Checks a record against the format; counts its unknown keys in `extra_keys`. Raises UserError."""
    for key in KEYS:
        if key not in record.fields:
            raise UserError(f"{record.origin}: expected key {key!r}, found {shown(list(record.fields))}")
    template, users, chosen, rejected = (_strings(record, key) for key in KEYS)
    for key, answers in (("Accepted", chosen), ("Rejected", rejected)):
        if len(answers) != len(users):
            raise UserError(f"{record.origin}: {key}: expected {len(users)} entries as in 'User', found {len(answers)}")
    if len(template) not in (1, len(users)):
        expected = "1 entry" if len(users) == 1 else f"1 entry or {len(users)}, one a turn"
        raise UserError(f"{record.origin}: Template: expected {expected}, found {len(template)}")
    if len(set(template)) != 1:
        raise UserError(
            f"{record.origin}: Template: expected the same system prompt for each turn, found different ones"
        )
    for key in record.fields:
        if key not in KEYS:
            extra_keys.add(shown(key), record.origin)
    system = default_system if template[0] == "CUSTOM" else template[0]
    return Conversation(system, users, chosen, rejected, record.file, record.number)


def _strings(record: Record, key: str) -> tuple[str, ...]:
    """The list of messages under `key`; only a system prompt may be blank."""
    values: Any = record.fields[key]
    if not isinstance(values, list) or not values:
        raise UserError(f"{record.origin}: {key}: expected a list of one or more strings, found {json_type(values)}")
    for number, value in enumerate(values, 1):
        place = f"{record.origin}: {key}, entry {number}"
        if not isinstance(value, str):
            raise UserError(f"{place}: expected a string, found {json_type(value)}")
        if key != "Template" and not value.strip():
            raise UserError(f"{place}: expected a message, found an empty one; remove the record or write one")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{place}: expected Unicode text, found half of a surrogate pair (\\ud800-\\udfff)")
    return tuple(values)
