"""Other trackers: which there are, what they are given, and that one out of reach ends nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.run import trackers
from simple_llama.reinforcement_learning.rlhf.run.records import RunWriter
from simple_llama.reinforcement_learning.rlhf.run.trackers import TrackerConfig, check_trackers, open_trackers


class Fake:
    """A tracker that fails while `broken`, and remembers what it was given."""

    broken = False
    given: list[tuple[int, dict[str, float]]]
    closed: bool | None
    known: str | None

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any], names: dict[str, str]):
        Fake.given, Fake.closed = [], None
        Fake.known = names.get("wandb")
        names.setdefault("wandb", "id-1")

    def send(self, step: int, values: Mapping[str, float]) -> None:
        if Fake.broken:
            raise ConnectionError("no route to host\nand more")
        Fake.given.append((step, dict(values)))

    def close(self, done: bool) -> None:
        Fake.closed = done


def test_trackers_are_named_once_and_known() -> None:
    """Blanks and repetitions do not matter; nothing is allowed; another name is refused."""
    assert trackers.tracker_names(TrackerConfig(log_to="csv, tensorboard,csv")) == ("csv", "tensorboard")
    assert trackers.tracker_names(TrackerConfig(log_to="")) == ()
    with pytest.raises(UserError, match="log_to: expected some of tensorboard, csv, wandb, mlflow.*found 'comet'"):
        TrackerConfig(log_to="tensorboard,comet")


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed, with the package to install; csv and TensorBoard need none."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_trackers(TrackerConfig(log_to="tensorboard,csv"))
    with pytest.raises(UserError, match="log_to: expected the package mlflow, found none; pip install mlflow"):
        check_trackers(TrackerConfig(log_to="csv,mlflow"))


def test_csv_has_every_line_and_its_columns_grow(tmp_path: Path) -> None:
    """A metric that comes later gets a column behind the others, empty before; a resumed run drops what it makes anew,
    as metrics.jsonl does, and goes on."""
    config = TrackerConfig(log_to="csv")

    def write(done: int, lines: list[tuple[int, dict[str, float]]]) -> list[dict[str, str]]:
        opened = open_trackers(tmp_path, config, done)
        writer = RunWriter(tmp_path, True, done, trackers=opened, on_board=False)
        for step, values in lines:
            writer.scalars(step, values)
        writer.close()
        with (tmp_path / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    found = write(-1, [(1, {"loss": 0.5}), (2, {"loss": 0.25}), (2, {"eval_loss": 1.0})])
    assert found == [
        {"step": "1", "loss": "0.5", "eval_loss": ""},
        {"step": "2", "loss": "0.25", "eval_loss": ""},
        {"step": "2", "loss": "", "eval_loss": "1.0"},
    ]
    found = write(1, [(2, {"loss": 0.125})])
    assert found == [{"step": "1", "loss": "0.5"}, {"step": "2", "loss": "0.125"}]
    assert not list(tmp_path.glob("events*"))


def test_a_tracker_out_of_reach_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once; tried again after half a minute, not before; then it gets everything in order, and how it ended. The
    name that it gave the run is kept for a resume, and not for a start from nothing."""
    monkeypatch.setitem(trackers._TRACKERS, "wandb", Fake)
    now = 0.0
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now)
    [tracker] = open_trackers(tmp_path, TrackerConfig(log_to="wandb"), -1)
    Fake.broken = True
    for step in (1, 2):
        tracker.send(step, {"loss": 1.0 / step})
    Fake.broken = False
    now = 29.0
    tracker.send(3, {"loss": 0.1})
    assert Fake.given == [] and [record.message.split(";")[0] for record in caplog.records] == [
        "wandb: ConnectionError: no route to host"
    ]
    now = 30.0
    tracker.send(4, {"loss": 0.0})
    assert [step for step, _ in Fake.given] == [1, 2, 3, 4]
    tracker.close(True)
    assert Fake.closed is True and len(caplog.records) == 1
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "id-1"}
    for done, known in ((4, "id-1"), (-1, None)):
        open_trackers(tmp_path, TrackerConfig(log_to="wandb"), done)
        assert Fake.known == known


def test_what_a_tracker_never_got_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three lines, of which two are kept for it, and it stays out of reach."""
    monkeypatch.setitem(trackers._TRACKERS, "wandb", Fake)
    monkeypatch.setattr(trackers, "_MOST_UNSENT", 2)
    [tracker] = open_trackers(tmp_path, TrackerConfig(log_to="wandb"), -1)
    monkeypatch.setattr(Fake, "broken", True)
    for step in (1, 2, 3):
        tracker.send(step, {"loss": 1.0})
    tracker.close(True)
    assert caplog.records[-1].message == "wandb: lines of metrics that could not be sent: 3"
