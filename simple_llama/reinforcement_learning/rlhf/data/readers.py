"""The readers: a record of a data file as a conversation with two answers, one function a format.

Template (what a data set is written in): keys Template, User, Accepted, Rejected.

    {"Template": ["CUSTOM"], "User": ["Hi"], "Accepted": ["Hello!"], "Rejected": ["Go away."]}

A record may have more answers than two, with a number each: the larger is better, of `Ranks` the smaller. An answer is
a list of strings as above, or a string where there is one turn. `pairs` says which two are compared.

    {"Template": ["CUSTOM"], "User": ["Hi"], "Responses": ["Hello!", "Hm.", "Go away."], "Scores": [9, 5, 1]}
    {"Template": ["CUSTOM"], "User": ["Hi"], "Accepted": ["Hello!"], "Rejected": [["Hm."], ["Go away."]]}

`Template` is a list with one system prompt, or the same one for each turn; "CUSTOM" is the default system prompt, and
what nearly spells it is refused. `User`, `Accepted` and `Rejected` are lists of strings of equal length, one entry a
turn; the last answers are compared. A message of white space and invisible characters alone is an empty one.

HH-RLHF (`chosen`, `rejected`): whole transcripts. A paragraph that starts with "Human:" or "Assistant:" starts a turn;
anywhere else these words are text (`holds_a_turn` says where that is doubtful). CR LF is read as LF. Turns have to
alternate, Human first and Assistant last, and the Human turns of both transcripts have to agree; earlier answers may
differ, the last ones have to. A record with a `prompt` beside them is of another form, and refused.
PKU-SafeRLHF (`prompt`, `response_0`, `response_1`, labels): `prefer` says which of the two labels decides. A pair whose
preferred answer is marked unsafe is dropped unless `keep_unsafe`.
Text of these two loses the white space around it.

A record of any format may also say how much its pair counts, and how much better the chosen answer is:

    "weight": 2.0     factor of the pair's loss, a number above 0; 1 where it is not given
    "gap": 1.5        reward of the chosen answer less that of the rejected one, for a loss that reads it

A reader raises UserError (file, record, key, expected, found) for what does not fit its format, and Dropped for a sound
record without a usable pair. A format is one such function and its line in READERS;
`dataset_loader.FORMATS` and convert.py name those that they take.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.json_records import Record, json_type
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT, format_chat

_Value = TypeVar("_Value", str, int, bool)
CUSTOM = "CUSTOM"  # stands in a record for the default system prompt
PAIR_KEYS = ("weight", "gap")  # a record of each format may have them
_LARGEST = 1e30  # of what they may be, and its inverse is the least: fp32 holds it, and what losses make of it
_TEMPLATE_KEYS = ("Template", "User", "Accepted", "Rejected")
RANKING_KEYS = ("Responses", "Scores", "Ranks")  # of a Template record with more answers, instead of the last two
Compared = Literal["all", "adjacent", "best_worst"]
_PKU_LABEL = {"helpfulness": "better_response_id", "safety": "safer_response_id"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_LIKE_A_TURN = re.compile(r"^[^\S\n]*(?:Human|Assistant):", re.MULTILINE)
_NO_LETTERS = re.compile(r"[\W_]+")
_LONGEST_SPELLING = 40  # characters of what may be meant for CUSTOM
_INVISIBLE = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))  # categories of Unicode: controls, formats, separators
# letters and marks that are shown as nothing; the last ones choose the form of the letter before them
_FILLERS = frozenset((*"\u034f\u115f\u1160\u2800\u3164\uffa0", *map(chr, range(0xFE00, 0xFE10))))


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
    first: dict[float, Rank] = {}
    for rank in sorted({rank for pair in known for rank in pair}):
        first.setdefault(rank.level, rank)
    levels = list(first.values())
    if compared == "all" or len(known) != len(ranks):
        return list(range(len(ranks)))
    wanted = {(levels[0], levels[-1])} if compared == "best_worst" else set(pairwise(levels))
    return [place for place, pair in enumerate(ranks) if pair in wanted]


class Dropped(Exception):
    """A record without a usable pair; the message is the reason that is counted."""


class NeedsOption(UserError):
    """A record that is sound, and cannot be read without an option: so are all others of its format."""


@dataclass(frozen=True)
class ReadOptions:
    """What readers leave to the caller; each format looks at those that it has a use for."""

    default_system: str | None = DEFAULT_SYSTEM_PROMPT  # for "CUSTOM", and for formats without a system prompt
    prefer: Literal["helpfulness", "safety"] | None = None  # the label of PKU-SafeRLHF that decides
    keep_unsafe: bool = False  # also pairs of PKU-SafeRLHF whose preferred answer is marked unsafe
    clean: Callable[[str], str] = str  # applied to each message of HH-RLHF and PKU-SafeRLHF before it is judged


class Reader(NamedTuple):
    """A format of records."""

    keys: tuple[str, ...]  # a record that has all of them is read so
    read: Callable[[Record, ReadOptions], Conversation | Ranking]


def format_of(record: Record, names: Sequence[str]) -> str:
    """The format of a record among `names`, by its keys. UserError for none of them.

    Where only one is allowed nothing is guessed: its reader says what the record lacks.
    """
    if len(names) == 1:
        return names[0]
    for name in names:
        if all(key in record.fields for key in READERS[name].keys):
            return name
    expected = " or ".join(f"{', '.join(READERS[name].keys)} ({name})" for name in names)
    raise UserError(f"{record.origin}: expected keys {expected}, found {shown(list(record.fields))}")


# === Template ===


def from_template(record: Record, options: ReadOptions) -> Conversation | Ranking:
    """The pair, or the answers, in a record of this project's own format."""
    ranked = any(key in record.fields for key in RANKING_KEYS)
    for key in ("Template", "User", "Responses") if ranked else _TEMPLATE_KEYS:
        if key not in record.fields:
            raise UserError(f"{record.origin}: expected key {key!r}, found {shown(list(record.fields))}")
    system, users = _prompt(record, options)
    if ranked:
        return _ranked(record, system, users)
    several = record.fields["Rejected"]
    if isinstance(several, list) and any(isinstance(one, list) for one in several):
        chosen, others = _answer(record, users, "Accepted"), _answers(record, users, "Rejected")
        scores = (1.0, *(0.0 for _ in others))
        weight, _ = _strength(record)
        return Ranking(system, users, (chosen, *others), scores, record.file, record.number, weight)
    chosen, rejected = (_answer(record, users, key) for key in ("Accepted", "Rejected"))
    return Conversation(system, users, chosen, rejected, record.file, record.number, *_strength(record))


