"""Records of a question with two answers, or several that have scores: Orca pairs, LLaMA-Factory's alpaca ranking,
UltraFeedback as it was published.

    {"system": "", "question": "Hi", "chosen": "Hello!", "rejected": "Go away."}
    {"instruction": "Translate.", "input": "Hallo", "chosen": "Hello", "rejected": "Halo", "history": [["Hi", "Hi!"]]}
    {"instruction": "Hi", "completions": [{"response": "Hello!", "overall_score": 8.5}, {"response": "No.", ...}]}

`system` without text is none. Orca's question may be called `input`. alpaca's `instruction` and `input` make one
message, a line break between; `history` has the earlier turns. UltraFeedback's answers are ranked by `overall_score`,
or by `fine-grained_score` where some of a record's answers lack the other. Texts are kept as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simple_llama.common.errors import UserError
from simple_llama.dataset.json_records import Record, json_type
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Dropped, Ranking
from simple_llama.reinforcement_learning.rlhf.data.message_lists import check_sayable, system_of
from simple_llama.reinforcement_learning.rlhf.data.record_checks import (
    ReadOptions,
    has_half_a_pair,
    is_blank,
    number_in,
    strength,
    typed,
    usable,
)

_SCORES = ("overall_score", "fine-grained_score")


def from_orca(record: Record, options: ReadOptions) -> Conversation:
    """The pair in an Orca record."""
    asked = "input" if "input" in record.fields and "question" not in record.fields else "question"
    question = typed(record, asked, str)
    chosen, rejected = (typed(record, key, str) for key in ("chosen", "rejected"))
    return usable(record, options, [question], [chosen], [rejected], system=system_of(record))


def from_alpaca(record: Record, options: ReadOptions) -> Conversation:
    """The pair in an alpaca record."""
    check_sayable(record)
    texts = [typed(record, "instruction", str)]
    texts += [typed(record, "input", str)] if record.fields.get("input") is not None else []
    chosen, rejected = (typed(record, key, str) for key in ("chosen", "rejected"))
    users, answers = _history(record)
    users.append("\n".join(text for text in texts if text))
    return usable(record, options, users, [*answers, chosen], [*answers, rejected], system=system_of(record))


def from_ultrafeedback(record: Record, options: ReadOptions) -> Ranking:
    """The answers under `completions`, by their scores."""
    user, found = options.clean(typed(record, "instruction", str)), record.fields.get("completions")
    if not isinstance(found, list):
        raise UserError(f"{record.origin}: completions: expected a list of answers, found {json_type(found)}")
    answers = [_part(record, f"completions, answer {n}", one) for n, one in enumerate(found, 1)]
    if len(answers) < 2:
        raise Dropped("with fewer than two answers")
    texts = tuple(options.clean(typed(answer, "response", str)) for answer in answers)
    if is_blank(user):
        raise Dropped("with an empty user message")
    if any(map(is_blank, texts)):
        raise Dropped("with an empty answer")
    if any(map(has_half_a_pair, (user, *texts))):
        raise Dropped("with half of a surrogate pair")
    key = next((key for key in _SCORES if all(answer.fields.get(key) is not None for answer in answers)), _SCORES[0])
    for answer in answers:
        if key not in answer.fields:
            raise UserError(f"{answer.origin}: expected key {_SCORES[0]!r} or {_SCORES[1]!r} in each, found neither")
    scores = tuple(number_in(answer, key) for answer in answers)
    weight, _ = strength(record)
    split = tuple((text,) for text in texts)
    return Ranking(options.default_system, (user,), split, scores, record.file, record.number, weight, gaps=True)


class _Part(Record):
    """An object within a record, named by its place there."""

    @property
    def origin(self) -> str:
        """`file:number: place`."""
        return self.file


def _part(record: Record, place: str, value: Any) -> Record:
    """An object of a list in a record."""
    if not isinstance(value, Mapping):
        raise UserError(f"{record.origin}: {place}: expected an object, found {json_type(value)}")
    return _Part(f"{record.origin}: {place}", record.number, dict(value))


def _history(record: Record) -> tuple[list[str], list[str]]:
    """Earlier user turns and the answers to them."""
    found: Any = record.fields.get("history") or []
    if not isinstance(found, list):
        raise UserError(f"{record.origin}: history: expected a list of turns, found {json_type(found)}")
    for number, turn in enumerate(found, 1):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise UserError(
                f"{record.origin}: history, turn {number}: expected a list of two strings, a message and its answer, "
                f"found {json_type(turn)}"
            )
    return [turn[0] for turn in found], [turn[1] for turn in found]
