"""How far the policy is from the reference where it speaks itself: KL(policy || reference) on answers that it samples.

k3 of Schulman, "Approximating KL divergence" (http://joschu.net/blog/kl-approx.html): for tokens drawn from the policy,

    r = log p_ref(token) - log p_policy(token)        KL = E[exp(r) - 1 - r]        never negative

Shapes: A answers, N their tokens, T packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from simple_llama.cluster import watchdog
from simple_llama.ops.attention import PackedLayout
from simple_llama.ops.logprob import token_logps
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import Loaded, empty_model, fill
from simple_llama.reinforcement_learning.rlhf.objective.policy import evaluating
from simple_llama.reinforcement_learning.rlhf.run.statistics import ratio_interval


class Spoken(NamedTuple):
    """Answers to prompts as one packed stream: a prompt's rows stand once before those of its answers."""

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    layout: PackedLayout
    rows_N: torch.Tensor  # int64 row that predicts each token of an answer
    targets_N: torch.Tensor  # int64
    counts: tuple[int, ...]  # tokens of each answer

    @classmethod
    def pack(cls, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> Spoken:
        """Packs each prompt with its answers, none of them empty."""
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        segments: list[tuple[int, tuple[int, ...]]] = []
        for prompt, own in zip(prompts, answers, strict=True):
            last = len(tokens) + len(prompt) - 1  # predicts the first token of each answer
            tokens += prompt
            positions += range(len(prompt))
            for answer in own:
                rows += [last, *range(len(tokens), len(tokens) + len(answer) - 1)]
                tokens += answer[:-1]
                positions += range(len(prompt), len(prompt) + len(answer) - 1)
            segments.append((len(prompt), tuple(len(answer) - 1 for answer in own)))
        flat = [answer for own in answers for answer in own]
        targets = [token for answer in flat for token in answer]
        stream = (torch.tensor(numbers, dtype=torch.int64) for numbers in (tokens, positions, rows, targets))
        tokens_T, positions_T, rows_N, targets_N = stream
        counts = tuple(len(answer) for answer in flat)
        return cls(tokens_T, positions_T, PackedLayout(tuple(segments)), rows_N, targets_N, counts)


@torch.no_grad()
def spoken_logps(
    model: LLaMaTransformer, spoken: Spoken, head: AbstractContextManager[None] | None = None
) -> torch.Tensor:
    """Log-prob (N,) of each token of the answers at temperature 1, fp64, without dropout.

    Args: head: in which the vocabulary matrix is there, where it is not by itself.
    """
    device = model.embeddings.weight.device
    with evaluating(model):
        layout = spoken.layout.to(device)
        hidden_TD = model.hidden(spoken.tokens_T.to(device), spoken.positions_T.to(device), layout)
        hidden_ND = hidden_TD.index_select(0, spoken.rows_N.to(device))
        with head or nullcontext():
            return token_logps(hidden_ND, model.head_weight, spoken.targets_N.to(device)).double()


def lean_model(start: Loaded, dtype: torch.dtype, device: torch.device) -> LLaMaTransformer:
    """The start model for one pass: a decoder block is read when its turn comes, and forgotten after it.

    In memory are the embeddings, the head and one block, in `dtype`; `start` has to be open until the pass is over.
    """
    model = empty_model(start)
    for name, part in model.named_children():
        if part is not model.decoder_blocks:
            fill(part, f"{name}.", start, dtype, device)
    for number, block in enumerate(model.decoder_blocks):
        _read_for_its_turn(block, f"decoder_blocks.{number}.", start, dtype, device)
    return model


def _read_for_its_turn(block: nn.Module, prefix: str, start: Loaded, dtype: torch.dtype, device: torch.device) -> None:
    """Lets a block have its weights during each of its calls alone."""

    def read(*_: object) -> None:
        watchdog.beat("reference of the sample answers")
        fill(block, prefix, start, dtype, device)

    def forget(*_: object) -> None:
        block.to_empty(device="meta")

    block.register_forward_pre_hook(read)
    block.register_forward_hook(forget)


def k3_sums(policy_N: torch.Tensor, ref_N: torch.Tensor, counts: Sequence[int]) -> list[float]:
    """Sum of exp(r) - 1 - r over the tokens of each answer (A,)."""
    ratios_N = ref_N - policy_N
    return [float(one.sum()) for one in (torch.expm1(ratios_N) - ratios_N).split(list(counts))]


def kl_metrics(sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """KL in nats a token, and its 95 % interval: a bootstrap over whole answers, whose tokens depend on each other.
    Nothing with fewer than two answers."""
    if len(sums) < 2:
        return {}
    found = ratio_interval(np.array(sums), np.array(counts), np.arange(len(sums)))
    return {"samples/kl": found.value, "samples/kl_low": found.low, "samples/kl_high": found.high}
