"""All pairs as arrays: what comes out is what went in, nothing is copied, and little is kept beside the tokens."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simple_llama.common.files import digest
from simple_llama.reinforcement_learning.rlhf.data import pair_set
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairBuffer, PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair

PAIRS = [
    TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 6, 7, 8], 3),
    TokenizedPair.from_chats([1, 9, 4], 1, [1, 9, 5, 6], 2),
    TokenizedPair.from_chats([1, 2, 10, 11, 12, 13], 3, [1, 2, 14], 1),
]
TOKENS = st.lists(st.integers(10, 14), min_size=1, max_size=8)


def content(pair: TokenizedPair) -> tuple:
    """All of a pair as plain values."""
    arrays = (pair.prefix.tolist(), pair.chosen.tolist(), pair.rejected.tolist())
    return *arrays, pair.chosen_scored, pair.rejected_scored, pair.digest


def test_arrays_by_hand() -> None:
    """Prefixes of 3, 2 and 2 tokens; branches of 2 and 3, 1 and 2, 4 and 1; rows are one less for each branch."""
    pairs = PairSet.of(PAIRS, [("a.json", 1), ("b.json", 1), ("a.json", 7)])
    assert pairs.token_array.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 4, 5, 6, 1, 2, 10, 11, 12, 13, 14]
    assert pairs.rows.tolist() == [3 + 1 + 2, 2 + 0 + 1, 2 + 3 + 0]
    assert (pairs.chosen_len.tolist(), pairs.rejected_len.tolist()) == ([5, 3, 6], [6, 4, 3])
    assert pairs.keys["counts"].tolist() == [[2, 3], [1, 2], [3, 1]]
    assert pairs.longer_is_chosen == pytest.approx(1 / 3)  # shorter, shorter, longer
    assert pairs.select([0, 2]).longer_is_chosen == 0.5
    assert pairs.keys["digest"].tobytes() == b"".join(pair.digest for pair in PAIRS)
    assert [pairs.origin(i) for i in range(3)] == ["a.json:1", "b.json:1", "a.json:7"]
    assert pairs.select([2, 0, 2, 1]).prompts.tolist() == [0, 1, 0, 2]


@given(st.lists(st.tuples(TOKENS, TOKENS, TOKENS), max_size=6))
def test_what_comes_out_is_what_went_in(triples: list[tuple[list[int], list[int], list[int]]]) -> None:
    """Pairs, and each of their properties beside the arrays'."""
    given = [TokenizedPair.from_chats([1, *p, *c], len(c), [1, *p, *r], len(r)) for p, c, r in triples]
    pairs = PairSet.of(given)
    assert [content(pair) for pair in pairs] == [content(pair) for pair in given]
    assert pairs.rows.tolist() == [pair.rows for pair in given]
    assert pairs.chosen_len.tolist() == [pair.chosen_len for pair in given]
    assert pairs.rejected_len.tolist() == [pair.rejected_len for pair in given]
    if given:
        assert pairs.keys.tobytes() == PairBatch.pack(given).keys.tobytes()


def test_it_is_a_sequence() -> None:
    """Places from both ends, slices, iteration, numbers of numpy; beyond the end is an IndexError."""
    pairs = PairSet.of(PAIRS)
    last: Any = np.int64(2)
    assert len(pairs) == 3 and content(pairs[-1]) == content(PAIRS[2]) == content(pairs[last])
    assert [content(pair) for pair in pairs[::2]] == [content(PAIRS[0]), content(PAIRS[2])]
    assert pairs and not pairs[3:] and not PairSet.of([])
    with pytest.raises(IndexError):
        pairs[3]


def test_nothing_is_copied() -> None:
    """A pair's arrays and the tokens of a choice are views; nobody can write through them."""
    pairs = PairSet.of(PAIRS)
    some = pairs.select([2, 0, 2])
    assert [content(pair) for pair in some] == [content(PAIRS[i]) for i in (2, 0, 2)]
    assert some.tokens is pairs.tokens and np.shares_memory(pairs[1:].keys, pairs.keys)
    for part in (pairs[1].prefix, pairs[1].chosen, some[1].rejected):
        assert np.shares_memory(part, pairs.tokens)
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 5


def test_a_pair_takes_64_bytes_beside_its_tokens() -> None:
    """52 in the set, 4 for its rows and 8 for its place in the shuffle."""
    pairs = PairSet.of(PAIRS)
    plan = BatchPlan(pairs.rows, 0, 1, 1, 1)
    assert pairs.nbytes == 52 * len(pairs)
    assert pairs.nbytes + plan.rows.nbytes + plan.shuffle(0).nbytes == 64 * len(pairs)
    assert pairs.token_array.nbytes == 4 * sum(len(part) for p in PAIRS for part in (p.prefix, p.chosen, p.rejected))


