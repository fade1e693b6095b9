"""Token ids that lie in several mapped arrays, of 16 bits each where the vocabulary allows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np


class TokenFiles:
    """Several arrays of ids as one: `tokens[start:stop]`, which lies within one of them, is int32."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, self.parts)], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        if where.start >= where.stop:
            return np.empty(0, np.int32)
        part = bisect_right(self._starts, where.start) - 1
        start = where.start - self._starts[part]
        return self.parts[part][start : start + where.stop - where.start].astype(np.int32)


def narrow(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Ids as they are kept."""
    return tokens.astype(np.uint16 if vocabulary <= 1 << 16 else np.int32)
