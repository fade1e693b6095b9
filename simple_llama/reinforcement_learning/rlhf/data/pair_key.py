"""The names of pairs, and of answers: what the reference store finds log-probs by. Needs no torch.

A pair is an entry of the store; where a record has more than two answers, each answer is one: that of a pair whose two
chats are both it. So K answers have K sums, whatever pairs they make. N pairs, G of them of such answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Digest of both whole chats and their scored spans, then the scored tokens of (chosen, rejected).
KEY = np.dtype([("digest", "V16"), ("counts", "<i4", (2,))])


class Entries(NamedTuple):
    """The entries that sums of N pairs are read from."""

    keys: np.ndarray  # of KEY: N of pairs or of their chosen answers, G of rejected ones, those of fronts where asked
    by_answer: np.ndarray  # (G,) positions of the pairs whose answers are entries
    pairs: int  # N

    @classmethod
    def of(
        cls,
        keys: np.ndarray,
        by_answer: Sequence[int] | np.ndarray,
        names_G2: np.ndarray,
        fronts: np.ndarray | None,
    ) -> Entries:
        """Those of pairs with these keys (N,). Args: names_G2: of the answers of those at `by_answer`; fronts: keys."""
        parts, places = [keys], np.asarray(by_answer, np.int64)
        if len(places):
            chosen, rejected = (_of_answers(names_G2[:, side], keys["counts"][places, side]) for side in (0, 1))
            parts = [keys.copy(), rejected]
            parts[0][places] = chosen
        return cls(np.concatenate([*parts, *([] if fronts is None else [fronts])]), places, len(keys))

    @property
    def owners(self) -> np.ndarray:
        """The pair that each entry is of (len(keys),)."""
        every = np.arange(self.pairs)
        fronts = len(self.keys) - self.pairs - len(self.by_answer)
        return np.concatenate([every, self.by_answer, every[:fronts]])

    def sums(self, found_M2: np.ndarray) -> np.ndarray:
        """The pairs' sums (N, 2), with those of fronts behind them (N, 4), of those of the entries."""
        sums_N2, second = found_M2[: self.pairs], self.pairs + len(self.by_answer)
        if len(self.by_answer):
            sums_N2 = sums_N2.copy()
            sums_N2[self.by_answer, 1] = found_M2[self.pairs : second, 0]
        fronts_M2 = found_M2[second:]
        return np.concatenate([sums_N2, fronts_M2], axis=1) if len(fronts_M2) else sums_N2

    def spread(self, sums_NS: np.ndarray) -> np.ndarray:
        """The entries' sums (len(keys), 2) of those of the pairs (N, 2) or (N, 4): the way back."""
        first_N2 = sums_NS[:, :2].copy()
        first_N2[self.by_answer, 1] = first_N2[self.by_answer, 0]
        rejected_G2 = np.repeat(sums_NS[self.by_answer, 1:2], 2, axis=1)
        return np.concatenate([first_N2, rejected_G2, sums_NS[:, 2:].reshape(-1, 2)])


def _of_answers(names: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Keys (G,) of answers with these names and scored counts."""
    keys = np.empty(len(names), KEY)
    keys["digest"], keys["counts"] = names, counts[:, None]
    return keys


def as_keys(digests: Sequence[bytes], counts: Sequence[tuple[int, int]]) -> np.ndarray:
    """Keys (B,) of pairs with these digests of 16 bytes and these scored counts."""
    joined = b"".join(digests)
    assert len(joined) == 16 * len(digests) == 16 * len(counts)
    keys = np.empty(len(digests), KEY)
    keys["digest"] = np.frombuffer(joined, "V16")
    keys["counts"] = np.array(counts, np.int32).reshape(-1, 2)
    return keys
