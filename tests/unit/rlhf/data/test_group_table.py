"""Which pairs are of one record."""

from __future__ import annotations

from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairBuffer
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair


def test_where_a_ranking_breaks() -> None:
    """Answers 1 to 5, best first: without the third, 4 > 5 does not go on from 1 > 2; the second record is whole."""

    def pair(chosen: int, rejected: int) -> TokenizedPair:
        return TokenizedPair.from_chats([9, chosen], 1, [9, rejected], 1)

    buffer = PairBuffer()
    buffer.append_group([pair(1, 2), pair(4, 5)], "file", 1)
    buffer.append_group([pair(1, 2), pair(2, 3)], "file", 2)
    pairs = buffer.finish()
    assert pairs.groups is not None
    assert pairs.groups.breaks(pairs.units).tolist() == [1]
    assert not pairs.groups.are_chains(pairs.units)
