"""Records of this project's own form, which all others become: keys Template, User, Accepted, Rejected.

    {"Template": ["CUSTOM"], "User": ["Hi"], "Accepted": ["Hello!"], "Rejected": ["Go away."]}

A record may have more answers than two, with a number each: the larger is better, of `Ranks` the smaller. An answer is
a list of strings as above, or a string where there is one turn. `pairs` says which two are compared.

    {"Template": ["CUSTOM"], "User": ["Hi"], "Responses": ["Hello!", "Hm.", "Go away."], "Scores": [9, 5, 1]}
    {"Template": ["CUSTOM"], "User": ["Hi"], "Accepted": ["Hello!"], "Rejected": [["Hm."], ["Go away."]]}

`Template` is a list with one system prompt, or the same one for each turn; "CUSTOM" is the default system prompt, and
what nearly spells it is refused. `User`, `Accepted` and `Rejected` are lists of strings of equal length, one entry a
turn; the last answers are compared. A message of white space and invisible characters alone is an empty one.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.json_records import Record, json_type
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Ranking
from simple_llama.reinforcement_learning.rlhf.data.record_checks import (
    LARGEST,
    ReadOptions,
    has_half_a_pair,
    is_blank,
    strength,
)

CUSTOM = "CUSTOM"  # stands in a record for the default system prompt
TEMPLATE_KEYS = ("Template", "User", "Accepted", "Rejected")
RANKING_KEYS = ("Responses", "Scores", "Ranks")  # of a record with more answers, instead of the last two
_NO_LETTERS = re.compile(r"[\W_]+")
_LONGEST_SPELLING = 40  # characters of what may be meant for CUSTOM


def from_template(record: Record, options: ReadOptions) -> Conversation | Ranking:
    """The pair, or the answers, in a record of this project's own format."""
    ranked = any(key in record.fields for key in RANKING_KEYS)
    for key in ("Template", "User", "Responses") if ranked else TEMPLATE_KEYS:
        if key not in record.fields:
            raise UserError(f"{record.origin}: expected key {key!r}, found {shown(list(record.fields))}")
    system, users = _prompt(record, options)
    if ranked:
        return _ranked(record, system, users)
    several = record.fields["Rejected"]
    if isinstance(several, list) and any(isinstance(one, list) for one in several):
        chosen, others = _answer(record, users, "Accepted"), _answers(record, users, "Rejected")
        scores = (1.0, *(0.0 for _ in others))
        weight, _ = strength(record)
        return Ranking(system, users, (chosen, *others), scores, record.file, record.number, weight)
    chosen, rejected = (_answer(record, users, key) for key in ("Accepted", "Rejected"))
    return Conversation(system, users, chosen, rejected, record.file, record.number, *strength(record))


def _prompt(record: Record, options: ReadOptions) -> tuple[str | None, tuple[str, ...]]:
    """The system prompt and the user turns."""
    template, users = (_strings(record, key) for key in ("Template", "User"))
    if len(template) not in (1, len(users)):
        expected = "1 entry" if len(users) == 1 else f"1 entry or {len(users)}, one a turn"
        raise UserError(f"{record.origin}: Template: expected {expected}, found {len(template)}")
    for number, text in enumerate(template, 1):
        if text != CUSTOM and _is_nearly_custom(text):
            raise UserError(
                f'{record.origin}: Template, entry {number}: expected "{CUSTOM}" for the default system prompt, or a '
                f"prompt of your own, found {shown(text)}; write {CUSTOM}"
            )
    if len(set(template)) != 1:
        raise UserError(
            f"{record.origin}: Template: expected the same system prompt for each turn, found different ones"
        )
    return options.default_system if template[0] == CUSTOM else template[0], users


