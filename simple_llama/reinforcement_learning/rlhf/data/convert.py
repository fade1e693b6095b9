"""Converts published human preference data into the format of RLDatasetLoader.

HH-RLHF (`chosen`, `rejected`): whole transcripts. A paragraph that starts with "Human:" or "Assistant:" starts a turn;
anywhere else these words are text. Turns have to alternate, Human first and Assistant last, and the Human turns of both
transcripts have to agree; earlier answers may differ.
PKU-SafeRLHF (`prompt`, `response_0`, `response_1`, labels): `prefer` says which of the two labels decides. A pair whose
preferred answer is marked unsafe is dropped unless `keep_unsafe`.
Text loses the white space around it. A record of another shape is a UserError; one that holds no usable pair is dropped
and counted by reason.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write, shown
from simple_llama.dataset.json_records import KeptCount, Record, json_type, read_records

Value = TypeVar("Value", str, int, bool)
KEYS_OF_KIND = {"HH-RLHF": ("chosen", "rejected"), "PKU-SafeRLHF": ("prompt", "response_0", "response_1")}
PKU_LABEL = {"helpfulness": "better_response_id", "safety": "safer_response_id"}
TURN = re.compile(r"\n\n(Human|Assistant):")
# the typographic characters that Unicode's own decomposition does not turn into ASCII
ASCII_FORMS = {
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2010": "-",
    "\u2011": "-",
    "\u2012": "-",
    "\u2013": "-",
    "\u2014": " - ",
    "\u2022": "*",
    "\u00d7": "x",
}


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of the conversion."""

    # === Files ===
    inputs: tuple[str, ...]  # HH-RLHF or PKU-SafeRLHF files: .jsonl or .json, plain or .gz
    output: str  # file to write: .jsonl (one pair a line) or .json (one list)

    # === Choice ===
    prefer: Literal["helpfulness", "safety"] | None = None  # which label decides; PKU-SafeRLHF only, and needed there
    keep_unsafe: bool = False  # keep pairs whose preferred answer is marked unsafe; PKU-SafeRLHF only
    ascii_only: bool = False  # replace or remove characters beyond ASCII, for a tokenizer that knows no others
    limit: int = 0  # pairs to write, at most; 0: all


class RawPair(NamedTuple):
    """User turns, and both answers to each of them."""

    users: Sequence[str]
    chosen: Sequence[str]
    rejected: Sequence[str]


class Dropped(Exception):
    """A record without a usable pair; the message is the reason that is counted."""


@dataclass
class Conversion:
    """What has been converted so far."""

    pairs: list[RawPair] = field(default_factory=list)
    count: KeptCount = field(default_factory=KeptCount)
    kinds: set[str] = field(default_factory=set)
    removed_characters: int = 0


def prepare(config: PrepareConfig) -> str:
    """Converts all inputs, in order, into `config.output` (whole or not at all). Returns the line to show.

    Raises UserError for files of another kind, options without effect, and when no pair is left.
    """
    check_settings(config)
    done = convert_files(config)
    if "PKU-SafeRLHF" not in done.kinds and (config.prefer or config.keep_unsafe):
        raise UserError("prefer and keep_unsafe: expected a PKU-SafeRLHF input, found none; leave the options out")
    report = done.count.summary()
    if not done.pairs:
        raise UserError(f"{', '.join(config.inputs)}: expected at least one usable pair, found none: {report}")
    if config.limit and len(done.pairs) == config.limit:
        report += f"; stopped at the limit of {config.limit:,} pairs"
    if config.ascii_only:
        report += f"; removed {done.removed_characters:,} characters without an ASCII form"
    atomic_write(config.output, serialized(done.pairs, as_list=config.output.endswith(".json")))
    return f"{config.output}: {report}"


def check_settings(config: PrepareConfig) -> None:
    """Raises UserError for settings that cannot work whatever the inputs hold."""
    if not config.inputs:
        raise UserError("inputs: expected at least one file, found none")
    if not config.output.endswith((".json", ".jsonl")):
        raise UserError(f"output: expected a name that ends with .json or .jsonl, found {config.output!r}")
    if Path(config.output).resolve() in {Path(name).resolve() for name in config.inputs}:
        raise UserError(f"output: expected another file than the inputs, found {config.output!r} among them")
    if config.limit < 0:
        raise UserError(f"limit: expected a number of pairs, or 0 for all, found {config.limit}")


def convert_files(config: PrepareConfig) -> Conversion:
    """Reads the inputs up to the limit."""
    done = Conversion()
    for record in (record for name in config.inputs for record in read_records(name)):
        kind = kind_of(record)
        done.kinds.add(kind)
        done.count.total += 1
        try:
            pair = from_hh(record) if kind == "HH-RLHF" else from_pku(record, config.prefer, config.keep_unsafe)
            if config.ascii_only:
                pair, removed = ascii_pair(pair)
                done.removed_characters += removed
            check_pair(pair)
            done.pairs.append(pair)
        except Dropped as reason:
            done.count.dropped.add(str(reason), record.origin)
        if config.limit and len(done.pairs) == config.limit:
            break
    return done


