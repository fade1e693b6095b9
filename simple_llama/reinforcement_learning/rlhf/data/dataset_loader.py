"""Preference data: reads the pairs, refuses what is malformed, drops what cannot be used, splits by prompt.

    {"Template": ["CUSTOM"], "User": ["Hi"], "Accepted": ["Hello!"], "Rejected": ["Go away."]}

Other formats: readers.py. Records are read, tokenized some hundreds at a time and forgotten: what stays is a
PairSet, and where each pair's text is.

Characters that the tokenizer does not know are tokenized in their ASCII spelling, where they have one (speller.py).

Refused (UserError, nothing is trained): no JSON, no UTF-8, a missing key or one that stands twice, another type,
unequal lists, a blank message, too many <UNK>; single records may be left out instead (`on_bad_record`). Dropped and
counted: chats of more than `max_seq_len` tokens (the pair, never one side of it; or their oldest turns alone, see
overlong.py), pairs whose two chats are the same tokens or score the same ones, pairs that came before or are held out
by a file, contradictions where that is wanted. Other keys are ignored and counted. Kept, counted and warned of: what
data_report.py names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from tokenizers import Tokenizer
from typing_extensions import Doc

from simple_llama.cluster import watchdog
from simple_llama.common.errors import UserError
from simple_llama.common.files import digest
from simple_llama.common.logging import LOGGER
from simple_llama.common.path_lists import NamedPaths, SharedPaths
from simple_llama.common.paths import package_path
from simple_llama.common.settings import WHOLE, Before, Bounds, CountOrNone
from simple_llama.dataset.ascii_text import Spelling
from simple_llama.finetune.chat_format import ChatFormat, SimpleLLaMAChat
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT
from simple_llama.reinforcement_learning.rlhf.data.conversation import (
    Compared,
    Conversation,
)
from simple_llama.reinforcement_learning.rlhf.data.data_report import (
    check_unknown,
    describe,
    warn_of_prompts,
    warnings_of,
)
from simple_llama.reinforcement_learning.rlhf.data.find_pairs import TokenCache, find_pairs
from simple_llama.reinforcement_learning.rlhf.data.pair_reader import PairReader
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.reading import ReadingConfig
from simple_llama.reinforcement_learning.rlhf.data.scored_tokens import Scoring
from simple_llama.reinforcement_learning.rlhf.data.sources import Epoch, Sources
from simple_llama.reinforcement_learning.rlhf.data.speller import Speller
from simple_llama.reinforcement_learning.rlhf.data.usable_pairs import Usable

Overlong = Literal["drop", "drop_oldest_turns"]
Contradictions = Literal["keep", "drop"]
_LAST_ANSWER = Scoring()
_AS_FOUND = ReadingConfig()


_HELD_OUT, _SHARE = Bounds(0.0, 0.5), Bounds(0.0, 1.0)
_MOST_UNKNOWN = 0.05  # of the scored tokens: a person who wants more says so
_VAL_SHARE = 0.05  # of the prompts


@dataclass(frozen=True)
class DataConfig(ReadingConfig):
    """Which pairs there are, and which of them are held out."""

    # === Data ===
    rlhf_dataset_path: Annotated[
        str,
        SharedPaths(),
        Doc(
            "preference pairs: a file (docs/data.md), or a folder of them; several with commas between, each with "
            ":SHARE behind it if an epoch is to have its pairs more or less often than once (a.jsonl:2,b.jsonl:0.5)"
        ),
    ] = package_path("reinforcement_learning", "rl_dataset")
    max_seq_len: CountOrNone = 0  # tokens; longer chats are dropped, both sides of the pair; 0: the model's own limit
    ascii_text: Annotated[
        bool, Before(False), Doc("spell in ASCII what the tokenizer does not know: typographic marks, accents")
    ] = True
    max_unknown: Annotated[
        float, _SHARE, Before(1.0), Doc("share of the scored tokens that may be <UNK>; more is refused; in [0, 1]")
    ] = _MOST_UNKNOWN
    score: Annotated[
        Literal["last", "all"], Doc("answers of a dialogue that are compared: the last one, or all of them together")
    ] = "last"
    pairs: Annotated[
        Compared,
        Doc(
            "answers that are compared where a record has more than two: the best with the worst (best_worst), each "
            "with the next (adjacent), each with each that is worse (all)"
        ),
    ] = "all"
    overlong: Annotated[
        Overlong,
        Doc(
            "what becomes of pairs with a chat of more than max_seq_len tokens: drop, or leave out the oldest turns of "
            "both chats until they fit; the system prompt and the last turn stay"
        ),
    ] = "drop"
    contradictions: Annotated[
        Contradictions,
        Doc("pairs of which the same two answers stand the other way round too: keep both, or drop both"),
    ] = "keep"
    verify_data: bool = False  # compare all of large files, whose tokens are kept, rather than 64 drawn pieces of 1 MiB
    mask_end_token: bool = False  # leave out of what is scored the token that ends an answer, on both sides: Llama 3
    val_share: Annotated[
        float | None,
        _HELD_OUT,
        Doc(f"share of prompts held out for evaluation, in [0, 0.5]; {_VAL_SHARE}, or 0 beside validation_path"),
    ] = None
    validation_path: Annotated[
        str,
        NamedPaths(),
        Doc(
            "pairs held out for evaluation, in place of a share: a file or a folder, or several NAME=PATH with commas "
            "between them, each with curves of its own"
        ),
    ] = ""
    seed: Annotated[int, Bounds(0, WHOLE)] = 42  # of the shuffle and the validation split

    def check_rules(self) -> None:
        """UserError where both a share and files say what is held out."""
        if self.validation_path and self.val_share:
            raise UserError(
                f"val_share: expected 0 or nothing beside validation_path, whose pairs are held out, found "
                f"{self.val_share}; leave one of both out, or take back what a file gives: --val_share 0"
            )

    @property
    def held_out_share(self) -> float:
        """The share of prompts that is held out."""
        if self.val_share is None:
            return 0.0 if self.validation_path else _VAL_SHARE
        return self.val_share


SomeConfig = TypeVar("SomeConfig", bound=DataConfig)


def with_held_out(config: SomeConfig) -> SomeConfig:
    """The same settings with the share of held-out prompts written out."""
    return config if config.val_share is not None else replace(config, val_share=config.held_out_share)


def pair_reader(
    chat: ChatFormat,
    max_seq_len: int,
    sources: Sources,
    seed: int,
    ascii_text: bool,
    scoring: Scoring,
    compared: Compared,
    reading: ReadingConfig,
    overlong: Overlong,
    contradictions: Contradictions,
) -> PairReader:
    """How RLDatasetLoader reads the records of these sources; the arguments are its own."""
    spelling = Spelling(chat.tokenizer, chat.unknown_id if ascii_text else None)
    usable = Usable(max_seq_len, seed, compared, contradictions == "drop", sources.held_files)
    shorten_to = max_seq_len if overlong == "drop_oldest_turns" else None
    return PairReader(chat, reading, scoring, spelling, usable, shorten_to)


class RLDatasetLoader:
    """Training and validation pairs of a file or a folder, in the order of the data.

    Args:
        path: a .json or .jsonl file (plain or .gz), or a folder of them, read in the order of their names; or text with
            several of them, each with a share (`shared_paths`), of which the first that has a pair counts.
        chat: the chat format; a tokenizer means SimpleLLaMA's with it.
        max_seq_len: tokens; a pair is dropped when one of its chats is longer, or loses its oldest turns (`overlong`).
        val_share: share of the prompts (not of the pairs) held out, in [0, 0.5].
        validation_path: files of pairs that are held out, with names where they are several (`named_paths`).
        contradictions: what becomes of two answers that stand both ways round.
        seed: of the split; which pairs are trained on does not depend on the order or the amount of other data.
        ascii_text: whether characters that the tokenizer does not know are spelled in ASCII where that can be done. It
            acts on token ids alone: conversations, and which prompts are held out, stay as they are.
        max_unknown: share of the scored tokens that may be <UNK>, in [0, 1].
        default_system: what "CUSTOM" stands for where `chat` is a tokenizer; it has to be the one that the start model
            was tuned with. A chat format has its own.
        scoring: which tokens of the chats are scored.
        compared: which answers of a record that has more than two, by their rank.
        group_weight: what counts alike in a mean: each pair, or each prompt, whose pairs share its weight.
        group_prompts: whether neighbours in a batch that answer one prompt share a segment.
        reading: how records are read: their format, which label decides, what a faulty one does.
        cache: where tokens of large files are kept for the next start; None: nowhere.

    Attributes: `train` and `validation`, views of `pairs` (each once, training first; those of a share are as often in
    `train` as in an epoch); `report` (one line: what was kept, dropped, ignored) and `warnings`; both are logged;
    `prompts`, how many different ones there are, and `largest_prompt_share`, the share of the pairs that the most
    frequent one has; `validation_sets`, where the pairs of each named validation path are in `validation`.
    Raises UserError (file, record, key, expected, found; of the first ten faulty records, with their number) for
    malformed data, too many <UNK>, and when no training pair is left. Beats the watchdog while it reads.
    """

    def __init__(
        self,
        path: str | Path,
        chat: ChatFormat | Tokenizer,
        max_seq_len: int,
        *,
        val_share: float,
        seed: int,
        ascii_text: bool = True,
        max_unknown: float = _MOST_UNKNOWN,
        default_system: str = DEFAULT_SYSTEM_PROMPT,
        scoring: Scoring = _LAST_ANSWER,
        compared: Compared = "all",
        group_weight: Literal["pair", "prompt"] = "pair",
        group_prompts: bool = False,
        reading: ReadingConfig = _AS_FOUND,
        validation_path: str = "",
        overlong: Overlong = "drop",
        contradictions: Contradictions = "keep",
        cache: TokenCache | None = None,
    ) -> None:
        if not _HELD_OUT.hold(val_share):
            raise UserError(f"val_share: expected {_HELD_OUT}, found {val_share}")
        chat = SimpleLLaMAChat(chat, default_system) if isinstance(chat, Tokenizer) else chat
        sources = Sources.of(str(path), validation_path)
        self._held_files = sources.held_files
        self._reader = pair_reader(
            chat, max_seq_len, sources, seed, ascii_text, scoring, compared, reading, overlong, contradictions
        )
        with watchdog.patience("reading the data"):
            found = find_pairs(self._reader, sources, val_share, cache)
        pairs, shares = found.pairs, found.shares
        speller = Speller(self._reader.spelling, *found.spelled)
        report = describe(found.count, found.extra_keys, found.unknown, speller, pairs) + found.formats
        if not pairs:
            raise UserError(f"{path}: expected at least one usable pair, found none: {report}")
        check_unknown(path, found.unknown, max_unknown, ascii_text)
        epoch = sources.epoch(pairs, found.trained)
        self.report = report + epoch.words + sources.told_held(pairs[epoch.trained :])
        few = epoch.held_out if val_share or validation_path else None
        self.warnings = warnings_of(found.count, found.unknown, few, of_files=bool(validation_path))
        if validation_path:
            self.warnings += warn_of_prompts(pairs, shares, epoch.trained)
        LOGGER.info("%s: %s", path, self.report)
        for warning in self.warnings:
            LOGGER.warning("%s: %s", path, warning)
        self._count_prompts(shares, epoch.times_N)
        self.validation_sets = sources.sets(pairs[epoch.trained :])
        _check_trained(path, epoch, val_share)
        epoch = epoch.used
        pairs = epoch.pairs.by_prompt() if group_prompts else epoch.pairs
        pairs = pairs.shared_out() if group_weight == "prompt" else pairs
        self.pairs, self.validation = pairs, pairs[epoch.trained :]
        self.train = epoch.repeated(pairs[: epoch.trained])

    @property
    def digest(self) -> bytes:
        """16 bytes over all pairs in order, training then held-out, and how often an epoch has them."""
        parts = [] if self.train.copies is None else [self.train.copies.astype("<i8").tobytes()]
        if self._held_files:
            parts.append(b"held out: %d" % len(self.validation))
        return digest(self.pairs.digest, *parts) if parts else self.pairs.digest

    def _count_prompts(self, shares_N: np.ndarray, times_N: np.ndarray) -> None:
        """Takes the number of prompts, and how much of an epoch and of what is held out one of them has at most."""
        _, numbers_N = np.unique(shares_N, return_inverse=True)
        counts = np.bincount(numbers_N, weights=times_N)
        self.prompts = int(np.count_nonzero(counts))
        self.largest_prompt_share = float(counts.max() / counts.sum()) if self.prompts else 0.0

    def conversations(self, pairs: PairSet) -> list[Conversation]:
        """What the records of these pairs say, read again from their files: a text is not kept.

        Raises UserError where a file no longer holds what was read at first.
        """
        origins = [(pairs.files[file], record) for file, record in pairs.places[["file", "record"]].tolist()]
        again: dict[tuple[str, int], dict[bytes, Conversation]] = {}
        wanted: dict[str, set[int]] = {}
        for file, record in origins:
            wanted.setdefault(file, set()).add(record)
        for file, numbers in wanted.items():
            for conversation, pair in self._reader.again(file, numbers):
                again.setdefault((file, conversation.record), {})[pair.digest] = conversation
        names = [key["digest"].tobytes() for key in pairs.keys]
        for origin, name in zip(origins, names, strict=True):
            if name not in again.get(origin, {}):
                raise UserError(
                    f"{origin[0]}:{origin[1]}: expected the pair that was read at the start, found "
                    f"{'another' if origin in again else 'none'}: the file has changed since; start again"
                )
        return [again[origin][name] for origin, name in zip(origins, names, strict=True)]


def _check_trained(path: str | Path, epoch: Epoch, val_share: float) -> None:
    """UserError where nothing is left to train on."""
    if not epoch.trained:
        raise UserError(
            f"{path}: expected training pairs, found none: all {len(epoch.pairs):,} pairs fell into the validation "
            f"share {val_share}; add data with other prompts, or set val_share to 0"
        )
    if not epoch.times_U.any():
        raise UserError(
            f"{path}: expected training pairs, found none: of {epoch.trained:,} pairs no one is there by its "
            f"share{epoch.words}; raise the shares, or add data"
        )
