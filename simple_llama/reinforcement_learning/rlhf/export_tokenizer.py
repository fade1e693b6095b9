"""Which tokenizer and chat template go along with a model that is written as a folder: launch/export.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from simple_llama.common.errors import UserError
from simple_llama.common.files import json_bytes, read_bytes
from simple_llama.common.paths import package_path
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.dataset.tokenizer import MOST_BYTES, is_simple_llama, load_tokenizer, token_count, tokenizer_digest
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT
from simple_llama.finetune.jinja_chat import TEMPLATE_KEY, template_digest
from simple_llama.interop.hf_tokenizer import PLAIN_CLASS, load_hf_tokenizer
from simple_llama.interop.own_checkpoints import tokenizer_for_others
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.reinforcement_learning.rlhf.inputs import TOKENIZER_KEY, given_tokenizer, is_shipped

TEMPLATE_DIGEST_KEY = "chat_template_digest"  # in the metadata of such a .pth
_GIVE = "give the tokenizer that it was trained with as --tokenize_path"

_SomeTokenizer = TypeVar("_SomeTokenizer", OwnTokenizer, OwnTokenizer | None)


class Asked(NamedTuple):
    """What a person says of it."""

    tokenize_path: str  # "": nothing
    system_prompt: str  # "": nothing


class Trained(NamedTuple):
    """What a run's state or export, or a conversion, keeps of the tokenizer that its model was trained with.

    A conversion keeps the digests under `metadata_of`, a run under `reference` and `dpo_config`.
    """

    tokenize_path: str  # where the run read it; "": the model's own, the shipped one, or not known
    system_prompt: str
    digest: str | None  # of `tokenizer_digest`; None: not known
    template: str | None  # of `template_digest`; None: none, or not known

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Trained:
        """From metadata, which may be another program's."""
        settings, reference = _object(metadata, "dpo_config"), _object(metadata, "reference")
        path, system = settings.get("tokenize_path"), settings.get("system_prompt")
        return cls(
            path if isinstance(path, str) and not is_shipped(Path(path)) else "",
            system if isinstance(system, str) else DEFAULT_SYSTEM_PROMPT,
            _text(metadata, TOKENIZER_KEY) or _text(reference, "tokenizer"),
            _text(metadata, TEMPLATE_DIGEST_KEY) or _text(_object(reference, "numerics"), TEMPLATE_KEY),
        )

    def where_it_lies(self, start: StartModel) -> str:
        """What is to be given to whatever reads a .pth of this model, in words; nothing where there is no tokenizer."""
        if not self.tokenize_path and start.own_tokenizer is None:
            return ""
        path = Path(self.tokenize_path or start.path)
        said = f"give {path} with it as --tokenize_path"
        if path.suffix == ".gguf":
            said = f"make a folder of {path} too (an --output without .pth), and give that with it as --tokenize_path"
        return f"; a .pth holds no tokenizer: {said}"


def metadata_of(own: OwnTokenizer) -> dict[str, str]:
    """What a .pth keeps of the tokenizer that came with its model, and that it does not hold."""
    template = {TEMPLATE_DIGEST_KEY: template_digest(own.template)} if own.template else {}
    return {TOKENIZER_KEY: tokenizer_digest(own.tokenizer), **template}


def tokenizer_of(asked: Asked, trained: Trained, start: StartModel) -> OwnTokenizer | None:
    """The tokenizer that goes along: that of the flags, that of the run, or for a .pth the shipped one; None for what
    came with the model.

    Raises UserError for one that the model was not trained with, as far as that is known, and for a system prompt
    without effect.
    """
    path = asked.tokenize_path or trained.tokenize_path
    if not path and isinstance(start, StartFile):
        path = package_path("dataset", "bpe_8k.json")
    own = _tokenizer_at(Path(path), asked, trained, start) if path else _unprompted(start.own_tokenizer, asked)
    if own is not None:
        guessed = isinstance(start, StartFile) and not (asked.tokenize_path or trained.tokenize_path or trained.digest)
        _check_size(own, start, path, exact=guessed)
        _check_trained_with(own, asked, trained, path)
    return own if path else None


def _tokenizer_at(path: Path, asked: Asked, trained: Trained, start: StartModel) -> OwnTokenizer:
    """The tokenizer in a folder or a file, with the chat template beside it, or SimpleLLaMA's with its chat format."""
    if not asked.tokenize_path and not path.exists():
        raise UserError(f"{path}: expected the tokenizer that the run was trained with, found nothing there; {_GIVE}")
    own = given_tokenizer(path, start)
    if own is not None:
        return _unprompted(own, asked)
    if is_simple_llama(path):
        system = asked.system_prompt or trained.system_prompt
        return tokenizer_for_others(load_tokenizer(path), system, start.architecture.max_seq_len, path)
    files = {  # without a class of its own transformers would take the model's, which adds tokens
        "tokenizer.json": read_bytes(path, MOST_BYTES),
        "tokenizer_config.json": json_bytes(PLAIN_CLASS),
    }
    return _unprompted(load_hf_tokenizer(files, path.parent), asked)


def _unprompted(own: _SomeTokenizer, asked: Asked) -> _SomeTokenizer:
    """A tokenizer whose chat template goes along as it is. UserError for a system prompt, which has no effect there."""
    if asked.system_prompt:
        raise UserError(
            "system_prompt: expected a SimpleLLaMA checkpoint and its tokenizer, found one whose chat template goes "
            "along as it is, where it has no effect; leave it out"
        )
    return own


def _check_size(own: OwnTokenizer, start: StartModel, path: str, exact: bool) -> None:
    """UserError for a tokenizer of more tokens than the model has, or of another number where nobody named it."""
    count, known = token_count(own.tokenizer), start.architecture.vocab_size
    if count > known or (exact and count != known):
        raise UserError(f"{path or own.source}: {count} tokens, but the model knows {known}; {_GIVE}")


def _check_trained_with(own: OwnTokenizer, asked: Asked, trained: Trained, path: str) -> None:
    """UserError where another tokenizer is known to be the model's, or another template and none was asked for."""
    place = path or own.source
    if trained.digest and (found := tokenizer_digest(own.tokenizer)) != trained.digest:
        raise UserError(
            f"{place}: expected the tokenizer that the model was trained with (digest {trained.digest}), found another "
            f"one ({found}); {_GIVE}"
        )
    template = template_digest(own.template) if own.template else None
    if trained.template and not any(asked) and template != trained.template:
        raise UserError(
            f"{place}: expected the chat template that the model was trained with (digest {trained.template}), found "
            f"{template or 'none'}; put it back, or say with --tokenize_path or --system_prompt what goes along"
        )


def _object(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object in metadata; an empty one where there is none."""
    value = found.get(key)
    return value if isinstance(value, Mapping) else {}


def _text(found: Mapping[str, Any], key: str) -> str | None:
    """A text in metadata."""
    value = found.get(key)
    return value if isinstance(value, str) else None
