"""Other places that a run's metrics go to, by the libraries of these: Weights & Biases, MLflow; and a CSV file.

metrics.jsonl has all of it, whatever becomes of a tracker: one that cannot be reached is said once, keeps what it could
not send, tries again now and then, and ends no run.
"""

from __future__ import annotations

import csv
import io
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import append_to, atomic_write, atomic_write_json, read_json, shown
from simple_llama.common.logging import LOGGER
from simple_llama.common.settings import Settings
from simple_llama.reinforcement_learning.rlhf.run.records import Tracker, read_records

TENSORBOARD = "tensorboard"
_PROJECT = "simple-llama-dpo"  # at a tracker, unless its own variable names another
_NAMES = "trackers.json"  # in the run's folder: how each tracker calls the run, for a resume
_FIRST_WAIT_S, _LONGEST_WAIT_S = 30.0, 1800.0  # between two tries to reach a tracker
_MOST_UNSENT = 100_000  # lines of metrics
_MLFLOW = {  # what its client reads: it would try for minutes while training stands still, and refuse a folder
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}


@dataclass(frozen=True)
class TrackerConfig(Settings):
    """Where metrics go to beside metrics.jsonl."""

    # === Trackers ===
    log_to: Annotated[
        str,
        Doc(
            "where curves go to beside metrics.jsonl, separated by commas: tensorboard, csv, and wandb or mlflow where "
            "they are installed (WANDB_MODE=offline and MLFLOW_TRACKING_URI are theirs)"
        ),
    ] = TENSORBOARD

    def check_rules(self) -> None:
        """UserError for a tracker that there is not."""
        for name in tracker_names(self):
            if name not in (TENSORBOARD, *_TRACKERS):
                raise UserError(
                    f"log_to: expected some of {', '.join((TENSORBOARD, *_TRACKERS))}, separated by commas, found "
                    f"{shown(name)}"
                )


def tracker_names(config: TrackerConfig) -> tuple[str, ...]:
    """The names in `log_to`, each once."""
    return tuple(dict.fromkeys(name.strip() for name in config.log_to.split(",") if name.strip()))


class _CSVFile:
    """metrics.csv: a row a line of metrics.jsonl, columns in the order in which they come; a cell may be empty."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any], names: dict[str, str]):
        self.path, self.source = folder / "metrics.csv", folder / "metrics.jsonl"
        self.columns: list[str] = []  # none before the first row: then all that is there is written anew

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row; with a column that is not there yet the whole file is written anew, from metrics.jsonl."""
        if set(values) - set(self.columns):
            self._write_again()
            return
        with append_to(self.path) as file:
            file.write(self._rows([{"step": step, **values}]))

    def close(self, done: bool) -> None:
        """Nothing is held back."""

    def _write_again(self) -> None:
        records = read_records(self.source)
        self.columns = list(dict.fromkeys(["step", *(name for record in records for name in record)]))
        header = self._rows([{name: name for name in self.columns}])
        atomic_write(self.path, (header + self._rows(records)).encode())

    def _rows(self, records: list[dict[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(records)
        return text.getvalue()


class _WandB:
    """A run of Weights & Biases; it sends in a process of its own. A resumed run goes on under the same id."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any], names: dict[str, str]):
        import wandb  # pyright: ignore[reportMissingImports]

        known = names.get("wandb") or secrets.token_hex(4)
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self.run = wandb.init(
            project=project, name=run, id=known, resume="allow", dir=str(folder), config=dict(settings)
        )
        names["wandb"] = known
        self.run.define_metric("*", step_metric="step")  # by ours: a resumed run makes steps once more

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)


class _MLflow:
    """A run of MLflow, wherever MLFLOW_TRACKING_URI leads. A resumed run goes on under the same id."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any], names: dict[str, str]):
        for name, value in _MLFLOW.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self.client, self.metric = MlflowClient(), Metric
        if "mlflow" not in names:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self.client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self.client.create_experiment(project)
            names["mlflow"] = self.client.create_run(experiment, run_name=run).info.run_id
            params = [Param(name, str(value)[:500]) for name, value in settings.items()]
            self.client.log_batch(names["mlflow"], params=params)
        self.id = names["mlflow"]
        self.client.update_run(self.id, status="RUNNING")

    def send(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(name, float(value), now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def close(self, done: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if done else "KILLED")


_TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], dict[str, str]], Tracker]] = {
    "csv": _CSVFile,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


class _Remote:
    """A tracker that may be out of reach: what it could not be given is kept and given later, in order."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self.name, self.make = name, make
        self.tracker: Tracker | None = None
        self.unsent: list[tuple[int, dict[str, float]]] = []
        self.dropped = 0  # lines for which there was no room among these
        self.wait_s, self.next_try = _FIRST_WAIT_S, 0.0
        self.said = False
        self._try(self._deliver)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Gives the tracker what it has not got, if it is time for a try."""
        if len(self.unsent) < _MOST_UNSENT:
            self.unsent.append((step, dict(values)))
        else:
            self.dropped += 1
        if time.monotonic() >= self.next_try:
            self._try(self._deliver)

    def close(self, done: bool) -> None:
        """A last try."""

        def end() -> None:
            self._deliver()
            if self.tracker:
                self.tracker.close(done)

        self._try(end)
        if missing := len(self.unsent) + self.dropped:
            LOGGER.warning("%s: lines of metrics that could not be sent: %d", self.name, missing)

    def _deliver(self) -> None:
        self.tracker = self.tracker or self.make()
        while self.unsent:
            self.tracker.send(*self.unsent[0])
            del self.unsent[0]

    def _try(self, what: Callable[[], None]) -> None:
        """Does it; what the tracker's library raises, of whatever kind, is said once."""
        try:
            what()
            self.wait_s = _FIRST_WAIT_S
        except Exception as error:  # noqa: BLE001 - a tracker must not end a run, and libraries raise what they like
            self.next_try = time.monotonic() + self.wait_s
            self.wait_s = min(2 * self.wait_s, _LONGEST_WAIT_S)
            if not self.said:
                reason = (str(error).splitlines() or [""])[0][:200]
                LOGGER.warning(
                    "%s: %s: %s; the run goes on, metrics.jsonl has everything, and what could not be sent is tried "
                    "again now and then",
                    self.name,
                    type(error).__name__,
                    reason,
                )
            self.said = True


def check_trackers(config: TrackerConfig) -> None:
    """UserError for a tracker whose library is not installed."""
    for name in tracker_names(config):
        if name in ("wandb", "mlflow") and find_spec(name) is None:
            raise UserError(f"log_to: expected the package {name}, found none; pip install {name}, or leave it out")


def open_trackers(folder: Path, config: TrackerConfig, done: int) -> list[Tracker]:
    """The trackers of a run but for TensorBoard, on rank 0, when metrics.jsonl stands at step `done` (-1: nothing).

    A run that goes on goes on at each tracker, by the names that it was given there.
    """
    path = folder / _NAMES
    found = read_json(path) if done >= 0 and os.path.lexists(path) else {}
    names = {name: known for name, known in found.items() if isinstance(known, str)} if isinstance(found, dict) else {}
    settings = asdict(config)

    def make(name: str) -> Tracker:
        before = dict(names)
        try:
            return _TRACKERS[name](folder, folder.name, settings, names)
        finally:
            if names != before:
                atomic_write_json(path, names)

    return [
        make(name) if name == "csv" else _Remote(name, lambda name=name: make(name))
        for name in tracker_names(config)
        if name != TENSORBOARD
    ]
