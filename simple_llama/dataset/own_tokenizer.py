"""A tokenizer that a model brings with it, and what its files say of chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer


@dataclass(frozen=True)
class OwnTokenizer:
    """As `interop/hf_tokenizer.py` reads it, or as it is made from a GGUF file's metadata."""

    tokenizer: Tokenizer  # as the files have it: text that spells a special token becomes one
    template: str | None  # of chats, in Jinja
    named: Mapping[str, str]  # special tokens by the names that templates use: {"bos_token": "<s>"}
    stop_ids: frozenset[int]  # an answer ends before one of these
    unknown_id: int | None  # of the token for what it does not know; None: it knows all bytes
    files: Mapping[str, bytes]  # to go into an export unchanged
    source: str  # the files, for errors
