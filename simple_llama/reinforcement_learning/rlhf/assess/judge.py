"""A command that says which of two answers is better: lines of JSON to it, lines of JSON from it.

    {"id": "0", "prompt": "...", "a": "...", "b": "..."}   to its stdin
    {"id": "0", "better": "a"}                              from its stdout: "a", "b" or "tie", in any order

Each question is put twice, with the answers changing places: a verdict that goes by the place counts as a tie.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.distributed import Ranks, broadcast_object, fail_together
from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.logging import LOGGER

_MOST_LINE = 1 << 20  # characters
_TURN_S = 1.0  # between two looks of the ranks at the judge
_END_S = 10.0  # that it has to end in, once it has answered all
_WORDS = ("a", "b", "tie")
_Words = bytes | None  # a line, or the end


class Duel(NamedTuple):
    """Two answers to one prompt."""

    prompt: str
    ours: str
    theirs: str


class Verdict(NamedTuple):
    """What the judge said of one duel."""

    score: float  # 1: ours is better, 0: theirs, 1/2: a tie
    flipped: bool  # the two orders had opposite verdicts


def judge_all(command: str, duels: Sequence[Duel], timeout_s: float, ranks: Ranks) -> list[Verdict]:
    """The verdicts, the same on all ranks (collective): rank 0 runs the command, once; its stderr passes through.

    Duels whose answers are the same text are ties, and not put to it. Raises UserError for a command that cannot be
    run, ends early, is silent for `timeout_s`, or answers anything else; Stopped on request.
    """
    asked = [number for number, duel in enumerate(duels) if duel.ours != duel.theirs]
    job = _Job(command, _lines(duels, asked), timeout_s) if ranks.is_main and asked else None
    try:
        while broadcast_object(job is not None and not job.is_done(), ranks, bool):
            watchdog.beat("the judge")
            stopping.agree(ranks, at_once=True)
    finally:
        if job:
            job.end()
    words: dict[str, str] = {}
    with fail_together(ranks):
        if job:
            words = job.result()
    words = broadcast_object(words, ranks, dict[str, str])
    LOGGER.info("judge: %d of %d pairs of answers differ and were judged, each in both orders", len(asked), len(duels))
    scores = {number: _score(words[f"{number}-ab"], words[f"{number}-ba"]) for number in asked}
    return [scores.get(number, Verdict(0.5, False)) for number in range(len(duels))]


def _score(first: str, second: str) -> Verdict:
    """Of the verdicts with ours as a, and with ours as b. A tie and a winner is the winner's by half."""
    ours = {"a": 1.0, "tie": 0.5, "b": 0.0}[first]
    again = {"b": 1.0, "tie": 0.5, "a": 0.0}[second]
    return Verdict((ours + again) / 2, abs(ours - again) == 1)


def _lines(duels: Sequence[Duel], asked: Sequence[int]) -> list[bytes]:
    """What the judge is told: first all duels with ours as a, then all with ours as b."""
    found = []
    for order in ("ab", "ba"):
        for number in asked:
            prompt, a, b = duels[number]
            if order == "ba":
                a, b = b, a
            found.append(json.dumps({"id": f"{number}-{order}", "prompt": prompt, "a": a, "b": b}).encode() + b"\n")
    return found


class _Job:
    """The command, running beside this process."""

    def __init__(self, command: str, lines: Sequence[bytes], timeout_s: float):
        self.command, self.timeout_s = command, timeout_s
        self.wanted = {json.loads(line)["id"] for line in lines}
        self.words: dict[str, str] = {}
        self.error: UserError | None = None
        self.heard: queue.Queue[_Words] = queue.Queue()
        self.number, self.heard_at, self.ended_at = 0, time.monotonic(), 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.threads: list[threading.Thread] = []
        try:
            self.process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except (OSError, ValueError) as error:  # ValueError: quotes that do not close
            self.error = UserError(f"judge: cannot run {command!r}: {error}")
            return
        self.threads = [
            threading.Thread(target=self._tell, args=(self.process, lines), daemon=True),
            threading.Thread(target=self._listen, args=(self.process,), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def is_done(self) -> bool:
        """Takes in what was said within a moment; whether nothing more is to come."""
        if self.error or self.process is None:
            return True
        until = time.monotonic() + _TURN_S
        try:
            while (left := until - time.monotonic()) > 0 and not self.ended_at:
                self._hear(self.heard.get(timeout=left))
        except queue.Empty:
            pass
        except UserError as error:
            self.error = error
        silent = time.monotonic() - self.heard_at
        if len(self.words) == len(self.wanted) and silent > _END_S:
            self.ended_at = time.monotonic()  # all is said; `end` ends what stays
        if not (self.error or self.ended_at) and silent > self.timeout_s:
            self.error = UserError(
                f"judge: expected an answer within {self.timeout_s:g} s (judge_timeout_s), found none; it had answered "
                f"{len(self.words)} of {len(self.wanted)} questions"
            )
        return bool(self.error or self.ended_at)

    def result(self) -> dict[str, str]:
        """Its verdicts by id. UserError where something went wrong."""
        if self.error:
            raise self.error
        return self.words

    def end(self) -> None:
        """No process of it stays behind."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for thread in self.threads:
            thread.join(_TURN_S)
        if not any(thread.is_alive() for thread in self.threads):  # else a process that left the group has the pipes
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _hear(self, line: _Words) -> None:
        """Takes in one line, or the end."""
        if line is None:
            self._close()
            return
        self.number += 1
        if not line.strip():
            return  # no answer, and no sign of one
        self.heard_at = time.monotonic()
        name, better = _verdict(line, self.number)
        if name not in self.wanted or name in self.words:
            problem = "an id that was answered before" if name in self.words else "an id that was not asked"
            raise UserError(
                f"judge: answer {self.number}: expected the id of a question, found {problem}: {shown(name)}"
            )
        self.words[name] = better

    def _close(self) -> None:
        """UserError unless it has answered all, and ends well."""
        assert self.process is not None
        try:
            status = self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            status = 0  # it has closed its output and may tidy up; `end` ends it
        missing = len(self.wanted) - len(self.words)
        if missing or status:
            raise UserError(
                f"judge: expected {len(self.wanted)} answers and status 0, found {len(self.words)} answers and status "
                f"{status} of {self.command!r}"
            )
        self.ended_at = time.monotonic()

    def _tell(self, process: subprocess.Popen[bytes], lines: Sequence[bytes]) -> None:
        """Writes all questions; what it does not read is its own affair."""
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            for line in lines:
                process.stdin.write(line)
                process.stdin.flush()
        with contextlib.suppress(OSError, ValueError):
            process.stdin.close()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Hands on its lines, then the end."""
        assert process.stdout is not None
        for line in _bounded(process):
            self.heard.put(line)
        self.heard.put(None)


def _bounded(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Lines of a process, cut where they are longer than any answer."""
    assert process.stdout is not None
    with contextlib.suppress(OSError, ValueError):
        while line := process.stdout.readline(_MOST_LINE):
            yield line


def _verdict(line: bytes, number: int) -> tuple[str, str]:
    """The id and the word in a line. UserError for anything else."""
    expected = f'judge: answer {number}: expected {{"id": ..., "better": "a", "b" or "tie"}}'
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise UserError(f"{expected}, found {shown(line.decode(errors='replace').rstrip())}") from None
    name, better = (found.get("id"), found.get("better")) if isinstance(found, dict) else (None, None)
    if not isinstance(name, str) or better not in _WORDS:
        raise UserError(f"{expected}, found {shown(found)}")
    return name, better
