"""Answers of a model to prompts of the pairs, shared out over the ranks.

Prompts are cut into groups that are answered together, whatever the number of ranks, so that each is computed with the
same others. Q prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.console import progress
from simple_llama.cluster.distributed import Ranks, gather_objects
from simple_llama.common.logging import LOGGER
from simple_llama.dataset.ascii_text import Spelling
from simple_llama.finetune.chat_format import ChatFormat, SimpleLLaMAChat, answer_text
from simple_llama.finetune.format_llm_prompt import encode_serving_prompt
from simple_llama.inference.generate import Sampling, answer_together, groups_with_room
from simple_llama.inference.guards import count_language, language_metrics, refuses
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.assess.evaluate_config import AnswersConfig
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.speller import Speller
from simple_llama.reinforcement_learning.rlhf.objective.policy import evaluating
from simple_llama.reinforcement_learning.rlhf.report.evaluation_numbers import Answers
from simple_llama.reinforcement_learning.rlhf.run.sampling import first_prompts

_MOST_TOGETHER, _MOST_CACHED = 16, 16384  # prompts of a group, and tokens whose keys and values it holds
TRAINING, _SERVING = "training", "serving"  # forms of a prompt


class Questions(NamedTuple):
    """The prompts that each model answers."""

    texts: tuple[str, ...]  # for people and judges
    forms: dict[str, tuple[tuple[int, ...], ...]]  # token ids (Q,) by form


def questions_of(data: RLDatasetLoader, pairs: PairSet, chat: ChatFormat, count: int, ascii_text: bool) -> Questions:
    """The first `count` different prompts of `pairs`; in the form of training and, with SimpleLLaMA's format, of
    upstream's server too."""
    first = first_prompts(pairs, count)
    if len(first) < count:
        LOGGER.info(
            "%d different prompts to answer, and not %d (--generate): the pairs have no more", len(first), count
        )
    said = data.conversations(pairs.select(list(first.values())))
    forms = {TRAINING: tuple(first)}
    if isinstance(chat, SimpleLLaMAChat):
        speller = Speller(Spelling(chat.tokenizer, chat.unknown_id if ascii_text else None))
        spelled = map(speller.spelled, said)
        forms[_SERVING] = tuple(
            tuple(encode_serving_prompt(chat.tokenizer, c.system or "", c.users, c.chosen[:-1])) for c in spelled
        )
    return Questions(tuple(map(prompt_text, said)), forms)


def prompt_text(said: Conversation) -> str:
    """What was asked, without the system prompt: the message, or of several turns each with who said it."""
    if len(said.users) == 1:
        return said.users[0]
    turns = [f"User: {said.users[0]}"]
    for user, assistant in zip(said.users[1:], said.chosen[:-1], strict=True):
        turns += [f"Assistant: {assistant}", f"User: {user}"]
    return "\n\n".join(turns)


def answer_all(
    model: LLaMaTransformer,
    chat: ChatFormat,
    questions: Questions,
    config: AnswersConfig,
    seed: int,
    ranks: Ranks,
) -> dict[str, Answers]:
    """A model's answers by the form of the prompts, the same on all ranks (collective). Raises Stopped on request."""
    return {
        form: _found(_answer(model, chat, prompts, config, seed, ranks), chat)
        for form, prompts in questions.forms.items()
    }


def _answer(
    model: LLaMaTransformer,
    chat: ChatFormat,
    prompts: Sequence[Sequence[int]],
    config: AnswersConfig,
    seed: int,
    ranks: Ranks,
) -> list[list[int]]:
    """Token ids of the answers (Q,), with the stop token that ended one (collective)."""
    lengths = [len(ids) + config.max_new_tokens for ids in prompts]
    groups = groups_with_room(lengths, _MOST_CACHED, _MOST_TOGETHER)
    mine: list[tuple[int, list[list[int]]]] = []
    turns = range(ranks.rank, ranks.rank + len(groups), ranks.world_size)
    sampling, beat = Sampling(config.temperature, config.top_p, seed), partial(watchdog.beat, "answers")
    with evaluating(model):
        for number in progress(turns, total=len(turns), desc="answers", ranks=ranks):
            if number < len(groups):
                places = groups[number]
                some = [prompts[place] for place in places]
                room, stop_ids = config.max_new_tokens, chat.stop_ids
                answers = answer_together(model, some, room, stop_ids, sampling, places, beat)
                mine.append((number, answers))
            stopping.agree(ranks)
    everybody = gather_objects(mine, ranks, list[tuple[int, list[list[int]]]])
    by_group = dict(pair for one in everybody for pair in one)
    return [answer for number in range(len(groups)) for answer in by_group[number]]


def _found(answers: Sequence[Sequence[int]], chat: ChatFormat) -> Answers:
    """The answers as text, and what tells whether the language holds."""
    texts = tuple(answer_text(chat, ids) for ids in answers)
    language = language_metrics(count_language(answers, chat.stop_ids, chat.unknown_id))
    ended = tuple(bool(ids) and ids[-1] in chat.stop_ids for ids in answers)
    lengths = tuple(len(ids) - end for ids, end in zip(answers, ended, strict=True))
    refused = tuple(map(refuses, texts))
    return Answers(texts, lengths, ended, refused, language["samples/repeated_trigrams"], language["samples/unknown"])