def kind_of(record: Record) -> str:
    """Name of the data set that a record comes from, by its keys."""
    for kind, keys in KEYS_OF_KIND.items():
        if all(key in record.fields for key in keys):
            return kind
    expected = " or ".join(f"{', '.join(keys)} ({kind})" for kind, keys in KEYS_OF_KIND.items())
    raise UserError(f"{record.origin}: expected keys {expected}, found {shown(list(record.fields))}")


def from_hh(record: Record) -> RawPair:
    """The pair in two HH-RLHF transcripts."""
    chosen, rejected = (_turns(_typed(record, key, str)) for key in ("chosen", "rejected"))
    if chosen[0::2] != rejected[0::2]:
        raise Dropped("with different Human turns")
    return RawPair(chosen[0::2], chosen[1::2], rejected[1::2])


def _turns(transcript: str) -> list[str]:
    """Messages of a transcript: Human, Assistant, Human, ..., Assistant."""
    before, *parts = TURN.split("\n\n" + transcript.strip())  # parts: speaker, message, speaker, message, ...
    speakers = parts[0::2]
    if before or speakers[:1] != ["Human"]:
        raise Dropped("not starting with a Human turn")
    if speakers[-1] == "Human":
        raise Dropped("without a reply")
    if speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        raise Dropped("with turns that do not alternate")
    return [message.strip() for message in parts[1::2]]


def from_pku(record: Record, prefer: str | None, keep_unsafe: bool) -> RawPair:
    """The pair in a PKU-SafeRLHF record, the better or the safer answer chosen."""
    if prefer is None:
        raise UserError(f"{record.origin}: a PKU-SafeRLHF record; give --prefer helpfulness or --prefer safety")
    prompt = _typed(record, "prompt", str).strip()
    answers = [_typed(record, f"response_{side}", str).strip() for side in (0, 1)]
    is_safe = [_typed(record, f"is_response_{side}_safe", bool) for side in (0, 1)]
    chosen = _typed(record, PKU_LABEL[prefer], int)
    if chosen not in (0, 1):
        raise UserError(f"{record.origin}: {PKU_LABEL[prefer]}: expected 0 or 1, found {shown(chosen)}")
    if not is_safe[chosen] and not keep_unsafe:
        raise Dropped("with an unsafe preferred answer")
    return RawPair([prompt], [answers[chosen]], [answers[1 - chosen]])


def _typed(record: Record, key: str, kind: type[Value]) -> Value:
    """The value under `key`, which has to be of type `kind` exactly (true is no number)."""
    expected = {str: "a string", int: "a whole number", bool: "true or false"}[kind]
    if key not in record.fields:
        raise UserError(f"{record.origin}: expected key {key!r} with {expected}, found {shown(list(record.fields))}")
    value = record.fields[key]
    if type(value) is not kind:
        raise UserError(f"{record.origin}: {key}: expected {expected}, found {json_type(value)}")
    return value


def check_pair(pair: RawPair) -> None:
    """Raises Dropped for what RLDatasetLoader would refuse or drop."""
    if not all(pair.users):
        raise Dropped("with an empty user message")
    if not all(pair.chosen) or not all(pair.rejected):
        raise Dropped("with an empty answer")
    if pair.chosen == pair.rejected:
        raise Dropped("with identical answers")
    if any("\ud800" <= character <= "\udfff" for messages in pair for text in messages for character in text):
        raise Dropped("with half of a surrogate pair")


def ascii_pair(pair: RawPair) -> tuple[RawPair, int]:
    """The pair in ASCII, and how many characters had no ASCII form and are gone."""
    forms = [[ascii_text(text) for text in messages] for messages in pair]
    removed = sum(count for messages in forms for _, count in messages)
    return RawPair(*([text.strip() for text, _ in messages] for messages in forms)), removed


def ascii_text(text: str) -> tuple[str, int]:
    """`text` in ASCII, and how many characters had no ASCII form. Accents go: an e with an acute accent becomes e."""
    spelled, removed = [], 0
    for character in text if not text.isascii() else ():
        decomposed = unicodedata.normalize("NFKD", ASCII_FORMS.get(character, character))
        form = decomposed.encode("ascii", "ignore").decode()
        removed += not form and not unicodedata.combining(character)  # an accent belongs to the letter before it
        spelled.append(form)
    return (text if text.isascii() else "".join(spelled)), removed


def serialized(pairs: Sequence[RawPair], as_list: bool) -> bytes:
    """The pairs in the format of RLDatasetLoader, as a JSON list or as one JSON object a line."""
    lines = [
        json.dumps(
            {"Template": ["CUSTOM"], "User": pair.users, "Accepted": pair.chosen, "Rejected": pair.rejected},
            ensure_ascii=False,
        )
        for pair in pairs
    ]
    return ("[\n" + ",\n".join(lines) + "\n]\n" if as_list else "\n".join(lines) + "\n").encode()
