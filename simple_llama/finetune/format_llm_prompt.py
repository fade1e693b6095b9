"""The chat format, as text and as token ids.

    <SOT>{system}<EOT>

    <SOU>{user}<EOU>
    <SOA>{assistant}<EOA>

Turns are joined by an empty line. Scored tokens are the last assistant message and its <EOA>. Ids are made segment by
segment with special tokens switched off in the text: the same ids as tokenizing the formatted text in one go, except
that a message which spells "<EOA>" cannot end itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from tokenizers import Tokenizer

from simple_llama.dataset.tokenizer import SPECIAL_IDS

DEFAULT_SYSTEM_PROMPT = (
    "You are SimpleLLaMA, a careful and friendly assistant. Give honest, clear and useful answers. Say so when you are "
    "not sure. Decline requests that would hurt someone, explain why in a sentence, and offer a safe way forward."
)


class _Segment(NamedTuple):
    """A piece of a chat: one special token, or text that may hold anything."""

    kind: Literal["special", "text"]
    text: str


def _chat_segments(system: str, users: Sequence[str], assistants: Sequence[str]) -> list[_Segment]:
    """Pieces of a chat in order. With one answer fewer than users the chat ends with <SOA>, ready to be answered.

    Raises ValueError for any other number of answers, or no user.
    """
    if not users or len(users) - len(assistants) not in (0, 1):
        raise ValueError(f"expected as many answers as users or one fewer, found {len(assistants)} for {len(users)}")
    segments = _wrapped("<SOT>", system, "<EOT>")
    for turn, user in enumerate(users):
        segments += [_Segment("text", "\n\n"), *_wrapped("<SOU>", user, "<EOU>"), _Segment("text", "\n")]
        if turn < len(assistants):
            segments += _wrapped("<SOA>", assistants[turn], "<EOA>")
        else:
            segments.append(_Segment("special", "<SOA>"))
    return segments


def format_chat(system: str, users: Sequence[str], assistants: Sequence[str]) -> str:
    """The chat as one string; with one answer fewer than users it ends with <SOA>."""
    return "".join(segment.text for segment in _chat_segments(system, users, assistants))


def _encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, array[int]]:
    """Token ids (int32) of each different text, tokenized in one batch; no special token can come out of it."""
    assert tokenizer.encode_special_tokens, "load the tokenizer with load_tokenizer"
    different = list(dict.fromkeys(texts))
    encodings = tokenizer.encode_batch_fast(different, add_special_tokens=False)
    return {text: array("i", encoding.ids) for text, encoding in zip(different, encodings, strict=True)}


def _join_ids(segments: Sequence[_Segment], ids_of_text: Mapping[str, array[int]]) -> array[int]:
    """Token ids of a chat from the ids of its texts (see `_encode_texts`)."""
    ids = array("i")
    for segment in segments:
        if segment.kind == "special":
            ids.append(SPECIAL_IDS[segment.text])
        else:
            ids.extend(ids_of_text[segment.text])
    return ids


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[tuple[str, Sequence[str], Sequence[str]]]
) -> list[tuple[array[int], int]]:
    """Of each whole chat (system, users, answers) the token ids (int32), and how many of the last ones are scored: the
    last answer and its <EOA>. Each different text is tokenized once.

    Raises ValueError unless there is an answer for each user message.
    """
    for _, users, assistants in chats:
        if len(users) != len(assistants):
            raise ValueError(f"expected an answer for each user message, found {len(assistants)} for {len(users)}")
    texts = (text for system, users, assistants in chats for text in (system, *users, *assistants))
    ids_of_text = _encode_texts(tokenizer, ("\n\n", "\n", *texts))
    prompts: dict[tuple[str, tuple[str, ...], tuple[str, ...]], array[int]] = {}  # both chats of a pair have one
    found, end = [], array("i", [SPECIAL_IDS["<EOA>"]])
    for system, users, assistants in chats:
        key = system, tuple(users), tuple(assistants[:-1])
        if (prompt := prompts.get(key)) is None:
            prompt = prompts[key] = _join_ids(_chat_segments(*key), ids_of_text)
        answer = ids_of_text[assistants[-1]]
        found.append((prompt + answer + end, len(answer) + 1))
    return found


def encode_chat(
    tokenizer: Tokenizer, system: str, users: Sequence[str], assistants: Sequence[str]
) -> tuple[list[int], int]:
    """A chat as `encode_chats` has it."""
    [(ids, scored)] = encode_chats(tokenizer, [(system, users, assistants)])
    return ids.tolist(), scored


def encode_prompt(tokenizer: Tokenizer, system: str, users: Sequence[str], assistants: Sequence[str]) -> list[int]:
    """Token ids up to the last <SOA>, for the model to continue; `assistants` has one entry fewer than `users`."""
    if len(users) != len(assistants) + 1:
        raise ValueError(f"expected one answer fewer than user messages, found {len(assistants)} for {len(users)}")
    segments = _chat_segments(system, users, assistants)
    return _join_ids(segments, _encode_texts(tokenizer, (s.text for s in segments if s.kind == "text"))).tolist()


def encode_serving_prompt(
    tokenizer: Tokenizer, system: str, users: Sequence[str], assistants: Sequence[str]
) -> list[int]:
    """Token ids up to the last <SOA> as upstream's server writes it (its `format_inference_prompt`): one line end
    before the last <SOU> where training has two; behind the system prompt, which brings its two along, three.

    ValueError unless `assistants` has one entry fewer than `users`.
    """
    segments = _serving_segments(system, users, assistants)
    return _join_ids(segments, _encode_texts(tokenizer, (s.text for s in segments if s.kind == "text"))).tolist()


def _serving_segments(system: str, users: Sequence[str], assistants: Sequence[str]) -> list[_Segment]:
    """Pieces of a chat as it is served."""
    if len(users) != len(assistants) + 1:
        raise ValueError(f"expected one answer fewer than user messages, found {len(assistants)} for {len(users)}")
    segments = _chat_segments(system, users, assistants)
    assert segments[-5] == ("special", "<SOU>")
    segments[-6] = _Segment("text", "\n" if assistants else "\n\n\n")
    return segments


def _wrapped(start: str, text: str, end: str) -> list[_Segment]:
    return [_Segment("special", start), _Segment("text", text), _Segment("special", end)]
