"""Greedy tokens: the same as full forwards, and where they end; in the model's own state, one at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.inference.generate import Sampling, _next_tokens, generate, generate_together, groups_with_room
from simple_llama.inference.steps import Steps
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from tiny_model import MLA, PROMPT, PROMPTS, tiny_model

NO_STOP: frozenset[int] = frozenset()


@torch.no_grad()
def by_full_forwards(model: LLaMaTransformer, count: int) -> list[int]:
    """The plain way: the whole chat through the model for each next token."""
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("shape", [{}, MLA], ids=["mha", "mla"])
def test_greedy_equals_full_forwards_step_by_step(shape: dict[str, Any]) -> None:
    """Twelve tokens with the cache are the argmax of twelve full forwards, and they are not one token twelve times."""
    model = tiny_model(**shape)
    expected = by_full_forwards(model, 12)
    assert len(set(expected)) > 2
    assert list(generate(model, PROMPT, 12, NO_STOP)) == expected


def test_it_ends_before_the_stop_id() -> None:
    """The fourth different token as the stop id: what stands before it is the answer."""
    model = tiny_model()
    tokens = by_full_forwards(model, 12)
    stop = list(dict.fromkeys(tokens))[3]
    assert list(generate(model, PROMPT, 12, {stop})) == tokens[: tokens.index(stop)]
    assert list(generate(model, PROMPT, 12, {tokens[0]})) == []


def test_it_respects_both_limits() -> None:
    """Prompt of 4 in a model of 8 tokens: 4 new ones at most, 3 where 3 are asked for, none where it is full."""
    model = tiny_model(max_seq_len=8)
    assert len(list(generate(model, PROMPT, 100, NO_STOP))) == 4
    assert len(list(generate(model, PROMPT, 3, NO_STOP))) == 3
    assert list(generate(model, [*PROMPT, *PROMPT], 100, NO_STOP)) == []
    with pytest.raises(UserError, match="max_seq_len = 8 tokens, found 9"):
        list(generate(model, [*PROMPT, *PROMPT, 6], 100, NO_STOP))


def test_tokens_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward for each token that is asked for and none ahead, so that an answer can be shown as it is made."""
    model, calls = tiny_model(), []
    decode = model.decode_together
    monkeypatch.setattr(model, "decode_together", lambda *args: calls.append(len(args[0][0])) or decode(*args))
    tokens = generate(model, PROMPT, 12, NO_STOP)
    assert calls == []
    next(tokens)
    assert calls == [4]  # the whole prompt at once
    step = Steps.step
    monkeypatch.setattr(Steps, "step", lambda self, *args: calls.append(len(args[0])) or step(self, *args))
    next(tokens)
    assert calls == [4, 1]


def test_dropout_is_refused() -> None:
    """In training the answer would be another each time."""
    with pytest.raises(AssertionError, match="dropout"):
        next(generate(tiny_model().train(), PROMPT, 1, NO_STOP))


# === several at once ===


def together(
    model: LLaMaTransformer, prompts: list[list[int]], count: int, stop_ids: set[int], *sampling: Any
) -> list[list[int]]:
    """Each prompt's answer, with the token that ended it."""
    columns = zip(*generate_together(model, prompts, count, stop_ids, *sampling), strict=True)
    return [[token for token in column if token is not None] for column in columns]


@pytest.mark.parametrize(
    ("changes", "shape"),
    [({}, {}), ({}, MLA), ({"key_heads": 1, "tied_head": True}, {})],
    ids=["mha", "mla", "grouped and tied"],
)
def test_together_is_one_by_one(changes: dict[str, Any], shape: dict[str, Any]) -> None:
    """Prompts of 4, 2, 7 and 1 tokens: twelve tokens of each are those of `generate`, and the answers differ."""
    model = tiny_model(changes, **shape)
    alone = [list(generate(model, ids, 12, NO_STOP)) for ids in PROMPTS]
    assert len({tuple(answer) for answer in alone}) > 1
    assert together(model, PROMPTS, 12, set()) == alone


def test_an_answer_that_has_ended_leaves_the_others_alone() -> None:
    """The first answer's fourth different token stops: it is the last one of the answers that have it; each is its own
    answer up to there."""
    model = tiny_model()
    alone = [list(generate(model, ids, 12, NO_STOP)) for ids in PROMPTS]
    stop = list(dict.fromkeys(alone[0]))[3]
    expected = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in alone]
    assert len({len(answer) for answer in expected}) > 1
    assert together(model, PROMPTS, 12, {stop}) == expected


def test_each_has_the_models_length_limit() -> None:
    """In a model of 8 tokens, prompts of 4, 8 and 1 tokens get 4, 0 and 5 of the 5 that are asked for."""
    model = tiny_model(max_seq_len=8)
    found = list(generate_together(model, [PROMPT, [*PROMPT, *PROMPT], [40]], 5, NO_STOP))
    assert [[token is not None for token in step] for step in found] == [[True, False, True]] * 4 + [
        [False, False, True]
    ]
    assert list(generate_together(model, [], 5, NO_STOP)) == []
    with pytest.raises(UserError, match="max_seq_len = 8 tokens, found 9"):
        list(generate_together(model, [PROMPT, [*PROMPT, *PROMPT, 6]], 5, NO_STOP))


