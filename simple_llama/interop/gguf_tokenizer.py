"""The tokenizer in a GGUF file's metadata, made into the tokenizer.json that its model was published with.

`tokenizer.ggml.model` says what it is: gpt2, a byte-level BPE, where `tokenizer.ggml.pre` names the rule that splits a
text before the merges; llama, SentencePiece's BPE, where scores order the merges. Which tokens are special is in
`tokenizer.ggml.token_type`. A file that has the whole tokenizer.json (`tokenizer.huggingface.json`) says it itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from simple_llama.common.errors import UserError
from simple_llama.common.files import json_bytes, shown
from simple_llama.common.logging import LOGGER
from simple_llama.dataset.own_tokenizer import OwnTokenizer, checked_template
from simple_llama.dataset.tokenizer import parse_tokenizer, unknown_id
from simple_llama.interop.hf_tokenizer import PLAIN_CLASS

_KEY = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_WHOLE = "tokenizer.huggingface.json"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # token types
_NAMED = {  # special tokens by the names that templates and tokenizer_config.json use
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SPACE = "\u2581"  # SentencePiece's


@dataclass(frozen=True)
class _Rule:
    """How a byte-level tokenizer splits a text before the merges, as the tokenizer.json of its models has it."""

    split: str | None  # a regular expression; None: GPT-2's, behind single digits
    normal_form: bool = False  # NFC
    whole_words: bool = False  # a word that is a token is not merged
    adds_bos: bool = False  # where the file does not say


_RULES = {  # by tokenizer.ggml.pre; expressions of the models' tokenizer.json, also in llama.cpp's llama-vocab.cpp
    "smollm": _Rule(None),
    "llama-bpe": _Rule(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+",
        whole_words=True,
        adds_bos=True,
    ),
    "qwen2": _Rule(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+",
        normal_form=True,
    ),
}


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a file, checked."""

    tokens: list[str]  # by id
    types: list[int]
    ids: dict[str, int]  # of the special tokens that the file names, by its keys

    @property
    def base(self) -> int:
        """Tokens of the model; those from here on are added to it."""
        added = (_UNKNOWN, _CONTROL, _USER)
        return 1 + max((number for number, kind in enumerate(self.types) if kind not in added), default=-1)

    def text(self, key: str) -> str | None:
        """Of a special token."""
        return self.tokens[self.ids[key]] if key in self.ids else None


