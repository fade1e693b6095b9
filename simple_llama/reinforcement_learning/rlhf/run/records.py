"""What a run writes while it goes: curves in metrics.jsonl and TensorBoard, sample answers, lines of the log."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write
from simple_llama.common.logging import LOGGER

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
    """Drops the lines of a .jsonl file that lie beyond `step`, and a last line that a kill cut short.

    Not `evaluated`: what an evaluation wrote at `step` goes too, for it is made again.
    """
    if not path.exists():
        return
    kept = []
    with writes(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            record = json.loads(line)
            again = record["step"] == step and not evaluated and "loss" not in record
            if record["step"] <= step and not again:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            break
    atomic_write(path, "".join(kept).encode())


def _append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line to a .jsonl file. UserError where the disk does not take it; `rewind` drops half a line."""
    with writes(path), path.open("a") as file:
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


class RunWriter:
    """metrics.jsonl and TensorBoard events of a run, on rank 0; elsewhere every call does nothing.

    Starting after step `done` (-1: nothing) drops what an earlier try wrote beyond it, so that each step stands once.
    """

    def __init__(self, folder: Path, is_main: bool, done: int = -1, evaluated: bool = True):
        self.is_main = is_main
        if not is_main:
            return
        self.path = folder / "metrics.jsonl"
        rewind(self.path, done, evaluated)
        with writes(folder):
            self.board = SummaryWriter(str(folder), purge_step=done + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl and one point of each curve at optimizer step `step`."""
        if not self.is_main:
            return
        _append_record(self.path, {"step": step, **values})
        with writes(self.path.parent):
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a page of TensorBoard's text tab."""
        if self.is_main:
            with writes(self.path.parent):
                self.board.add_text(name, markdown, step)

    def flush(self) -> None:
        """Brings the events to disk."""
        if self.is_main:
            with writes(self.path.parent):
                self.board.flush()

    def close(self) -> None:
        """Brings the events to disk and ends. No error: it may be one that ends the run."""
        if self.is_main:
            try:
                self.board.close()
            except OSError as error:
                LOGGER.warning("curves in %s lack their end: %s", self.path.parent, error.strerror or error)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Lines of samples.jsonl: {step, prompts, answers}; the first one is the start model's."""
    path = folder / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_samples(folder: Path, step: int, prompts: list[str], answers: list[str]) -> None:
    """Adds a line to samples.jsonl."""
    _append_record(folder / "samples.jsonl", {"step": step, "prompts": prompts, "answers": answers})