def test_what_prompts_begin_with_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts that begin with the same 40 of 42, 43 and 41 tokens: the first forward has these, the second what
    is left of each, 2 + 3 + 1 rows; answers are those of each alone. Prompts of 9 save 16: too few."""
    model, calls = tiny_model(max_seq_len=64), []
    decode = model.decode_together
    monkeypatch.setattr(model, "decode_together", lambda *args: calls.append(list(map(len, args[0]))) or decode(*args))
    shared = [8 + i % 30 for i in range(40)]
    prompts = [[*shared, 5, 6], [*shared, 7, 8, 9], [*shared, 5]]
    found = together(model, prompts, 6, set())
    assert calls == [[40], [2, 3, 1]]
    assert found == [list(generate(model, ids, 6, NO_STOP)) for ids in prompts] and len(set(map(tuple, found))) > 1
    calls.clear()
    together(model, [PROMPT * 2 + [6]] * 3, 1, set())
    assert calls == [[9, 9, 9]]
    together(model, [shared] * 3, 1, set())  # the same prompt: its last token is left to each
    assert calls[1:] == [[39], [1, 1, 1]]


# === sampled ===

LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()


def shares(sampling: Sampling, draws: int = 4000) -> list[float]:
    """How often each of four tokens is drawn."""
    generators = [sampling.generator(number) for number in range(draws)]
    found = _next_tokens(LOGITS.expand(draws, 4), sampling, generators)
    return (found.bincount(minlength=4) / draws).tolist()


def test_answers_are_made_together_as_far_as_memory_goes() -> None:
    """At most 16 and 16,384 tokens a group, neighbours together, none lost; one alone though it is too long."""
    assert groups_with_room([10] * 20, 16384, 16) == [range(16), range(16, 20)]
    assert groups_with_room([9000, 9000, 100, 20000], 16384, 16) == [range(1), range(1, 3), range(3, 4)]
    assert groups_with_room([4, 5, 6, 12, 1, 2], 10) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert groups_with_room([], 16384) == []


def test_draws_have_the_probabilities() -> None:
    """1/2 1/4 1/8 1/8 at temperature 1; squared and normalised, 16 4 1 1 of 22, at 1/2; a nucleus of 0.7 has the first
    two, 2/3 and 1/3, one of exactly 0.5 the first. Four standard errors of 4,000 draws are 0.032."""
    assert shares(Sampling(temperature=1)) == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 8], abs=0.032)
    assert shares(Sampling(temperature=0.5)) == pytest.approx([16 / 22, 4 / 22, 1 / 22, 1 / 22], abs=0.032)
    assert shares(Sampling(temperature=1, top_p=0.7)) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.032)
    assert shares(Sampling(temperature=1, top_p=0.5)) == [1, 0, 0, 0]
    assert shares(Sampling(temperature=1e-320)) == [1, 0, 0, 0]


def test_a_wide_nucleus_is_found_whole() -> None:
    """100 tokens of the same probability and top_p 0.9: 90 of them may be drawn, beyond the first look."""
    sampling = Sampling(temperature=1, top_p=0.9)
    found = _next_tokens(torch.zeros(2000, 100), sampling, [sampling.generator(n) for n in range(2000)])
    assert len(found.unique()) == 90


def test_samples_are_those_of_their_seed_and_number() -> None:
    """The same again by the same seed, others by another seed or number; greedy is the default."""
    model, sampling = tiny_model(), Sampling(temperature=1.5, top_p=0.9, seed=3)
    found = list(generate(model, PROMPT, 12, NO_STOP, sampling))
    assert found == list(generate(model, PROMPT, 12, NO_STOP, sampling))
    assert found != list(generate(model, PROMPT, 12, NO_STOP, sampling, 1))
    assert found != list(generate(model, PROMPT, 12, NO_STOP, replace(sampling, seed=4)))
    assert list(generate(model, PROMPT, 12, NO_STOP, Sampling())) == by_full_forwards(model, 12)


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    """Four prompts sampled together, then in other company and order under their numbers, then alone."""
    model, sampling = tiny_model(), Sampling(temperature=1.2, top_p=0.95, seed=1)
    found = together(model, PROMPTS, 12, set(), sampling)
    assert together(model, [PROMPTS[3], PROMPTS[1]], 12, set(), sampling, [3, 1]) == [found[3], found[1]]
    alone = [list(generate(model, ids, 12, NO_STOP, sampling, number)) for number, ids in enumerate(PROMPTS)]
    assert found == alone and len({tuple(answer) for answer in found}) == 4


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}])
def test_what_cannot_be_sampled_is_refused(wrong: dict[str, Any]) -> None:
    """Named, with what is allowed."""
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_nucleus_of_greedy_answers_is_refused() -> None:
    """It would have no effect."""
    with pytest.raises(UserError, match="top_p: expected a temperature above 0 beside it"):
        Sampling(top_p=0.5)
