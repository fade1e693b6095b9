"""Answers of the policy to fixed held-out prompts, beside the start model's answers to the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, gather_objects
from simple_llama.common.logging import LOGGER
from simple_llama.finetune.chat_format import ChatFormat
from simple_llama.inference.generate import generate
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import evaluating
from simple_llama.reinforcement_learning.rlhf.run.evaluate import EvaluationConfig
from simple_llama.reinforcement_learning.rlhf.run.records import RunWriter, append_samples, first_answers


def _answers(
    model: LLaMaTransformer, chat: ChatFormat, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Decoded greedy answers to `prompts` (token ids, up to where an answer begins), without dropout."""
    with evaluating(model):
        return [chat.decode(list(_watched(model, chat, ids, max_new_tokens))) for ids in prompts]


def _watched(
    model: LLaMaTransformer, chat: ChatFormat, prompt_ids: Sequence[int], max_new_tokens: int
) -> Iterator[int]:
    """An answer's tokens; each token is a sign of life."""
    watchdog.beat("sample answers")
    for token in generate(model, prompt_ids, max_new_tokens, chat.stop_ids):
        yield token
        watchdog.beat("sample answers")


def _sample_prompts(pairs: Sequence[TokenizedPair], count: int) -> list[list[int]]:
    """The first `count` different prompts of `pairs` as token ids, up to where an answer begins."""
    prompts: dict[tuple[int, ...], None] = {}
    for pair in pairs:
        if len(prompts) == count:
            break
        prompts[tuple(pair.prompt_ids.tolist())] = None
    return [list(prompt) for prompt in prompts]


def _sample_page(prompt: str, before: str, after: str) -> str:
    """Markdown of one prompt with both answers; the text is indented, so that TensorBoard shows it as it is."""

    def block(text: str) -> str:
        return "\n".join("    " + line for line in text.splitlines() or [""])

    return f"**prompt**\n\n{block(prompt)}\n\n**start model**\n\n{block(before)}\n\n**policy**\n\n{block(after)}\n"


class Samples:
    """The fixed prompts of a run, and where answers to them are written."""

    def __init__(
        self, inputs: Inputs, engine: Engine, config: EvaluationConfig, ranks: Ranks, folder: Path, writer: RunWriter
    ):
        """Args: folder: the run's, with its samples.jsonl."""
        self.chat, self.engine, self.ranks = inputs.chat, engine, ranks
        self.prompts = _sample_prompts(inputs.data.validation, config.n_samples)
        self.most_tokens = config.sample_tokens
        self.folder, self.writer = folder, writer

    def take(self, step: int) -> None:
        """Answers the prompts (collective): shared out over the ranks, or together under ZeRO-3."""
        if not self.prompts:
            return
        ranks, together = self.ranks, self.engine.partitioned
        share = slice(None) if together else slice(ranks.rank, None, ranks.world_size)
        mine = _answers(self.engine.model, self.chat, self.prompts[share], self.most_tokens)
        gathered = gather_objects(mine, ranks, list[str])
        if ranks.is_main:
            parts = 1 if together else len(gathered)
            self.write(step, [gathered[i % parts][i // parts] for i in range(len(self.prompts))])

    def write(self, step: int, now: list[str]) -> None:
        """Puts the answers after `step` steps beside the start model's: samples.jsonl, TensorBoard, the log."""
        prompts = [self.chat.tokenizer.decode(ids, skip_special_tokens=False) for ids in self.prompts]
        append_samples(self.folder, step, prompts, now)
        start = first_answers(self.folder)
        for index, (prompt, after) in enumerate(zip(prompts, now, strict=True)):
            before = start.get(prompt, "(not recorded at step 0)")
            self.writer.text(step, f"samples/prompt_{index}", _sample_page(prompt, before, after))
            LOGGER.info("sample %d, start model: %r", index, before)
            LOGGER.info("sample %d, step %d: %r", index, step, after)
