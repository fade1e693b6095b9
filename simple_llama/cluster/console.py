"""Where the logger writes: rank 0 to the console and to the run's train.log, others only errors; progress bars.

The log of a run begins with what was said before it was opened, the data's line among it.

Messages go to stdout and progress bars to stderr, so `> run.txt` keeps the messages and shows the bar.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.files import append_to
from simple_llama.common.logging import LOGGER

Item = TypeVar("Item")
_bars: dict[str, tqdm] = {}  # the last one of each name
_MOST_KEPT = 1000  # messages before the log is opened; a start says some tens


class _ConsoleHandler(logging.Handler):
    """Prints a message above any progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
        except (OSError, ValueError, TypeError):  # as logging does: a closed console must not end the run
            self.handleError(record)


class _Keeper(logging.Handler):
    """Keeps messages for a log that is opened later."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[logging.LogRecord] = deque(maxlen=_MOST_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)


def set_up_log(path: str | os.PathLike[str] | None, ranks: Ranks) -> None:
    """Sets the program's logger up for this rank, in place of any set-up before.

    Args:
        path: file to append to (its folder is made), or None for the console only. Used on rank 0. A file that follows
            the console gets what was said there too.
        ranks: rank 0 shows everything from INFO; the others show only errors, with the rank's number in front.

    Raises:
        UserError: the log file cannot be opened.
    """
    keepers = (handler for handler in LOGGER.handlers if isinstance(handler, _Keeper))
    said = [record for keeper in keepers for record in keeper.kept] if path is not None else []
    _close_log()
    console = _ConsoleHandler()
    LOGGER.addHandler(console)
    if not ranks.is_main:
        LOGGER.setLevel(logging.ERROR)
        console.setFormatter(logging.Formatter(f"[rank {ranks.rank}] %(levelname)s %(message)s"))
        return
    LOGGER.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    file = _Keeper() if path is None else _file_handler(Path(path))
    for record in said:
        file.handle(record)
    LOGGER.addHandler(file)


def _close_log() -> None:
    """Bring the program's logger back to how import left it, and close the log file."""
    LOGGER.setLevel(logging.NOTSET)
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()


def progress(iterable: Iterable[Item], total: int | None, desc: str, ranks: Ranks | None = None) -> Iterable[Item]:
    """`iterable` with a progress bar of `total` steps, with rate and remaining time, on rank 0's terminal; untouched on
    other ranks and in files.

    Args:
        total: None: not known before, so only counted.
        ranks: None: shown where the log shows what is no error, as it does on rank 0.
    """
    is_main = ranks.is_main if ranks else LOGGER.isEnabledFor(logging.INFO)
    if not (is_main and sys.stderr.isatty()):
        return iterable
    bar = tqdm(iterable, total=total, desc=desc, dynamic_ncols=True, file=sys.stderr)
    _bars[desc] = bar
    return bar


def note_on_bar(desc: str, words: str) -> None:
    """Shows a few words behind the bar of that name, where there is one."""
    if desc in _bars:
        _bars[desc].set_postfix_str(words)


class _LogFile(logging.FileHandler):
    """Appends, since a resumed run goes on in the same log. A line that the disk does not take ends no run: it is said
    once on stderr, and the lines that follow are tried."""

    failed = False

    def _open(self) -> TextIOWrapper:
        return append_to(self.baseFilename)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            with contextlib.suppress(OSError):
                print(
                    f"{_cannot_write(self.baseFilename, error)}; until then it lacks lines", file=sys.stderr, flush=True
                )

    def close(self) -> None:
        with contextlib.suppress(OSError):  # said when the line came
            super().close()


def _file_handler(path: Path) -> logging.FileHandler:
    """What writes train.log."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def _cannot_write(path: str | os.PathLike[str], error: OSError) -> str:
    """Which file, and why."""
    return f"cannot write the log {path}: {error.strerror or error}; free space or choose another log_dir"
