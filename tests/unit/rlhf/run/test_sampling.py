"""Greedy answers: the same tokens as full forwards, and where they end; the prompts; the page."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import PreferencePair, tokenize
from simple_llama.reinforcement_learning.rlhf.data.readers import Conversation
from simple_llama.reinforcement_learning.rlhf.run.sampling import answers, generate, sample_page, sample_prompts
from tiny_job import TINY, make_job

VOCAB = 50
PROMPT = [8, 21, 22, 6]
NO_STOP = -1
MLA = {"use_mla": True, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16}


def tiny_model(vocab: int = VOCAB, **shape: object) -> LLaMaTransformer:
    """Weights large enough that the next token depends on all tokens before it."""
    config = TrainingConfig(batch_size=1, tokens_per_update=512, **{**TINY, **shape})
    model = LLaMaTransformer(config, vocab)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def by_full_forwards(model: LLaMaTransformer, count: int) -> list[int]:
    """The plain way: the whole chat through the model for each next token."""
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny job's tokenizer."""
    return load_tokenizer(make_job(tmp_path_factory.mktemp("job")).folder / "tokenizer.json")


def pairs_of(tokenizer: Tokenizer, *users: str) -> list[PreferencePair]:
    """One pair a user message, all with other answers."""
    conversations = [
        Conversation("Be kind.", (user,), (f"yes {n}",), (f"no {n}",), "pairs.jsonl", n)
        for n, user in enumerate(users, 1)
    ]
    return list(tokenize(conversations, tokenizer))


# === generate ===


@pytest.mark.parametrize("shape", [{}, MLA], ids=["mha", "mla"])
def test_greedy_equals_full_forwards_step_by_step(shape: dict[str, Any]) -> None:
    """Twelve tokens with the cache are the argmax of twelve full forwards, and they are not one token twelve times."""
    model = tiny_model(**shape)
    expected = by_full_forwards(model, 12)
    assert len(set(expected)) > 2
    assert generate(model, PROMPT, 12, NO_STOP) == expected


def test_it_ends_before_the_stop_id() -> None:
    """The fourth different token as the stop id: what stands before it is the answer."""
    model = tiny_model()
    tokens = by_full_forwards(model, 12)
    stop = list(dict.fromkeys(tokens))[3]
    assert generate(model, PROMPT, 12, stop) == tokens[: tokens.index(stop)]
    assert generate(model, PROMPT, 12, tokens[0]) == []


def test_it_respects_both_limits() -> None:
    """Prompt of 4 in a model of 8 tokens: 4 new ones at most, 3 where 3 are asked for, none where it is full."""
    model = tiny_model(max_seq_len=8)
    assert len(generate(model, PROMPT, 100, NO_STOP)) == 4
    assert len(generate(model, PROMPT, 3, NO_STOP)) == 3
    assert generate(model, [*PROMPT, *PROMPT], 100, NO_STOP) == []


def test_dropout_is_off_and_the_training_flag_is_kept() -> None:
    """A model in training with dropout 0.5 answers as the same model without dropout."""
    model = tiny_model(dropout=0.5).train()
    found = [generate(model, PROMPT, 8, NO_STOP) for _ in range(2)]
    assert model.training
    assert found == [by_full_forwards(model.eval(), 8)] * 2


def test_answers_are_decoded_up_to_end_of_answer(tokenizer: Tokenizer) -> None:
    """A model whose every next token is " a": two tokens of text; whose every next token is <EOA>: no text."""
    [letter] = tokenizer.encode(" a", add_special_tokens=False).ids
    model = tiny_model(vocab=300)
    for token, expected in ((letter, "a a"), (7, "")):
        with torch.no_grad():
            model.embeddings.weight.fill_(1.0)
            for block in model.decoder_blocks.parameters():
                block.zero_()
            model.final_linear.weight.zero_()
            model.final_linear.weight[token] = 1.0
        assert answers(model, tokenizer, [PROMPT, [6]], 2) == [expected, expected]


# === prompts and pages ===


def test_prompts_are_different_and_end_with_start_of_answer(tokenizer: Tokenizer) -> None:
    """Users a, a, b, a, c: the first two different prompts are a's and b's; there are only three in all."""
    pairs = pairs_of(tokenizer, "a", "a", "b", "a", "c")
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in sample_prompts(pairs, 2)]
    assert texts == [f"<SOT> Be kind.<EOT> \n\n<SOU> {user}<EOU> \n<SOA>" for user in ("a", "b")]
    assert [ids[-1] for ids in sample_prompts(pairs, 9)] == [6, 6, 6]
    assert sample_prompts(pairs, 0) == [] and sample_prompts([], 3) == []


def test_page_indents_every_line() -> None:
    """Markdown shows indented text as it is; an empty answer is an empty indented line."""
    assert sample_page("# a\n\nb", "", "c") == (
        "**prompt**\n\n    # a\n    \n    b\n\n**start model**\n\n    \n\n**policy**\n\n    c\n"
    )
