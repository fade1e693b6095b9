"""From records to usable pairs: how the records of files, or of a block of one, are read and tokenized."""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from simple_llama.cluster.console import progress
from simple_llama.common.errors import UserError
from simple_llama.dataset.ascii_text import Spelling
from simple_llama.dataset.json_records import Faults, KeptCount, Record, Tally, read_records
from simple_llama.dataset.tokenizer import one_thread_a_call
from simple_llama.finetune.chat_format import Chat, ChatFormat, UnsayableChat
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation
from simple_llama.reinforcement_learning.rlhf.data.overlong import without_oldest_turns
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.reading import Reading, ReadingConfig
from simple_llama.reinforcement_learning.rlhf.data.scored_tokens import ScoredChat, Scoring
from simple_llama.reinforcement_learning.rlhf.data.speller import Speller
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.data.usable_pairs import ForMerge, Usable, keep_usable

_Encode = Callable[[Sequence[Chat]], "Future[list[ScoredChat]]"]
_MOST_THREADS = 8  # that tokenize: more would wait for Python, which makes pairs of what they made
_RECORDS_PER_BATCH = 256  # that a thread tokenizes at a time


@dataclass
class ReadPairs:
    """What records are."""

    pairs: PairSet
    shares: np.ndarray  # (N,) where the prompt of each stands in [0, 1)
    count: KeptCount
    extra_keys: Tally
    speller: Speller
    faults: Faults
    formats: Mapping[str, str] = field(default_factory=dict)  # of each file


@dataclass(frozen=True)
class PairReader:
    """How records become pairs."""

    chat: ChatFormat
    config: ReadingConfig
    scoring: Scoring
    spelling: Spelling
    usable: Usable
    shorten_to: int | None = None  # tokens; longer chats lose their oldest turns, None: they are dropped

    def read(
        self,
        records: Callable[[Faults], Iterable[Record]],
        formats: Mapping[str, str] | None = None,
        merge: ForMerge | None = None,
    ) -> ReadPairs:
        """The usable pairs. Faults of records are gathered, and those of whole files unless faulty records are dropped.

        Args:
            records: gives the records, and to its argument those that are faulty.
            formats: of files whose first records are not there.
            merge: see `keep_usable`.
        """
        reading = Reading(self.config, self.chat.default_system, formats)
        faults, count, extra_keys, speller = reading.faults(), KeptCount(), Tally(), Speller(self.spelling)
        pairs, shares = PairSet.of([]), np.zeros(0)
        try:
            counted = progress(records(faults), None, "reading and tokenizing pairs")
            conversations = reading.conversations(counted, count, extra_keys, faults)
            tokenized = self._tokenized(conversations, speller, count, faults)
            with _others_kept():
                pairs, shares = keep_usable(tokenized, self.usable, count, merge)
        except UserError as fault:  # of a whole file
            if faults.are_dropped:
                raise
            faults.add(fault)
        return ReadPairs(pairs, shares, count, extra_keys, speller, faults, reading.formats)

    def said(self, formats: Mapping[str, str]) -> str:
        """The formats of files that were read, in words. UserError for an option that no record had a use for."""
        return Reading(self.config, self.chat.default_system, formats).said()

    def again(self, file: str, numbers: set[int]) -> Iterator[tuple[Conversation, TokenizedPair]]:
        """The pairs of these records of a file, which is read to the last one; no other line is parsed."""
        reading = Reading(self.config, self.chat.default_system)
        count, faults = KeptCount(), reading.faults()
        gathered = faults if faults.are_dropped else None
        found = islice(read_records(file, gathered, numbers), len(numbers))
        conversations = reading.conversations(found, count, Tally(), gathered)
        yield from self._tokenized(conversations, Speller(self.spelling), count, faults)

    def _tokenized(
        self, conversations: Iterable[Conversation], speller: Speller, count: KeptCount, faults: Faults
    ) -> Iterator[tuple[Conversation, TokenizedPair]]:
        """Adds token ids; leaves out turns of chats that are too long, where that is wanted.

        Ids are made by other threads, one for each core of this rank, a batch each: while the tokenizer works, Python
        can read and look at pairs.
        """
        number = min(_MOST_THREADS, torch.get_num_threads())
        with one_thread_a_call, ThreadPoolExecutor(number, "tokenizing") as threads:

            def encode(chats: Sequence[Chat]) -> Future[list[ScoredChat]]:
                return threads.submit(self.scoring.encode, self.chat, chats)

            def again(c: Conversation) -> TokenizedPair | None:
                found = _tokenize([c], encode, Speller(self.spelling), KeptCount(), faults, 1)
                return next((pair for _, pair in found), None)

            found = _tokenize(conversations, encode, speller, count, faults, number)
            if self.shorten_to is not None:
                found = without_oldest_turns(found, self.shorten_to, again, count)
            yield from found


