"""What a run writes while it goes: metrics.jsonl, and what is shown of it; sample answers, lines of the log."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.files import append_to, atomic_path, open_file
from simple_llama.common.logging import LOGGER
from simple_llama.common.settings import Settings
from simple_llama.reinforcement_learning.rlhf.run.board import Board

WARNINGS = "warnings.jsonl"

_MOST_IN_A_LINE = 64 << 20  # bytes: sample answers of a run's prompts are far shorter
_MOST_BYTES = 16 << 30  # of a file: some ten million lines
_MOST_READ = 1 << 30  # bytes of a file whose records are all held at once
_MOST_NAMED = 10  # damaged lines named in a warning

# Metrics of a line of train.log, and how each is shown.
_LOGGED = {
    "loss": "loss %.4f",
    "rewards/accuracies": "accuracy %.3f",
    "rewards/margins": "margin %.4f",
    "grad_norm": "grad norm %.3f",
    "learning_rate": "lr %.3g",
    "perf/pairs_per_second": "%.2f pairs/s",
}


def log_line(head: str, values: dict[str, float], prefix: str = "") -> None:
    """One line of train.log: the metrics of `values` that it shows, whose names begin with `prefix`."""
    parts = [form % values[prefix + name] for name, form in _LOGGED.items() if prefix + name in values]
    LOGGER.info("%s  %s", head, "  ".join(parts))


def rewind(path: Path, step: int, evaluated: bool = True) -> None:
    """Drops the lines of a .jsonl file that lie beyond `step`, and a last line that a kill cut short. A line that is
    damaged goes too, by itself and with a warning.

    Not `evaluated`: what an evaluation wrote at `step` goes too, for it is made again.
    """
    if not os.path.lexists(path):
        return
    damaged: list[int] = []

    def stays(number: int, line: bytes) -> bool:
        record = _record(line)
        if record is None:
            if line.endswith(b"\n"):
                damaged.append(number)
            return False
        again = record["step"] == step and not evaluated and "loss" not in record
        return record["step"] <= step and not again

    with writes(path), _open_bounded(path) as file, atomic_path(path) as temp, temp.open("wb") as kept:
        for number, line in enumerate(_bounded_lines(file), 1):
            if stays(number, line):
                kept.write(line if line.endswith(b"\n") else line + b"\n")
    if damaged:
        LOGGER.warning("%s: damaged lines dropped: %s", path, _counted(damaged))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file of a run, in order; none where there is no file.

    Damaged lines are left out with a warning, a last line that is being written, or that a kill cut short, without one.
    UserError for a file that cannot be read, or of more than 1 GiB.
    """
    if not os.path.lexists(path):
        return []
    found: list[dict[str, Any]] = []
    damaged: list[int] = []
    try:
        with _open_bounded(path, _MOST_READ) as file:
            for number, line in enumerate(_bounded_lines(file), 1):
                if record := _record(line):
                    found.append(record)
                elif line.endswith(b"\n"):
                    damaged.append(number)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if damaged:
        LOGGER.warning("%s: damaged lines left out: %s", path, _counted(damaged))
    return found


def _counted(damaged: list[int]) -> str:
    """How many lines are damaged, and the first of them."""
    lines = ", ".join(map(str, damaged[:_MOST_NAMED])) + ("" if len(damaged) <= _MOST_NAMED else ", ...")
    return f"{len(damaged)}, all others stay: line {lines}"


def _open_bounded(path: Path, most: int = _MOST_BYTES) -> BinaryIO:
    """A file that may be read to its end."""
    file = open_file(path)
    if os.fstat(file.fileno()).st_size <= most:
        return file
    file.close()
    raise OSError(errno.EFBIG, f"expected at most {most:,} bytes, found more")


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long its beginning, which is no record."""
    while line := file.readline(_MOST_IN_A_LINE):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(_MOST_IN_A_LINE)):
            line = line[:1] + rest[-1:]  # too long: nothing of it is kept
        yield line


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is damaged."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):  # no UTF-8, no JSON, numbers of thousands of digits, lists without end
        return None
    return found if isinstance(found, dict) and type(found.get("step")) is int else None


def _append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line to a .jsonl file. UserError where the disk does not take it; `rewind` drops half a line."""
    with writes(path), append_to(path) as file:
        file.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def writes(path: Path) -> Iterator[None]:
    """Makes the body's OSError (a full disk) a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another log_dir, then --resume"
        ) from error


class Tracker(Protocol):
    """Another place that metrics go to (trackers.py)."""

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Hands one line of metrics over, once it is in metrics.jsonl."""
        ...

    def close(self, done: bool) -> None:
        """No more comes; `done`: the run is finished."""
        ...


