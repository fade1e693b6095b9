"""A pair as one packed sequence. Model-level exactness is in test_policy.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_key import as_keys
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair

TOKENS = st.lists(st.integers(10, 14), min_size=1, max_size=8)


def test_pair_by_hand():
    """Prompt 1 2 3, answers 4 5 and 4 6 7. All answer tokens are scored, so the shared 4 is not part of the prefix."""
    pair = TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 4, 6, 7], 3)
    assert pair.prefix.tolist() == [1, 2, 3]
    assert pair.chosen.tolist() == [4, 5] and pair.rejected.tolist() == [4, 6, 7]
    assert pair.rows == 3 + 1 + 2 and (pair.chosen_len, pair.rejected_len) == (5, 6)


def test_batch_by_hand():
    """The pair above: stream 1 2 3 | 4 | 4 6; row 2 (token 3) predicts the first token of both branches."""
    pair = TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 4, 6, 7], 3)
    batch = PairBatch.pack([pair])
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 4, 6]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.rows_N.tolist() == [2, 3, 2, 4, 5]
    assert batch.targets_N.tolist() == [4, 5, 4, 6, 7]
    assert batch.counts == ((2, 3),) and batch.layout.segments == ((3, (1, 2)),)
    assert batch.pairs == (pair,) and batch.counts_B2.tolist() == [[2, 3]] and batch.counts_B2.dtype == torch.int64


def test_a_batch_knows_the_names_of_its_pairs() -> None:
    """Digest and counts of each pair, in the order of the stream: what a reference store is asked by."""
    pairs = [TokenizedPair.from_chats([1, 2, i], 1, [1, 2, 5, i], 2) for i in (8, 9)]
    batch = PairBatch.pack(pairs)
    assert len(batch) == 2
    assert batch.keys.tobytes() == as_keys([pair.digest for pair in pairs], [(1, 2), (1, 2)]).tobytes()


def test_several_answers_by_hand() -> None:
    """Chats 1 2 [3] 4 [5 6] and 1 2 [3] 4 [7]: the first answer is shared, so the row of the token before it predicts
    for both; the prefix ends before the last answers. The spans are in the name, and in that of the swapped pair."""
    spans = ((2, 3), (4, 6)), ((2, 3), (4, 5))
    pair = TokenizedPair.from_spans([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], spans)
    batch = PairBatch.pack([TokenizedPair.from_chats([8, 9], 1, [8, 10], 1), pair])
    assert pair.prefix.tolist() == [1, 2, 3, 4] and batch.counts == ((1, 1), (3, 2))
    assert batch.tokens_T.tolist() == [8, 1, 2, 3, 4, 5] and batch.positions_T.tolist() == [0, 0, 1, 2, 3, 4]
    assert batch.rows_N.tolist() == [0, 0, *(2, 4, 5), *(2, 4)]
    assert batch.targets_N.tolist() == [9, 10, *(3, 5, 6), *(3, 7)]
    assert pair.prompt_ids.tolist() == [1, 2, 3, 4]
    assert [ids.tolist() for ids in pair.last_answers] == [[5, 6], [7]]
    last = TokenizedPair.from_chats([1, 2, 3, 4, 5, 6], 2, [1, 2, 3, 4, 7], 1)
    other = TokenizedPair.from_spans([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], (((1, 2), (4, 6)), ((1, 2), (4, 5))))
    assert len({pair.digest, last.digest, other.digest}) == 3
    assert (
        TokenizedPair.from_spans([1, 2, 3, 4, 7], [1, 2, 3, 4, 5, 6], (spans[1], spans[0])).digest
        == pair.swapped_digest
    )
    # one span a side is what was there before: the same pair
    assert TokenizedPair.from_spans([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], (((4, 6),), ((4, 5),))).digest == last.digest


def test_fronts_by_hand() -> None:
    """Answers of 2 and 3 tokens up to 2; of spans, 1 + 2 and 1 + 1 tokens, up to 2; of as many tokens: itself."""
    pair = TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 6, 7, 8], 3, 2.0, 1.0)
    shorter = TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 6, 7], 2)
    assert pair.front.digest == shorter.digest != pair.digest and shorter.front is shorter
    batch = PairBatch.pack([pair, shorter])
    assert batch.entries(fronts=True).keys[2:].tobytes() == PairBatch.pack([shorter, shorter]).keys.tobytes()
    assert batch.part_counts == ((2, 0, 2, 1), (2, 0, 2, 0))
    assert batch.counts_of(4).tolist() == [[2, 3, 2, 2], [2, 2, 2, 2]] and batch.counts_of(2) is batch.counts_B2
    spans = ((2, 3), (4, 6)), ((2, 3), (4, 5))
    several = TokenizedPair.from_spans([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], spans)
    cut = TokenizedPair.from_spans([1, 2, 3, 4, 5], [1, 2, 3, 4, 7], (((2, 3), (4, 5)), spans[1]))
    assert several.front.digest == cut.digest and PairBatch.pack([several]).part_counts == ((2, 1, 2, 0),)
    first = TokenizedPair.from_spans([1, 2, 3, 4, 5], [1, 2, 6, 7, 8, 4, 5], (((2, 3), (4, 5)), ((2, 5), (6, 7))))
    assert first.front.scored_spans == (((2, 3), (4, 5)), ((2, 4),)) and first.front.rejected_len == 4


def test_different_first_answers_score_two_pairs_of_tokens() -> None:
    """Chats 1 [2] 3 [4] and 1 [5] 3 [4]: the last answers are the same, all of them are not."""
    spans = ((1, 2), (3, 4)), ((1, 2), (3, 4))
    assert not TokenizedPair.from_spans([1, 2, 3, 4], [1, 5, 3, 4], spans).scores_one_answer
    assert TokenizedPair.from_spans([1, 2, 3, 4], [1, 2, 6, 4], spans).scores_one_answer
    assert TokenizedPair.from_chats([1, 2, 3, 4], 1, [1, 5, 3, 4], 1).scores_one_answer


@pytest.mark.parametrize("some", [(), ((0, 3),), ((1, 1), (2, 3)), ((1, 2),), ((1, 2), (2, 3)), ((2, 3), (1, 3))])
def test_spans_must_be_in_order_up_to_the_end(some) -> None:
    """None, no token before the first, an empty one, one that ends early, two that touch, two in disorder."""
    with pytest.raises(ValueError, match="rejected: expected spans in order up to 3"):
        TokenizedPair.from_spans([1, 2, 3], [1, 2, 4], (((1, 3),), some))


def test_a_batch_has_weights_and_gaps() -> None:
    """fp32, in the order of the stream: 1 and NaN where nothing is said. They are no part of a pair's name."""
    pair = TokenizedPair.from_chats([1, 2, 8], 1, [1, 2, 9], 1)
    batch = PairBatch.pack([pair, TokenizedPair.from_chats([1, 2, 8], 1, [1, 2, 9], 1, 0.5, 3.0)])
    assert batch.weights_B.tolist() == [1.0, 0.5] and batch.weights_B.dtype == batch.gaps_B.dtype == torch.float32
    assert batch.gaps_B[0].isnan() and batch.gaps_B[1] == 3
    assert batch.pairs[0].digest == batch.pairs[1].digest


