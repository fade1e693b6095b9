"""The tokens that a tokenizer has beside its vocabulary: what the files beside tokenizer.json say of them.

They say it in five places, and what counts is what transformers makes of them (5.23: `_from_pretrained` in
tokenization_utils_base.py, then `TokenizersBackend.__init__`): all of them change which ids a text becomes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.logging import LOGGER
from simple_llama.dataset.tokenizer import token_count

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FURTHER, _FURTHER_BEFORE = "extra_special_tokens", "additional_special_tokens"
_DECODER = "added_tokens_decoder"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class SaidTokens(NamedTuple):
    """What a folder's files say of tokens."""

    added: Mapping[int, AddedToken]  # by the ids that they are to have
    place: str  # which file says so
    named: Mapping[str, AddedToken]  # special ones, by the names that templates use
    further: Sequence[AddedToken]  # special ones without a name


class TokenFiles(NamedTuple):
    """The files beside tokenizer.json that name tokens, read; empty where they are not there."""

    config: Mapping[str, Any]  # tokenizer_config.json
    special_map: Mapping[str, Any]  # special_tokens_map.json
    added: Mapping[str, Any]  # added_tokens.json


def said_tokens(tokenizer: Tokenizer, files: TokenFiles, source: Path) -> SaidTokens:
    """What `files` say of the tokens of `tokenizer`. UserError naming the file of `source` that cannot be read so.

    The map and added_tokens.json are of old folders: they count only where tokenizer_config.json has no
    added_tokens_decoder, the map before tokenizer_config.json, and tokenizer.json's own tokens before
    added_tokens.json's.
    """
    is_old = _DECODER not in files.config
    special_map = files.special_map if is_old else {}
    config, place = {**files.config, **special_map}, source / "tokenizer_config.json"
    names, listed = _further(files.config, special_map, place)
    order = [*_NAMED, *(name for name in config if name.endswith("_token") and name not in _NAMED)]
    texts = {name: config[name] for name in order if isinstance(config.get(name), str | dict)} | names
    named = {name: _token(value, name, place) for name, value in texts.items()}
    further = [_token(value, _FURTHER, place) for value in listed]
    if is_old:
        special = {token.content for token in (*named.values(), *further)}
        place = source / "added_tokens.json"
        added, where = _by_text(files.added, special, place) | tokenizer.get_added_tokens_decoder(), str(place)
    else:
        added, where = _by_id(config[_DECODER], place), f"{place}: {_DECODER}"
    return SaidTokens(added, where, named, further)


def add_tokens(tokenizer: Tokenizer, said: SaidTokens, source: Path, rows: int | None = None) -> None:
    """Adds to `tokenizer` what it lacks, and gives its tokens the flags that the files say.

    Args:
        rows: of the model's embeddings. A token that would be added beyond them is left out, with a warning.

    UserError where a token has another id than the files say.
    """
    names = {token.content for token in said.named.values()}
    known = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *said.added.values())}
    unknown = {token.content: token for token in (*said.named.values(), *said.further) if token.content not in known}
    wanted, left_out = [], []
    free = token_count(tokenizer)
    for token in (*(said.added[number] for number in sorted(said.added)), *unknown.values()):
        token.special = token.special or token.content in names
        is_new = tokenizer.token_to_id(token.content) is None
        if is_new and rows is not None and free >= rows:
            left_out.append(token.content)
            continue
        free += is_new
        wanted.append(token)
    if left_out:
        LOGGER.warning(
            "%s: tokens that are not in tokenizer.json are left out, since the model's %d rows are taken; a text that "
            "spells one stays text: %s",
            source,
            rows,
            shown(left_out),
        )
    tokenizer.add_tokens(wanted)
    for number, token in said.added.items():
        if (found := tokenizer.token_to_id(token.content)) not in (number, None):
            raise UserError(
                f"{said.place}: expected the id that {token.content} has in tokenizer.json, {found}, found {number}; "
                "are these files of one model?"
            )


def _further(config: Mapping[str, Any], special_map: Mapping[str, Any], place: Path) -> tuple[dict[str, Any], list]:
    """Special tokens with names of their own, and those without a name."""
    before = config.get(_FURTHER) or config.get(_FURTHER_BEFORE)
    has_before = _FURTHER in config or _FURTHER_BEFORE in config
    later = special_map.get(_FURTHER, None if has_before else special_map.get(_FURTHER_BEFORE))
    names: dict[str, Any] = {}
    listed: list[Any] = []
    for found in (before, later):
        if isinstance(found, dict):
            names |= found
        elif isinstance(found, list):
            listed += [{**one, "special": True} if found is later and isinstance(one, dict) else one for one in found]
        elif found is not None:
            raise UserError(f"{place}: {_FURTHER}: expected a list of tokens, found {shown(found)}")
    return names, listed


def _token(found: Any, key: str, place: Path) -> AddedToken:
    """A token as these files write it: its text, or an object with its flags. UserError for anything else."""
    said = {"content": found, "special": True} if isinstance(found, str) else found
    text = said.get("content") if isinstance(said, dict) else None
    if not isinstance(text, str) or not text:
        raise UserError(f"{place}: {key}: expected a token's text, or an object with content, found {shown(found)}")
    return AddedToken(text, **{name: said[name] for name in _FLAGS if isinstance(said.get(name), bool)})


def _by_id(found: Any, place: Path) -> dict[int, AddedToken]:
    """tokenizer_config.json's added_tokens_decoder."""
    if not isinstance(found, dict) or not all(key.isdecimal() and isinstance(t, dict) for key, t in found.items()):
        raise UserError(f"{place}: {_DECODER}: expected an object of ids with their tokens")
    return {int(key): _token(token, f"{_DECODER}, {key}", place) for key, token in found.items()}


def _by_text(found: Mapping[str, Any], special: set[str], place: Path) -> dict[int, AddedToken]:
    """added_tokens.json."""
    if wrong := [number for text, number in found.items() if type(number) is not int or not text]:
        raise UserError(f"{place}: expected tokens with their ids, found {shown(wrong[0])}")
    return {
        number: AddedToken(text, normalized=text not in special, special=text in special)
        for text, number in found.items()
    }
