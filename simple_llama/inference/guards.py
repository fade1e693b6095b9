"""What tells that a model's language breaks, whatever its preferences do: it repeats itself, runs on, falls silent,
refuses."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch

ENDED_AT_ONCE = "(ended at once)"  # shown for an empty answer
_COUNTED = ("answers", "tokens", "trigrams", "repeated", "ended", "empty", "unknown")

# Phrases of a refusal, in its first characters: lower case, straight apostrophes.
REFUSALS = (
    "i can't",
    "i cannot",
    "i can not",
    "i could not",
    "i couldn't",
    "i won't",
    "i will not",
    "i'm not able to",
    "i am not able to",
    "i'm unable to",
    "i am unable to",
    "i'm not going to",
    "i'm not comfortable",
    "i must decline",
    "i have to decline",
    "i refuse",
    "i don't think i can",
    "i don't feel comfortable",
    "i do not feel comfortable",
    "i'm sorry, but",
    "i am sorry, but",
    "sorry, but i",
    "i apologize, but",
    "as an ai",
    "as a language model",
    "not appropriate for me",
    "we can't help",
)
_LOOKED_AT = 200  # characters: an answer that helps first may say later what it cannot do


def count_language(
    answers: Sequence[Sequence[int]], stop_ids: Collection[int], unknown_id: int | None = None
) -> torch.Tensor:
    """Sums over answers (token ids, the stop token that ended one among them), fp64: those of other ranks add up.

    Answers, their tokens without stop tokens, trigrams of these, trigrams that stood in the same answer before,
    answers that ended by themselves, answers without a token, and tokens that are `unknown_id`.
    """
    sums = dict.fromkeys(_COUNTED, 0)
    for ids in answers:
        ended = bool(ids) and ids[-1] in stop_ids
        text = list(ids[:-1] if ended else ids)
        total, repeated = _repeated_ngrams(text, 3)
        sums["answers"] += 1
        sums["tokens"] += len(text)
        sums["trigrams"] += total
        sums["repeated"] += repeated
        sums["ended"] += ended
        sums["empty"] += not text
        sums["unknown"] += sum(token == unknown_id for token in text)
    return torch.tensor(list(sums.values()), dtype=torch.float64)


def language_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Share of repeated trigrams, mean tokens of an answer, share of answers that ended by themselves, of empty ones,
    and of tokens that stand for what the tokenizer does not know."""
    found = dict(zip(_COUNTED, sums.tolist(), strict=True))
    return {
        "samples/repeated_trigrams": found["repeated"] / max(found["trigrams"], 1),
        "samples/tokens": found["tokens"] / max(found["answers"], 1),
        "samples/ended": found["ended"] / max(found["answers"], 1),
        "samples/empty": found["empty"] / max(found["answers"], 1),
        "samples/unknown": found["unknown"] / max(found["tokens"], 1),
    }


def _repeated_ngrams(ids: Sequence[int], size: int) -> tuple[int, int]:
    """The runs of `size` tokens in one answer, and how many of them stood in it before."""
    runs = list(zip(*(ids[start:] for start in range(size)), strict=False))
    return len(runs), len(runs) - len(set(runs))


def refuses(text: str) -> bool:
    """Whether an answer declines: one of `REFUSALS`, as whole words, in its first characters, whatever case and
    apostrophe."""
    start = " ".join(text[:_LOOKED_AT].replace("\u2019", "'").lower().split())
    return any(re.search(rf"\b{re.escape(phrase)}\b", start) for phrase in REFUSALS)
