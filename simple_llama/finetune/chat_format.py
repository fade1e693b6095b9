"""How a conversation becomes token ids, what of it is scored, and what ends an answer: one class a family of formats.

`SimpleLLaMAChat` is that of SimpleLLaMA's models (format_llm_prompt.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.dataset.tokenizer import SPECIAL_IDS, SPECIAL_TOKENS, decode_text
from simple_llama.finetune.format_llm_prompt import (
    DEFAULT_SYSTEM_PROMPT,
    encode_chats,
    encode_prompt,
    format_chat,
)


class Chat(NamedTuple):
    """A conversation: user turns and their answers, the last of which may be missing."""

    system: str | None  # None: no system message
    users: Sequence[str]
    assistants: Sequence[str]


class EncodedChat(NamedTuple):
    """Token ids of a whole chat. It ends with what is scored: the last answer and its end token."""

    ids: Sequence[int]
    scored: int  # of the last ids
    notes: tuple[str, ...] = ()  # what is to be counted and said of it, in a few words


class UnsayableChat(UserError):
    """A chat that a format cannot say: the one at `index` of those that were to be encoded."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class ChatFormat(Protocol):
    """A chat format with its tokenizer."""

    @property
    def tokenizer(self) -> Tokenizer:
        """As text becomes ids in it."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """An answer ends before one of these."""
        ...

    @property
    def unknown_id(self) -> int | None:
        """Of the token for what the tokenizer does not know; None: it knows all bytes."""
        ...

    @property
    def default_system(self) -> str | None:
        """What "CUSTOM", or no word of a system message, stands for; None: no system message."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides ids beside the tokenizer; nothing for SimpleLLaMA's format, as stores of before have it."""
        ...

    def encode(self, chats: Sequence[Chat]) -> list[EncodedChat]:
        """Token ids of whole chats. UnsayableChat for one that the format cannot say."""
        ...

    def encode_prompt(self, chat: Chat) -> list[int]:
        """Token ids up to where the next answer begins; `chat` has one answer fewer than users."""
        ...

    def show(self, chat: Chat) -> str:
        """The chat as text, for people."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens."""
        ...

    def spell(self, ids: Sequence[int]) -> str:
        """Text of a chat's ids with its special tokens, for people."""
        ...


@dataclass(frozen=True)
class SimpleLLaMAChat:
    """SimpleLLaMA's own format; see format_llm_prompt.py."""

    tokenizer: Tokenizer
    default_system: str | None = DEFAULT_SYSTEM_PROMPT
    stop_ids: frozenset[int] = frozenset({SPECIAL_IDS["<EOA>"]})
    unknown_id: int | None = SPECIAL_IDS["<UNK>"]

    @property
    def identity(self) -> Mapping[str, str]:
        """Nothing: this format is what stores of before had."""
        return {}

    def encode(self, chats: Sequence[Chat]) -> list[EncodedChat]:
        """Token ids of whole chats; each different text is tokenized once."""
        found = encode_chats(self.tokenizer, [(c.system or "", c.users, c.assistants) for c in chats])
        return [EncodedChat(*one) for one in found]

    def encode_prompt(self, chat: Chat) -> list[int]:
        """Token ids up to the last <SOA>."""
        return encode_prompt(self.tokenizer, chat.system or "", chat.users, chat.assistants)

    def show(self, chat: Chat) -> str:
        """The chat as text."""
        return format_chat(chat.system or "", chat.users, chat.assistants)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer."""
        return decode_text(self.tokenizer, ids).strip()

    def spell(self, ids: Sequence[int]) -> str:
        """Text of a chat's ids, as `show` has it: the tokenizer would put a space before each text."""
        runs = groupby(ids, key=lambda token: token < len(SPECIAL_TOKENS))
        return "".join(
            "".join(SPECIAL_TOKENS[token] for token in run) if special else decode_text(self.tokenizer, list(run))
            for special, run in runs
        )


def answer_text(chat: ChatFormat, ids: Sequence[int]) -> str:
    """Text of an answer that may still have the token which ended it."""
    return chat.decode([token for token in ids if token not in chat.stop_ids])


def about_system(chat: ChatFormat) -> str:
    """Which system prompt chats without one of their own get, in words for the log."""
    if chat.default_system is None:
        return 'no system message for "CUSTOM": what the chat template then does by itself'
    words = f'"CUSTOM" stands for {chat.default_system!r}'
    if isinstance(chat, SimpleLLaMAChat) and chat.default_system == DEFAULT_SYSTEM_PROMPT:
        words += "; models that the original SimpleLLaMA tuned have seen another: give theirs with --system_prompt"
    return words
