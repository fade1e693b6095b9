"""Answers of the policy to fixed held-out prompts, beside the start model's answers to the same prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, all_reduce_sum, fail_together, gather_objects, of_rank_0
from simple_llama.common.logging import LOGGER
from simple_llama.finetune.chat_format import answer_text
from simple_llama.inference.generate import Sampling, answer_together, groups_with_room
from simple_llama.inference.guards import ENDED_AT_ONCE, count_language, language_metrics
from simple_llama.pretraining.layers import adapters_off
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.start_model import StartChanged
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import evaluating
from simple_llama.reinforcement_learning.rlhf.run.divergence import (
    Spoken,
    k3_sums,
    kl_metrics,
    lean_model,
    spoken_logps,
)
from simple_llama.reinforcement_learning.rlhf.run.evaluate import EvaluationConfig
from simple_llama.reinforcement_learning.rlhf.run.records import RunWriter, append_samples, first_answers

_GREEDY = Sampling()
ANSWERS_OF_KL = 16  # that are sampled to estimate it, or one of each prompt where there are more
_MOST_CACHED = 4096  # tokens whose keys and values are held at once, beside a run's other memory


def _answers(
    model: LLaMaTransformer,
    stop_ids: Collection[int],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = _GREEDY,
    numbers: Sequence[int] | None = None,
    together: bool = False,
) -> list[list[int]]:
    """Answers to `prompts` (token ids, up to where an answer begins), without dropout.

    With the stop token that ended one. Each new token is a sign of life. `numbers` tells sampled answers apart. Where
    all ranks make the same answers `together`, rank 0's tokens count: ranks that round otherwise stay in step.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    answers, beat = list[list[int]](), partial(watchdog.beat, "sample answers")
    agree = of_rank_0 if together else None
    with evaluating(model):
        for places in groups_with_room([len(ids) + max_new_tokens for ids in prompts], _MOST_CACHED):
            beat()
            some, own = [prompts[place] for place in places], [numbers[place] for place in places]
            answers += answer_together(model, some, max_new_tokens, stop_ids, sampling, own, beat, agree)
    return answers


def first_prompts(pairs: Sequence[TokenizedPair], count: int) -> dict[tuple[int, ...], int]:
    """The first `count` different prompts of `pairs` as token ids, up to where an answer begins, each with the position
    of its first pair."""
    found: dict[tuple[int, ...], int] = {}
    for position in range(len(pairs)):
        if len(found) == count:
            break
        found.setdefault(tuple(pairs[position].prompt_ids.tolist()), position)
    return found


def sample_prompts(pairs: Sequence[TokenizedPair], count: int) -> list[list[int]]:
    """The prompts that a run answers at each evaluation."""
    return [list(prompt) for prompt in first_prompts(pairs, count)]