def test_digest_is_that_of_all_digests_in_order() -> None:
    pairs = PairSet.of(PAIRS)
    assert pairs.digest == digest(*(pair.digest for pair in PAIRS))
    assert pairs.select([1, 0, 2]).digest == digest(*(PAIRS[i].digest for i in (1, 0, 2))) != pairs.digest


# === weights and gaps ===


def test_weights_and_gaps_are_kept_where_a_pair_has_one() -> None:
    """16 bytes a pair, those before and behind filled up; none at all without; choices and single pairs have theirs."""
    assert PairSet.of(PAIRS).strengths is None and not PairSet.of(PAIRS).is_weighted
    given = [PAIRS[0], replace(PAIRS[1], weight=2.5, gap=-1.0), PAIRS[2]]
    pairs = PairSet.of(given)
    assert pairs.nbytes == (52 + 16) * 3 and pairs.is_weighted
    assert pairs.weights.tolist() == [1.0, 2.5, 1.0] and pairs.gaps[1] == -1.0
    assert np.isnan(pairs.gaps).tolist() == [True, False, True]
    assert [(pair.weight, pair.gap) for pair in pairs.select([1, 2])] == [(2.5, -1.0), (1.0, None)]
    assert not pairs[:1].is_weighted and PairSet.of(PAIRS).weights.tolist() == [1.0] * 3
    assert content(pairs[1]) == content(PAIRS[1])  # its name too


def test_the_digest_of_a_data_set_has_its_weights_and_gaps() -> None:
    """Another weight, or the same on another pair, is another data set; weights of 1 that are written out are none."""
    plain = PairSet.of(PAIRS).digest
    changes: list[dict[str, Any]] = [{"weight": 2.0}, {"weight": 3.0}, {"gap": 2.0}, {"gap": 0.0}]
    sets = [PairSet.of([replace(PAIRS[0], **change), *PAIRS[1:]]) for change in changes]
    sets.append(PairSet.of([*PAIRS[:2], replace(PAIRS[2], weight=2.0)]))
    assert len({plain, *(one.digest for one in sets)}) == 6
    assert sets[0][1:].digest == PairSet.of(PAIRS[1:]).digest


# === spans ===


def test_spans_are_kept_where_a_pair_has_some() -> None:
    """Pairs before and behind it have none; choices keep them; none at all where no pair has any."""
    spans = ((1, 2), (3, 4), (5, 7)), ((1, 2), (3, 4), (5, 6))
    several = TokenizedPair.from_spans([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 8], spans)
    given = [PAIRS[0], several, PAIRS[1], replace(several, weight=2.0), PAIRS[2]]
    pairs = PairSet.of(given)
    assert [pair.spans for pair in pairs] == [None, spans, None, spans, None]
    assert [content(pair) for pair in pairs] == [content(pair) for pair in given]
    assert [pair.spans for pair in pairs.select([3, 0])] == [spans, None]
    assert [pair.spans for pair in pairs[2:]] == [None, spans, None] and pairs.keys["counts"][1].tolist() == [4, 3]
    assert pairs.nbytes == (52 + 16 + 16) * 5 + 8 * 12 and PairSet.of(PAIRS).spans is None
    assert PairBatch.pack(list(pairs)).rows_N.tolist() == PairBatch.pack(given).rows_N.tolist()


# === the buffer that grows ===


def test_reading_needs_no_second_copy() -> None:
    """20,000 pairs of 300 tokens: at no time is there half as much again as at the end."""
    part = np.arange(100, dtype=np.int32)
    tracemalloc.start()
    buffer = PairBuffer()
    for number in range(20_000):
        buffer.append(TokenizedPair(part, part, part, 1, 1, number.to_bytes(16, "little")), "a.json", number)
    pairs = buffer.finish()
    now, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs.token_array.nbytes + pairs.nbytes == 20_000 * 1252
    assert now < 1.2 * 20_000 * 1252 and most < 1.4 * 20_000 * 1252


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_the_buffer_knows_digests_as_a_set_does(parts: list[tuple[int, int]]) -> None:
    """Against a plain set. First 8 bytes that agree in all or most bits, so that searches start at the same place."""
    buffer, plain, first_slots = PairBuffer(), set(), pair_set._FIRST_SLOTS
    buffer._slots = buffer._slots[:2]  # as small as can be, so that it grows
    assert len(buffer._slots) < first_slots
    for low, high in parts:
        name = low.to_bytes(8, "little") + high.to_bytes(8, "little")
        assert (buffer.position(name) >= 0) == (name in plain)
        token = np.zeros(1, np.int32)
        buffer.append(TokenizedPair(token, token, token, 1, 1, name), "a.json", 1)
        plain.add(name)
        assert buffer.position(name) >= 0 and len(buffer._slots) >= 2 * len(buffer)
    assert len(buffer) == len(parts)
