"""Stepping a trainer's own `train()` from outside, with a trainer of our own in TRL's place."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.peers import SteppedPeer, plain_process


class Trainer:
    """Trains `steps` steps; what it does goes to `log`. An entry of `fails` is raised in that step."""

    def __init__(self, name: str, steps: int, log: list[str], fails: int = -1):
        self.name, self.steps, self.log, self.fails = name, steps, log, fails
        self.wait: Any = None

    def add_callback(self, stepped: SteppedPeer) -> None:
        self.wait = stepped.wait

    def train(self) -> None:
        for step in range(self.steps):
            if step == self.fails:
                raise ValueError(f"{self.name} failed")
            self.log.append(f"{self.name}{step}")
            if self.wait():
                return
        self.log.append(f"{self.name} end")


@pytest.fixture(autouse=True)
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes the stepper itself as its callback."""
    monkeypatch.setattr(peers, "hand_back", lambda stepped: stepped)


def stepped(name: str, steps: int, log: list[str], fails: int = -1) -> SteppedPeer:
    """A stepper of a stand-in trainer."""
    peer: Any = SimpleNamespace(trainer=Trainer(name, steps, log, fails), activate=lambda: log.append(f"{name}:"))
    return SteppedPeer(peer)


def test_steps_in_turns() -> None:
    """A call makes exactly one step, after the trainer's shared state was put in place; `close` ends the training."""
    log: list[str] = []
    first, second = stepped("a", 9, log), stepped("b", 9, log)
    assert log == []
    for _ in range(2):
        first.step()
        second.step()
    first.close()
    second.close()
    assert log == ["a:", "a0", "b:", "b0", "a:", "a1", "b:", "b1"]
    assert not first.thread.is_alive()
    assert not second.thread.is_alive()


def test_close_before_the_first_step() -> None:
    """Nothing is trained."""
    log: list[str] = []
    stepped("a", 9, log).close()
    assert log == []


def test_errors_reach_the_caller() -> None:
    """What the trainer raises in its thread is raised by `step`, and no step is left after it."""
    one = stepped("a", 9, [], fails=1)
    one.step()
    with pytest.raises(ValueError, match="a failed"):
        one.step()
    with pytest.raises(RuntimeError, match="no step left"):
        one.step()
    one.close()


def test_used_up() -> None:
    """The call after the last step finds the training ended, and says so."""
    log: list[str] = []
    one = stepped("a", 1, log)
    one.step()
    with pytest.raises(RuntimeError, match="no step left"):
        one.step()
    one.close()
    assert log == ["a:", "a0", "a:", "a end"]


def test_plain_process_hides_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCAL_RANK, which a single process has after `init_ranks`, would make accelerate join a process group."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    with plain_process():
        assert "LOCAL_RANK" not in os.environ
    assert os.environ["LOCAL_RANK"] == "0"
