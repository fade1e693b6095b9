"""Whole transcripts under `chosen` and `rejected`, as HH-RLHF has them.

A paragraph that starts with "Human:" or "Assistant:" starts a turn; anywhere else these words are text (`holds_a_turn`
says where that is doubtful). CR LF is read as LF, and texts lose the white space around them. Turns have to alternate,
Human first and Assistant last, and the Human turns of both transcripts have to agree; earlier answers may differ, the
last ones have to.
"""

from __future__ import annotations

import re

from simple_llama.common.errors import UserError
from simple_llama.dataset.json_records import Record
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Dropped
from simple_llama.reinforcement_learning.rlhf.data.record_checks import ReadOptions, typed, usable

_TURN = re.compile(r"\n\n(Human|Assistant):")


def from_hh(record: Record, options: ReadOptions) -> Conversation:
    """The pair in two HH-RLHF transcripts."""
    if "prompt" in record.fields:
        raise UserError(
            f"{record.origin}: expected whole transcripts under chosen and rejected (HH-RLHF), found a prompt beside "
            "them, which is another form (TRL's)"
        )
    return from_transcripts(record, options, typed(record, "chosen", str), typed(record, "rejected", str))


def from_transcripts(record: Record, options: ReadOptions, *transcripts: str) -> Conversation:
    """The pair in two whole transcripts, the better one first."""
    chosen, rejected = map(_turns, transcripts)
    if chosen[0::2] != rejected[0::2]:
        raise Dropped("with different Human turns")
    return usable(record, options, chosen[0::2], chosen[1::2], rejected[1::2])


def begins_a_transcript(text: object) -> bool:
    """Whether a value is text whose first turn is Human's."""
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def _turns(transcript: str) -> list[str]:
    """Messages of a transcript: Human, Assistant, Human, ..., Assistant."""
    if "\r" in transcript:
        transcript = transcript.replace("\r\n", "\n").replace("\r", "\n")
    before, *parts = _TURN.split("\n\n" + transcript.strip())  # parts: speaker, message, speaker, message, ...
    speakers = parts[0::2]
    if before or speakers[:1] != ["Human"]:
        raise Dropped("not starting with a Human turn")
    if speakers[-1] == "Human":
        raise Dropped("without a reply")
    if speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        raise Dropped("with turns that do not alternate")
    return [message.strip() for message in parts[1::2]]
