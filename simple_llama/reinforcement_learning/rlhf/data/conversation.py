"""What a record says, whatever its form: a conversation with two answers, or with several of which each has a score."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from simple_llama.common.errors import UserError
from simple_llama.finetune.format_llm_prompt import format_chat

Compared = Literal["all", "adjacent", "best_worst"]
_LIKE_A_TURN = re.compile(r"^[^\S\n]*(?:Human|Assistant):", re.MULTILINE)


class PairText(NamedTuple):
    """The two chats of a pair as text. A chat is the whole conversation; it ends with its suffix, the scored part."""

    accepted_chat: str
    accepted_suffix: str  # the last answer and <EOA>: what is scored
    rejected_chat: str
    rejected_suffix: str


class Rank(NamedTuple):
    """Where an answer stands among those of its record; the smaller is the better one."""

    level: float  # equal for answers of one score
    place: int  # in the record


@dataclass(frozen=True)
class Conversation:
    """What a record says: a system prompt, user turns, and two answers to each of them."""

    system: str | None  # None: no system message
    users: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    file: str
    record: int  # from 1: place in a .json list, line of a .jsonl file
    weight: float = 1.0  # factor of the pair's loss
    gap: float | None = None  # reward of the chosen answer less that of the rejected one
    ranks: tuple[Rank, Rank] | None = None  # of both answers, where the record has others too

    @property
    def text(self) -> PairText:
        """Both chats in SimpleLLaMA's format."""
        chosen_chat = format_chat(self.system or "", self.users, self.chosen)
        rejected_chat = format_chat(self.system or "", self.users, self.rejected)
        return PairText(chosen_chat, self.chosen[-1] + "<EOA>", rejected_chat, self.rejected[-1] + "<EOA>")


@dataclass(frozen=True)
class Ranking:
    """What a record with several answers says: a system prompt, user turns, and answers to them, each with a score."""

    system: str | None
    users: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]  # each with one entry a turn
    scores: tuple[float, ...]  # the larger is better
    file: str
    record: int
    weight: float = 1.0
    gaps: bool = False  # whether scores are rewards, whose differences count

    @property
    def pairs(self) -> list[Conversation]:
        """Each answer with each of a lower score, best first. Dropped where all scores are equal."""
        order = sorted(range(len(self.scores)), key=lambda place: -self.scores[place])
        found = [(w, r) for n, w in enumerate(order) for r in order[n + 1 :] if self.scores[w] > self.scores[r]]
        if not found:
            raise Dropped("with answers of equal score")
        return [self._pair(w, r) for w, r in found]

    def _pair(self, chosen: int, rejected: int) -> Conversation:
        """Two of its answers."""
        better, worse = (Rank(-self.scores[place], place) for place in (chosen, rejected))
        gap = self.scores[chosen] - self.scores[rejected] if self.gaps else None
        answers, place = (self.answers[chosen], self.answers[rejected]), (self.file, self.record)
        return Conversation(self.system, self.users, *answers, *place, self.weight, gap, ranks=(better, worse))


def chosen_pairs(ranks: Sequence[tuple[Rank, Rank] | None], compared: Compared) -> list[int]:
    """Which of the pairs of one record, by the ranks of both answers, are compared: best_worst the first with the last
    answer, adjacent each with the next, both of the first answer of each score; all each with each of a lower one."""
    known = [pair for pair in ranks if pair]
    if compared == "all" or len(known) != len(ranks):
        return list(range(len(ranks)))
    first: dict[float, Rank] = {}
    for rank in sorted({rank for pair in known for rank in pair}):
        first.setdefault(rank.level, rank)
    levels = list(first.values())
    wanted = {(levels[0], levels[-1])} if compared == "best_worst" else set(pairwise(levels))
    return [place for place, pair in enumerate(ranks) if pair in wanted]


class Dropped(Exception):
    """A record without a usable pair; the message is the reason that is counted."""


class NeedsOption(UserError):
    """A record that is sound, and cannot be read without an option: so are all others of its format."""


def holds_a_turn(said: Conversation) -> bool:
    """Whether a line of an answer starts like a turn of HH-RLHF: perhaps one that was not recognised as such."""
    for text in said.chosen + said.rejected:
        if ("Human:" in text or "Assistant:" in text) and _LIKE_A_TURN.search(text):
            return True
    return False
