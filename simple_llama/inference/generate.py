"""Answers token by token: greedy, with the keys and values of the tokens so far kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from simple_llama.pretraining.llama_transformer import LLaMaTransformer


def generate(
    model: LLaMaTransformer, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """The most likely next token, again and again; ends before one of `stop_ids` or at the model's length limit.

    Greedy, so that a change of the answer is a change of the model. One forward a token, when it is asked for. The
    model has to be out of training (`model.eval()`), or dropout would act. UserError where the prompt is too long.
    """
    assert not model.training, "generate: dropout would act"
    device = model.embeddings.weight.device
    room = min(max_new_tokens, model.architecture.max_seq_len - len(prompt_ids))
    cache = model.new_cache(len(prompt_ids) + max(room, 0))
    ahead = torch.tensor(list(prompt_ids), device=device)
    for _ in range(room):
        token = int(model.decode(ahead, cache).argmax())
        if token in stop_ids:
            return
        yield token
        ahead = torch.tensor([token], device=device)
