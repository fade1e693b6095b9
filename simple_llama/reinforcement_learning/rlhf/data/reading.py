"""From records to conversations: which format a file has, what is dropped, what is faulty, which keys nobody reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from typing_extensions import Doc

from simple_llama.cluster import watchdog
from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.settings import Settings
from simple_llama.dataset.json_records import Faults, KeptCount, Record, Tally
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Dropped, NeedsOption, Ranking
from simple_llama.reinforcement_learning.rlhf.data.readers import READERS, DataFormat, Formats, without_nulls
from simple_llama.reinforcement_learning.rlhf.data.record_checks import ReadOptions

_RECORDS_PER_BEAT = 512


@dataclass(frozen=True)
class ReadingConfig(Settings):
    """How records are read."""

    # === Records ===
    data_format: Annotated[
        DataFormat, Doc("format of the records; auto: what the first ones of each file show (docs/data.md)")
    ] = "auto"
    prefer: Annotated[
        Literal["helpful", "safe", "both"] | None,
        Doc("label of PKU-SafeRLHF that decides; both: pairs whose more helpful answer is the safer one"),
    ] = None
    keep_unsafe: bool = False  # also pairs of PKU-SafeRLHF whose preferred answer is marked unsafe
    on_bad_record: Annotated[
        Literal["stop", "drop"], Doc("what a faulty record does: end the start, or be left out, counted and named")
    ] = "stop"


class Reading:
    """Reads conversations as the settings say; `default_system` is that of records without a system prompt."""

    def __init__(self, config: ReadingConfig, default_system: str | None, formats: Mapping[str, str] | None = None):
        self._config, self._formats = config, Formats(config.data_format, dict(formats or {}))
        self._drops_faults = config.on_bad_record == "drop"
        guess = config.data_format == "TRL"
        self._options = ReadOptions(default_system, config.prefer, config.keep_unsafe, guess)

    @property
    def formats(self) -> dict[str, str]:
        """The format of each file, as far as it is known."""
        return self._formats.of_file

    def faults(self) -> Faults:
        """Where faulty records go."""
        return Faults(are_dropped=self._drops_faults)

    def conversations(
        self, records: Iterable[Record], count: KeptCount, extra_keys: Tally, faults: Faults | None = None
    ) -> Iterator[Conversation]:
        """What the records say; counts them, those without a pair, and keys that their format does not have.

        Behind the first of `faults` records are only looked at, unless these are dropped: no pair will be used.
        """
        for number, record in enumerate(map(without_nulls, records)):
            if number % _RECORDS_PER_BEAT == 0:
                watchdog.beat("reading the data")
            try:
                reader = READERS[self._formats.of(record)]
                said = reader.read(record, self._options)
                found = said.pairs if isinstance(said, Ranking) else [said]
            except Dropped as reason:
                count.total += 1
                count.dropped.add(str(reason), record.origin)
                continue
            except UserError as fault:
                if faults is None or isinstance(fault, NeedsOption):
                    raise
                faults.add(fault, record.origin)
                continue
            count.total += len(found)
            if faults and faults.end_the_start:
                continue
            for key in filter(reader.passes_over, record.fields):
                extra_keys.add(shown(key), record.origin)
            yield from found

    def said(self) -> str:
        """The formats that were read, for the report. UserError for an option that no record had a use for."""
        if (self._config.prefer or self._config.keep_unsafe) and not self._formats.has("PKU-SafeRLHF"):
            raise UserError(
                "prefer, keep_unsafe: expected PKU-SafeRLHF records, found none; leave the options out (--prefer None "
                "where a run brings one along)"
            )
        return self._formats.said()
