"""The tokenizer of a Hugging Face folder: what its files say together, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from simple_llama.common.errors import UserError
from simple_llama.interop.hf_tokenizer import load_hf_tokenizer
from tiny_hf import byte_level_tokenizer

HERE = Path("model")


def files(**changes: Any) -> dict[str, bytes]:
    """tokenizer.json of 300 tokens (<|im_end|> is 2), and JSON files by their stems."""
    found = {"tokenizer.json": byte_level_tokenizer().to_str().encode()}
    found.update({f"{name}.json": json.dumps(content).encode() for name, content in changes.items()})
    return found


def test_tokenizer_alone() -> None:
    """No file but tokenizer.json: no template, no named token, nothing that ends an answer; all bytes are known."""
    own = load_hf_tokenizer(files(), HERE)
    assert (own.template, dict(own.named), own.stop_ids, own.unknown_id) == (None, {}, frozenset(), None)
    assert own.tokenizer.encode("a<|im_end|>", add_special_tokens=False).ids[1] == 2
    assert list(own.files) == ["tokenizer.json"]


def test_named_tokens_and_stops() -> None:
    """A named token may be an object; eos is 2, and 0 of the generation config."""
    own = load_hf_tokenizer(
        files(
            tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "image_token": "<|im_start|>"},
            generation_config={"eos_token_id": [0]},
        ),
        HERE,
    )
    assert own.named == {"eos_token": "<|im_end|>", "image_token": "<|im_start|>"}
    assert own.stop_ids == {0, 2}


def test_places_of_the_template() -> None:
    """chat_template.jinja goes before chat_template.json before tokenizer_config.json; of several, "default"."""
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    found = files(tokenizer_config={"chat_template": several})
    assert load_hf_tokenizer(found, HERE).template == "D"
    found.update(files(chat_template={"chat_template": "J"}))
    assert load_hf_tokenizer(found, HERE).template == "J"
    assert load_hf_tokenizer({**found, "chat_template.jinja": b"{{ x }}\n"}, HERE).template == "{{ x }}\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": {"no": 1}}, "tokenizer.json: expected a tokenizer JSON file"),
        ({"tokenizer_config": []}, "tokenizer_config.json: expected a JSON object"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "eos_token: expected a token of tokenizer.json, found '</s>'"),
        ({"generation_config": {"eos_token_id": [999]}}, "expected ids of tokens of tokenizer.json, found 999"),
        ({"generation_config": {"eos_token_id": "2"}}, "expected ids of tokens of tokenizer.json, found '2'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}}, "2, found 7"),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": {}}}}, "expected a token's text, or an object with"),
        ({"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens: expected false, found true"),
        ({"tokenizer_config": {"extra_special_tokens": 3}}, "extra_special_tokens: expected a list of tokens, found 3"),
        ({"tokenizer_config": {"extra_special_tokens": [3]}}, "extra_special_tokens: expected a token's text"),
        ({"added_tokens": {"<|im_end|>": 7}}, "added_tokens.json: expected the id that <|im_end|> has"),
        ({"added_tokens": {"<|im_end|>": "2"}}, "added_tokens.json: expected tokens with their ids, found '2'"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "expected an object of ids"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template: expected a text, found 3"),
        ({"tokenizer_config": {"chat_template": [{"name": "a", "template": "b"}]}}, 'one named "default"'),
        ({"tokenizer_config": {"chat_template": "x" * 2_000_000}}, "at most 1,048,576 characters"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    """One message that names the file."""
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        load_hf_tokenizer(files(**changes), HERE, rows=300)
    assert str(raised.value).startswith("model/")


def test_a_tokenizer_that_leaves_characters_out_is_refused() -> None:
    """The byte-level vocabulary without "e" and without an unknown token: "e" would vanish."""
    saved = json.loads(byte_level_tokenizer().to_str())
    gone = [token for token in saved["model"]["vocab"] if "e" in token and not token.startswith("<|")]
    for token in gone:
        del saved["model"]["vocab"][token]
    saved["model"]["merges"] = [pair for pair in saved["model"]["merges"] if "e" not in "".join(pair)]
    with pytest.raises(UserError, match="leaves characters out"):
        load_hf_tokenizer({"tokenizer.json": json.dumps(saved).encode()}, HERE)