def test_the_prompt_ends_before_the_scored_tokens() -> None:
    """Chats 1 2 8 9 (scored: 9) and 1 3 8 9: the prompt is that of the chosen chat, 1 2 8."""
    assert TokenizedPair.from_chats([1, 2, 8, 9], 1, [1, 3, 8, 9], 1).prompt_ids.tolist() == [1, 2, 8]


def test_different_earlier_turns_are_context_in_the_branches():
    """Chats 1 2 8 9 (scored: 9) and 1 3 8 9: only 1 is shared, the branches carry one unscored token each."""
    pair = TokenizedPair.from_chats([1, 2, 8, 9], 1, [1, 3, 8, 9], 1)
    batch = PairBatch.pack([pair])
    assert pair.prefix.tolist() == [1] and batch.tokens_T.tolist() == [1, 2, 8, 3, 8]
    assert batch.rows_N.tolist() == [2, 4] and batch.targets_N.tolist() == [9, 9]


@given(st.lists(st.tuples(TOKENS, TOKENS, TOKENS), min_size=1, max_size=4))
def test_every_scored_token_is_predicted_by_the_token_before_it(triples):
    """For any pairs: row r of a scored token holds the token before it in its own chat, at that token's position."""
    pairs = [TokenizedPair.from_chats([1, *p, *c], len(c), [1, *p, *r], len(r)) for p, c, r in triples]
    for p, c, r in triples:  # with a first answer, of one token, which may differ too
        spans = [((1, 2), (2 + len(p), 2 + len(p) + len(answer))) for answer in (c, r)]
        pairs.append(TokenizedPair.from_spans([1, c[-1], *p, *c], [1, r[-1], *p, *r], (spans[0], spans[1])))
    batch = PairBatch.pack(pairs)
    assert len(batch.tokens_T) == sum(pair.rows for pair in pairs) == batch.layout.rows
    place = 0
    for pair in pairs:
        for chat, scored_at in zip(pair.wholes, pair.scored_at, strict=True):
            for index in scored_at:
                row = batch.rows_N[place]
                assert batch.targets_N[place] == chat[index]
                assert batch.tokens_T[row] == chat[index - 1] and batch.positions_T[row] == index - 1
                place += 1
    assert place == len(batch.targets_N)


def test_digest_names_tokens_and_scored_spans():
    """Same tokens with another scored span, swapped sides or one other token are other pairs."""
    base = TokenizedPair.from_chats([1, 2, 3], 1, [1, 2, 4], 1)
    assert base.digest == TokenizedPair.from_chats((1, 2, 3), 1, (1, 2, 4), 1).digest
    others = [([1, 2, 3], 2, [1, 2, 4], 2), ([1, 2, 4], 1, [1, 2, 3], 1), ([1, 2, 3], 1, [1, 2, 5], 1)]
    digests = {base.digest, *(TokenizedPair.from_chats(*other).digest for other in others)}
    assert len(digests) == 4 and all(len(name) == 16 for name in digests)


@pytest.mark.parametrize("scored", [0, 3, -1])
def test_scored_span_must_leave_a_token_before_it(scored):
    with pytest.raises(ValueError, match="chosen: .* expected 1..2"):
        TokenizedPair.from_chats([1, 2, 3], scored, [1, 2, 4], 1)


def test_chats_that_share_no_first_token_are_refused():
    with pytest.raises(ValueError, match="same token"):
        TokenizedPair.from_chats([1, 2], 1, [3, 2], 1)
