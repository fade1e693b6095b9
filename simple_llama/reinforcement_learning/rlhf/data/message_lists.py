"""Records whose chats are lists of messages, or a prompt with two texts: TRL's, OpenRLHF's, UltraFeedback (binarized),
and ShareGPT's as LLaMA-Factory ranks them.

    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello!"}], ...}
    {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "rejected": ...}
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello!"}, ...}

With a list as prompt the chats are prompt + chosen and prompt + rejected; without one, `chosen` and `rejected` are
whole chats. A prompt that is a string beside message lists is the user message that stands in front of them, or in
them. Three strings are a user message and two answers. Texts are kept as they are. Behind at most one system message
the turns have to alternate, and the user's have to be the same on both sides; earlier answers may differ.

Two strings without a prompt say only what they begin with alike; that is taken for the prompt, as TRL does, where it is
asked for (`guess_prompt`), since transcripts look the same. A prompt that is a transcript up to "Assistant:" is read as
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.json_records import Record, json_type
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Dropped
from simple_llama.reinforcement_learning.rlhf.data.record_checks import ReadOptions, is_blank, number_in, typed, usable
from simple_llama.reinforcement_learning.rlhf.data.transcripts import begins_a_transcript, from_transcripts

_UNSAYABLE = ("tools", "chat_template_kwargs", "images", "image", "videos", "audios")  # of a record
_UNSAYABLE_IN_MESSAGES = ("tool_calls", "tool_call_id", "reasoning_content", "thinking")
TRL_OTHERS = ("system", "score_chosen", "score_rejected", "margin", *_UNSAYABLE)
SHAREGPT_OTHERS = ("system", *_UNSAYABLE)


class _Message(NamedTuple):
    """One of a chat."""

    role: str  # system, user or assistant
    content: str


class _Spelling(NamedTuple):
    """How a form writes its messages."""

    role: str  # the key of the role
    content: str
    roles: Mapping[str, str]


_TRL = _Spelling("role", "content", {role: role for role in ("system", "user", "assistant")})
_SHAREGPT = _Spelling("from", "value", {"system": "system", "human": "user", "gpt": "assistant"})


def from_trl(record: Record, options: ReadOptions) -> Conversation:
    """The pair in a record of message lists, or of strings."""
    check_sayable(record)
    fields = record.fields
    if isinstance(fields.get("chosen"), str) and not isinstance(fields.get("prompt"), list):
        return _from_strings(record, options)
    chosen, rejected = (_messages(record, key, _TRL) for key in ("chosen", "rejected"))
    prompt = fields.get("prompt")
    if isinstance(prompt, list):
        before = _messages(record, "prompt", _TRL)
        if not (_begins(chosen, before) and _begins(rejected, before)):
            chosen, rejected = before + chosen, before + rejected
    elif prompt is not None:
        chosen, rejected = _behind(record, typed(record, "prompt", str), chosen, rejected)
    return _compared(record, options, chosen, rejected, _gap(record))


def from_sharegpt(record: Record, options: ReadOptions) -> Conversation:
    """The pair in a record of `conversations` that end with a user message, and the two answers to it."""
    check_sayable(record)
    before = _messages(record, "conversations", _SHAREGPT)
    answers = []
    for key in ("chosen", "rejected"):
        answer = _message(record, key, record.fields.get(key), _SHAREGPT)
        if answer.role != "assistant":
            raise UserError(f"{record.origin}: {key}: expected a message from gpt, found one from {answer.role}")
        answers.append(answer)
    return _compared(record, options, [*before, answers[0]], [*before, answers[1]], None)


def is_list_of_messages(value: object) -> bool:
    """Whether a value is what `_messages` reads, by its first entry."""
    return isinstance(value, list) and all(isinstance(one, dict) and "role" in one for one in value[:1])


def check_sayable(record: Record) -> None:
    """UserError for a record with tools, pictures or the like: a chat here is text alone."""
    for key in _UNSAYABLE:
        if record.fields.get(key):
            raise UserError(
                f"{record.origin}: {key}: expected a record without {key}, which no chat has here, found "
                f"{json_type(record.fields[key])}; take the record out"
            )


def system_of(record: Record) -> str | None:
    """The text under `system`, where there is some."""
    system = typed(record, "system", str) if record.fields.get("system") is not None else ""
    return None if is_blank(system) else system


def _from_strings(record: Record, options: ReadOptions) -> Conversation:
    """The pair in a prompt and two answers, all strings; without a prompt it is what both texts begin with."""
    chosen, rejected = (typed(record, key, str) for key in ("chosen", "rejected"))
    gap = _gap(record)
    if "prompt" not in record.fields:
        if not options.guess_prompt:
            raise UserError(
                f"{record.origin}: expected key 'prompt', found {shown(list(record.fields))}; --data_format TRL takes "
                "what chosen and rejected begin with alike for the prompt"
            )
        length = _common_beginning(chosen, rejected)
        return usable(record, options, [chosen[:length]], [chosen[length:]], [rejected[length:]], gap=gap)
    prompt = typed(record, "prompt", str)
    if begins_a_transcript(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        return from_transcripts(record, options, prompt + chosen, prompt + rejected)
    return usable(record, options, [prompt], [chosen], [rejected], system=system_of(record), gap=gap)


def _common_beginning(one: str, other: str) -> int:
    """How many characters two texts begin with alike, without a space in front of where they differ: TRL's prompt."""
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return alike - (one[alike - 1 : alike] == " ")


