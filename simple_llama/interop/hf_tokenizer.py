"""The tokenizer of a Hugging Face folder: tokenizer.json as it is, with what the files beside it say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.common.files import parse_json, read_bytes, shown
from simple_llama.dataset.own_tokenizer import OwnTokenizer, checked_template
from simple_llama.dataset.tokenizer import MOST_BYTES, parse_tokenizer, unknown_id
from simple_llama.interop.added_tokens import TokenFiles, add_tokens, said_tokens

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
# of a tokenizer_config.json: any tokenizer.json as it is; transformers 4 would make token_type_ids of a text too, which
# such a model refuses
PLAIN_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
_BESIDE = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")


def load_hf_tokenizer(files: Mapping[str, bytes], source: Path, rows: int | None = None) -> OwnTokenizer:
    """The tokenizer in a folder's small files, by their names; tokenizer.json has to be among them.

    Its added tokens are those that transformers makes of the files (`added_tokens`). The template is looked for in
    chat_template.jinja, chat_template.json, tokenizer_config.json. Answers end where generation_config.json says, and
    at eos_token.

    Args:
        rows: of the model's embeddings, beyond which no token is added.

    Raises UserError naming the file, what was expected and found.
    """
    place = source / "tokenizer.json"
    tokenizer = parse_tokenizer(files["tokenizer.json"], place)
    config = _object(files, "tokenizer_config.json", source)
    if config.get("split_special_tokens") is True:
        raise UserError(
            f"{source / 'tokenizer_config.json'}: split_special_tokens: expected false, found true: what marks the "
            "turns of a chat would be text; take it out"
        )
    beside = (_object(files, name, source) for name in ("special_tokens_map.json", "added_tokens.json"))
    said = said_tokens(tokenizer, TokenFiles(config, *beside), source)
    add_tokens(tokenizer, said, source, rows)
    named = {name: token.content for name, token in said.named.items()}
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


def tokenizer_at(path: str | Path, rows: int | None = None) -> OwnTokenizer | None:
    """The tokenizer in a folder, or a tokenizer.json with a tokenizer_config.json or chat template beside it; None for
    any other path: that of SimpleLLaMA's stands alone. `rows` and UserError as of `load_hf_tokenizer`."""
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
    return load_hf_tokenizer(files, folder, rows)


def _read(path: Path) -> bytes:
    """A whole file. FileNotFoundError where there is none, UserError where it cannot be read."""
    try:
        return read_bytes(path, MOST_BYTES)
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
    return checked_template(found, f"{source / name}: chat_template")


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
