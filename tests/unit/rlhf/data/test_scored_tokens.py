"""Which tokens of a chat are scored: spans by hand, in SimpleLLaMA's format and in that of a template."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer

from simple_llama.common.paths import root_path
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.chat_format import Chat, EncodedChat, SimpleLLaMAChat, UnsayableChat
from simple_llama.reinforcement_learning.rlhf.data.scored_tokens import Scoring

CHAT = Chat("S", ["a", "b"], ["c", "The last answer."])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return load_tokenizer(root_path("simple_llama", "dataset", "bpe_8k.json"))


class Numbers:
    """A format of one token a message: 1, then user, 2, answer, 3 for each turn. With `forgets`, answers but the last
    become 9, as in templates that leave out what a model thought."""

    def __init__(self, forgets: bool = False):
        self.forgets = forgets

    def encode(self, chats: list[Chat]) -> list[EncodedChat]:
        """An answer and its 3 are scored."""
        found = []
        for chat in chats:
            ids = [1]
            for turn, (user, answer) in enumerate(zip(chat.users, chat.assistants, strict=True), 1):
                ids += [int(user), 2, 9 if self.forgets and turn < len(chat.users) else int(answer), 3]
            found.append(EncodedChat(ids, 2, (f"note {len(chat.users)}",)))
        return found


def encoded(scoring: Scoring, *chats: Chat, forgets: bool = False) -> list[tuple[list[int], Any, Any]]:
    """Plain values of chats in the format of numbers."""
    format_: Any = Numbers(forgets)
    return [(list(one.ids), one.spans, one.notes) for one in scoring.encode(format_, chats)]


def test_spans_by_hand() -> None:
    """Two turns, 1 | 10 2 20 3 | 11 2 21 3: the last answer and its end are [7, 9), the first [3, 5); without ends one
    token less, and the chat ends before the last one. Of a chat of one turn all answers are the last."""
    two, one = Chat(None, ["10", "11"], ["20", "21"]), Chat(None, ["12"], ["22"])
    ids, short = [1, 10, 2, 20, 3, 11, 2, 21, 3], [1, 12, 2, 22, 3]
    assert encoded(Scoring(), two, one) == [(ids, ((7, 9),), ("note 2",)), (short, ((3, 5),), ("note 1",))]
    assert encoded(Scoring("all"), two, one) == [
        (ids, ((3, 5), (7, 9)), ("note 1", "note 2")),
        (short, ((3, 5),), ("note 1",)),
    ]
    assert encoded(Scoring("last", True), two) == [(ids[:-1], ((7, 8),), ("note 2",))]
    assert encoded(Scoring("all", True), two) == [(ids[:-1], ((3, 4), (7, 8)), ("note 1", "note 2"))]


def test_answers_that_a_format_writes_otherwise_later_are_refused() -> None:
    """The second chat is named; the last answers alone can be scored."""
    one, two = Chat(None, ["12"], ["22"]), Chat(None, ["10", "11"], ["20", "21"])
    with pytest.raises(UnsayableChat, match="score: expected a chat format that writes an earlier answer") as raised:
        encoded(Scoring("all"), one, two, forgets=True)
    assert raised.value.index == 1
    assert encoded(Scoring(), two, forgets=True)[0][1] == ((7, 9),)


def test_a_chat_that_cannot_be_said_is_named(tokenizer: Tokenizer) -> None:
    """By its place among the chats, not among their turns."""

    class Refuses(Numbers):
        def encode(self, chats: list[Chat]) -> list[EncodedChat]:
            raise UnsayableChat("no", len(chats) - 1)

    format_: Any = Refuses()
    with pytest.raises(UnsayableChat, match="no") as raised:
        Scoring("all").encode(format_, [CHAT, CHAT, CHAT])
    assert raised.value.index == 2


def test_all_answers_in_the_chat_format(tokenizer: Tokenizer) -> None:
    """What is scored spells the answers with their ends, and without."""
    chat_format = SimpleLLaMAChat(tokenizer)
    for scoring, said in (
        (Scoring("all"), ["c<EOA>", "The last answer.<EOA>"]),
        (Scoring("all", True), ["c", "The last answer."]),
        (Scoring("last", True), ["The last answer."]),
    ):
        [found] = scoring.encode(chat_format, [CHAT])
        assert [chat_format.spell(found.ids[start:stop]) for start, stop in found.spans] == said
        assert found.spans[-1][1] == len(found.ids)
