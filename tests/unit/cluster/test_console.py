"""Rank 0 writes to the console and train.log, the others only errors; bars only on a terminal."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simple_llama.cluster.console import _close_log, note_on_bar, progress, set_up_log
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER


def ranks(rank: int) -> Ranks:
    """One of two ranks."""
    return Ranks(rank, 2, rank, 2, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Leave the program's logger as it was."""
    yield
    _close_log()


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_rank_0_writes_console_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A message reaches stdout and the file, once each; stderr stays free for bars."""
    log = tmp_path / "runs" / "train.log"
    set_up_log(log, ranks(0))
    LOGGER.info("kept %d pairs", 7)
    console = capsys.readouterr()
    assert console.out.count("INFO kept 7 pairs") == 1 and console.err == ""
    assert log.read_text().count("INFO kept 7 pairs") == 1


def test_other_ranks_show_only_errors_and_write_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What every rank would say is said once; an error says which rank it is from."""
    set_up_log(tmp_path / "train.log", ranks(1))

    LOGGER.warning("said by rank 0 too")
    LOGGER.error("mine")
    assert capsys.readouterr().out == "[rank 1] ERROR mine\n"
    assert not (tmp_path / "train.log").exists()


def test_setting_up_twice_does_not_double_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second set-up replaces the first; without arguments nothing changes; the file is appended to."""
    set_up_log(tmp_path / "train.log", ranks(0))
    LOGGER.info("first")
    set_up_log(tmp_path / "train.log", ranks(0))
    LOGGER.info("second")
    assert capsys.readouterr().out.count("second") == 1
    assert [line.split()[-1] for line in (tmp_path / "train.log").read_text().splitlines()] == ["first", "second"]


def test_the_log_begins_with_what_was_said_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once on the console and once in the file, in order; another job in the same process does not get it."""
    set_up_log(None, ranks(0))
    LOGGER.info("of a job that ended")
    set_up_log(None, ranks(0))
    LOGGER.warning("data %d", 1)
    set_up_log(tmp_path / "train.log", ranks(0))
    LOGGER.info("run")
    said = capsys.readouterr().out
    assert [said.count(word) for word in ("WARNING data 1", "run")] == [1, 1]
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["WARNING data 1", "INFO run"]


def test_import_adds_no_handlers() -> None:
    """Importing does nothing; closing brings that state back."""
    _close_log()
    assert LOGGER.handlers == [] and LOGGER.level == logging.NOTSET and LOGGER is logging.getLogger("simple_llama")


def test_an_unwritable_log_is_a_user_error(tmp_path: Path) -> None:
    """A folder has the log's name."""
    with pytest.raises(UserError, match=r"cannot write the log .*: Is a directory"):
        set_up_log(tmp_path, ranks(0))


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full takes no byte: one line on stderr, no traceback a message, and closing is no error."""
    log = tmp_path / "train.log"
    set_up_log(log, ranks(0))
    handler = next(handler for handler in LOGGER.handlers if isinstance(handler, logging.FileHandler))
    assert handler.stream is not None
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), handler.stream.fileno())
    for _ in range(2):
        LOGGER.info("a line")
    _close_log()
    expected = f"cannot write the log {log}: No space left on device; free space or choose another log_dir"
    assert capsys.readouterr().err == f"{expected}; until then it lacks lines\n"


def test_a_pipe_is_no_log(tmp_path: Path) -> None:
    """Nobody reads it, so opening it would wait for ever."""
    os.mkfifo(tmp_path / "train.log")
    with pytest.raises(UserError, match="cannot write the log .*train.log: expected a file, found a pipe"):
        set_up_log(tmp_path / "train.log", ranks(0))


def test_no_bar_in_a_file_or_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iterable comes back as it is: rank 0 with stderr in a file, rank 1 on a terminal."""
    items = [1, 2]
    assert progress(items, 2, "pairs", ranks(0)) is items
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert progress(items, 2, "pairs", ranks(1)) is items


def test_a_bar_has_words_behind_it_and_no_total_where_none_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and accuracy of the last line stand behind the bar of that name, and nowhere where there is none. Without
    ranks a bar is shown where the log is: not before it is set up, and not on rank 1."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    items = [1, 2]
    assert progress(items, None, "reading") is items
    set_up_log(None, ranks(1))
    assert progress(items, None, "reading") is items
    set_up_log(None, ranks(0))
    note_on_bar("no such bar", "loss 1.0")
    for _ in progress(iter(items), None, "reading"):
        note_on_bar("reading", "loss 0.5")
    assert "reading: 2it" in terminal.getvalue() and "loss 0.5" in terminal.getvalue()
    assert "loss 1.0" not in terminal.getvalue()


def test_a_message_does_not_break_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal the bar goes to stderr with its name; a message in between goes whole to stdout."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    set_up_log(None, ranks(0))

    for item in progress([1, 2], 2, "pairs", ranks(0)):
        LOGGER.info("item %d", item)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("INFO ")[1] for line in lines] == ["item 1", "item 2"]
    assert "pairs" in terminal.getvalue() and "2/2" in terminal.getvalue()
