"""One logger for the whole program: rank 0 writes to the console and to the run's train.log, others only errors.

Messages go to stdout and progress bars to stderr, so `> run.txt` keeps the messages and shows the bar.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from simple_llama.common.errors import UserError

if TYPE_CHECKING:
    from simple_llama.common.distributed import Ranks

Item = TypeVar("Item")

LOGGER = logging.getLogger("simple_llama")  # until it is set up, Python shows only warnings, on stderr


class _ConsoleHandler(logging.Handler):
    """Prints a message above any progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
        except (OSError, ValueError, TypeError):  # as logging does: a closed console must not end the run
            self.handleError(record)


def get_logger(run_log_path: str | os.PathLike[str] | None = None, ranks: Ranks | None = None) -> logging.Logger:
    """The program's logger. With `ranks` it is first set up for this rank, in place of any set-up before.

    Args:
        run_log_path: file to append to (its folder is made), or None for the console only. Used on rank 0.
        ranks: rank 0 shows everything from INFO; the others show only errors, with the rank's number in front.

    Raises:
        UserError: the log file cannot be opened.
    """
    if ranks is None:
        return LOGGER
    close_logger()
    console = _ConsoleHandler()
    LOGGER.addHandler(console)
    if not ranks.is_main:
        LOGGER.setLevel(logging.ERROR)
        console.setFormatter(logging.Formatter(f"[rank {ranks.rank}] %(levelname)s %(message)s"))
        return LOGGER
    LOGGER.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    if run_log_path is not None:
        LOGGER.addHandler(_file_handler(Path(run_log_path)))
    return LOGGER


def close_logger() -> None:
    """Bring the program's logger back to how import left it, and close the log file."""
    LOGGER.setLevel(logging.NOTSET)
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()


def progress(iterable: Iterable[Item], total: int, desc: str, ranks: Ranks) -> Iterable[Item]:
    """`iterable` with a progress bar of `total` steps on rank 0's terminal; untouched on other ranks and in files."""
    if not (ranks.is_main and sys.stderr.isatty()):
        return iterable
    return tqdm(iterable, total=total, desc=desc, dynamic_ncols=True, file=sys.stderr)


def _file_handler(path: Path) -> logging.FileHandler:
    """Appends, since a resumed run goes on in the same log."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the log {path}: {error.strerror or error}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler
