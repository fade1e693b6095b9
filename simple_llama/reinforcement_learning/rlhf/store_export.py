"""`launch/store.py export`: the pairs with the store's sums, as a data set that TRL's DPO trainer reads.

    {"prompt": [{"role": ..., "content": ...}, ...], "chosen": [{...}], "rejected": [{...}], "split": "train",
     "ref_chosen_logps": -12.5, "ref_rejected_logps": -14.25}

The sums are over the tokens that TRL 1.16 scores. Of a chat template it tokenizes the prompt (with the generation
prompt) and both whole chats, and scores what stands behind the common beginning: also what the template writes behind
the end of an answer, where we stop unless `score_tail` is set. Pairs for which that differs are computed once more, and
kept in the same store under names of their own. Of SimpleLLaMA's format the scored tokens are ours. B pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple

import numpy as np
from typing_extensions import Doc

from simple_llama.cluster.distributed import Ranks, fail_together
from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_path, check_free
from simple_llama.common.logging import LOGGER
from simple_llama.common.settings import parse_settings
from simple_llama.dataset.packed_files import optional_package
from simple_llama.finetune.chat_format import Chat, ChatFormat, SimpleLLaMAChat
from simple_llama.reinforcement_learning.rlhf.command import run_any
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import resolved
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import open_store
from simple_llama.reinforcement_learning.rlhf.run.run_folder import check_folders

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names
_FORMS = (".jsonl", ".parquet")
_ROWS_AT_ONCE = 4096  # of a Parquet file's row group


@dataclass(frozen=True)
class PairsExportConfig(DPOConfig):
    """The settings of the pass, and where the data set goes."""

    # === Export ===
    output: Annotated[str, Doc("file to write, .jsonl or .parquet; nothing may lie there yet")] = ""

    def check_rules(self) -> None:
        """UserError for another form, or for scored tokens that TRL would not score."""
        if self.output and not self.output.endswith(_FORMS):
            raise UserError(f"output: expected a name that ends with {' or '.join(_FORMS)}, found {self.output!r}")
        if self.score != "last" or self.mask_end_token:
            raise UserError(
                "score, mask_end_token: expected their defaults, since TRL scores the whole last answer, found others; "
                "leave them out"
            )


class TrlPairs(NamedTuple):
    """Pairs whose scored tokens are TRL's."""

    pairs: PairSet
    places: np.ndarray  # of these pairs among those of the data set
    said: list[Conversation]


def run_export(words: Sequence[str], description: str | None) -> None:
    """The whole command, on any number of ranks. Ends the process, non-zero on any error."""

    def parse() -> PairsExportConfig:
        config = resolved(parse_settings(PairsExportConfig, words, description))
        if not config.output:
            raise UserError("output: expected a file to write, found none; give --output pairs.jsonl")
        return config

    run_any(_export, parse)


def _export(config: PairsExportConfig, ranks: Ranks) -> None:
    """Fills the store where pairs are missing, then writes (collective)."""
    with fail_together(ranks):
        _require_free(config.output)
        check_folders(config, config.ref_cache_dir)
    inputs = load_inputs(config, ranks)
    with fail_together(ranks):
        scored = pairs_for_trl(inputs)
    precompute(config, inputs, ranks, scored.pairs)
    store = open_store(config.ref_cache_dir, inputs.reference_id, ranks)
    entries = scored.pairs.entries()
    sums_B2 = entries.sums(store.lookup(entries.keys))
    with fail_together(ranks):
        if ranks.is_main:
            splits = ["train" if place < len(inputs.data.train) else "held_out" for place in scored.places]
            _write(config.output, map(_row, scored.said, splits, sums_B2.tolist()))
            LOGGER.info("%s: %d pairs with the log-prob sums of %s", config.output, len(splits), inputs.reference.path)


def pairs_for_trl(inputs: Inputs) -> TrlPairs:
    """The pairs as TRL scores them. UserError where a file has changed, or none is left."""
    said = inputs.data.conversations(inputs.data.pairs)
    if isinstance(inputs.chat, SimpleLLaMAChat):
        return TrlPairs(inputs.data.pairs, np.arange(len(said)), said)
    return _as_trl_scores(inputs, said)


def _as_trl_scores(inputs: Inputs, said: Sequence[Conversation]) -> TrlPairs:
    """The pairs as TRL tokenizes them; one that it could not score is left out."""
    text_of = cache(lambda chat: _ids(inputs.chat, chat))
    pairs, kept, left_out = list[TokenizedPair](), list[int](), list[str]()
    for place, one in enumerate(said):
        prompt, chosen, rejected = (list(text_of(chat)) for chat in _chats(one))
        start = min(_common(prompt, chosen), _common(prompt, rejected))
        spans = ((start, len(chosen)),), ((start, len(rejected)),)
        fits = 0 < start < min(len(chosen), len(rejected)) and max(len(chosen), len(rejected)) <= inputs.max_seq_len
        if fits and chosen != rejected:
            pairs.append(TokenizedPair.from_spans(chosen, rejected, spans))
            kept.append(place)
        else:
            left_out.append(inputs.data.pairs.origin(place))
    if left_out:
        LOGGER.warning("left out %d pairs that TRL cannot score (the first: %s)", len(left_out), left_out[0])
    if not pairs:
        raise UserError("expected pairs that TRL can score, found none: all are too long, or have no scored token")
    found = PairSet.of(pairs, [(one.file, one.record) for one in (said[place] for place in kept)])
    others = int((found.keys["digest"] != inputs.data.pairs.keys["digest"][kept]).sum())
    if others:
        LOGGER.info(
            "TRL scores other tokens of %d of %d pairs than we do (what stands behind the end of an answer): one more "
            "pass over those that the store lacks",
            *(others, len(found)),
        )
    return TrlPairs(found, np.array(kept), [said[place] for place in kept])


def _chats(said: Conversation) -> tuple[Chat, Chat, Chat]:
    """The prompt, and both whole chats."""
    before = tuple(said.chosen[:-1])  # TRL's form has one prompt for both answers
    users = tuple(said.users)
    prompt = Chat(said.system, users, before)
    return (
        prompt,
        Chat(said.system, users, (*before, said.chosen[-1])),
        Chat(said.system, users, (*before, said.rejected[-1])),
    )


def _ids(chat_format: ChatFormat, chat: Chat) -> tuple[int, ...]:
    """Token ids as transformers' `apply_chat_template` makes them: of the text as a whole."""
    return tuple(chat_format.tokenizer.encode(chat_format.show(chat), add_special_tokens=False).ids)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two chats share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _row(said: Conversation, split: str, sums: Sequence[float]) -> dict[str, Any]:
    """A record in TRL's conversational form with an explicit prompt."""
    prompt = [] if said.system is None else [{"role": "system", "content": said.system}]
    for turn, user in enumerate(said.users):
        prompt.append({"role": "user", "content": user})
        prompt += [{"role": "assistant", "content": answer} for answer in said.chosen[turn:-1][:1]]
    answers = [[{"role": "assistant", "content": side[-1]}] for side in (said.chosen, said.rejected)]
    columns = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "split": split}
    return {**columns, **dict(zip(COLUMNS, sums, strict=True))}


def _require_free(output: str) -> None:
    """UserError where something lies at a path, or its form cannot be written here."""
    check_free(output)
    if output.endswith(".parquet"):
        optional_package("pyarrow.parquet", output)


def _write(output: str, rows: Iterator[dict[str, Any]]) -> None:
    """The data set, whole or not at all, and never over another file."""
    with atomic_path(output) as temp:
        if output.endswith(".parquet"):
            table = optional_package("pyarrow", output).Table.from_pylist(list(rows))
            parquet = optional_package("pyarrow.parquet", output)
            parquet.write_table(table, temp, row_group_size=_ROWS_AT_ONCE)
        else:
            with open(temp, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _require_free(output)
