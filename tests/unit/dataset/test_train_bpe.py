"""Training the tokenizer: what the file holds, that it can be repeated, where the text comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simple_llama.common.errors import UserError
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.dataset.train_bpe import (
    BPEConfig,
    _docstrings,
    _input_texts,
    _python_docs,
    _write_tokenizer,
    train_bpe,
)

TEXT = "the cat sat on the mat and the dog sat on the log. " * 20


def test_ids_are_special_tokens_then_bytes_then_merges() -> None:
    """266 tokens are given, 14 are merges; " the" is the most frequent word (U+0120 stands for its space)."""
    vocab = train_bpe([TEXT], vocab_size=280).get_vocab()
    by_id = sorted(vocab, key=vocab.__getitem__)
    assert by_id[:4] == ["<SOS>", "<EOS>", "<PAD>", "<UNK>"]
    assert all(len(token) == 1 for token in by_id[10:266])
    assert all(len(token) > 1 for token in by_id[266:])
    assert "\u0120the" in vocab
    assert len(vocab) == 280


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two trainings write equal files, and the file loads and knows every byte."""
    source = tmp_path / "text.txt"
    source.write_text(TEXT, encoding="utf-8")
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        _write_tokenizer(BPEConfig(inputs=(str(source),), output=str(file), vocab_size=280))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_tokenizer(files[0]).encode(" zz\u2603").ids.count(3) == 0


def test_file_has_the_settings_of_the_original(tmp_path: Path, shared_dir: Path) -> None:
    """So one loader and one chat format serve both; merges are strings, as all library versions read them."""
    source = tmp_path / "text.txt"
    source.write_text(TEXT, encoding="utf-8")
    _write_tokenizer(BPEConfig(inputs=(str(source),), output=str(tmp_path / "a.json"), vocab_size=280))
    ours = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    original = json.loads((shared_dir / "tokenizer" / "bpe_8k.json").read_text(encoding="utf-8"))
    for part in ("pre_tokenizer", "normalizer", "post_processor", "added_tokens"):
        assert ours[part] == original[part]
    assert isinstance(ours["model"]["merges"][0], str)


def test_too_little_text_is_refused() -> None:
    """A vocabulary smaller than asked for would not fit the model's embeddings."""
    with pytest.raises(UserError, match=r"expected 500 tokens, found 2\d\d"):
        train_bpe(["a b"], vocab_size=500)


def test_strings_of_data_files_in_order(tmp_path: Path) -> None:
    """All strings of the records but "CUSTOM"; numbers and keys are no text."""
    file = tmp_path / "pairs.jsonl"
    rows = [{"Template": ["CUSTOM"], "User": ["hi"], "Accepted": ["yes"], "score": 5}, {"nested": {"deep": ["x"]}}]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert list(_input_texts(str(file))) == ["hi", "yes", "x"]


def test_missing_or_binary_text_is_refused(tmp_path: Path) -> None:
    """And so is a training without any text."""
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.txt", "missing.txt"):
        with pytest.raises(UserError, match="expected a UTF-8 text file"):
            list(_input_texts(str(tmp_path / name)))
    with pytest.raises(UserError, match="found none"):
        _write_tokenizer(BPEConfig(output=str(tmp_path / "out.json")))


def test_docstrings_of_a_module() -> None:
    """Outer before inner."""
    source = b'"""Of the module."""\nclass A:\n    """Of a class."""\n    def f(self):\n        """Of a method."""\n'
    assert list(_docstrings(source)) == ["Of the module.", "Of a class.", "Of a method."]


def test_python_docs_start_with_the_manual() -> None:
    """The topics come first, in the order of their names."""
    first = next(_python_docs())
    assert first.startswith('The "assert" statement')