def _prompt(record: Record, options: ReadOptions) -> tuple[str | None, tuple[str, ...]]:
    """The system prompt and the user turns."""
    template, users = (_strings(record, key) for key in ("Template", "User"))
    if len(template) not in (1, len(users)):
        expected = "1 entry" if len(users) == 1 else f"1 entry or {len(users)}, one a turn"
        raise UserError(f"{record.origin}: Template: expected {expected}, found {len(template)}")
    for number, text in enumerate(template, 1):
        if text != CUSTOM and _is_nearly_custom(text):
            raise UserError(
                f'{record.origin}: Template, entry {number}: expected "{CUSTOM}" for the default system prompt, or a '
                f"prompt of your own, found {shown(text)}; write {CUSTOM}"
            )
    if len(set(template)) != 1:
        raise UserError(
            f"{record.origin}: Template: expected the same system prompt for each turn, found different ones"
        )
    return options.default_system if template[0] == CUSTOM else template[0], users


def _ranked(record: Record, system: str | None, users: tuple[str, ...]) -> Ranking:
    """The answers under `Responses`, by their `Scores` or `Ranks`."""
    for key in ("Accepted", "Rejected", "gap"):
        if key in record.fields:
            raise UserError(f"{record.origin}: expected no {key!r} beside a ranking's Responses, found both")
    found = [key for key in ("Scores", "Ranks") if key in record.fields]
    if len(found) != 1:
        raise UserError(
            f"{record.origin}: expected Scores or Ranks with Responses, found {' and '.join(found) or 'none'}"
        )
    answers, numbers, (key,) = _answers(record, users, "Responses"), record.fields[found[0]], found
    if not isinstance(numbers, list) or len(numbers) != len(answers):
        count = len(numbers) if isinstance(numbers, list) else json_type(numbers)
        raise UserError(f"{record.origin}: {key}: expected {len(answers)} numbers as in 'Responses', found {count}")
    for number in numbers:
        if type(number) not in (int, float) or not -_LARGEST <= number <= _LARGEST:
            expected = f"numbers from {-_LARGEST:g} to {_LARGEST:g}"
            raise UserError(f"{record.origin}: {key}: expected {expected}, found {json_type(number)}")
    scores = tuple(float(number) if key == "Scores" else -float(number) for number in numbers)
    weight, _ = _strength(record)
    return Ranking(system, users, answers, scores, record.file, record.number, weight, gaps=key == "Scores")


