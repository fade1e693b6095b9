"""Answers to prompts as text, and signs of life while they are made; the prompts."""

from __future__ import annotations

import pytest
import torch

from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.chat_format import SimpleLLaMAChat
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.run.sampling import _answers, sample_prompts
from tiny_job import TINY, make_job

PROMPT = [8, 21, 22, 6]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> SimpleLLaMAChat:
    """With the tiny job's tokenizer."""
    return SimpleLLaMAChat(load_tokenizer(make_job(tmp_path_factory.mktemp("job")).folder / "tokenizer.json"))


def one_token_model(token: int, **shape: object) -> LLaMaTransformer:
    """Its most likely next token is always `token`."""
    model = LLaMaTransformer(Architecture.of(TrainingConfig(**{**TINY, **shape}), 300))  # type: ignore[arg-type]
    with torch.no_grad():
        model.embeddings.weight.fill_(1.0)
        for block in model.decoder_blocks.parameters():
            block.zero_()
        model.head_weight.zero_()
        model.head_weight[token] = 1.0
    return model


# === answers ===


def test_answers_end_with_the_stop_token(chat: SimpleLLaMAChat) -> None:
    """A model whose every next token is " a": two tokens, the most; whose every next token is <EOA>: that one."""
    [letter] = chat.tokenizer.encode(" a", add_special_tokens=False).ids
    for token, expected in ((letter, [letter] * 2), (7, [7])):
        assert _answers(one_token_model(token), chat.stop_ids, [PROMPT, [6]], 2) == [expected, expected]


def test_dropout_is_off_and_the_training_flag_is_kept(chat: SimpleLLaMAChat) -> None:
    """A model in training with dropout 0.9 answers as without; afterwards it is in training still. Its blocks are
    called for the prompt; steps of a token, which know no dropout, use their weights."""
    [letter] = chat.tokenizer.encode(" a", add_special_tokens=False).ids
    model = one_token_model(letter, dropout=0.9).train()
    dropped = []
    model.decoder_blocks[0].register_forward_hook(lambda module, _, __: dropped.append(module.training))
    assert _answers(model, chat.stop_ids, [PROMPT], 3) == [[letter] * 3]
    assert model.training and dropped == [False]


def test_each_token_is_a_sign_of_life(chat: SimpleLLaMAChat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first tokens of two answers that are made together, and after each of three: 4."""
    beats = []
    monkeypatch.setattr("simple_llama.cluster.watchdog.beat", beats.append)
    [letter] = chat.tokenizer.encode(" a", add_special_tokens=False).ids
    _answers(one_token_model(letter), chat.stop_ids, [PROMPT, [6]], 3)
    assert beats == ["sample answers"] * 4


# === prompts ===


def pair_of(prompt: list[int], answer: int) -> TokenizedPair:
    """Two chats of one prompt: its first answer is `answer`, its second one 99; both end with 7."""
    return TokenizedPair.from_chats([*prompt, answer, 7], 2, [*prompt, 99, 7], 2)


def test_prompts_are_different_and_end_with_start_of_answer() -> None:
    """Prompts a, a, b, a, c: the first two different ones are a and b; there are only three in all."""
    a, b, c = [8, 20, 6], [8, 21, 22, 6], [9, 6]
    pairs = [pair_of(prompt, answer) for prompt, answer in ((a, 50), (a, 51), (b, 50), (a, 52), (c, 50))]
    assert sample_prompts(pairs, 2) == [a, b]
    assert sample_prompts(pairs, 9) == [a, b, c]
    assert sample_prompts(pairs, 0) == [] and sample_prompts([], 3) == []


def test_the_prompt_is_the_chosen_chats() -> None:
    """Where the chats differ before their last answers, the chosen one is asked about: all but its scored tokens."""
    pair = TokenizedPair.from_chats([8, 20, 30, 6, 40, 41, 7], 3, [8, 20, 31, 6, 42, 7], 2)
    assert sample_prompts([pair], 1) == [[8, 20, 30, 6]]
