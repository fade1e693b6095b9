"""The readers: a record of a data file as a conversation with two answers, one function a format.

A reader raises UserError (file, record, key, expected, found) for what does not fit its format, and Dropped for a sound
record without a usable pair. A format is one such function and its line in READERS;
`dataset_loader.FORMATS` and convert.py name those that they take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.json_records import Record
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Ranking
from simple_llama.reinforcement_learning.rlhf.data.own_records import TEMPLATE_KEYS, from_template
from simple_llama.reinforcement_learning.rlhf.data.record_checks import ReadOptions
from simple_llama.reinforcement_learning.rlhf.data.safety_records import from_pku
from simple_llama.reinforcement_learning.rlhf.data.transcripts import from_hh


class Reader(NamedTuple):
    """A format of records."""

    keys: tuple[str, ...]  # a record that has all of them is read so
    read: Callable[[Record, ReadOptions], Conversation | Ranking]


def format_of(record: Record, names: Sequence[str]) -> str:
    """The format of a record among `names`, by its keys. UserError for none of them.

    Where only one is allowed nothing is guessed: its reader says what the record lacks.
    """
    if len(names) == 1:
        return names[0]
    for name in names:
        if all(key in record.fields for key in READERS[name].keys):
            return name
    expected = " or ".join(f"{', '.join(READERS[name].keys)} ({name})" for name in names)
    raise UserError(f"{record.origin}: expected keys {expected}, found {shown(list(record.fields))}")


READERS = {
    "Template": Reader(TEMPLATE_KEYS, from_template),
    "HH-RLHF": Reader(("chosen", "rejected"), from_hh),
    "PKU-SafeRLHF": Reader(("prompt", "response_0", "response_1"), from_pku),
}
