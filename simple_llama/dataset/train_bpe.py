"""Trains the byte-level BPE tokenizer. The command that made bpe_8k.json is in README.md beside this file.

    python -m simple_llama.dataset.train_bpe --inputs pairs.json more.jsonl.gz text.txt --python-docs --output bpe.json

The same inputs give the same file, byte for byte. All 256 bytes are in the alphabet, so no text ever becomes <UNK>.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write
from simple_llama.dataset.json_records import can_read, read_records
from simple_llama.dataset.tokenizer import SPECIAL_TOKENS

_NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class BPEConfig:
    """Settings of the tokenizer's training."""

    inputs: tuple[
        str, ...
    ] = ()  # text files, and data files (.json, .jsonl.gz, .parquet, ...) whose strings are all taken
    python_docs: bool = False  # add the text of Python's own manual and docstrings (PSF licence)
    output: str = "bpe.json"  # tokenizer JSON to write
    vocab_size: int = 8192  # tokens, the ten special tokens and 256 bytes among them
    min_frequency: int = 2  # times that a pair of tokens has to occur to become one


def train_bpe(texts: Sequence[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """Trains on `texts`: special tokens are the ids 0-9, then the 256 bytes, then merges.

    Raises UserError when the texts do not hold enough pairs of tokens for `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"vocab_size: expected {vocab_size:,} tokens, found {tokenizer.get_vocab_size():,} in the texts; give more "
            "text, or a smaller vocab_size (at least 266)"
        )
    return tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The tokenizer's file. Merges are written "a b", which every version of the tokenizers library reads."""
    saved = json.loads(tokenizer.to_str())
    saved["model"]["merges"] = [" ".join(merge) for merge in saved["model"]["merges"]]
    return (json.dumps(saved, indent=2, ensure_ascii=False) + "\n").encode()


def _input_texts(path: str) -> Iterator[str]:
    """All strings of a JSON data file ("CUSTOM" stands for no text), or a text file as a whole."""
    if can_read(path):
        for record in read_records(path):
            yield from (text for text in _strings_in(record.fields) if text != "CUSTOM")
        return
    try:
        yield Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a UTF-8 text file, found: {error}") from None


def _strings_in(value: Any) -> Iterator[str]:
    """Every string in a parsed JSON value, in order; keys are not text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(item)


def _python_docs() -> Iterator[str]:
    """The topics of Python's manual, then the docstrings of its standard library, in the order of the file names."""
    from pydoc_data.topics import topics  # half a megabyte of text, only read when it is asked for

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(library) for path in library.rglob("*.py"))
    for name in sorted(name.as_posix() for name in names if not _NOT_DOCUMENTATION.intersection(name.parts)):
        yield from _docstrings((library / name).read_bytes())


def _docstrings(source: bytes) -> Iterator[str]:
    """Docstrings of a module and all that it defines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the standard library are not ours to report
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _write_tokenizer(config: BPEConfig) -> str:
    """Trains on the inputs and writes `config.output`. Returns what was read and written, with digests of both."""
    texts = [text for path in config.inputs for text in _input_texts(path)]
    texts += _python_docs() if config.python_docs else []
    if not texts:
        raise UserError("inputs: expected text to train on, found none; give files or --python-docs")
    data = tokenizer_json(train_bpe(texts, config.vocab_size, config.min_frequency))
    atomic_write(config.output, data)
    read = "\n".join(texts).encode()
    return (
        f"read {len(texts):,} texts, {len(read):,} bytes, sha256 {hashlib.sha256(read).hexdigest()}\n"
        f"wrote {config.output}: {config.vocab_size:,} tokens, sha256 {hashlib.sha256(data).hexdigest()}"
    )


def main() -> None:
    """Command line of the training."""
    try:
        print(_write_tokenizer(tyro.cli(BPEConfig, description=__doc__)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
