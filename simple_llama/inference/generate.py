"""Answers token by token, greedy or sampled, with the keys and values of the tokens so far kept.

Greedy unless asked otherwise, so that a change of an answer is a change of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any

import torch
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.settings import Bounds, CountOrNone, Settings
from simple_llama.inference.steps import Steps
from simple_llama.pretraining.kv_cache import KVCache
from simple_llama.pretraining.llama_transformer import LLaMaTransformer

_WORTH_SHARING = 64  # rows that a shared prefix has to save: it costs a forward of its own, which reads all weights
_FIRST_LOOK = 64  # tokens among which a nucleus is looked for first


@dataclass(frozen=True)
class NextToken(Settings):
    """From what the next token is drawn."""

    # === Sampling ===
    temperature: Annotated[float, Bounds(0, 100), Doc("logits are divided by it; 0: always the most likely token")] = (
        0.0
    )
    top_p: Annotated[
        float,
        Bounds(0, 1, above=True),
        Doc("only the likeliest tokens that together have this probability are drawn (nucleus, arXiv:1904.09751)"),
    ] = 1.0

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def check_rules(self) -> None:
        """UserError for an option without effect."""
        if self.top_p < 1 and self.is_greedy:
            raise UserError("top_p: expected a temperature above 0 beside it, found 0, where it has no effect")


@dataclass(frozen=True)
class Sampling(NextToken):
    """How answers are drawn."""

    seed: CountOrNone = 0  # of the draws: the same answers again

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
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[list[int | None]]:
    """`generate` for several prompts at once, which may have any lengths: each time, the next token of each answer.

    An answer's last token is that of `stop_ids` which ended it, unless it came to a limit; behind its end stands None.
    A forward of all rows reads the weights once, and what all prompts begin with is computed once.

    Each answer is sampled by a generator of its own (`Sampling.generator`), so rounding apart it is that of
    `generate`, whatever is answered beside it.

    Args:
        numbers: which answers these are of all that the seed makes, where they are not 0, 1, ...
        agree: of a model whose forward all ranks have to make together, gives all of them the same tokens (B,).
    """
    assert not model.training, "generate: dropout would act"
    device = model.embeddings.weight.device
    rooms = [min(max_new_tokens, model.architecture.max_seq_len - len(ids)) for ids in prompts]
    for ids in prompts:
        model.check_length(len(ids))
    going = [index for index, room in enumerate(rooms) if room > 0]
    lengths = [len(prompts[index]) + rooms[index] for index in going]
    steps = Steps(model, lengths) if Steps.fit(model, lengths) else None
    caches = steps.caches if steps else [model.new_cache(length) for length in lengths]
    generators = [sampling.generator(number) for number in (range(len(prompts)) if numbers is None else numbers)]
    done = _fill_shared(model, [prompts[index] for index in going], caches)
    ahead = [torch.tensor(list(prompts[index][done:]), device=device) for index in going]
    made = 0
    while going:
        logits_BV = steps.step(torch.cat(ahead)) if steps and made else model.decode_together(ahead, caches)
        tokens_B = _next_tokens(logits_BV, sampling, [generators[index] for index in going])
        tokens_B = agree(tokens_B) if agree else tokens_B
        found = dict(zip(going, tokens_B.tolist(), strict=True))
        yield [found.get(index) for index in range(len(prompts))]
        made += 1
        ahead = list(tokens_B.split(1))
        for row in reversed(range(len(going))):
            if found[going[row]] in stop_ids or made >= rooms[going[row]]:
                _drop(row, going, ahead)
                if steps:
                    steps.drop(row)
                else:
                    _drop(row, caches)


def answer_together(
    model: LLaMaTransformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = _GREEDY,
    numbers: Sequence[int] | None = None,
    beat: Callable[[], object] | None = None,
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[list[int]]:
    """Token ids of the whole answers of `generate_together`, each with the stop token that ended it.

    Args:
        beat: called with each round of tokens. agree: as there.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_together(model, prompts, max_new_tokens, stop_ids, sampling, numbers, agree):
        if beat:
            beat()
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def groups_with_room(lengths: Sequence[int], most_cached: int, most_together: int | None = None) -> list[range]:
    """Neighbouring answers that are made together: as many as have room for their keys and values.

    Args:
        lengths: tokens of each, with its prompt. most_cached: of all in a group, which has one answer at least.
    """
    found, first, total = list[range](), 0, 0
    for place, length in enumerate(lengths):
        if place > first and (place - first == most_together or total + length > most_cached):
            found.append(range(first, place))
            first, total = place, 0
        total += length
    return [*found, range(first, len(lengths))] if lengths else []


def _drop(row: int, *lists: list[Any]) -> None:
    """Takes an answer out of lists of all that go on; the last one takes its row."""
    for rows in lists:
        rows[row] = rows[-1]
        rows.pop()


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