def _ranked(record: Record, system: str | None, users: tuple[str, ...]) -> Ranking:
    """The answers under `Responses`, by their `Scores` or `Ranks`."""
    for key in ("Accepted", "Rejected", "gap"):
        if key in record.fields:
            raise UserError(f"{record.origin}: expected no {key!r} beside a ranking's Responses, found both")
    found = [key for key in ("Scores", "Ranks") if key in record.fields]
    if len(found) != 1:
        raise UserError(
            f"{record.origin}: expected Scores or Ranks with Responses, found {' and '.join(found) or 'none'}"
        )
    answers, numbers, (key,) = _answers(record, users, "Responses"), record.fields[found[0]], found
    if not isinstance(numbers, list) or len(numbers) != len(answers):
        count = len(numbers) if isinstance(numbers, list) else json_type(numbers)
        raise UserError(f"{record.origin}: {key}: expected {len(answers)} numbers as in 'Responses', found {count}")
    for number in numbers:
        if type(number) not in (int, float) or not -LARGEST <= number <= LARGEST:
            expected = f"numbers from {-LARGEST:g} to {LARGEST:g}"
            raise UserError(f"{record.origin}: {key}: expected {expected}, found {json_type(number)}")
    scores = tuple(float(number) if key == "Scores" else -float(number) for number in numbers)
    weight, _ = strength(record)
    return Ranking(system, users, answers, scores, record.file, record.number, weight, gaps=key == "Scores")


def _answers(record: Record, users: tuple[str, ...], key: str) -> tuple[tuple[str, ...], ...]:
    """The list of answers under `key`, each a list of strings, one a turn, or a string where there is one turn."""
    values: Any = record.fields[key]
    if not isinstance(values, list) or len(values) < 1 + (key == "Responses"):
        least = "two" if key == "Responses" else "one"
        raise UserError(
            f"{record.origin}: {key}: expected a list of {least} or more answers, found {json_type(values)}"
        )
    for number, one in enumerate(values, 1):
        if isinstance(one, str) and len(users) > 1:
            raise UserError(
                f"{record.origin}: {key}, answer {number}: expected a list of {len(users)} strings, one a turn as in "
                "'User', found a string"
            )
    listed = [[one] if isinstance(one, str) else one for one in values]
    return tuple(_answer(record, users, key, one, f", answer {number}") for number, one in enumerate(listed, 1))


def _answer(record: Record, users: tuple[str, ...], key: str, values: Any = None, which: str = "") -> tuple[str, ...]:
    """An answer to each user turn: the messages under `key`, or `values`, one of several there."""
    found = _messages(record, key, record.fields[key] if values is None else values, which)
    if len(found) != len(users):
        several = "; of several answers each is a list of its own" if key == "Rejected" and not which else ""
        raise UserError(
            f"{record.origin}: {key}{which}: expected {len(users)} entries as in 'User', found {len(found)}{several}"
        )
    return found


def _strings(record: Record, key: str) -> tuple[str, ...]:
    """The list of messages under `key`; only a system prompt may be blank."""
    return _messages(record, key, record.fields[key])


def _messages(record: Record, key: str, values: Any, which: str = "") -> tuple[str, ...]:
    """A list of messages that stands under `key`; only a system prompt may be blank."""
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{record.origin}: {key}{which}: expected a list of one or more strings, found {json_type(values)}"
        )
    for number, value in enumerate(values, 1):
        if wrong := _what_is_wrong(value, may_be_blank=key == "Template"):
            raise UserError(f"{record.origin}: {key}{which}, entry {number}: {wrong}")
    return tuple(values)


def _what_is_wrong(value: Any, may_be_blank: bool) -> str:
    """Why a value is no message; "" where it is one."""
    if not isinstance(value, str):
        return f"expected a string, found {json_type(value)}"
    if not may_be_blank and is_blank(value):
        return "expected a message, found an empty one; remove the record or write one"
    if has_half_a_pair(value):
        return "expected Unicode text, found half of a surrogate pair (\\ud800-\\udfff)"
    return ""


def _is_nearly_custom(text: str) -> bool:
    """Whether a system prompt is CUSTOM in another case, or with other characters around it."""
    if len(text) > _LONGEST_SPELLING:
        return False
    return _NO_LETTERS.sub("", unicodedata.normalize("NFKC", text)).casefold() == CUSTOM.casefold()
