"""What tells that a model's language breaks, whatever its preferences do: it repeats itself, runs on, falls silent."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

_COUNTED = ("answers", "tokens", "trigrams", "repeated", "ended")


def count_language(answers: Sequence[Sequence[int]], stop_ids: Collection[int]) -> torch.Tensor:
    """Sums over answers (token ids, the stop token that ended one among them), fp64: those of other ranks add up.

    Answers, their tokens without stop tokens, trigrams of these, trigrams that stood in the same answer before, and
    answers that ended by themselves.
    """
    sums = dict.fromkeys(_COUNTED, 0)
    for ids in answers:
        ended = bool(ids) and ids[-1] in stop_ids
        text = list(ids[:-1] if ended else ids)
        trigrams = list(zip(text, text[1:], text[2:], strict=False))
        sums["answers"] += 1
        sums["tokens"] += len(text)
        sums["trigrams"] += len(trigrams)
        sums["repeated"] += len(trigrams) - len(set(trigrams))
        sums["ended"] += ended
    return torch.tensor(list(sums.values()), dtype=torch.float64)


def language_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Share of repeated trigrams, mean tokens of an answer, share of answers that ended by themselves."""
    found = dict(zip(_COUNTED, sums.tolist(), strict=True))
    return {
        "samples/repeated_trigrams": found["repeated"] / max(found["trigrams"], 1),
        "samples/tokens": found["tokens"] / max(found["answers"], 1),
        "samples/ended": found["ended"] / max(found["answers"], 1),
    }