def read_gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> OwnTokenizer | None:
    """The tokenizer and the chat template; None for a file without. Its files are those of a Hugging Face folder.

    Raises UserError for a tokenizer of another kind, or one that is not sound.
    """
    if f"{_KEY}model" not in metadata:
        return None
    try:
        return _own_tokenizer(metadata, path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Ids of special tokens as config.json and generation_config.json have them."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {ours: metadata[_KEY + key] for ours, key in keys.items() if _KEY + key in metadata}


def _own_tokenizer(metadata: Mapping[str, Any], path: Path) -> OwnTokenizer:
    vocabulary = _vocabulary(metadata)
    tokenizer = _given(vocabulary, metadata) if _WHOLE in metadata else _made(vocabulary, metadata, path)
    template = checked_template(metadata.get(_TEMPLATE), _TEMPLATE)
    named = {name: text for name, key in _NAMED.items() if (text := vocabulary.text(key)) is not None}
    stops = sorted({vocabulary.ids[key] for key in _STOPS if key in vocabulary.ids})
    config = {
        **PLAIN_CLASS,
        **named,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": template} if template is not None else {}),
    }
    generation = {**token_ids(metadata), **({"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {})}
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json_bytes(config),
        "generation_config.json": json_bytes(generation),
    }
    tokenizer = parse_tokenizer(files["tokenizer.json"], path)
    unknown = unknown_id(tokenizer)
    return OwnTokenizer(tokenizer, template, named, frozenset(stops), unknown, files, str(path))


def _given(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer.json in the file. UserError for one that is not sound, or of other tokens than the file lists."""
    found = metadata[_WHOLE]
    if not isinstance(found, str):
        raise UserError(f"{_WHOLE}: expected a text, found {shown(found)}")
    tokenizer = parse_tokenizer(found.encode(), _WHOLE)
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind != _UNUSED and tokenizer.token_to_id(token) != number:
            raise UserError(
                f"{_WHOLE}: expected the tokens of {_KEY}tokens, found {shown(token)} as {tokenizer.token_to_id(token)}"
                f" in the place of {number}"
            )
    return tokenizer


def _made(vocabulary: _Vocabulary, metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that the other keys describe."""
    kind = metadata[f"{_KEY}model"]
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary, metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(vocabulary, metadata, path)
    else:
        raise UserError(f"{_KEY}model: expected gpt2 or llama, found {shown(kind)}; no other can be made")
    _add_tokens(tokenizer, vocabulary)
    return tokenizer


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    """UserError for lists that are not as they should be, or ids of no token."""
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int, len(tokens))
    if wrong := [kind for kind in types if not _NORMAL <= kind <= _BYTE]:
        raise UserError(f"{_KEY}token_type: expected numbers from {_NORMAL} to {_BYTE}, found {shown(wrong[0])}")
    ids = {}
    for key in {*_NAMED.values(), *_STOPS}:
        if (number := metadata.get(_KEY + key)) is not None:
            if type(number) is not int or not 0 <= number < len(tokens):
                raise UserError(f"{_KEY}{key}: expected one of {len(tokens):,} ids, found {shown(number)}")
            ids[key] = number
    while types and types[-1] == _UNUSED and len(types) - 1 not in ids.values():  # rows that the model has to spare
        types.pop()
    tokens = tokens[: len(types)]
    if len(last := dict(zip(tokens, range(len(tokens)), strict=True))) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if last[token] != number)
        raise UserError(f"{_KEY}tokens: expected each token once, found {shown(twice)} twice")
    if "" in tokens:
        raise UserError(f"{_KEY}tokens: expected texts, found an empty one, id {tokens.index('')}")
    return _Vocabulary(tokens, types, ids)


def _list(metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None) -> list[Any]:
    """A list of the metadata, of this length where it is given."""
    found = metadata.get(_KEY + key)
    if not isinstance(found, list) or not found or type(found[0]) is not kind:  # all are of one type
        what = {str: "texts", int: "whole numbers", float: "numbers"}[kind]
        raise UserError(f"{_KEY}{key}: expected a list of {what}, found {shown(found)}")
    if length is not None and len(found) != length:
        raise UserError(f"{_KEY}{key}: expected one for each of {length:,} tokens, found {len(found):,}")
    return list(found)


def _byte_level(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Tokenizer:
    """A byte-level BPE."""
    pre = metadata.get(f"{_KEY}pre")
    rule = _RULES.get(pre) if isinstance(pre, str) else None
    if rule is None:
        raise UserError(
            f"{_KEY}pre: expected {', '.join(_RULES)}, found {shown(pre)}; how it splits a text is not known"
        )
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str)]
    tokenizer = Tokenizer(_bpe(vocabulary, merges, ignore_merges=rule.whole_words))
    if rule.normal_form:
        tokenizer.normalizer = normalizers.NFC()
    if rule.split is None:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        steps = [
            pre_tokenizers.Split(Regex(rule.split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    _add_bos(tokenizer, vocabulary, metadata, rule.adds_bos)
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary, metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """SentencePiece's BPE with bytes for what it does not know, as Llama 2's tokenizer.json has it.

    Its space in front of a text is put behind each special token, which is llama.cpp's rule too (llama-vocab.cpp).
    """
    unknown = vocabulary.text("unknown_token_id")
    if unknown is None:
        found = [token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _UNKNOWN]
        if len(found) != 1:
            raise UserError(f"{_KEY}unknown_token_id: expected an id, found none")
        [unknown] = found
    scores = _list(metadata, "scores", float)
    if len(scores) < len(vocabulary.tokens) or any(score != score for score in scores):
        raise UserError(f"{_KEY}scores: expected a number for each token, found other ones")
    merges = _merges(vocabulary, scores)
    tokenizer = Tokenizer(_bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", _SPACE)]
    prefix = metadata.get(f"{_KEY}add_space_prefix", True) is not False
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    if prefix:
        LOGGER.info(
            "%s: as in llama.cpp, a text behind any special token begins with a space; no GGUF file says whether the "
            "model's own tokenizer.json puts it in front of the first text alone (Metaspace with prepend_scheme first, "
            "as Mistral v0.3's), which gives other ids: then give that with --tokenize_path",
            path,
        )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *spaces] if prefix else spaces)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_bos(tokenizer, vocabulary, metadata, True)
    return tokenizer


def _merges(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, in the order in which they are merged: the best scores first.

    Of equal scores it is transformers' order (generate_merges in convert_slow_tokenizer.py).
    """
    rank = {
        token: number
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == _NORMAL
    }
    found: list[tuple[float, str, str]] = []
    for token, number in rank.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in halves if left in rank and right in rank]
        pairs.sort(key=lambda pair: (rank[pair[0]], rank[pair[1]]))
        found += [(scores[number], left, right) for left, right in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _bpe(vocabulary: _Vocabulary, merges: list[Any], **options: Any) -> models.BPE:
    """UserError for merges of what is no token."""
    known = {token: number for number, token in enumerate(vocabulary.tokens[: vocabulary.base])}
    for number, merge in enumerate(merges):
        if len(merge) != 2 or not (merge[0] in known and merge[1] in known and "".join(merge) in known):
            raise UserError(
                f"{_KEY}merges: expected two tokens that make a third, found {shown(' '.join(merge))}, number {number}"
            )
    return models.BPE(vocab=known, merges=merges, **options)


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Marks the special tokens, and those that a text is searched for before all else, in the order of their ids."""
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (_UNKNOWN, _CONTROL, _USER):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind != _USER)])
            assert tokenizer.token_to_id(token) == number


def _add_bos(tokenizer: Tokenizer, vocabulary: _Vocabulary, metadata: Mapping[str, Any], default: bool) -> None:
    """Puts the first and last tokens around a plain text where the file says so; chats have them in their template."""
    first, last = vocabulary.text("bos_token_id"), vocabulary.text("eos_token_id")
    first = first if metadata.get(f"{_KEY}add_bos_token", default) is True else None
    last = last if metadata.get(f"{_KEY}add_eos_token", False) is True else None
    if first is not None or last is not None:
        ends = [text for text in (first, last) if text is not None]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*([first] if first else []), "$A", *([last] if last else [])],
            special_tokens=[(text, vocabulary.tokens.index(text)) for text in dict.fromkeys(ends)],
        )