def _answers(record: Record, users: tuple[str, ...], key: str) -> tuple[tuple[str, ...], ...]:
    """The list of answers under `key`, each a list of strings, one a turn, or a string where there is one turn."""
    values: Any = record.fields[key]
    if not isinstance(values, list) or len(values) < 1 + (key == "Responses"):
        least = "two" if key == "Responses" else "one"
        raise UserError(
            f"{record.origin}: {key}: expected a list of {least} or more answers, found {json_type(values)}"
        )
    for number, one in enumerate(values, 1):
        if isinstance(one, str) and len(users) > 1:
            raise UserError(
                f"{record.origin}: {key}, answer {number}: expected a list of {len(users)} strings, one a turn as in "
                "'User', found a string"
            )
    listed = [[one] if isinstance(one, str) else one for one in values]
    return tuple(_answer(record, users, key, one, f", answer {number}") for number, one in enumerate(listed, 1))


def _answer(record: Record, users: tuple[str, ...], key: str, values: Any = None, which: str = "") -> tuple[str, ...]:
    """An answer to each user turn: the messages under `key`, or `values`, one of several there."""
    found = _messages(record, key, record.fields[key] if values is None else values, which)
    if len(found) != len(users):
        several = "; of several answers each is a list of its own" if key == "Rejected" and not which else ""
        raise UserError(
            f"{record.origin}: {key}{which}: expected {len(users)} entries as in 'User', found {len(found)}{several}"
        )
    return found


def _strings(record: Record, key: str) -> tuple[str, ...]:
    """The list of messages under `key`; only a system prompt may be blank."""
    return _messages(record, key, record.fields[key])


def _messages(record: Record, key: str, values: Any, which: str = "") -> tuple[str, ...]:
    """A list of messages that stands under `key`; only a system prompt may be blank."""
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{record.origin}: {key}{which}: expected a list of one or more strings, found {json_type(values)}"
        )
    for number, value in enumerate(values, 1):
        place = f"{record.origin}: {key}{which}, entry {number}"
        if not isinstance(value, str):
            raise UserError(f"{place}: expected a string, found {json_type(value)}")
        if key != "Template" and _is_blank(value):
            raise UserError(f"{place}: expected a message, found an empty one; remove the record or write one")
        if _has_half_a_pair(value):
            raise UserError(f"{place}: expected Unicode text, found half of a surrogate pair (\\ud800-\\udfff)")
    return tuple(values)


def _is_nearly_custom(text: str) -> bool:
    """Whether a system prompt is CUSTOM in another case, or with other characters around it."""
    if len(text) > _LONGEST_SPELLING:
        return False
    return _NO_LETTERS.sub("", unicodedata.normalize("NFKC", text)).casefold() == CUSTOM.casefold()


# === HH-RLHF ===


def from_hh(record: Record, options: ReadOptions) -> Conversation:
    """The pair in two HH-RLHF transcripts."""
    if "prompt" in record.fields:
        raise UserError(
            f"{record.origin}: expected whole transcripts under chosen and rejected (HH-RLHF), found a prompt beside "
            "them, which is another form (TRL's)"
        )
    transcripts = [_typed(record, key, str) for key in ("chosen", "rejected")]
    chosen, rejected = map(_turns, transcripts)
    if chosen[0::2] != rejected[0::2]:
        raise Dropped("with different Human turns")
    return _usable(record, options, chosen[0::2], chosen[1::2], rejected[1::2])


def _turns(transcript: str) -> list[str]:
    """Messages of a transcript: Human, Assistant, Human, ..., Assistant."""
    if "\r" in transcript:
        transcript = transcript.replace("\r\n", "\n").replace("\r", "\n")
    before, *parts = _TURN.split("\n\n" + transcript.strip())  # parts: speaker, message, speaker, message, ...
    speakers = parts[0::2]
    if before or speakers[:1] != ["Human"]:
        raise Dropped("not starting with a Human turn")
    if speakers[-1] == "Human":
        raise Dropped("without a reply")
    if speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        raise Dropped("with turns that do not alternate")
    return [message.strip() for message in parts[1::2]]


