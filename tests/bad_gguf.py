"""The table of broken GGUF files for `unit/rlhf/test_bad_input.py`, as `bad_models` has Hugging Face folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bad_inputs import Case, Spoil, Start
from tiny_gguf import make_gguf
from tiny_job import TinyJob

NAME = "model.gguf"


def made(changes: dict[str, Any] | None = None, **others: Any) -> Spoil:
    """The file with other metadata or tensors, as `make_gguf` writes it."""

    def spoil(job: TinyJob) -> None:
        make_gguf(job.folder / NAME, changes, **others)

    return spoil


def bytes_of(change: Callable[[bytes], bytes]) -> Spoil:
    """The file's bytes, changed."""

    def spoil(job: TinyJob) -> None:
        path = job.folder / NAME
        path.write_bytes(change(path.read_bytes()))

    return spoil


def instead(make: Callable[[Path], object]) -> Spoil:
    """`make` puts something in the place of the file."""

    def spoil(job: TinyJob) -> None:
        (job.folder / NAME).unlink()
        make(job.folder / NAME)

    return spoil


def in_a_folder(job: TinyJob) -> Start:
    """The folder that holds the file, in the place of the file."""
    (job.folder / "models").mkdir()
    (job.folder / NAME).rename(job.folder / "models" / NAME)
    return Start({"model_path": job.folder / "models"})


NOT_SOUND = f"{NAME}: expected a GGUF file, found one that is not sound"
NAN = torch.full((32,), torch.nan)
GGUF = [
    Case("an empty file", bytes_of(lambda content: b""), (NOT_SOUND,)),
    Case("a download cut in its keys", bytes_of(lambda content: content[:999]), (NOT_SOUND, "it claims 300 items")),
    Case(
        "a download cut in its tensors",
        bytes_of(lambda content: content[:-999]),
        (NOT_SOUND, "behind the file's end"),
    ),
    Case("a page of the web", bytes_of(lambda content: b"<!DOCTYPE html>"), (NOT_SOUND, "instead of b'GGUF'")),
    Case("a pipe", instead(os.mkfifo), (f"{NAME}: expected a GGUF file, found", "pipe")),
    Case(
        "the file's folder",
        in_a_folder,
        ("models: expected a folder with a .pth file, found GGUF files", "a .gguf file"),
    ),
    Case(
        "another architecture",
        made({"general.architecture": "gemma3"}),
        (f"{NAME}: general.architecture: expected llama, found 'gemma3'",),
    ),
    Case("one of several files", made({"split.count": 2}), (f"{NAME}: split.count", "merge them first")),
    Case("experts", made({"llama.expert_count": 8}), (f"{NAME}: llama.expert_count: expected 0, found 8",)),
    Case("YaRN", made({"llama.rope.scaling.type": "yarn"}), (f"{NAME}: llama.rope.scaling.type: expected none",)),
    Case("a key nobody knows", made({"llama.magic": 2.0}), (f"{NAME}: expected keys that are known", "llama.magic")),
    Case("a layer more", made({"llama.block_count": 3}), (f"{NAME}: expected the tensors", "missing blk.2.")),
    Case("a norm missing", made(tensors={"output_norm.weight": None}), (f"{NAME}:", "missing output_norm.weight")),
    Case("NaN weights", made(tensors={"output_norm.weight": NAN}), (f"{NAME}:", "norm.weight")),
    Case(
        "a text split by a rule nobody knows",
        made({"tokenizer.ggml.pre": "tekken"}),
        (f"{NAME}: tokenizer.ggml.pre: expected smollm, llama-bpe, qwen2, found 'tekken'",),
    ),
    Case(
        "a tokenizer of another kind",
        made({"tokenizer.ggml.model": "bert"}),
        (f"{NAME}: tokenizer.ggml.model: expected gpt2 or llama, found 'bert'",),
    ),
    Case(
        "no token types",
        made({"tokenizer.ggml.token_type": None}),
        (f"{NAME}: tokenizer.ggml.token_type: expected a list of whole numbers, found None",),
    ),
    Case("no chat template", made({"tokenizer.chat_template": None}), (f"{NAME}: expected a chat template",)),
    Case(
        "a template that calls out",
        made({"tokenizer.chat_template": "{{ cycler.__init__.__globals__.os.mkdir('ran') }}"}),
        (f"{NAME}: expected a chat that the chat template takes", "SecurityError"),
    ),
]
