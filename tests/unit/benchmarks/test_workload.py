"""Pairs and batches of the benches."""

from __future__ import annotations

import pytest
import torch

from benchmarks.workload import MIXES, PACKS, make_pairs, pack_padded, pack_whole, pairs_for_rows, shares_prompt
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps

PAIRS = [
    TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 6], 1),
    TokenizedPair.from_chats([1, 7, 8], 1, [1, 7, 9, 5, 3, 2], 4),
]


def test_whole_by_hand() -> None:
    """Chats of 5, 4, 3 and 6 tokens without their last one: 4 + 3 + 2 + 5 rows; a scored token is behind its row."""
    batch = pack_whole(PAIRS)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 1, 2, 3, 1, 7, 1, 7, 9, 5, 3]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2, 3, 4]
    assert batch.rows_N.tolist() == [2, 3, 6, 8, 10, 11, 12, 13]
    assert batch.targets_N.tolist() == [4, 5, 6, 8, 9, 5, 3, 2]
    assert batch.counts == ((2, 1), (1, 4))


def test_padded_by_hand() -> None:
    """Four chats of the longest one's 5 rows; scored rows stand before the padding."""
    batch = pack_padded(PAIRS)
    assert batch.layout.rows == len(batch.tokens_T) == 20
    assert batch.rows_N.tolist() == [2, 3, 7, 11, 16, 17, 18, 19]


@pytest.mark.parametrize("name", ["whole", "padded"])
def test_all_ways_give_the_same_log_probs(name: str) -> None:
    """Sharing and padding change the work, not the numbers."""
    config = TrainingConfig(n_embd=16, n_heads=2, n_layers=2, multiple_of=8, max_seq_len=64)
    model = LLaMaTransformer(Architecture.of(config, 12))
    expected = pair_logps(model, PACKS["shared"](PAIRS))
    assert torch.allclose(pair_logps(model, PACKS[name](PAIRS)), expected, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("mix", MIXES)
def test_synthetic_pairs(mix: str) -> None:
    """Lengths are within the mix's bounds, prompts are shared whole, and a seed gives the same pairs again."""
    pairs = make_pairs(mix, 20, vocab=500, seed=3)
    for pair in pairs:
        assert shares_prompt(pair)
        assert MIXES[mix].prompt[0] <= len(pair.prefix) <= MIXES[mix].prompt[1]
        for scored in (pair.chosen_scored, pair.rejected_scored):
            assert MIXES[mix].response[0] <= scored <= MIXES[mix].response[1]
    assert [pair.digest for pair in make_pairs(mix, 20, vocab=500, seed=3)] == [pair.digest for pair in pairs]
    assert pairs[0].digest != make_pairs(mix, 1, vocab=500, seed=4)[0].digest


def test_pairs_that_differ_before_the_answer_share_no_prompt() -> None:
    """An earlier answer differs: tokens 2 and 3 of the two prompts."""
    assert not shares_prompt(TokenizedPair.from_chats([1, 2, 4, 5], 1, [1, 3, 4, 5], 1))
    assert shares_prompt(PAIRS[0])


def test_pairs_for_rows() -> None:
    """3 + 2 + 1 - 2... rows of the pairs: 3 + (2 - 1) + (1 - 1) = 4 and 2 + 0 + 3 = 5; mean 4.5: 9 rows are 2 pairs."""
    assert [pair.rows for pair in PAIRS] == [4, 5]
    assert pairs_for_rows(PAIRS, 9) == 2
    assert pairs_for_rows(PAIRS, 10) == 3
