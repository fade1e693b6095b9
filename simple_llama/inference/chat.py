"""A conversation in a terminal, or over a pipe: lines in, answers out, with one model or with two side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple, TextIO

from simple_llama.common.errors import UserError
from simple_llama.inference.guards import ENDED_AT_ONCE
from simple_llama.inference.terminal_text import TextStream, printable, side_by_side

_HELP = """\
/reset  a new conversation
/help   this
/quit   ends, as Ctrl-D does
Ctrl-C ends an answer; what was said of it stays in the conversation. A line that begins with // is sent with one /.
All else is said to the model; what is spelled like a special token stays text."""

_COMMAND = re.compile(r"/[a-z]+")
_PROMPT = "> "


class Speaker(NamedTuple):
    """A model in a conversation."""

    name: str
    about: str  # which model, and how it computes
    encode: Callable[[Sequence[str], Sequence[str]], list[int]]  # user messages and answers so far, one fewer: ids
    decode: Callable[[Sequence[int]], str]  # all tokens of an answer: text
    answer: Callable[[Sequence[int], int, int], Iterator[int]]  # prompt, most tokens, number of the answer: its tokens
    most_tokens: int  # of a conversation, the answer included
    unknown_id: int | None = None  # of the token for what the tokenizer does not know


class ChatSession:
    """The conversation of one or two speakers, each with its own answers in mind."""

    def __init__(
        self,
        speakers: Sequence[Speaker],
        max_new_tokens: int,
        out: TextIO,
        notes: TextIO,
        width: Callable[[], int] | None = None,
    ):
        """Args:
        out: where answers go.
        notes: where all else goes.
        width: columns of the terminal now.
        """
        self._speakers, self._most_new = speakers, max_new_tokens
        self._out, self._notes, self._width = out, notes, width or (lambda: 80)
        self._turns: list[tuple[str, ...]] = []  # a message and an answer of each speaker: a Ctrl-C parts none
        self._number = 0  # of the next answer, over all conversations: no two are drawn alike
        self._unknown = 0  # tokens in the conversation so far

    def run(self, read: Callable[[str], str], terminal: bool) -> None:
        """Takes line after line until EOF or /quit.

        Args:
            read: a line for a prompt, as `input`. EOFError at the end.
            terminal: somebody sits there, whose Ctrl-C at a prompt ends nothing. Elsewhere KeyboardInterrupt.
        """
        while True:
            try:
                line = read(_PROMPT if terminal else "").strip()
            except EOFError:
                if terminal:
                    self._note("")
                return
            except KeyboardInterrupt:
                if not terminal:
                    raise
                self._note("\n(Ctrl-D or /quit ends)")
                continue
            if line == "/quit":
                return
            if _COMMAND.fullmatch(line):
                self._command(line)
            elif line:
                try:
                    self.say(line[1:] if line.startswith("//") else line)
                except KeyboardInterrupt:  # before the first token, or behind the last one
                    self._note("\n(interrupted)")

    def say(self, message: str) -> None:
        """One turn: the message, and what is answered. What cannot be answered is not kept, and said."""
        try:
            users = [*(turn[0] for turn in self._turns), message]
            prompts = [
                speaker.encode(users, [turn[place] for turn in self._turns])
                for place, speaker in enumerate(self._speakers, 1)
            ]
            for speaker, prompt in zip(self._speakers, prompts, strict=True):
                if len(prompt) >= speaker.most_tokens:
                    raise UserError(
                        f"with this message the conversation has {len(prompt)} tokens, and {speaker.name} takes "
                        f"{speaker.most_tokens}, its answer included: it is not kept; /reset begins a new conversation"
                    )
            self._warn_of_unknown(prompts)
            self._take_turn(message, prompts)
        except UserError as error:
            self._note(f"error: {error}")

    def _take_turn(self, message: str, prompts: Sequence[Sequence[int]]) -> None:
        """Lets all speakers answer, a token each in turn, and keeps what they said."""
        streams = [TextStream(speaker.decode) for speaker in self._speakers]
        rooms = [min(self._most_new, s.most_tokens - len(ids)) for s, ids in zip(self._speakers, prompts, strict=True)]
        interrupted = False
        try:
            answers = [
                s.answer(ids, room, self._number) for s, ids, room in zip(self._speakers, prompts, rooms, strict=True)
            ]
            for tokens in zip_longest(*answers):
                for stream, token in zip(streams, tokens, strict=True):
                    if token is not None:
                        self._write(stream.add(token))
        except KeyboardInterrupt:
            interrupted = True
        self._number += 1
        if len(streams) == 1:
            self._write(f"{streams[0].close()}\n")
        else:
            self._show_both(streams)
        if interrupted and not any(stream.ids for stream in streams):
            self._note("(interrupted before an answer began: the message is not kept)")
            return
        self._turns.append((message, *(stream.text for stream in streams)))
        self._say_ends(streams, rooms, interrupted)

    def _write(self, text: str) -> None:
        """Puts a part of an answer out at once; of two speakers, when both are done."""
        if len(self._speakers) == 1 and text:
            self._out.write(printable(text))
            self._out.flush()

    def _show_both(self, streams: Sequence[TextStream]) -> None:
        """Both answers side by side."""
        names = [speaker.name for speaker in self._speakers]
        texts = [printable(stream.text) or ENDED_AT_ONCE for stream in streams]
        self._out.write(side_by_side(names, texts, self._width()) + "\n")
        self._out.flush()

    def _say_ends(self, streams: Sequence[TextStream], rooms: Sequence[int], interrupted: bool) -> None:
        """Says of each answer that did not end by itself what ended it, and of one without text that it has none."""
        if interrupted:
            self._note("(interrupted: what was said stays in the conversation)")
            return
        for speaker, stream, room in zip(self._speakers, streams, rooms, strict=True):
            whose = "" if len(self._speakers) == 1 else f"{speaker.name}: "
            if len(stream.ids) == room:
                full = room < self._most_new
                why = "the conversation is as long as the model takes; /reset" if full else "--max_new_tokens"
                self._note(f"({whose}cut at {room} tokens: {why})")
            elif not stream.text and len(self._speakers) == 1:
                self._note(ENDED_AT_ONCE)

    def _warn_of_unknown(self, prompts: Sequence[Sequence[int]]) -> None:
        """Says how much of a message the tokenizer does not know."""
        speaker, prompt = self._speakers[0], prompts[0]
        found = 0 if speaker.unknown_id is None else list(prompt).count(speaker.unknown_id)
        if found > self._unknown:
            self._note(f"(the tokenizer does not know {found - self._unknown} tokens of this; the model sees gaps)")
        self._unknown = found

    def _command(self, line: str) -> None:
        if line == "/reset":
            self._turns.clear()
            self._unknown = 0
            self._note("(a new conversation)")
        elif line == "/help":
            self._note(_HELP)
        else:
            self._note(f"(no command {line}; /help lists them, and //... says a line that begins with /)")

    def _note(self, text: str) -> None:
        print(printable(text), file=self._notes, flush=True)