def _behind(
    record: Record, prompt: str, chosen: list[_Message], rejected: list[_Message]
) -> tuple[list[_Message], list[_Message]]:
    """Whole chats of a prompt that is a string: it stands in front of the messages, or is one of them."""
    sides = []
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        said = [message.content.strip() for message in side if message.role == "user"]
        if not said:
            side = [_Message("user", prompt), *side]
        elif prompt.strip() not in said:
            raise UserError(
                f"{record.origin}: prompt: expected the text of a user message in {key}, found another; leave it out, "
                f"or leave the user messages out of {key}"
            )
        sides.append(side)
    return sides[0], sides[1]


def _compared(
    record: Record, options: ReadOptions, chosen: list[_Message], rejected: list[_Message], gap: float | None
) -> Conversation:
    """The pair of two whole chats."""
    system, users, answers = _turns(chosen)
    other_system, other_users, other_answers = _turns(rejected)
    if system != other_system:
        raise Dropped("with different system messages")
    if users != other_users:
        raise Dropped("with different user turns")
    system = system_of(record) if system is None else system
    return usable(record, options, users, answers, other_answers, system=system, gap=gap)


def _turns(messages: Sequence[_Message]) -> tuple[str | None, list[str], list[str]]:
    """The system message, user turns and answers of a whole chat."""
    system = messages[0].content if messages[0].role == "system" else None
    turns = messages if system is None else messages[1:]
    roles = [message.role for message in turns]
    if roles[:1] != ["user"]:
        raise Dropped("not starting with a user turn")
    if roles[-1] == "user":
        raise Dropped("without a reply")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise Dropped("with turns that do not alternate")
    texts = [message.content for message in turns]
    return system, texts[0::2], texts[1::2]


def _messages(record: Record, key: str, spelling: _Spelling) -> list[_Message]:
    """The list of messages under `key`."""
    if key not in record.fields:
        raise UserError(f"{record.origin}: expected key {key!r} with messages, found {shown(list(record.fields))}")
    values = record.fields[key]
    if not isinstance(values, list) or not values:
        raise UserError(f"{record.origin}: {key}: expected a list of one or more messages, found {json_type(values)}")
    return [_message(record, f"{key}, message {n}", value, spelling) for n, value in enumerate(values, 1)]


def _message(record: Record, place: str, value: Any, spelling: _Spelling) -> _Message:
    """One message."""
    if not isinstance(value, dict):
        found = "nothing" if value is None else json_type(value)
        raise UserError(f"{record.origin}: {place}: expected a message, found {found}")
    for key in (spelling.role, spelling.content):
        if not isinstance(value.get(key), str):
            found = json_type(value[key]) if key in value else "none"
            raise UserError(f"{record.origin}: {place}: {key}: expected a string, found {found}")
    for key in _UNSAYABLE_IN_MESSAGES:
        if value.get(key):
            raise UserError(f"{record.origin}: {place}: expected no {key}, which no chat has here; take the record out")
    role = value[spelling.role]
    if role not in spelling.roles:
        raise UserError(
            f"{record.origin}: {place}: {spelling.role}: expected {', '.join(spelling.roles)}, found {shown(role)}; "
            "take the record out"
        )
    return _Message(spelling.roles[role], value[spelling.content])


def _begins(messages: Sequence[_Message], before: Sequence[_Message]) -> bool:
    """Whether a chat begins with messages, and goes on."""
    return len(messages) > len(before) and list(messages[: len(before)]) == list(before)


def _gap(record: Record) -> float | None:
    """How much better the chosen answer is: its score less the other's, or OpenRLHF's margin."""
    if all(record.fields.get(key) is not None for key in ("score_chosen", "score_rejected")):
        return number_in(record, "score_chosen") - number_in(record, "score_rejected")
    return number_in(record, "margin") if record.fields.get("margin") is not None else None
