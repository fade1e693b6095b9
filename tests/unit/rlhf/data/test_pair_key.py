"""Names of pairs as arrays."""

from __future__ import annotations

from simple_llama.reinforcement_learning.rlhf.data.pair_key import KEY, as_keys


def test_keys_are_digest_and_counts_side_by_side() -> None:
    """Two keys of 24 bytes: the digest, then both counts in four bytes each, the lowest first."""
    keys = as_keys([b"a" * 16, b"\0" * 16], [(1, 258), (3, 4)])
    assert keys.dtype == KEY and keys.shape == (2,)
    assert keys.tobytes() == b"a" * 16 + bytes([1, 0, 0, 0, 2, 1, 0, 0]) + b"\0" * 16 + bytes([3, 0, 0, 0, 4, 0, 0, 0])


def test_no_pairs_have_no_keys() -> None:
    assert as_keys([], []).shape == (0,)
