"""The one place that loads a tokenizer."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from simple_llama.common.errors import UserError
from simple_llama.common.files import digest, read_bytes

# fmt: off
SPECIAL_TOKENS = ("<SOS>", "<EOS>", "<PAD>", "<UNK>", "<SOU>", "<EOU>", "<SOA>", "<EOA>", "<SOT>", "<EOT>")
# fmt: on
_PARALLEL = "TOKENIZERS_PARALLELISM"  # a variable that the library reads at each batch
MOST_BYTES = 256 << 20  # of a file beside a model's weights; tokenizers of a quarter million tokens take 20 MB
# of text as people write it: no controls, no planes without characters; real tokenizers lack some of these
_TEXT_BYTES = (9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))
SPECIAL_IDS = {token: number for number, token in enumerate(SPECIAL_TOKENS)}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads SimpleLLaMA's tokenizer, a byte-level BPE, and makes it ready for its chats.

    Text that spells a special token stays text (`encode_special_tokens`), so data cannot forge the structure of a chat.
    Raises UserError when the file is no tokenizer or its special tokens are not the ids 0-9.
    """
    try:
        data = read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: expected a tokenizer JSON file, found {error.strerror}") from None
    tokenizer = parse_tokenizer(data, path)
    if not isinstance(tokenizer.model, models.BPE):
        raise UserError(f"{path}: expected a byte-level BPE tokenizer, found {type(tokenizer.model).__name__}")
    _check_special_tokens(tokenizer, path)
    tokenizer.model.unk_token = "<UNK>"
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    return tokenizer


class _OneThreadACall:
    """While someone is within, a tokenizer does a batch in the thread that calls it, in place of threads of its own.

    For callers with a thread for each core, which work without a pause then, also while one of them waits for Python.
    """

    def __init__(self) -> None:
        self._lock, self._within = threading.Lock(), 0
        self._before: str | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._before = os.environ.get(_PARALLEL)
            self._within += 1
            os.environ[_PARALLEL] = "false"

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                os.environ.pop(_PARALLEL)
                os.environ.update({} if self._before is None else {_PARALLEL: self._before})


one_thread_a_call = _OneThreadACall()


def parse_tokenizer(data: bytes, source: str | Path) -> Tokenizer:
    """Any tokenizer in the bytes of a tokenizer.json, as it is.

    Truncation, padding and merge dropout are switched off: each would change the scored tokens without a word.
    Raises UserError for what is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        tokenizer.get_vocab_size()
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for whatever it cannot read
        raise UserError(f"{source}: expected a tokenizer JSON file, found: {str(error)[:200]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token for what a tokenizer does not know; None where it knows all bytes of text.

    UserError for one that leaves such bytes out without a word.
    """
    saved = json.loads(tokenizer.to_str())
    model, vocab = saved["model"], tokenizer.get_vocab(with_added_tokens=False)
    steps = [step["type"] for name in ("normalizer", "pre_tokenizer") for step in _steps(saved[name])]
    if "ByteLevel" in steps and all(_byte_character(byte) in vocab for byte in _TEXT_BYTES):
        return None
    if model.get("byte_fallback") and vocab.keys() >= {f"<0x{byte:02X}>" for byte in _TEXT_BYTES}:
        return None
    found = model["unk_id"] if model["type"] == "Unigram" else tokenizer.token_to_id(model.get("unk_token") or "")
    if found is None:
        raise UserError(
            "expected a tokenizer that knows all bytes of text, or has a token for what it does not know, found one "
            "that leaves characters out; take the model's own tokenizer.json"
        )
    return found


def _byte_character(byte: int) -> str:
    """How a byte-level vocabulary writes a byte: itself where Latin-1 shows it, else one of the characters from 256."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte if byte in shown else 256 + byte - sum(other < byte for other in shown))


def _steps(part: dict | None) -> list[dict]:
    """The steps of a normalizer or a pre-tokenizer as tokenizer.json has it."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [part, *(step for one in inner for step in _steps(one))]


def token_count(tokenizer: Tokenizer) -> int:
    """Rows that a model's vocabulary needs: one more than the highest id, whether or not all below it are used."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def is_simple_llama(tokenizer: Tokenizer | Path) -> bool:
    """Whether a tokenizer, or that in a file, has SimpleLLaMA's ten special tokens in their places.

    UserError for a file that is none.
    """
    if isinstance(tokenizer, Path):
        try:
            tokenizer = parse_tokenizer(read_bytes(tokenizer, MOST_BYTES), tokenizer)
        except OSError as error:
            raise UserError(f"{tokenizer}: expected a tokenizer JSON file, found {error.strerror}") from None
    return isinstance(tokenizer.model, models.BPE) and not _other_special_token(tokenizer)


def _check_special_tokens(tokenizer: Tokenizer, path: str | Path) -> None:
    """Raises UserError unless the ten special tokens have the ids 0-9 and are marked as special."""
    if found := _other_special_token(tokenizer):
        raise UserError(f"{path}: expected {found}")


def _other_special_token(tokenizer: Tokenizer) -> str:
    """What the first of SimpleLLaMA's ten special tokens should be and is; nothing where all are as they should be."""
    added = tokenizer.get_added_tokens_decoder()
    for token, number in SPECIAL_IDS.items():
        found = tokenizer.token_to_id(token)
        if found != number:
            return f"special token {token} with id {number}, found {found}"
        if number not in added or not added[number].special:
            return f"{token} among the added tokens, marked special, found a plain token"
    return ""


def decode_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of one message: without special tokens, and without the space that the tokenizer puts before a text."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).removeprefix(" ")


def tokenizer_digest(tokenizer: Tokenizer | str | Path) -> str:
    """Hex digest of all that decides which ids a text becomes; the file's layout and library version do not count.

    Of SimpleLLaMA's, special tokens do not count, as in the names of older stores: ten are given, and none of a text
    becomes one. Further added tokens do.
    """
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    saved = json.loads(loaded.to_str())
    model = saved["model"]
    if "merges" in model:  # one is written "a b" or ["a", "b"], depending on the library's version
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = [token for token in saved["added_tokens"] if token["content"] not in SPECIAL_IDS]
    if is_simple_llama(loaded):
        parts = [model["vocab"], model["merges"], saved["pre_tokenizer"], saved["normalizer"]]
        parts += [plain] if (plain := [token for token in added if not token["special"]]) else []
    else:
        parts = [model, saved["pre_tokenizer"], saved["normalizer"], saved["added_tokens"]]
    return digest(json.dumps(parts, sort_keys=True).encode()).hex()
