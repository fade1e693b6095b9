"""Counting what DeepSpeed sends: bytes of each collective by hand, time on both kinds of device, and no trace left."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import pytest
import torch

from simple_llama.reinforcement_learning.rlhf.engine import communication
from simple_llama.reinforcement_learning.rlhf.engine.communication import _SHARES, CommunicationMeter

CPU = torch.device("cpu")
WORK_S = 0.02


class Work:
    """A collective under way that takes a while."""

    def wait(self) -> str:
        time.sleep(WORK_S)
        return "done"

    def is_completed(self) -> bool:
        return False


class Backend:
    """Four ranks (two in group "pair") that send nothing; a collective takes a while, or gives a handle."""

    def __init__(self) -> None:
        for name in _SHARES:
            setattr(type(self), name, Backend.collective)

    def collective(self, *_args: Any, async_op: bool = False, **_kwargs: Any) -> Work | None:
        if async_op:
            return Work()
        time.sleep(WORK_S)
        return None

    def get_world_size(self, group: str | None = None) -> int:
        return {None: 4, "pair": 2, "alone": 1}[group]


@pytest.fixture
def backend() -> Any:
    return Backend()


@pytest.fixture
def meter(backend: Any) -> CommunicationMeter:
    return CommunicationMeter(backend, CPU)


def values(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("all_reduce", [values(100)], 400 * 2 * 3 / 4),
        ("all_reduce", [values(100, torch.bfloat16)], 200 * 2 * 3 / 4),
        ("all_reduce", [values(100), "sum", "pair"], 400),
        ("all_reduce", [values(100), "sum", "alone"], 0),
        ("all_reduce_coalesced", [[values(60), values(40)]], 400 * 2 * 3 / 4),
        ("all_gather_into_tensor", [values(100), values(25)], 400 * 3 / 4),
        ("all_gather", [[values(25)] * 4, values(25)], 400 * 3 / 4),
        ("all_gather_coalesced", [[values(80), values(20)], [values(20), values(5)]], 400 * 3 / 4),
        ("reduce_scatter_tensor", [values(25), values(100)], 400 * 3 / 4),
        ("reduce_scatter", [values(25), [values(25)] * 4], 400 * 3 / 4),
        ("all_to_all_single", [values(100), values(100)], 400 * 3 / 4),
        ("reduce", [values(100), 0], 400 * 3 / 4),
        ("broadcast", [values(100), 0], 400 * 3 / 4),
        ("barrier", [], 0),
    ],
)
def test_bytes_of_each_collective_by_hand(
    backend: Any, meter: CommunicationMeter, name: str, args: list[Any], expected: float
) -> None:
    """100 fp32 values are 400 bytes; of four ranks each keeps or has a quarter, so three quarters travel."""
    with meter.counting():
        getattr(backend, name)(*args)
    assert meter.sent_bytes == expected


def test_named_arguments_count_too(backend: Any, meter: CommunicationMeter) -> None:
    """deepspeed.comm passes names for most: 100 and 50 fp32 values in a group of two."""
    with meter.counting():
        backend.all_gather_into_tensor(output_tensor=values(100), input_tensor=values(50), group="pair")
        backend.reduce_scatter_tensor(output_tensor=values(50), input_tensor=values(100), group="pair")
        backend.barrier(group=None, async_op=False)
    assert meter.sent_bytes == 200 + 200


def test_only_inside_and_nothing_stays_behind(backend: Any, meter: CommunicationMeter) -> None:
    """Calls outside count for nothing; the backend is as it was, also after an error; a reset starts again."""
    backend.all_reduce(values(100))
    with pytest.raises(RuntimeError, match="lost"), meter.counting():
        backend.all_reduce(values(100))
        raise RuntimeError("lost")
    assert vars(backend) == {} and meter.sent_bytes == 600
    backend.all_reduce(values(100))
    assert meter.sent_bytes == 600
    meter.reset()
    assert (meter.sent_bytes, meter.seconds) == (0, 0)


def test_two_meters_do_not_mix(backend: Any, meter: CommunicationMeter) -> None:
    """Two engines of one process share the backend."""
    other = CommunicationMeter(backend, CPU)
    with other.counting():
        backend.all_reduce(values(100))
    with meter.counting():
        backend.broadcast(values(100), 0)
    assert (meter.sent_bytes, other.sent_bytes) == (300, 600)


def test_time_is_that_of_the_call_and_of_the_wait(backend: Any, meter: CommunicationMeter) -> None:
    """One call of 20 ms, and one that is under way for long, of which only the 20 ms of its wait count."""
    with meter.counting():
        backend.all_reduce(values(1))
        work = backend.all_reduce(values(1), async_op=True)
        time.sleep(5 * WORK_S)
        assert not work.is_completed()
        assert work.wait() == "done"
    assert 2 * WORK_S <= meter.seconds < 4 * WORK_S


class Event:
    """A CUDA event that finishes when `done` says so; the clock ticks 10 ms an event."""

    made: ClassVar[list[Event]] = []
    done = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.synchronized = False
        Event.made.append(self)

    def record(self) -> None:
        self.at_ms = 10.0 * Event.made.index(self)

    def query(self) -> bool:
        return Event.done

    def synchronize(self) -> None:
        self.synchronized = True

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


def test_cuda_time_waits_for_no_event_before_it_is_asked_for(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events a call: nobody waits for them until `settle(wait=True)`; those that are finished are added on the way."""
    monkeypatch.setattr(communication.torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", [])
    meter = CommunicationMeter(backend, torch.device("cuda"))
    with meter.counting():
        backend.all_reduce(values(1))
    assert meter.seconds == 0 and len(meter.events) == 1 and not any(event.synchronized for event in Event.made)
    monkeypatch.setattr(Event, "done", True)
    with meter.counting():
        backend.all_reduce(values(1))
    assert meter.seconds == pytest.approx(0.02) and not meter.events
    monkeypatch.setattr(Event, "done", False)
    with meter.counting():
        backend.all_reduce(values(1))
    meter.settle(wait=True)
    assert meter.seconds == pytest.approx(0.03)
