"""The one place that loads a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from simple_llama.common.errors import UserError
from simple_llama.common.files import digest, read_bytes

# fmt: off
SPECIAL_TOKENS = ("<SOS>", "<EOS>", "<PAD>", "<UNK>", "<SOU>", "<EOU>", "<SOA>", "<EOA>", "<SOT>", "<EOT>")
# fmt: on
_MOST_BYTES = 256 << 20  # of a tokenizer's file; vocabularies of a quarter million tokens take 20 MB
SPECIAL_IDS = {token: number for number, token in enumerate(SPECIAL_TOKENS)}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a byte-level BPE tokenizer JSON and makes it ready for chats.

    Text that spells a special token stays text (`encode_special_tokens`), so data cannot forge the structure of a chat.
    Truncation, padding and merge dropout are switched off: each would change the scored tokens without a word.
    Raises UserError when the file is no tokenizer or its special tokens are not the ids 0-9.
    """
    try:
        tokenizer = Tokenizer.from_str(read_bytes(path, _MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected a tokenizer JSON file, found {error.strerror}") from None
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for whatever it cannot read
        raise UserError(f"{path}: expected a tokenizer JSON file, found: {str(error)[:200]}") from None
    if not isinstance(tokenizer.model, models.BPE):
        raise UserError(f"{path}: expected a byte-level BPE tokenizer, found {type(tokenizer.model).__name__}")
    _check_special_tokens(tokenizer, path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.model.dropout = None
    tokenizer.model.unk_token = "<UNK>"
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_count(tokenizer: Tokenizer) -> int:
    """Rows that a model's vocabulary needs: one more than the highest id, whether or not all below it are used."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def _check_special_tokens(tokenizer: Tokenizer, path: str | Path) -> None:
    """Raises UserError unless the ten special tokens have the ids 0-9 and are marked as special."""
    added = tokenizer.get_added_tokens_decoder()
    for token, number in SPECIAL_IDS.items():
        found = tokenizer.token_to_id(token)
        if found != number:
            raise UserError(f"{path}: expected special token {token} with id {number}, found {found}")
        if number not in added or not added[number].special:
            raise UserError(f"{path}: expected {token} among the added tokens, marked special, found a plain token")


def decode_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of one message: without special tokens, and without the space that the tokenizer puts before a text."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).removeprefix(" ")


def tokenizer_digest(tokenizer: Tokenizer | str | Path) -> str:
    """Hex digest of all that decides which ids a text becomes; the file's layout and library version do not count."""
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    saved = json.loads(loaded.to_str())
    model = saved["model"]
    # a merge is written "a b" or ["a", "b"], depending on the library's version
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    parts = [model["vocab"], merges, saved["pre_tokenizer"], saved["normalizer"]]
    return digest(json.dumps(parts, sort_keys=True).encode()).hex()
