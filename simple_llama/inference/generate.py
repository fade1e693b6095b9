"""Answers token by token, greedy or sampled, with the keys and values of the tokens so far kept.

Greedy unless asked otherwise, so that a change of an answer is a change of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

import torch
from typing_extensions import Doc

from simple_llama.common.settings import Bounds, CountOrNone, Settings
from simple_llama.pretraining.kv_cache import KVCache
from simple_llama.pretraining.llama_transformer import LLaMaTransformer

_WORTH_SHARING = 64  # rows that a shared prefix has to save: it costs a forward of its own, which reads all weights
_FIRST_LOOK = 64  # tokens among which a nucleus is looked for first


@dataclass(frozen=True)
class Sampling(Settings):
    """How the next token is drawn."""

    # === Sampling ===
    temperature: Annotated[float, Bounds(0, 100), Doc("logits are divided by it; 0: always the most likely token")] = (
        0.0
    )
    top_p: Annotated[
        float,
        Bounds(0, 1, above=True),
        Doc("only the likeliest tokens that together have this probability are drawn (nucleus, arXiv:1904.09751)"),
    ] = 1.0
    seed: CountOrNone = 0  # of the draws: the same answers again

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def generator(self, number: int) -> torch.Generator:
        """The draws of answer `number`: others for each, the same at any time and whatever is drawn beside them."""
        made = blake2b(f"{self.seed} {number}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(made, "little") & 2**63 - 1)


_GREEDY = Sampling()


def generate(
    model: LLaMaTransformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = _GREEDY,
    number: int = 0,
) -> Iterator[int]:
    """The next token, again and again; ends before one of `stop_ids` or at the model's length limit.

    One forward a token, when it is asked for. The model has to be out of training (`model.eval()`), or dropout would
    act. `number` tells apart answers that are sampled with one seed. UserError where the prompt is too long.
    """
    for (token,) in generate_together(model, [prompt_ids], max_new_tokens, stop_ids, sampling, [number]):
        if token is None or token in stop_ids:
            return
        yield token


def generate_together(
    model: LLaMaTransformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = _GREEDY,
    numbers: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """`generate` for several prompts at once, which may have any lengths: each time, the next token of each answer.

    An answer's last token is that of `stop_ids` which ended it, unless it came to a limit; behind its end stands None.
    A forward of all rows reads the weights once, and what all prompts begin with is computed once.

    Each answer is sampled by a generator of its own (`Sampling.generator`), so rounding apart it is that of
    `generate`, whatever is answered beside it.

    Args:
        numbers: which answers these are of all that the seed makes, where they are not 0, 1, ...
    """
    assert not model.training, "generate: dropout would act"
    device = model.embeddings.weight.device
    rooms = [min(max_new_tokens, model.architecture.max_seq_len - len(ids)) for ids in prompts]
    caches = [model.new_cache(len(ids) + max(room, 0)) for ids, room in zip(prompts, rooms, strict=True)]
    generators = [sampling.generator(number) for number in (range(len(prompts)) if numbers is None else numbers)]
    going = [index for index, room in enumerate(rooms) if room > 0]
    done = _fill_shared(model, [prompts[i] for i in going], [caches[i] for i in going])
    ahead = [torch.tensor(list(ids[done:]), device=device) for ids in prompts]
    made = 0
    while going:
        logits_BV = model.decode_together([ahead[i] for i in going], [caches[i] for i in going])
        tokens_B = _next_tokens(logits_BV, sampling, [generators[i] for i in going])
        found = dict(zip(going, tokens_B.tolist(), strict=True))
        yield [found.get(index) for index in range(len(prompts))]
        made += 1
        for row, index in enumerate(going):
            ahead[index] = tokens_B[row : row + 1]
        going = [index for index in going if found[index] not in stop_ids and made < rooms[index]]


def _next_tokens(logits_BV: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """A token (B,) for each row of logits, by its own generator; greedy draws nothing."""
    if sampling.is_greedy:
        return logits_BV.argmax(dim=-1)
    drawn = [_draw(logits_V, sampling, one) for logits_V, one in zip(logits_BV.cpu(), generators, strict=True)]
    return torch.tensor(drawn, device=logits_BV.device)


def _draw(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token of softmax(logits / temperature), cut to its nucleus: one uniform number, put through its inverse
    distribution function."""
    logits_V = logits_V.double()
    probabilities_V = ((logits_V - logits_V.max()) / sampling.temperature).softmax(-1)
    tokens = None
    if sampling.top_p < 1:
        probabilities_V, tokens = _nucleus(probabilities_V, sampling.top_p)
    heights = probabilities_V.cumsum(-1)
    height = torch.rand((), generator=generator, dtype=torch.float64) * heights[-1]
    place = int(torch.searchsorted(heights, height, right=True).clamp(max=len(heights) - 1))
    return place if tokens is None else int(tokens[place])


def _nucleus(probabilities_V: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest set of likeliest tokens whose probabilities add up to `top_p`: these, likeliest first, and the
    tokens."""
    look = _FIRST_LOOK
    while True:  # most nuclei are small, and sorting a vocabulary takes as long as a layer
        found, tokens = probabilities_V.topk(min(look, len(probabilities_V)))
        heights = found.cumsum(-1)
        if heights[-1] >= top_p or look >= len(probabilities_V):
            break
        look *= 8
    count = int((heights < top_p).sum()) + 1
    return found[:count], tokens[:count]


def _fill_shared(model: LLaMaTransformer, prompts: Sequence[Sequence[int]], caches: Sequence[KVCache]) -> int:
    """Computes what all prompts begin with once, where that saves something, and copies its keys and values into all
    caches; returns its tokens. One token of each prompt stays."""
    length = _shared_length(prompts)
    if (len(prompts) - 1) * length < _WORTH_SHARING:
        return 0
    shared = model.new_cache(length)
    model.decode(torch.tensor(list(prompts[0][:length]), device=shared.keys_LSGK.device), shared)
    for cache in caches:
        cache.keys_LSGK[:, :length] = shared.keys_LSGK
        cache.values_LSGV[:, :length] = shared.values_LSGV
        cache.length = length
    return length


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; fewer than any of them has."""
    if len(prompts) < 2:
        return 0
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if len({ids[i] for ids in prompts}) > 1), max(most, 0))
