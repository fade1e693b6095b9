"""Which tokens of a chat are scored: those of its last answer or of all, with or without the token that ends an answer.

A chat ends with its last scored token: what stands behind it changes no log-prob.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from simple_llama.finetune.chat_format import Chat, ChatFormat, EncodedChat, UnsayableChat
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import Spans


class ScoredChat(NamedTuple):
    """Token ids of a chat up to its last scored one, and which of them are scored."""

    ids: Sequence[int]
    spans: Spans  # one an answer; an empty one where an answer has no token to score
    notes: tuple[str, ...]  # of the chat format


class Scoring(NamedTuple):
    """What is scored of a dialogue."""

    score: Literal["last", "all"] = "last"  # answers
    mask_end_token: bool = False  # whether the token that ends an answer is left out

    def encode(self, chat_format: ChatFormat, chats: Sequence[Chat]) -> list[ScoredChat]:
        """Whole chats as they are scored. UnsayableChat for one that the format cannot say, or whose answers cannot be
        told apart in it."""
        if self.score == "last":
            found = [ScoredChat(one.ids, (_last(one),), one.notes) for one in chat_format.encode(chats)]
        else:
            found = _all_answers(chat_format, chats)
        return [_without_ends(one) for one in found] if self.mask_end_token else found


def _last(encoded: EncodedChat) -> tuple[int, int]:
    """The span of the last answer and what ends it."""
    return len(encoded.ids) - encoded.scored, len(encoded.ids)


def _all_answers(chat_format: ChatFormat, chats: Sequence[Chat]) -> list[ScoredChat]:
    """Each chat with all its answers: an answer is the last one of the chat up to it, whose ids begin the whole."""
    turns = [(number, turn) for number, chat in enumerate(chats) for turn in range(1, len(chat.users) + 1)]
    parts = [Chat(chats[n].system, chats[n].users[:turn], chats[n].assistants[:turn]) for n, turn in turns]
    try:
        encoded = chat_format.encode(parts)
    except UnsayableChat as error:
        raise UnsayableChat(str(error), turns[error.index][0]) from None
    ahead, found = iter(encoded), []
    for number, chat in enumerate(chats):
        mine = [next(ahead) for _ in chat.users]
        whole = list(mine[-1].ids)
        if any(list(part.ids) != whole[: len(part.ids)] for part in mine):
            raise UnsayableChat(
                "score: expected a chat format that writes an earlier answer as it writes the last one, to score all, "
                "found one that does not; leave it at last",
                number,
            )
        notes = dict.fromkeys(note for part in mine for note in part.notes)
        found.append(ScoredChat(whole, tuple(map(_last, mine)), tuple(notes)))
    return found


def _without_ends(chat: ScoredChat) -> ScoredChat:
    """The chat without the last token of each span."""
    return chat._replace(ids=chat.ids[:-1], spans=tuple((start, stop - 1) for start, stop in chat.spans))
