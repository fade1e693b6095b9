"""TensorBoard's file of a run, written where it is called: torch's SummaryWriter leaves it to a thread, which dies of a
full disk with a traceback of its own, and says so to the run only later."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, histogram, hparams, scalar, text

_VERSION = "brain.Event:2"  # of the format
_BINS = 30  # of a histogram


class EventFile:
    """A file of events, buffered until `flush`. An OSError of the disk comes out of the call that meets it."""

    def __init__(self, folder: Path, purge_step: int):
        """Makes a file of its own in `folder`. Points from `purge_step` on in older files are hidden by TensorBoard."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        path = next(path for number in count() if not (path := folder / f"{name}.{number}").exists())
        self._file = path.open("xb")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version=_VERSION))
        self._add(Event(file_version=_VERSION, step=purge_step))
        self._add(Event(session_log=SessionLog(status=SessionLog.START), step=purge_step))
        self.flush()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._add(Event(summary=scalar(name, value), step=step))

    def add_text(self, name: str, markdown: str, step: int) -> None:
        """A page of the text tab."""
        self._add(Event(summary=text(name, markdown), step=step))

    def add_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """How finite values are spread (`values` is not empty)."""
        self._add(Event(summary=histogram(name, values, _BINS), step=step))

    def add_layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """The page of charts of several curves each: names of curves by charts by groups of charts."""
        layout = {
            group: {title: ["Multiline", list(names)] for title, names in of_group.items()}
            for group, of_group in charts.items()
        }
        self._add(Event(summary=custom_scalars(layout), step=0))

    def add_hparams(self, settings: Mapping[str, bool | float | str], curves: Sequence[str]) -> None:
        """The run as a line of the table of runs: its settings, and the last points of these curves."""
        experiment, start, _ = hparams(dict(settings), dict.fromkeys(curves))
        for summary in (experiment, start):
            self._add(Event(summary=summary, step=0))

    def add_end(self) -> None:
        """That the run of the table is done."""
        _, _, end = hparams({}, {})
        self._add(Event(summary=end))

    def flush(self) -> None:
        """Gives all events to the system."""
        self._file.flush()

    def close(self) -> None:
        """Gives all events to the system and ends; called again it does nothing."""
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