# === PKU-SafeRLHF ===


def from_pku(record: Record, options: ReadOptions) -> Conversation:
    """The pair in a PKU-SafeRLHF record, the better or the safer answer chosen."""
    if options.prefer is None:
        raise NeedsOption(f"{record.origin}: a PKU-SafeRLHF record; give --prefer helpfulness or --prefer safety")
    prompt = _typed(record, "prompt", str).strip()
    answers = [_typed(record, f"response_{side}", str).strip() for side in (0, 1)]
    is_safe = [_typed(record, f"is_response_{side}_safe", bool) for side in (0, 1)]
    label = _PKU_LABEL[options.prefer]
    chosen = _typed(record, label, int)
    if chosen not in (0, 1):
        raise UserError(f"{record.origin}: {label}: expected 0 or 1, found {shown(chosen)}")
    if not is_safe[chosen] and not options.keep_unsafe:
        raise Dropped("with an unsafe preferred answer")
    return _usable(record, options, [prompt], [answers[chosen]], [answers[1 - chosen]])


def _typed(record: Record, key: str, kind: type[_Value]) -> _Value:
    """The value under `key`, which has to be of type `kind` exactly (true is no number)."""
    expected = {str: "a string", int: "a whole number", bool: "true or false"}[kind]
    if key not in record.fields:
        raise UserError(f"{record.origin}: expected key {key!r} with {expected}, found {shown(list(record.fields))}")
    value = record.fields[key]
    if type(value) is not kind:
        raise UserError(f"{record.origin}: {key}: expected {expected}, found {json_type(value)}")
    return value


# === All ===


def _usable(record: Record, options: ReadOptions, *messages: Sequence[str]) -> Conversation:
    """The conversation of (users, chosen, rejected) that others have written. Dropped for what cannot be trained on."""
    users, chosen, rejected = (tuple(map(options.clean, texts)) for texts in messages)
    if any(map(_is_blank, users)):
        raise Dropped("with an empty user message")
    if any(map(_is_blank, chosen + rejected)):
        raise Dropped("with an empty answer")
    if chosen == rejected:
        raise Dropped("with identical answers")
    if chosen[-1] == rejected[-1]:
        raise Dropped("with the same last answer")
    if any(map(_has_half_a_pair, users + chosen + rejected)):
        raise Dropped("with half of a surrogate pair")
    return Conversation(options.default_system, users, chosen, rejected, record.file, record.number, *_strength(record))


def _strength(record: Record) -> tuple[float, float | None]:
    """The record's (weight, gap). UserError where one is no such number."""
    weight = _within(record, "weight", 1 / _LARGEST) if "weight" in record.fields else 1.0
    return weight, _within(record, "gap", -_LARGEST) if "gap" in record.fields else None


def _within(record: Record, key: str, least: float) -> float:
    """The number under `key`, from `least` to _LARGEST."""
    value = record.fields[key]
    if type(value) not in (int, float) or not least <= value <= _LARGEST:
        expected = f"a number from {least:g} to {_LARGEST:g}"
        raise UserError(f"{record.origin}: {key}: expected {expected}, found {json_type(value)}")
    return float(value)


def holds_a_turn(said: Conversation) -> bool:
    """Whether a line of an answer starts like a turn of HH-RLHF: perhaps one that was not recognised as such."""
    for text in said.chosen + said.rejected:
        if ("Human:" in text or "Assistant:" in text) and _LIKE_A_TURN.search(text):
            return True
    return False


def _is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen."""
    seen = text.strip()
    if seen[:1].isalnum() and seen[0] not in _FILLERS:
        return False
    return all(character in _FILLERS or unicodedata.category(character) in _INVISIBLE for character in seen)


def _has_half_a_pair(text: str) -> bool:
    """Whether half of a surrogate pair stands in a text, which has no UTF-8 form."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


READERS = {
    "Template": Reader(_TEMPLATE_KEYS, from_template),
    "HH-RLHF": Reader(("chosen", "rejected"), from_hh),
    "PKU-SafeRLHF": Reader(("prompt", "response_0", "response_1"), from_pku),
}
