"""What a batch costs, by hand.

One pair: prefix [1, 2, 3], chosen [4, 5] (2 scored), rejected [6, 7, 8] (3 scored). The last token of a branch is not
computed, so the packed stream has 3 + 1 + 2 = 6 rows; 2 + 3 = 5 of its tokens are scored.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize, model_size, useful_flops

BATCH = PairBatch.pack([TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 6, 7, 8], 3)])
VOCAB = 50
# width 32, 2 layers, 2 heads of 16, feed-forward width 16 * ceil(85 / 16) = 96
TINY = {"n_embd": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16, "max_seq_len": 512}
MLA = {"use_mla": True, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 16}
SIZE = ModelSize(layers=8000, head=1600, other=400)  # 10,000 weights, 1600 = 50 * 32 of them the vocabulary matrix


def tiny(**shape: object) -> Architecture:
    """The tiny shape, changed by `shape`."""
    return Architecture.of(TrainingConfig(batch_size=1, tokens_per_update=512, **{**TINY, **shape}), VOCAB)


def test_useful_flops_of_multi_head_attention_by_hand() -> None:
    """The prefix once, and each branch row on its prefix and its own branch.

    visible keys  prefix 1 + 2 + 3 = 6; chosen row 3 + 1 = 4; rejected rows (3 + 1) + (3 + 2) = 9; together 19
    attention     2 FLOPs * 19 * 2 layers * 2 heads * (16 query + 16 value) = 4,864
    matrices      2 FLOPs * (6 rows * 8,000 + 5 scored * 1,600) = 112,000
    forward       116,864; forward and backward three times that
    """
    assert useful_flops(SIZE, tiny(), BATCH, backward=False) == 116_864
    assert useful_flops(SIZE, tiny(), BATCH, backward=True) == 350_592


def test_useful_flops_of_latent_attention_by_hand() -> None:
    """2 * 19 * 2 layers * 2 heads * (6 + 4 query + 16 value) = 3,952, and the same matrices."""
    assert useful_flops(SIZE, tiny(**MLA), BATCH, backward=False) == 115_952


def test_useful_flops_add_up_over_pairs() -> None:
    """Packed pairs do not see each other: two cost twice as much as one."""
    pair = TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 6, 7, 8], 3)
    assert useful_flops(SIZE, tiny(), PairBatch.pack([pair, pair]), backward=False) == 2 * 116_864


def test_model_size_by_hand() -> None:
    """A layer: 32 * 96 for q, k, v, 32 * 32 out, 3 * 32 * 96 feed-forward = 13,312; 2 layers 26,624.

    Vocabulary matrix 50 * 32 = 1,600. Other: embeddings 1,600 and 5 norms of 32 = 1,760.
    """
    assert model_size(LLaMaTransformer(tiny())) == (26_624, 1_600, 1_760)


@pytest.mark.parametrize("shape", [{}, MLA, {"use_lora": True, "lora_rank": 4}], ids=["mha", "mla", "lora"])
def test_model_size_adds_up(shape: dict[str, object]) -> None:
    """Every weight is in one of the three parts, biases and adapters too."""
    model = LLaMaTransformer(tiny(**shape))
    assert sum(model_size(model)) == sum(parameter.numel() for parameter in model.parameters())


def test_a_tied_head_works_once_and_is_held_once() -> None:
    """The same 1,600 weights are embeddings and head: multiplied as the head, and other are the 5 norms of 32 only."""
    model = LLaMaTransformer(replace(tiny(), tied_head=True))
    assert model_size(model) == (26_624, 1_600, 160)
    assert sum(model_size(model)) == sum(parameter.numel() for parameter in model.parameters())


def test_grouped_keys_cost_as_many_products() -> None:
    """Fewer keys are read by as many queries: attention's products are those of multi-head attention."""
    assert useful_flops(SIZE, replace(tiny(), key_heads=1), BATCH, backward=False) == 116_864
