"""Answers of the policy to fixed held-out prompts, beside the start model's answers to the same prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, all_reduce_sum, gather_objects
from simple_llama.common.logging import LOGGER
from simple_llama.inference.generate import generate_together
from simple_llama.inference.guards import count_language, language_metrics
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import evaluating
from simple_llama.reinforcement_learning.rlhf.run.evaluate import EvaluationConfig
from simple_llama.reinforcement_learning.rlhf.run.records import RunWriter, append_samples, first_answers

_MOST_CACHED = 4096  # tokens whose keys and values are held at once, beside a run's other memory


def _answers(
    model: LLaMaTransformer, stop_ids: Collection[int], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers to `prompts` (token ids, up to where an answer begins), without dropout.

    With the stop token that ended one. Each new token is a sign of life.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for share in _shares([len(ids) + max_new_tokens for ids in prompts]):
            watchdog.beat("sample answers")
            for tokens in generate_together(model, prompts[share], max_new_tokens, stop_ids):
                watchdog.beat("sample answers")
                for answer, token in zip(answers[share], tokens, strict=True):
                    if token is not None:
                        answer.append(token)
    return answers


def _shares(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbouring prompts that are answered together: as many as have room for their keys and values."""
    first, total = 0, 0
    for index, length in enumerate(lengths):
        if total and total + length > _MOST_CACHED:
            yield slice(first, index)
            first, total = index, 0
        total += length
    if lengths:
        yield slice(first, len(lengths))


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

    def take(self, step: int) -> dict[str, float]:
        """Answers the prompts (collective): shared out over the ranks, or together under ZeRO-3.

        Returns what tells whether the language breaks, the same on all ranks; nothing without prompts.
        """
        if not self.prompts:
            return {}
        ranks, together = self.ranks, self.engine.partitioned
        share = slice(None) if together else slice(ranks.rank, None, ranks.world_size)
        mine = _answers(self.engine.model, self.chat.stop_ids, self.prompts[share], self.most_tokens)
        gathered = gather_objects([self.text(ids) for ids in mine], ranks, list[str])
        if ranks.is_main:
            parts = 1 if together else len(gathered)
            self.write(step, [gathered[i % parts][i // parts] for i in range(len(self.prompts))])
        found = language_metrics(
            all_reduce_sum(count_language(mine, self.chat.stop_ids, self.chat.unknown_id).to(ranks.device))
        )
        LOGGER.info(
            "samples at step %d  repeated trigrams %.1f %%  mean tokens %.1f  ended by themselves %.0f %%",
            step,
            100 * found["samples/repeated_trigrams"],
            found["samples/tokens"],
            100 * found["samples/ended"],
        )
        return found

    def text(self, ids: Sequence[int]) -> str:
        """An answer without the stop token that ended it."""
        return self.chat.decode([token for token in ids if token not in self.chat.stop_ids])

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
