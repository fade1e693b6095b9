"""A tokenizer that a model brings with it, and what its files say of chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown

_MOST_TEMPLATE = 1 << 20  # characters


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

    @property
    def token_ids(self) -> dict[str, Any]:
        """The ids of special tokens that config.json has, which transformers generates by: None for a token that the
        tokenizer lacks, since there a missing key would mean LLaMA's own."""
        first, pad = (self.tokenizer.token_to_id(self.named.get(name, "")) for name in ("bos_token", "pad_token"))
        stops = sorted(self.stop_ids)
        return {
            "bos_token_id": first,
            "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
            "pad_token_id": pad,
        }


def checked_template(found: Any, place: str) -> str | None:
    """A chat template, or None where there is none. UserError naming `place` for what is no template."""
    if found is not None and not isinstance(found, str):
        raise UserError(f"{place}: expected a text, found {shown(found)}")
    if found is not None and len(found) > _MOST_TEMPLATE:
        raise UserError(f"{place}: expected at most {_MOST_TEMPLATE:,} characters, found more")
    return found
