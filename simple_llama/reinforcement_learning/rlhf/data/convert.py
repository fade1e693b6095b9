"""Converts preference data of any format that is known (readers.py) into this project's own.

A record of another shape is a UserError; one that holds no usable pair is dropped and counted by reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write, check_free
from simple_llama.common.logging import LOGGER
from simple_llama.dataset.ascii_text import ascii_text
from simple_llama.dataset.json_records import Faults, KeptCount, Record, read_records
from simple_llama.reinforcement_learning.rlhf.data.conversation import (
    Conversation,
    Dropped,
    NeedsOption,
    Ranking,
    holds_a_turn,
)
from simple_llama.reinforcement_learning.rlhf.data.data_report import LIKE_A_TURN, warnings_of
from simple_llama.reinforcement_learning.rlhf.data.own_records import CUSTOM
from simple_llama.reinforcement_learning.rlhf.data.readers import READERS, DataFormat, Formats, without_nulls
from simple_llama.reinforcement_learning.rlhf.data.record_checks import Preferred, ReadOptions
from simple_llama.reinforcement_learning.rlhf.data.safety_records import category_of

_HH = "HH-RLHF"
_Named = Literal["helpful", "safe", "both", "helpfulness", "safety"]
_PREFERRED: dict[_Named, Preferred] = {"helpfulness": "helpful", "safety": "safe", "both": "both"}
_PREFERRED |= {"helpful": "helpful", "safe": "safe"}


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of the conversion."""

    # === Files ===
    inputs: tuple[str, ...]  # files of any format in docs/data.md
    output: str  # file to write: .jsonl (one pair a line) or .json (one list)

    # === Choice ===
    data_format: DataFormat = "auto"  # of the inputs; auto: what the first records of each show
    # which label decides; PKU-SafeRLHF only, and needed there; helpfulness and safety mean helpful and safe
    prefer: _Named | None = None
    keep_unsafe: bool = False  # keep pairs whose preferred answer is marked unsafe; PKU-SafeRLHF only
    ascii_only: bool = False  # replace or remove characters beyond ASCII, for a tokenizer that knows no others
    limit: int = 0  # pairs to write, at most; 0: all


@dataclass
class _Conversion:
    """What has been converted so far."""

    formats: Formats
    pairs: list[dict[str, object]] = field(default_factory=list)
    count: KeptCount = field(default_factory=KeptCount)
    faults: Faults = field(default_factory=Faults)
    removed_characters: int = 0
    carriage_returns: int = 0  # transcripts that have some

    def to_ascii(self, text: str) -> str:
        """A message in ASCII; characters without an ASCII form are counted and gone."""
        form, removed = ascii_text(text)
        self.removed_characters += removed
        return form.strip()


def prepare(config: PrepareConfig) -> str:
    """Converts all inputs, in order, into `config.output` (whole or not at all). Returns the line to show.

    Warns of what data_report.py names. Raises UserError for files of another kind, for faulty records (the first ten,
    with their number), options without effect, and when no pair is left.
    """
    _check_settings(config)
    done = _convert_files(config)
    if not done.formats.has("PKU-SafeRLHF") and (config.prefer or config.keep_unsafe):
        raise UserError("prefer and keep_unsafe: expected a PKU-SafeRLHF input, found none; leave the options out")
    report = done.count.summary()
    if not done.pairs:
        raise UserError(f"{', '.join(config.inputs)}: expected at least one usable pair, found none: {report}")
    if config.limit and len(done.pairs) == config.limit:
        report += f"; stopped at the limit of {config.limit:,} pairs"
    if config.ascii_only:
        report += f"; removed {done.removed_characters:,} characters without an ASCII form"
    if done.carriage_returns:
        report += f"; read CR LF as LF in {done.carriage_returns:,} records"
    report += done.formats.said()
    atomic_write(config.output, _serialized(done.pairs, as_list=config.output.endswith(".json")))
    for warning in warnings_of(done.count):
        LOGGER.warning("%s: %s", config.output, warning)
    return f"{config.output}: {report}"


def _check_settings(config: PrepareConfig) -> None:
    """Raises UserError for settings that cannot work whatever the inputs hold."""
    if not config.inputs:
        raise UserError("inputs: expected at least one file, found none")
    if not config.output.endswith((".json", ".jsonl")):
        raise UserError(f"output: expected a name that ends with .json or .jsonl, found {config.output!r}")
    if Path(config.output).resolve() in {Path(name).resolve() for name in config.inputs}:
        raise UserError(f"output: expected another file than the inputs, found {config.output!r} among them")
    check_free(config.output)
    if config.limit < 0:
        raise UserError(f"limit: expected a number of pairs, or 0 for all, found {config.limit}")


def _convert_files(config: PrepareConfig) -> _Conversion:
    """Reads the inputs up to the limit. One UserError for all that is faulty."""
    done = _Conversion(Formats(config.data_format))
    prefer = _PREFERRED[config.prefer] if config.prefer else None
    clean = done.to_ascii if config.ascii_only else str
    options = ReadOptions(CUSTOM, prefer, config.keep_unsafe, config.data_format == "TRL", clean)
    try:
        for record in (record for name in config.inputs for record in read_records(name, done.faults)):
            _convert_record(without_nulls(record), options, done)
            if config.limit and len(done.pairs) == config.limit:
                break
    except UserError as fault:  # of a whole file
        done.faults.add(fault)
    done.faults.end()
    return done


def _convert_record(record: Record, options: ReadOptions, done: _Conversion) -> None:
    """Adds what a record says to `done`, or counts why there is no pair in it."""
    done.count.total += 1
    try:
        found = done.formats.of(record)
        said = READERS[found].read(record, options)
        pairs = said.pairs if isinstance(said, Ranking) else [said]
    except Dropped as reason:
        done.count.dropped.add(str(reason), record.origin)
    except NeedsOption:
        raise
    except UserError as fault:
        done.faults.add(fault)
    else:
        done.pairs.append(_fields(said, category_of(record.fields)))
        if any(map(holds_a_turn, pairs)):
            done.count.noticed.add(LIKE_A_TURN, record.origin)
        if found == _HH:
            done.carriage_returns += any("\r" in record.fields[side] for side in READERS[found].keys)


def _serialized(records: Sequence[dict[str, object]], as_list: bool) -> bytes:
    """Records of this project's own format, as a JSON list or as one JSON object a line."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return ("[\n" + ",\n".join(lines) + "\n]\n" if as_list else "\n".join(lines) + "\n").encode()


def _fields(said: Conversation | Ranking, category: object) -> dict[str, object]:
    """A record of a pair, or of several answers."""
    fields: dict[str, object] = {"Template": [said.system], "User": said.users}
    if isinstance(said, Ranking):
        scores = said.scores if said.gaps else [0 - score for score in said.scores]
        fields |= {"Responses": said.answers, "Scores" if said.gaps else "Ranks": scores}
    else:
        fields |= {"Accepted": said.chosen, "Rejected": said.rejected}
    gap = None if isinstance(said, Ranking) else said.gap
    given = {"weight": None if said.weight == 1 else said.weight, "gap": gap, "category": category}
    return {**fields, **{name: value for name, value in given.items() if value is not None}}
