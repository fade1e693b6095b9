"""Tokens that the files beside tokenizer.json name: those of transformers, their flags, and the ids of texts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from simple_llama.interop.hf_tokenizer import load_hf_tokenizer
from tokenizer_folders import FOLDERS, described, folder_files, write_folder

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden" / "added_tokens.json").read_text())


def ours(name: str, rows: int | None = None) -> dict[str, Any]:
    """What is made of one of the folders: tokens, ids of texts, names."""
    own = load_hf_tokenizer(folder_files(name), Path("model"), rows)
    return {**described(own.tokenizer), "named": dict(own.named)}


@pytest.mark.parametrize("name", [name for name in FOLDERS if "refused" not in GOLDEN[name]])
def test_what_transformers_makes_of_a_folder(name: str) -> None:
    """Recorded by golden/make_added_tokens.py with transformers 5.23."""
    assert ours(name) == GOLDEN[name]


def test_by_hand() -> None:
    """In "a <|im_end|> b" the token (2) takes the space in front of it along: a is 67, b 68, a space 223."""
    assert ours("nothing")["ids"][0] == [67, 223, 2, 223, 68]
    assert ours("other flags")["ids"][0] == [67, 2, 223, 68]


def test_what_transformers_5_refuses() -> None:
    """Objects in the list of special_tokens_map.json: special ones with their flags, as in transformers 4.45."""
    [name] = [name for name in FOLDERS if "refused" in GOLDEN[name]]
    assert name == "the map with further flags" and ours(name)["added"]["262"] == "<|new|> LS"


@pytest.mark.parametrize("name", FOLDERS)
def test_in_transformers_itself(tmp_path: Path, name: str) -> None:
    """Where version 5 is installed: it makes what is recorded."""
    transformers = pytest.importorskip("transformers", minversion="5")
    folder = write_folder(tmp_path / "model", name)
    if "refused" in GOLDEN[name]:
        with pytest.raises(TypeError):
            transformers.AutoTokenizer.from_pretrained(folder)
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert {**described(tokenizer.backend_tokenizer), "named": tokenizer.special_tokens_map} == GOLDEN[name]


def test_no_token_beyond_the_embeddings(caplog: pytest.LogCaptureFixture) -> None:
    """With 263 rows <|new|> (262) has one and <two> (263) none: its text stays text, and it is said; so of all sources
    of tokens. tokenizer.json's own 262 are there whatever the model has: the start refuses it."""
    with caplog.at_level(logging.WARNING):
        found = ours("two new, the later first", rows=263)
    assert found["added"].keys() == {"0", "1", "2", "261", "262"}
    assert "model: tokens that are not in tokenizer.json are left out, since the model's 263 rows" in caplog.text
    assert "['<two>']" in caplog.text
    for name in ("a name", "further ones", "the map", "added_tokens.json"):
        assert max(map(int, ours(name, rows=262)["added"])) == 261
    caplog.clear()
    assert ours("two new, the later first", rows=264) == ours("two new, the later first") and not caplog.records