@contextlib.contextmanager
def _others_kept() -> Iterator[None]:
    """While it lasts, Python looks for garbage among what is made meanwhile alone, not again and again in all that the
    packages have: a tenth of the time that reading takes."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Batch(NamedTuple):
    """Conversations whose chats are being made into ids."""

    said: list[Conversation]
    chats: list[Chat]  # two of each conversation
    made: Future[list[ScoredChat]]  # of each different chat: an answer may stand in several pairs


def _tokenize(
    conversations: Iterable[Conversation],
    encode: _Encode,
    speller: Speller,
    count: KeptCount,
    faults: Faults,
    most_ahead: int,
) -> Iterator[tuple[Conversation, TokenizedPair]]:
    """Adds token ids, made in batches of the texts as `speller` has them, so many at once; counts what the chat format
    notes."""
    source, ahead = iter(conversations), deque[_Batch]()
    while said := list(islice(source, _RECORDS_PER_BATCH)):
        spelled = map(speller.spelled, said)
        chats = [Chat(c.system, c.users, answers) for c in spelled for answers in (c.chosen, c.rejected)]
        ahead.append(_Batch(said, chats, encode(_distinct(chats))))
        if len(ahead) > most_ahead:
            yield from _pairs(ahead.popleft(), encode, count, faults)
    for batch in ahead:
        yield from _pairs(batch, encode, count, faults)


def _distinct(chats: list[Chat]) -> list[Chat]:
    return list(dict.fromkeys(chats))


def _pairs(
    batch: _Batch, encode: _Encode, count: KeptCount, faults: Faults
) -> Iterator[tuple[Conversation, TokenizedPair]]:
    """The pairs of a batch."""
    encoded = _encoded(batch, encode, count, faults)
    for c, *sides in zip(batch.said, batch.chats[0::2], batch.chats[1::2], strict=True):
        chosen, rejected = (encoded[side] for side in sides)
        for note in dict.fromkeys(chosen.notes + rejected.notes):
            count.noticed.add(note, f"{c.file}:{c.record}")
        spans = chosen.spans, rejected.spans
        if all(start < stop for side in spans for start, stop in side):
            yield c, TokenizedPair.from_spans(chosen.ids, rejected.ids, spans, c.weight, c.gap)
        else:
            count.dropped.add("an answer of no scored token", f"{c.file}:{c.record}")


def _encoded(batch: _Batch, encode: _Encode, count: KeptCount, faults: Faults) -> dict[Chat, ScoredChat]:
    """Ids of each different chat. One that the format cannot say is a fault, or is taken out of the batch where faults
    are dropped."""
    said, chats, made = batch
    while True:
        distinct = _distinct(chats)
        try:
            return dict(zip(distinct, made.result(), strict=True))
        except UnsayableChat as error:
            place = chats.index(distinct[error.index]) // 2
            unsaid = said.pop(place)
            del chats[2 * place : 2 * place + 2]
            origin = f"{unsaid.file}:{unsaid.record}"
            fault = UserError(f"{origin}: {error}")
            if not faults.are_dropped:
                raise fault from error
            faults.add(fault, origin)
            count.total -= 1
        if not chats:
            return {}
        made = encode(_distinct(chats))
