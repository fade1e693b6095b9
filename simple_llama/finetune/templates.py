"""Chat templates (Jinja), checked here and rendered in a process of their own: see render_worker.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simple_llama.common.errors import UserError
from simple_llama.common.files import listed, shown

Messages = Sequence[Mapping[str, str]]  # of one chat: {"role": ..., "content": ...}
_WORKER = Path(__file__).with_name("render_worker.py")
_AT_ONCE = 64  # chats in a line to the process, which holds all of them
_MOST_AT_ONCE = 4 << 20  # characters of their messages
GIVEN_BY_CHATS = frozenset(("messages", "add_generation_prompt", "tools", "documents"))  # at each rendering
_CPU_SECONDS = 2.0  # of one rendering: some ten thousand times that of an honest one
_DATE, _CLOCK = "date_string", "strftime_now"


class Rendering(NamedTuple):
    """What a template made of a chat: a text, or why there is none."""

    text: str = ""
    error: str = ""


class TemplateRenderer:
    """One template with what it reads beside the messages; the process starts with the first rendering.

    Args:
        named: the tokenizer's special tokens by their names ("bos_token").
        given: what the user sets (`chat_template_kwargs`).
        source: what the template is of, for errors.
        cpu_seconds: that one rendering may take.

    Raises UserError for a template that cannot be compiled, for a `given` name that it does not read, and where the
    process cannot start.
    """

    def __init__(
        self,
        template: str,
        named: Mapping[str, str],
        given: Mapping[str, Any],
        source: str,
        *,
        cpu_seconds: float = _CPU_SECONDS,
    ):
        self._seconds = cpu_seconds
        self._first = {
            "template": template,
            "variables": {**named, **given},
            "date": given.get(_DATE),
            "cpu_seconds": cpu_seconds,
        }
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # an answer of the process belongs to the thread that asked last
        said = self._start()
        if "reads" not in said:
            raise UserError(f"{source}: expected a chat template (Jinja), found: {said['error']}")
        known = {_DATE if name == _CLOCK else name for name in said["reads"]} - GIVEN_BY_CHATS - set(named)
        if unknown := sorted(set(given) - known):
            few = listed(sorted(known)) or "nothing"
            raise UserError(
                f"chat_template_kwargs: expected names that the chat template of {source} reads ({few}), found "
                f"{listed(unknown)}; leave it out"
            )

    def render(self, chats: Sequence[tuple[Messages, bool]]) -> list[Rendering]:
        """The text of each chat; True asks for the prompt of a further answer behind it.

        A rendering that takes too much time or memory ends its process, and is an error like those of the template.
        UserError where no process can start in its place.
        """
        found: list[Rendering] = []
        while len(found) < len(chats):
            ahead = chats[len(found) : len(found) + _AT_ONCE]
            with self._lock:
                found += self._render(ahead[: _fitting(ahead)])
        return found

    def _render(self, chats: Sequence[tuple[Messages, bool]]) -> list[Rendering]:
        """The first of these: all of them, or up to one that ended the process."""
        if self._process is None and "reads" not in (said := self._start()):
            return [Rendering(**said)]
        self._send(chats)
        found: list[Rendering] = []
        while len(found) < len(chats) and self._process:
            found.append(Rendering(**self._receive()))
        return found

    def _start(self) -> dict[str, Any]:
        """Starts the process; what it says of the template. UserError where it cannot start."""
        command = [sys.executable, str(_WORKER), str(os.getpid())]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,  # read with the answers, so that it cannot fill up
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise _no_start(error.strerror or str(error)) from error
        except MemoryError as error:  # of Popen's own, before the system refuses
            raise _no_start("no memory") from error
        self._process, self._end = process, weakref.finalize(self, _end, process, os.getpid())
        if "error" in (said := self._receive()):
            raise _no_start(said["error"])
        self._send(self._first)
        return self._receive()

    def _send(self, said: Any) -> None:
        """A line to the process, which reads all of it before it answers."""
        assert self._process and self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it ended: no answer will come
            self._process.stdin.write(json.dumps(said) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        """Its next answer; where it ended without one, why."""
        assert self._process and self._process.stdout
        words = ""
        for line in self._process.stdout:
            if line.startswith("{") and line.endswith("\n"):
                return json.loads(line)
            words = line.strip() or words  # of Python, on its error stream
        process, self._process = self._process, None
        self._end()
        return {"error": _why_ended(process.returncode, words, self._seconds)}


def _fitting(chats: Sequence[tuple[Messages, bool]]) -> int:
    """How many of the first chats go into one line."""
    total = 0
    for number, (messages, _) in enumerate(chats):
        total += sum(len(message["content"]) for message in messages)
        if number and total > _MOST_AT_ONCE:
            return number
    return len(chats)


def _why_ended(status: int, words: str, seconds: float) -> str:
    """Why a process ended that should have answered: by its status and its last words."""
    if "MemoryError" in words:
        return "it took too much memory"
    if status == -signal.SIGPROF:
        return f"it took more than {seconds:g} s to be rendered"
    if status == -signal.SIGKILL:
        return "its process was killed, as the system does where memory is short"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}" + (f" and {shown(words)}" if words else "")


def _no_start(why: str) -> UserError:
    """Of a process that cannot render anything."""
    return UserError(
        f"expected a process that renders chat templates ({sys.executable}), found that it cannot start: {why}; it "
        "needs the package jinja2, and no limit (ulimit -v, -u) below what Python takes"
    )


def _end(process: subprocess.Popen[str], owner: int) -> None:
    """Ends a process that renders; not in a fork of the process that started it."""
    if os.getpid() != owner:
        return
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # of what it had not read
        process.communicate()
