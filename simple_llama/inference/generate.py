"""Answers token by token: greedy, with the keys and values of the tokens so far kept.

Greedy, so that a change of an answer is a change of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from simple_llama.pretraining.llama_transformer import LLaMaTransformer


def generate(
    model: LLaMaTransformer, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """The most likely next token, again and again; ends before one of `stop_ids` or at the model's length limit.

    One forward a token, when it is asked for. The model has to be out of training (`model.eval()`), or dropout would
    act. UserError where the prompt is too long.
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


def generate_together(
    model: LLaMaTransformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[list[int | None]]:
    """`generate` for several prompts at once, which may have any lengths: each time, the next token of each answer.

    An answer's last token is that of `stop_ids` which ended it, unless it came to a limit; behind its end stands None.
    A forward of all rows reads the weights once; rounding apart, answers are those of `generate`.
    """
    assert not model.training, "generate: dropout would act"
    device = model.embeddings.weight.device
    rooms = [min(max_new_tokens, model.architecture.max_seq_len - len(ids)) for ids in prompts]
    caches = [model.new_cache(len(ids) + max(room, 0)) for ids, room in zip(prompts, rooms, strict=True)]
    ahead = [torch.tensor(list(ids), device=device) for ids in prompts]
    going = [index for index, room in enumerate(rooms) if room > 0]
    made = 0
    while going:
        logits_BV = model.decode_together([ahead[i] for i in going], [caches[i] for i in going])
        tokens_B = logits_BV.argmax(dim=-1)
        found = dict(zip(going, tokens_B.tolist(), strict=True))
        yield [found.get(index) for index in range(len(prompts))]
        made += 1
        for row, index in enumerate(going):
            ahead[index] = tokens_B[row : row + 1]
        going = [index for index in going if found[index] not in stop_ids and made < rooms[index]]
