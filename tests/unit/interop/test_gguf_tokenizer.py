"""A tokenizer out of GGUF metadata: how texts are split, what is special, what is refused. By hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from simple_llama.common.errors import UserError
from simple_llama.interop.gguf_tokenizer import read_gguf_tokenizer
from tiny_gguf import byte_level
from tiny_hf import byte_level_tokenizer

FILE = Path("model.gguf")
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """<unk> <s> </s>, the 256 bytes, then pieces with their scores: longer ones are better."""
    pieces = {"\u2581": -9.0, "a": -8.0, "b": -8.0, "ab": -2.0, "\u2581a": -3.0, "\u2581ab": -1.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    found = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)],
        "scores": [0.0] * 259 + list(pieces.values()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**found, **changes}.items() if value is not None}


def split(pre: str, text: str) -> list[str]:
    """The pieces that are merged apart."""
    own = read_gguf_tokenizer(byte_level(pre), FILE)
    assert own is not None
    found = own.tokenizer.pre_tokenizer.pre_tokenize_str(text)  # type: ignore[union-attr]
    return [piece.replace("\u0120", "_").replace("\u010a", "|") for piece, _ in found]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["||", "1", "2", "3", "4", "."]),
        ("llama-bpe", ["||", "123", "4", "."]),
        ("qwen2", ["||", "1", "2", "3", "4", "."]),
    ],
)
def test_how_numbers_are_split(pre: str, pieces: list[str]) -> None:
    """SmolLM2 and Qwen2 take digits one by one, Llama 3 three at a time; before a digit SmolLM2's rule cuts first."""
    assert split(pre, "\n\n1234.") == pieces


def test_rules_differ_in_line_breaks() -> None:
    """ " a\\n\\n": GPT-2's rule, which SmolLM2 uses, and that of Llama 3 both keep line breaks behind a word together;
    behind a full stop Llama 3's takes them along."""
    assert split("smollm", "a.\n\nb") == ["a", ".", "|", "|", "b"]
    assert split("llama-bpe", "a.\n\nb") == ["a", ".||", "b"]


def test_types_tell_what_is_special() -> None:
    """The three control tokens of ChatML are special and added; named ones and stops come with their ids."""
    own = read_gguf_tokenizer(byte_level(), FILE)
    assert own is not None
    added = own.tokenizer.get_added_tokens_decoder()
    assert [(number, token.content, token.special) for number, token in sorted(added.items())] == [
        (0, "<|endoftext|>", True),
        (1, "<|im_start|>", True),
        (2, "<|im_end|>", True),
    ]
    assert own.named["bos_token"] == "<|im_start|>" and own.named["eos_token"] == "<|im_end|>"
    assert 2 in own.stop_ids and own.unknown_id is None


def test_a_token_of_a_users_is_added_and_not_special() -> None:
    """As <think> is in Qwen3's."""
    metadata = byte_level()
    metadata["tokenizer.ggml.token_type"] = [CONTROL, CONTROL, USER, *metadata["tokenizer.ggml.token_type"][3:]]
    own = read_gguf_tokenizer(metadata, FILE)
    assert own is not None and not own.tokenizer.get_added_tokens_decoder()[2].special


def test_sentencepiece_by_hand() -> None:
    """ "ab ab": a space in front, best scores first: two whole words. "\u00e9" has no piece: its two bytes in UTF-8."""
    own = read_gguf_tokenizer(sentencepiece(), FILE)
    assert own is not None
    ids = own.tokenizer.encode("ab ab", add_special_tokens=False).ids
    assert ids == [264, 264] and own.tokenizer.decode(ids) == "ab ab"
    assert own.tokenizer.encode("\u00e9", add_special_tokens=False).ids == [259, 3 + 0xC3, 3 + 0xA9]
    assert own.tokenizer.encode("ab").ids == [1, 264]
    plain = read_gguf_tokenizer(sentencepiece(add_space_prefix=False, add_bos_token=False), FILE)
    assert plain is not None and plain.tokenizer.encode("ab").ids == [262]


def test_what_no_metadata_tells_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The space in front of a text stands behind each special token, as in llama.cpp: "</s>ab" is </s>, "\u2581ab". The
    file cannot tell that from one in front of the first text alone, and that is said; without such a space, nothing."""
    with caplog.at_level(logging.INFO):
        own = read_gguf_tokenizer(sentencepiece(add_space_prefix=True), FILE)
    assert own is not None and own.tokenizer.encode("ab</s>ab", add_special_tokens=False).ids == [264, 2, 264]
    assert ["model.gguf: as in llama.cpp, a text behind" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert read_gguf_tokenizer(sentencepiece(add_space_prefix=False), FILE)
        assert read_gguf_tokenizer(byte_level(), FILE)
    assert not caplog.records


def test_a_file_that_has_the_whole_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    """tokenizer.huggingface.json is taken as it is: with a space in front of the first text alone, "ab" behind </s> is
    262. Nothing is left to say. One of another model is refused."""
    built = read_gguf_tokenizer(sentencepiece(), FILE)
    assert built is not None
    saved = json.loads(built.tokenizer.to_str())
    saved["normalizer"] = None
    saved["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    whole = {"tokenizer.huggingface.json": json.dumps(saved)}
    with caplog.at_level(logging.INFO):
        own = read_gguf_tokenizer({**sentencepiece(), **whole}, FILE)
    assert own is not None and own.tokenizer.encode("ab</s>ab", add_special_tokens=False).ids == [264, 2, 262]
    assert json.loads(own.files["tokenizer.json"])["pre_tokenizer"] == saved["pre_tokenizer"]
    assert not caplog.records
    other = {**sentencepiece(), "tokenizer.huggingface.json": byte_level_tokenizer().to_str()}
    with pytest.raises(UserError, match="expected the tokens of tokenizer.ggml.tokens, found '<unk>' as None"):
        read_gguf_tokenizer(other, FILE)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({**byte_level(), "tokenizer.huggingface.json": 3}, "tokenizer.huggingface.json: expected a text, found 3"),
        ({**byte_level(), "tokenizer.huggingface.json": "{}"}, "tokenizer.huggingface.json: expected a tokenizer JSON"),
        (sentencepiece(model="bert"), "tokenizer.ggml.model: expected gpt2 or llama, found 'bert'"),
        (sentencepiece(tokens=None), "tokenizer.ggml.tokens: expected a list of texts"),
        (sentencepiece(scores=[0.0]), "tokenizer.ggml.scores: expected a number for each token"),
        (sentencepiece(token_type=[1]), "tokenizer.ggml.token_type: expected one for each of 265 tokens, found 1"),
        (sentencepiece(token_type=[9] * 265), "tokenizer.ggml.token_type: expected numbers from 1 to 6, found 9"),
        (sentencepiece(eos_token_id=265), "tokenizer.ggml.eos_token_id: expected one of 265 ids, found 265"),
        (
            {**byte_level(), "tokenizer.ggml.pre": "deepseek-llm"},
            "tokenizer.ggml.pre: expected smollm, llama-bpe, qwen2",
        ),
        ({**byte_level(), "tokenizer.ggml.merges": ["a b c"]}, "tokenizer.ggml.merges: expected two tokens"),
        ({**byte_level(), "tokenizer.chat_template": 3}, "tokenizer.chat_template: expected a text, found 3"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(metadata: dict[str, Any], words: str) -> None:
    """Other kinds of tokenizer, and lists that are not as they should be."""
    with pytest.raises(UserError) as error:
        read_gguf_tokenizer(metadata, FILE)
    assert str(error.value).startswith("model.gguf: ") and words in str(error.value)
