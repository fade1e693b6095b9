"""Preference data: reads the pairs, refuses what is malformed, drops what cannot be used, splits by prompt.

    {"Template": ["CUSTOM"], "User": ["Hi"], "Accepted": ["Hello!"], "Rejected": ["Go away."]}

`Template` is a list with one system prompt, or the same one for each turn; "CUSTOM" is the default system prompt.
`User`, `Accepted` and `Rejected` are lists of strings of equal length, one entry a turn; the last answers are compared.

Refused (UserError, nothing is trained): no JSON, no UTF-8, a missing key or one that stands twice, another type,
unequal lists, a blank message. Dropped and counted: chats of more than `max_seq_len` tokens (the pair, never one side
of it), pairs whose two chats are the same tokens, pairs that came before. Other keys are ignored and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.common.files import digest
from simple_llama.common.logging import LOGGER
from simple_llama.dataset.json_records import KeptCount, Tally, data_files, read_records
from simple_llama.dataset.tokenizer import SPECIAL_IDS
from simple_llama.finetune.format_llm_prompt import (
    DEFAULT_SYSTEM_PROMPT,
    chat_segments,
    encode_texts,
    join_ids,
)
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.data.readers import Conversation, parse_record

RECORDS_PER_BATCH = 512  # tokenized at a time: long enough to keep the tokenizer's threads busy, short enough to forget


@dataclass(frozen=True)
class PreferencePair(Conversation):
    """A conversation that can be trained on."""

    tokenized: TokenizedPair

    @property
    def prompt_ids(self) -> np.ndarray:
        """int32 token ids of the chosen chat up to its last <SOA>: what a model is asked to continue."""
        chosen_chat = np.concatenate([self.tokenized.prefix, self.tokenized.chosen])
        return chosen_chat[: -self.tokenized.chosen_scored]


class RLDatasetLoader:
    """Training and validation pairs of a file or a folder, in the order of the data.

    Args:
        path: a .json or .jsonl file (plain or .gz), or a folder of them, read in the order of their names.
        max_seq_len: tokens; a pair is dropped when one of its chats is longer.
        val_share: share of the prompts (not of the pairs) held out, in [0, 1).
        seed: of the split; which pairs are trained on does not depend on the order or the amount of other data.
        default_system: what "CUSTOM" stands for; it has to be the one that the start model was tuned with.

    Attributes: `train`, `validation` (lists of PreferencePair), `report` (one line: what was kept, dropped, ignored).
    Raises UserError (file, record, key, expected, found) for malformed data and when no training pair is left.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        max_seq_len: int,
        *,
        val_share: float,
        seed: int,
        default_system: str = DEFAULT_SYSTEM_PROMPT,
    ) -> None:
        if not 0 <= val_share < 1:
            raise UserError(f"val_share: expected at least 0 and below 1, found {val_share}")
        extra_keys = Tally()
        records = (record for file in data_files(path) for record in read_records(file))
        conversations = (parse_record(record, default_system, extra_keys) for record in records)
        pairs, count = keep_usable(tokenize(conversations, tokenizer), max_seq_len)
        self.report = describe(pairs, count, extra_keys)
        if not pairs:
            raise UserError(f"{path}: expected at least one usable pair, found none: {self.report}")
        LOGGER.info("%s: %s", path, self.report)
        self.train, self.validation = split_by_prompt(pairs, val_share, seed)
        if not self.train:
            raise UserError(
                f"{path}: expected training pairs, found none: all {len(pairs):,} pairs fell into the validation share "
                f"{val_share}; add data with other prompts, or set val_share to 0"
            )


def tokenize(conversations: Iterable[Conversation], tokenizer: Tokenizer) -> Iterator[PreferencePair]:
    """Adds token ids. Texts are tokenized in batches and each different text of a batch once."""
    ahead = iter(conversations)
    while batch := list(islice(ahead, RECORDS_PER_BATCH)):
        texts = (text for c in batch for text in ("\n\n", "\n", c.system, *c.users, *c.chosen, *c.rejected))
        ids_of_text = encode_texts(tokenizer, texts)
        for c in batch:
            chosen_ids = join_ids(chat_segments(c.system, c.users, c.chosen), ids_of_text)
            rejected_ids = join_ids(chat_segments(c.system, c.users, c.rejected), ids_of_text)
            chosen_scored = len(ids_of_text[c.chosen[-1]]) + 1  # and <EOA>
            rejected_scored = len(ids_of_text[c.rejected[-1]]) + 1
            tokenized = TokenizedPair.from_chats(chosen_ids, chosen_scored, rejected_ids, rejected_scored)
            yield PreferencePair(c.system, c.users, c.chosen, c.rejected, c.file, c.record, tokenized)


def keep_usable(pairs: Iterable[PreferencePair], max_seq_len: int) -> tuple[list[PreferencePair], KeptCount]:
    """Leaves out over-long and identical pairs and repetitions, by their tokens: what the model sees decides."""
    kept, count, seen = [], KeptCount(), set()
    for pair in pairs:
        count.total += 1
        tokenized = pair.tokenized
        if max(tokenized.chosen_len, tokenized.rejected_len) > max_seq_len:
            count.dropped.add("too long", pair.origin)
        elif np.array_equal(tokenized.chosen, tokenized.rejected):
            count.dropped.add("identical", pair.origin)
        elif tokenized.digest in seen:
            count.dropped.add("duplicate", pair.origin)
        else:
            seen.add(tokenized.digest)
            kept.append(pair)
    return kept, count


def describe(pairs: Sequence[PreferencePair], count: KeptCount, extra_keys: Tally) -> str:
    """One line: kept and dropped pairs, ignored keys, characters that the tokenizer does not know."""
    line = count.summary()
    for key, times in extra_keys.times.items():
        line += f"; ignored key {key} (records: {times:,}, first: {extra_keys.first[key]})"
    unknown = {pair.origin: times for pair in pairs if (times := _unknown_bytes(pair.tokenized))}
    if unknown:
        line += f"; {sum(unknown.values()):,} bytes that the tokenizer does not know became <UNK>"
        line += f" (pairs: {len(unknown):,}, first: {next(iter(unknown))})"
    return line


def _unknown_bytes(tokenized: TokenizedPair) -> int:
    parts = (tokenized.prefix, tokenized.chosen, tokenized.rejected)
    return sum(int(np.count_nonzero(part == SPECIAL_IDS["<UNK>"])) for part in parts)


def split_by_prompt(
    pairs: Sequence[PreferencePair], val_share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(training, validation): a prompt with all its pairs goes to validation when its hash is below `val_share`.

    So a prompt stays on its side when data is added. Only where no hash is below `val_share` (few prompts) the smallest
    one goes to validation, and more data may move it back.
    """
    shares = [prompt_share(pair.system, pair.users, seed) for pair in pairs]
    limit = max(val_share, np.nextafter(min(shares), 1.0)) if val_share > 0 else 0.0
    train = [pair for pair, share in zip(pairs, shares, strict=True) if share >= limit]
    return train, [pair for pair, share in zip(pairs, shares, strict=True) if share < limit]


def prompt_share(system: str, users: Sequence[str], seed: int) -> float:
    """Where the prompt stands in [0, 1), from a hash of the seed, the system prompt and the user turns."""
    key = json.dumps([seed, system, list(users)]).encode()
    return int.from_bytes(digest(key, size=6), "big") / 2**48  # 48 bits are exact in a float