class Samples:
    """The fixed prompts of a run, and where answers to them are written."""

    def __init__(
        self,
        inputs: Inputs,
        engine: Engine,
        config: EvaluationConfig,
        ranks: Ranks,
        folder: Path,
        writer: RunWriter,
        seed: int,
        reference: LLaMaTransformer | None = None,
    ):
        """Args:
        folder: the run's, with its samples.jsonl.
        seed: of the answers that are sampled to estimate the KL.
        reference: the reference model, where it is in memory.
        """
        self.chat, self.engine, self.ranks = inputs.chat, engine, ranks
        self.prompts = sample_prompts(inputs.data.validation, config.n_samples)
        self.most_tokens = config.sample_tokens
        self.folder, self.writer = folder, writer
        self.inputs, self.sampling, self.reference = inputs, Sampling(temperature=1.0, seed=seed), reference

    def take(self, step: int) -> dict[str, float]:
        """Answers the prompts (collective): shared out over the ranks, or together under ZeRO-3.

        Returns what tells whether the language breaks, the same on all ranks; nothing without prompts.
        """
        if not self.prompts:
            return {}
        ranks, together = self.ranks, self.engine.partitioned
        share = slice(None) if together else slice(ranks.rank, None, ranks.world_size)
        mine = _answers(self.engine.model, self.chat.stop_ids, self.prompts[share], self.most_tokens, together=together)
        told = [(answer_text(self.chat, ids), len(ids)) for ids in mine]
        gathered = gather_objects(told, ranks, list[tuple[str, int]])
        if ranks.is_main:
            parts = 1 if together else len(gathered)
            self.write(step, [gathered[i % parts][i // parts][0] for i in range(len(self.prompts))])
        lengths = np.array([length for one in gathered for _, length in one])
        self.writer.histograms(step, {"samples/answer_tokens": lengths})
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
        return {**found, **self.divergence(step)}

    def divergence(self, step: int) -> dict[str, float]:
        """KL(policy || reference) on answers that the policy samples (collective); see divergence.py.

        Shared out over the ranks; with ZeRO-3 each makes all of it, and what rank 0 has counts. Nothing, and a warning,
        where the start model's files are not what they were.
        """
        together, every = self.engine.partitioned, range(len(self.prompts))
        numbers = every if together else every[self.ranks.rank :: self.ranks.world_size]
        sums: list[float] = []
        counts: tuple[int, ...] = ()
        problem = ""
        with nullcontext() if together else fail_together(self.ranks):  # the policy's forward passes: collectives
            spoken = self.spoken(numbers) if numbers else None
            made = self.logps_by_policy(spoken) if spoken and spoken.counts else None
        with fail_together(self.ranks):
            if spoken and made:
                policy_N, ref_N = made
                try:
                    ref_N = self.reference_logps(spoken) if ref_N is None else ref_N
                    sums, counts = k3_sums(policy_N, ref_N, spoken.counts), spoken.counts
                except StartChanged as changed:
                    problem = str(changed)
        of_all = gather_objects((sums, list(counts), problem), self.ranks, tuple[list[float], list[int], str])
        if problems := [problem for _, _, problem in of_all if problem]:
            LOGGER.warning("samples/kl is not estimated at step %d: %s", step, problems[0])
            return {}
        parts = of_all[:1] if together else of_all
        found = kl_metrics([x for one in parts for x in one[0]], [x for one in parts for x in one[1]])
        if found:
            words = "policy to reference at step %d  KL %.4f nats a token  95 %% interval %.4f to %.4f"
            LOGGER.info(words, step, *found.values())
        return found

    def spoken(self, numbers: range) -> Spoken:
        """Answers that the policy samples to the prompts of these numbers: the same whichever rank makes them."""
        each = max(1, ANSWERS_OF_KL // len(self.prompts))
        which = [number for number in numbers for _ in range(each)]
        own = [each * number + index for number in numbers for index in range(each)]
        prompts = [self.prompts[number] for number in which]
        answers = _answers(
            self.engine.model,
            self.chat.stop_ids,
            prompts,
            self.most_tokens,
            self.sampling,
            own,
            together=self.engine.partitioned,
        )
        grouped = [answers[first : first + each] for first in range(0, len(answers), each)]
        kept = [[answer for answer in group if answer] for group in grouped]  # none where the prompt leaves no room
        return Spoken.pack([self.prompts[number] for number in numbers], kept)

    def logps_by_policy(self, spoken: Spoken) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the policy gives the tokens (N,), and what the reference does where that is the policy without its
        adapters (collective with ZeRO-3)."""
        model, head = self.engine.model, self.engine.whole_head
        policy_N = spoken_logps(model, spoken, head())
        if self.reference is not None or not self.inputs.without_adapters:
            return policy_N, None
        with adapters_off(model):
            return policy_N, spoken_logps(model, spoken, head())

    def reference_logps(self, spoken: Spoken) -> torch.Tensor:
        """What the reference gives the tokens (N,): a model in memory, or its files, read a block at a time."""
        if self.reference is not None:
            return spoken_logps(self.reference, spoken)
        with self.inputs.reference.reading() as start:
            return spoken_logps(lean_model(start, self.inputs.dtype, self.ranks.device), spoken)

    def write(self, step: int, now: list[str]) -> None:
        """Puts the answers after `step` steps beside the start model's: samples.jsonl, TensorBoard, the log."""
        prompts = [self.chat.spell(ids) for ids in self.prompts]
        append_samples(self.folder, step, prompts, now)
        start = first_answers(self.folder)
        for index, (prompt, after) in enumerate(zip(prompts, now, strict=True)):
            before = start[index] if index < len(start) else "(not recorded at step 0)"
            self.writer.sample(step, index, prompt, before, after)
            whose = f"step {step}" if step else "start model"
            LOGGER.info("sample %d, %s: %s", index, whose, repr(after) if after else ENDED_AT_ONCE)
