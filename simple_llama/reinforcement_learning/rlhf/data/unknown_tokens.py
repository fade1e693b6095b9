"""Tokens <UNK> in pairs: bytes that the tokenizer does not know."""

from __future__ import annotations

import numpy as np

from simple_llama.reinforcement_learning.rlhf.data.data_report import Unknown
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair

_TOKENS_AT_ONCE = 1 << 22  # looked through for <UNK>


def unknown_counts(pairs: PairSet, unknown_id: int | None) -> np.ndarray | None:
    """Tokens for what the tokenizer does not know, of pairs whose tokens lie in their order: (N, 2) int32, in the chats
    of each and in what is scored of them; None where there are none."""
    if unknown_id is None or not pairs:
        return None
    if pairs.groups is not None:
        return _in_each(pairs, unknown_id)
    places, counts_N2 = pairs.places, pairs.keys["counts"]
    starts_N = np.ascontiguousarray(places["start"])
    stops_N = starts_N + places["prefix"] + places["chosen"] + places["rejected"]
    in_chats_N, in_scored_N = np.zeros(len(pairs), np.int32), np.zeros(len(pairs), np.int32)
    for first in range(0, len(pairs.token_array), _TOKENS_AT_ONCE):
        found_U = first + np.flatnonzero(pairs.token_array[first : first + _TOKENS_AT_ONCE] == unknown_id)
        owners_U = np.searchsorted(starts_N, found_U, side="right") - 1
        is_there_U = (owners_U >= 0) & (found_U < stops_N[owners_U])  # not of a pair that was left out
        found_U, owners_U = found_U[is_there_U], owners_U[is_there_U]
        np.add.at(in_chats_N, owners_U, 1)
        ends_U = starts_N[owners_U] + places["prefix"][owners_U]
        for side, name in enumerate(("chosen", "rejected")):
            ends_U = ends_U + places[name][owners_U]
            is_scored_U = (found_U < ends_U) & (found_U >= ends_U - counts_N2[owners_U, side])
            np.add.at(in_scored_N, owners_U, is_scored_U)
    if pairs.spans is not None:
        for index in np.flatnonzero(in_chats_N).tolist():
            in_scored_N[index] = _unknown_scored(pairs[index], unknown_id)
    return np.stack([in_chats_N, in_scored_N], axis=1) if in_chats_N.any() else None


def _in_each(pairs: PairSet, unknown_id: int) -> np.ndarray | None:
    """The same of pairs that share tokens."""
    if not (pairs.token_array == unknown_id).any():
        return None
    in_chats_N, in_scored_N = np.zeros(len(pairs), np.int32), np.zeros(len(pairs), np.int32)
    for index, pair in enumerate(pairs):
        parts = (pair.prefix, pair.chosen, pair.rejected)
        in_chats_N[index] = sum(np.count_nonzero(part == unknown_id) for part in parts)
        in_scored_N[index] = _unknown_scored(pair, unknown_id)
    return np.stack([in_chats_N, in_scored_N], axis=1) if in_chats_N.any() else None


def _unknown_scored(pair: TokenizedPair, unknown_id: int) -> int:
    """How many of its scored tokens are <UNK>."""
    scored = (whole[at] for whole, at in zip(pair.wholes, pair.scored_at, strict=True))
    return sum(int(np.count_nonzero(some == unknown_id)) for some in scored)


def unknown_of(pairs: PairSet, counts_N2: np.ndarray | None) -> Unknown:
    """What is said of <UNK>, by `unknown_counts`."""
    if counts_N2 is None or not counts_N2.any():
        return Unknown()
    in_chats_N, in_scored_N = counts_N2.T
    having, scored = np.flatnonzero(in_chats_N), np.flatnonzero(in_scored_N)
    return Unknown(
        tokens=int(in_chats_N.sum(dtype=np.int64)),
        pairs=len(having),
        first=pairs.origin(int(having[0])),
        scored_share=float(in_scored_N.sum(dtype=np.int64) / pairs.keys["counts"].sum(dtype=np.int64)),
        scored_pairs=len(scored),
        scored_first=pairs.origin(int(scored[0])) if len(scored) else "",
    )
