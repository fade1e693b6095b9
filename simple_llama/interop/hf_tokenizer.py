"""The tokenizer of a Hugging Face folder: tokenizer.json as it is, with what the files beside it say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.common.files import parse_json, read_bytes, shown
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.dataset.tokenizer import parse_tokenizer, unknown_id

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_BESIDE = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
_MOST_BYTES = 256 << 20  # of a file; tokenizers of a quarter million tokens take 20 MB
_MOST_TEMPLATE = 1 << 20  # characters


def load_hf_tokenizer(files: Mapping[str, bytes], source: Path) -> OwnTokenizer:
    """The tokenizer in a folder's small files, by their names; tokenizer.json has to be among them.

    Special tokens are looked for in tokenizer_config.json, then in special_tokens_map.json; the template in
    chat_template.jinja, chat_template.json, tokenizer_config.json. Answers end where generation_config.json says, and
    at eos_token. Raises UserError naming the file, what was expected and found.
    """
    place = source / "tokenizer.json"
    tokenizer = parse_tokenizer(files["tokenizer.json"], place)
    config = _object(files, "tokenizer_config.json", source)
    _add_tokens(tokenizer, config.get("added_tokens_decoder", {}), source / "tokenizer_config.json")
    named = {**_named(_object(files, "special_tokens_map.json", source)), **_named(config)}
    try:
        unknown = unknown_id(tokenizer)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return OwnTokenizer(
        tokenizer,
        _template(files, config, source),
        named,
        frozenset(_stops(tokenizer, named, _object(files, "generation_config.json", source), source)),
        unknown,
        {name: files[name] for name in TOKENIZER_FILES if name in files},
        str(source),
    )


def tokenizer_at(path: str | Path) -> OwnTokenizer | None:
    """The tokenizer in a folder, or a tokenizer.json with a tokenizer_config.json or chat template beside it; None for
    any other path: that of SimpleLLaMA's stands alone. UserError as of `load_hf_tokenizer`."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path != folder and not any((folder / name).exists() for name in _BESIDE):
        return None
    files = {}
    for name in TOKENIZER_FILES:
        place = path if name == "tokenizer.json" and path != folder else folder / name
        with contextlib.suppress(FileNotFoundError):
            files[name] = _read(place)
    if "tokenizer.json" not in files:
        raise UserError(f"{path}: expected a tokenizer.json, or a folder with one, found a folder without")
    return load_hf_tokenizer(files, folder)


def _read(path: Path) -> bytes:
    """A whole file. FileNotFoundError where there is none, UserError where it cannot be read."""
    try:
        return read_bytes(path, _MOST_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: expected a file, found: {error.strerror or error}") from error


def _object(files: Mapping[str, bytes], name: str, source: Path) -> dict[str, Any]:
    """A JSON object among the files; an empty one where it is not there."""
    if name not in files:
        return {}
    found = parse_json(files[name], source / name)
    if not isinstance(found, dict):
        raise UserError(f"{source / name}: expected a JSON object, found {shown(found)}")
    return found


def _named(found: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have a name: a text, or an object with it."""
    texts = {name: found[name] for name in _NAMED if found.get(name) is not None}
    texts = {name: text.get("content") if isinstance(text, dict) else text for name, text in texts.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _add_tokens(tokenizer: Tokenizer, wanted: Any, place: Path) -> None:
    """Adds the tokens that tokenizer_config.json alone has. UserError where the two files differ in an id."""
    if not isinstance(wanted, dict) or not all(key.isdecimal() and isinstance(t, dict) for key, t in wanted.items()):
        raise UserError(f"{place}: added_tokens_decoder: expected an object of ids with their tokens")
    for number, token in sorted((int(key), token) for key, token in wanted.items()):
        text = token.get("content")
        if not isinstance(text, str) or not text:
            raise UserError(f"{place}: added_tokens_decoder, {number}: expected content, found {shown(text)}")
        if tokenizer.token_to_id(text) is None:
            flags = {name: token[name] for name in _FLAGS if isinstance(token.get(name), bool)}
            tokenizer.add_tokens([AddedToken(text, **flags)])
        if (found := tokenizer.token_to_id(text)) != number:
            raise UserError(
                f"{place}: added_tokens_decoder: expected the id that {text} has in tokenizer.json, {found}, found "
                f"{number}; are these files of one model?"
            )


def _template(files: Mapping[str, bytes], config: Mapping[str, Any], source: Path) -> str | None:
    """The chat template, of several the one named "default"."""
    name, found = "tokenizer_config.json", config.get("chat_template")
    if "chat_template.jinja" in files:
        name = "chat_template.jinja"
        try:
            found = files[name].decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{source / name}: expected UTF-8 text, found other bytes") from None
    elif "chat_template.json" in files:
        name = "chat_template.json"
        found = _object(files, name, source).get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
        if found is None:
            raise UserError(f'{source / name}: chat_template: expected one named "default" among several, found none')
    if found is not None and not isinstance(found, str):
        raise UserError(f"{source / name}: chat_template: expected a text, found {shown(found)}")
    if found is not None and len(found) > _MOST_TEMPLATE:
        raise UserError(f"{source / name}: chat_template: expected at most {_MOST_TEMPLATE:,} characters, found more")
    return found


def _stops(
    tokenizer: Tokenizer, named: Mapping[str, str], generation: Mapping[str, Any], source: Path
) -> Iterator[int]:
    """Ids before which an answer ends."""
    eos = generation.get("eos_token_id")
    for number in [] if eos is None else eos if isinstance(eos, list) else [eos]:
        if type(number) is not int or tokenizer.id_to_token(number) is None:
            raise UserError(
                f"{source / 'generation_config.json'}: eos_token_id: expected ids of tokens of tokenizer.json, found "
                f"{shown(number)}"
            )
        yield number
    if "eos_token" in named:
        number = tokenizer.token_to_id(named["eos_token"])
        if number is None:
            raise UserError(
                f"{source / 'tokenizer_config.json'}: eos_token: expected a token of tokenizer.json, found "
                f"{shown(named['eos_token'])}; are these files of one model?"
            )
        yield number
