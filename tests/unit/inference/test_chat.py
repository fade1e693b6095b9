"""A conversation, with speakers that say bytes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import pytest

from simple_llama.common.errors import UserError
from simple_llama.inference.chat import _HELP, ChatSession, Speaker


def echo(prompt: Sequence[int], most: int, number: int) -> Iterator[int]:
    """Says the prompt again, up to the limit."""
    return iter(prompt[:most])


def speaker(
    answer: Callable[[Sequence[int], int, int], Iterator[int]] = echo, name: str = "tiny", most: int = 60
) -> Speaker:
    """One that hears a conversation as `u1|a1|u2`."""

    def encode(users: Sequence[str], answers: Sequence[str]) -> list[int]:
        if "unsayable" in users[-1]:
            raise UserError("the template cannot say this")
        turns = [text for pair in zip(users, [*answers, ""], strict=True) for text in pair]
        return list("|".join(turns[:-1]).encode())

    return Speaker(name, "", encode, lambda ids: bytes(ids).decode(errors="replace"), answer, most, ord("?"))


def converse(lines: Sequence[str], *speakers: Speaker, most: int = 40, terminal: bool = False) -> tuple[str, str]:
    """What was answered, and what was said beside."""
    out, notes, left = io.StringIO(), io.StringIO(), iter(lines)

    def read(prompt: str) -> str:
        assert prompt == ("> " if terminal else "")
        line = next(left, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    ChatSession(speakers or [speaker()], most, out, notes, lambda: 39).run(read, terminal)
    return out.getvalue(), notes.getvalue()


def test_a_model_hears_the_whole_conversation() -> None:
    """Turn 2 is answered with turn 1 in mind; after /reset it is forgotten; blank lines say nothing."""
    answers, notes = converse(["ab\n", "", "cd", "/reset", "ef"])
    assert answers == "ab\nab|ab|cd\nef\n" and notes == "(a new conversation)\n"


def test_a_ctrl_c_anywhere_parts_no_message_from_its_answer() -> None:
    """Raised at each line of a turn, once: the next turn hears a whole conversation, with "ab" or without."""
    heard = set[str]()
    for line in range(1, 60):
        out = io.StringIO()

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal count
            if frame.f_code.co_name not in ("_take_turn", "say"):
                return None
            if event == "line":
                count -= 1
                if count == 0:
                    raise KeyboardInterrupt
            return trace

        count, session = line, ChatSession([speaker()], 40, out, io.StringIO())
        sys.settrace(trace)
        try:
            session.say("ab")
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        out.truncate(0)
        out.seek(0)
        session.say("c")
        heard.add(out.getvalue())
    assert heard <= {"c\n", "ab|ab|c\n", "ab|a|c\n", "ab||c\n"} and len(heard) > 1


def test_commands() -> None:
    """/help, one that is none, text that begins with a slash, and /quit, behind which nothing is read."""
    answers, notes = converse(["/help", "/exit", "/etc is", "//quit", "/quit", "x"])
    assert answers == "/etc is\n/etc is|/etc is|/quit\n"
    assert notes.startswith(f"{_HELP}\n(no command /exit;")


def test_answers_stream() -> None:
    """Each character is out before the next token is made."""
    out, seen = io.StringIO(), []

    def slow(prompt: Sequence[int], most: int, number: int) -> Iterator[int]:
        for byte in b"xyz":
            yield byte
            seen.append(out.getvalue())

    ChatSession([speaker(slow)], 9, out, io.StringIO()).say("hello")
    assert seen == ["x", "xy", "xyz"]


def test_ctrl_c_ends_an_answer_and_not_the_program() -> None:
    """After two tokens: they stay in the conversation, which goes on. Before the first: nothing stays. At a prompt of a
    terminal: a hint."""

    def interrupted(prompt: Sequence[int], most: int, number: int) -> Iterator[int]:
        yield from b"xy"[: max(2 - number, 0)]
        if number < 3:
            raise KeyboardInterrupt
        yield from prompt

    answers, notes = converse(["a", "^C", "b", "c", "d"], speaker(interrupted), terminal=True)
    assert answers == "xy\nx\n\na|xy|b|x|d\n"
    assert notes.splitlines() == [
        "(interrupted: what was said stays in the conversation)",
        "",
        "(Ctrl-D or /quit ends)",
        "(interrupted: what was said stays in the conversation)",
        "(interrupted before an answer began: the message is not kept)",
        "",
    ]
    with pytest.raises(KeyboardInterrupt):
        converse(["^C"])


def test_what_cannot_be_answered_is_said_and_not_kept() -> None:
    """A conversation of 60 tokens for a model of 60, and one that the format cannot say; then it goes on."""
    answers, notes = converse(["a" * 60, "unsayable", "b"])
    assert answers == "b\n"
    first, second = notes.splitlines()
    assert "60 tokens, and tiny takes 60" in first and "/reset" in first and second.endswith("cannot say this")


def test_limits_are_said() -> None:
    """20 + 20 tokens at --max_new_tokens 20; then 20 + 1 + 20 + 1 + 2 of 60, so the model has room for 16."""
    answers, notes = converse(["a" * 20, "bb"], most=20)
    assert list(map(len, answers.splitlines())) == [20, 16]
    assert notes.splitlines() == [
        "(cut at 20 tokens: --max_new_tokens)",
        "(cut at 16 tokens: the conversation is as long as the model takes; /reset)",
    ]


def test_an_empty_answer_is_said() -> None:
    """And stays one in the conversation; of two speakers it stands in its place."""
    silent = speaker(lambda prompt, most, number: iter(prompt if number else []))
    assert converse(["a", "b"], silent) == ("\na||b\n", "(ended at once)\n")
    answers, notes = converse(["a"], speaker(), silent)
    assert answers.splitlines()[-1].split() == ["a", "|", "(ended", "at", "once)"] and not notes


def test_unknown_characters_are_said_once() -> None:
    """Two in the first message; none more in the second, one in the third."""
    silent = speaker(lambda prompt, most, number: iter(b"."))
    _, notes = converse(["??", "a", "?"], silent)
    assert [line[:36] for line in notes.splitlines()] == [
        "(the tokenizer does not know 2 token",
        "(the tokenizer does not know 1 token",
    ]


def test_two_speakers_have_each_its_own_answers_in_mind() -> None:
    """The second says the prompt backwards: side by side, and each goes on from what it said itself. Answers are drawn
    by one number a turn, the same for both."""
    numbers: list[tuple[str, int]] = []

    def numbered(name: str, step: int) -> Callable[[Sequence[int], int, int], Iterator[int]]:
        def answer(prompt: Sequence[int], most: int, number: int) -> Iterator[int]:
            numbers.append((name, number))
            return iter(prompt[::step][:most])

        return answer

    first, second = (speaker(numbered(name, step), name) for name, step in (("start", 1), ("tuned", -1)))
    answers, _ = converse(["ab", "cd", "/reset", "e"], first, second)
    rows = [line.split() for line in answers.splitlines() if "-" not in line]
    head = ["start", "|", "tuned"]
    assert rows == [head, ["ab", "|", "ba"], head, ["ab|ab|cd", "|", "dc|ab|ba"], head, ["e", "|", "e"]]
    assert numbers == [(name, number) for number in range(3) for name in ("start", "tuned")]


def test_what_steers_a_terminal_does_not_reach_it() -> None:
    """An answer with an escape sequence."""
    assert converse(["\x1b[2J"])[0] == "\\x1b[2J\n"
