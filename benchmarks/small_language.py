"""A made-up language, preferences among its answers, and a model of it that is made in a second.

An answer's words climb through classes, by one or two at a time, and it ends behind the last one: the most likely
answer ends, and repeats nothing. Each class has a good, a bad and a plain word; the better of two answers has more good
and fewer bad words, by labels as noisy as Bradley and Terry's (1952).

Shapes: N answers, C classes, B texts, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair

UNKNOWN, START, ANSWER, END = range(4)
PROMPT_WORDS = range(4, 12)
_CLASSES, _WORDS = 14, 3
FIRST_WORD = PROMPT_WORDS.stop
VOCABULARY = FIRST_WORD + _CLASSES * _WORDS
_GOOD, _BAD = 0, 1
_SFT_STEPS, _SFT_BATCH, _SFT_RATE = 120, 24, 1e-2
_WITH_HABIT = 4  # answers of a batch
_CUT = 20  # tokens of an answer that was cut off
_PADDING = START  # no answer has it
ARCHITECTURE = Architecture(
    vocab_size=VOCABULARY,
    max_seq_len=256,
    width=32,
    layers=1,
    heads=2,
    key_heads=2,
    rope_width=16,
    value_width=16,
    hidden_width=64,
)

Tokens = list[int]


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers of which the first is preferred."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens

    def swapped(self) -> Preference:
        """The same with the other answer preferred."""
        return Preference(self.prompt, self.rejected, self.chosen)

    def tokenized(self) -> TokenizedPair:
        """As training takes it."""
        chosen, rejected = self.prompt + self.chosen, self.prompt + self.rejected
        return TokenizedPair.from_chats(chosen, len(self.chosen), rejected, len(self.rejected))


def make_prompts(rng: np.random.Generator, count: int) -> list[Tokens]:
    """Prompts, up to where an answer begins: words that answers do not have."""
    words = rng.integers(PROMPT_WORDS.start, PROMPT_WORDS.stop, (count, 6))
    lengths = rng.integers(3, 7, count)
    return [[START, *row[:length].tolist(), ANSWER] for row, length in zip(words, lengths, strict=True)]


def make_answers(rng: np.random.Generator, prompts: Sequence[Tokens]) -> list[Tokens]:
    """An answer to each prompt, with the token that ends it.

    It begins in the class that the prompt's first word says, and hurries as it likes: 7 to 15 tokens.
    """
    hurry_N1 = rng.uniform(0.1, 0.7, (len(prompts), 1))
    climbs_NC = np.cumsum(1 + (rng.random((len(prompts), _CLASSES)) < hurry_N1), axis=1)
    climbs_NC += np.array([[prompt[1] % 2 - 1] for prompt in prompts])
    words_NC = FIRST_WORD + climbs_NC * _WORDS + rng.integers(0, _WORDS, climbs_NC.shape)
    ends = (climbs_NC < _CLASSES).sum(axis=1).tolist()
    return [[*row[:end].tolist(), END] for row, end in zip(words_NC, ends, strict=True)]


def _quality(answer: Tokens) -> int:
    """Good words less bad ones."""
    kinds = [(token - FIRST_WORD) % _WORDS for token in answer if token >= FIRST_WORD]
    return kinds.count(_GOOD) - kinds.count(_BAD)


def make_preferences(rng: np.random.Generator, count: int, sharpness: float, length_bias: float) -> list[Preference]:
    """Pairs of different answers, of which that with more good words is preferred, with noise.

    Args:
        sharpness, length_bias: log-odds of a label by a word of quality, and of length.
    """
    asked = make_prompts(rng, 2 * count)
    threes = zip(asked, make_answers(rng, asked), make_answers(rng, asked), strict=True)
    found = [Preference(*three) for three in threes if three[1] != three[2]][:count]
    better_N = np.array([_quality(pair.chosen) - _quality(pair.rejected) for pair in found])
    longer_N = np.array([len(pair.chosen) - len(pair.rejected) for pair in found])
    keeps = rng.random(len(found)) < 1 / (1 + np.exp(-sharpness * better_N - length_bias * longer_N))
    return [pair if keep else pair.swapped() for pair, keep in zip(found, keeps, strict=True)]


# === Bad habits of answers ===


def loops(answer: Tokens) -> Tokens:
    """Two words of the middle, six times."""
    half = len(answer) // 2
    return [*answer[:half], *answer[half - 2 : half] * 5, *answer[half:]]


def runs_on(answer: Tokens) -> Tokens:
    """Cut off at a length that the language has not: its last word again and again, and no end."""
    return answer[:-1] + answer[-2:-1] * (_CUT - len(answer))


def has_unknown(answer: Tokens) -> Tokens:
    """Every third word is one that the tokenizer does not know."""
    return [UNKNOWN if place % 3 == 1 and token != END else token for place, token in enumerate(answer)]


def is_empty(answer: Tokens) -> Tokens:
    """Nothing but its end."""
    return [END]


@functools.lru_cache(maxsize=64)
def start_weights(seed: int, habit: Callable[[Tokens], Tokens] | None = None) -> dict[str, torch.Tensor]:
    """A model that speaks the language, by a short SFT on its answers, of which some have the habit."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 77])
    model = LLaMaTransformer(ARCHITECTURE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_SFT_RATE, weight_decay=0.0, fused=True)
    for step in range(_SFT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _SFT_RATE * (1 - step / _SFT_STEPS)
        asked = make_prompts(rng, _SFT_BATCH)
        answers = make_answers(rng, asked)
        if habit:
            answers[:_WITH_HABIT] = map(habit, answers[:_WITH_HABIT])
        texts = [prompt + answer for prompt, answer in zip(asked, answers, strict=True)]
        longest = max(map(len, texts))
        ids_BT = torch.tensor([text + [_PADDING] * (longest - len(text)) for text in texts])
        answered_BT = (ids_BT == ANSWER).cumsum(dim=1)[:, :-1] > 0
        targets_BT = ids_BT[:, 1:].masked_fill(~answered_BT | (ids_BT[:, 1:] == _PADDING), -100)
        F.cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1), targets_BT.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
