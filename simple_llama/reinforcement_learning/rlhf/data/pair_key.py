"""The name of a pair: what the reference store finds its log-probs by. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Digest of both whole chats and their scored spans, then the scored tokens of (chosen, rejected).
KEY = np.dtype([("digest", "V16"), ("counts", "<i4", (2,))])


def as_keys(digests: Sequence[bytes], counts: Sequence[tuple[int, int]]) -> np.ndarray:
    """Keys (B,) of pairs with these digests of 16 bytes and these scored counts."""
    joined = b"".join(digests)
    assert len(joined) == 16 * len(digests) == 16 * len(counts)
    keys = np.empty(len(digests), KEY)
    keys["digest"] = np.frombuffer(joined, "V16")
    keys["counts"] = np.array(counts, np.int32).reshape(-1, 2)
    return keys