class RunWriter:
    """metrics.jsonl, TensorBoard events and trackers of a run, on rank 0; elsewhere every call does nothing.

    Starting after step `done` (-1: nothing) drops what an earlier try wrote beyond it, so that each step stands once.
    """

    def __init__(
        self,
        folder: Path,
        is_main: bool,
        done: int = -1,
        evaluated: bool = True,
        settings: Settings | None = None,
        trackers: Sequence[Tracker] = (),
        on_board: bool = True,
    ):
        """Args: settings: of the run, for TensorBoard's table of runs. on_board: whether TensorBoard has the run."""
        self.is_main = is_main
        if not is_main:
            return
        self.path, self.trackers, self.done = folder / "metrics.jsonl", trackers, False
        rewind(self.path, done, evaluated)
        with writes(folder):
            self.board = Board(folder, purge_step=done + 1, settings=settings) if on_board else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl and one point of each curve at optimizer step `step`."""
        if not self.is_main:
            return
        _append_record(self.path, {"step": step, **values})
        with writes(self.path.parent):
            if self.board:
                self.board.scalars(step, values)
            for tracker in self.trackers:
                tracker.send(step, values)

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Shows how numbers are spread at optimizer step `step`, by name."""
        if self.is_main and self.board:
            with writes(self.path.parent):
                self.board.histograms(step, values)

    def sample(self, step: int, index: int, prompt: str, before: str, after: str) -> None:
        """Shows a prompt with the start model's answer and the policy's."""
        if self.is_main and self.board:
            with writes(self.path.parent):
                self.board.sample(step, index, prompt, before, after)

    def text(self, step: int, name: str, parts: Sequence[tuple[str, str]]) -> None:
        """Writes a page of TensorBoard's text tab: paragraphs, each a head and a text."""
        if self.is_main and self.board:
            with writes(self.path.parent):
                self.board.text(step, name, parts)

    def flush(self) -> None:
        """Brings the events to disk."""
        if self.is_main and self.board:
            with writes(self.path.parent):
                self.board.file.flush()

    def end(self) -> None:
        """Notes that the run is done."""
        if self.is_main:
            self.done = True
            if self.board:
                with writes(self.path.parent):
                    self.board.file.add_end()

    def close(self) -> None:
        """Brings the events to disk and ends. No error: it may be one that ends the run."""
        if not self.is_main:
            return
        try:
            if self.board:
                self.board.file.close()
        except OSError as error:
            LOGGER.warning("curves in %s lack their end: %s", self.path.parent, error.strerror or error)
        for tracker in self.trackers:
            tracker.close(self.done)


def first_answers(folder: Path) -> list[str]:
    """The start model's answers, in the order of the prompts: of the first line of samples.jsonl, where that is of
    step 0."""
    path = folder / "samples.jsonl"
    if not os.path.lexists(path):
        return []
    with writes(path), open_file(path) as file:
        record = _record(next(_bounded_lines(file), b"")) or {}
    answers = record.get("answers")
    if record.get("step") != 0 or not isinstance(answers, list):
        return []
    return [answer for answer in answers if isinstance(answer, str)]


def append_samples(folder: Path, step: int, prompts: list[str], answers: list[str]) -> None:
    """Adds a line to samples.jsonl."""
    _append_record(folder / "samples.jsonl", {"step": step, "prompts": prompts, "answers": answers})


def append_warning(folder: Path, step: int, level: str, name: str, text: str) -> None:
    """Adds a line to the file of warnings."""
    _append_record(folder / WARNINGS, {"step": step, "level": level, "name": name, "text": text})
