"""Work in stages beside the main thread, on one rank; on two: tests/distributed/test_faults.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from simple_llama.cluster.background import Background, Job
from simple_llama.cluster.distributed import Ranks

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def noting(said: list[str], *jobs: Callable[[], Any]) -> Generator[Job, Future[Any], None]:
    """Work of these jobs, that notes what comes of each."""
    for job in jobs:
        done = yield job
        said.append(f"{done.result()} in {threading.current_thread().name}")
    said.append("end")


def poll_to_the_end(background: Background) -> int:
    """How often it was asked."""
    polls, deadline = 0, time.monotonic() + 30
    while background.is_busy and time.monotonic() < deadline:
        background.poll()
        polls += 1
        time.sleep(0.001)
    return polls


def test_stages_go_on_by_polls_that_do_not_wait() -> None:
    """The first job waits for a word: until it comes, asking changes nothing and returns at once; then both end, each
    in a thread of its own, and what is between them in this one."""
    word, said, threads = threading.Event(), list[str](), list[str]()

    def first() -> str:
        word.wait(30)
        threads.append(threading.current_thread().name)
        return "first"

    background = Background(ALONE)
    background.begin(noting(said, first, lambda: "second"))
    for _ in range(100):
        background.poll()
    assert background.is_busy and said == []
    word.set()
    assert poll_to_the_end(background) >= 2
    assert said == ["first in MainThread", "second in MainThread", "end"] and threads == ["background"]


def test_waiting_makes_all_stages() -> None:
    """And a second work may begin then."""
    said = list[str]()
    background = Background(ALONE)
    for _ in range(2):
        background.begin(noting(said, lambda: time.sleep(0.05), lambda: 2))
        background.wait()
        assert not background.is_busy
    assert said == 2 * ["None in MainThread", "2 in MainThread", "end"]
    background.poll()
    background.wait()


@pytest.mark.parametrize("by", [poll_to_the_end, Background.wait])
def test_an_error_of_a_job_is_raised_once_where_its_result_is_asked_for(by: Callable[[Background], Any]) -> None:
    """In the main thread, with its message; then there is no work any more."""

    def fail() -> None:
        raise OSError("a full disk")

    background, said = Background(ALONE), list[str]()
    background.begin(noting(said, fail, lambda: "never"))
    with pytest.raises(OSError, match="a full disk"):
        by(background)
    assert not background.is_busy and said == []
    background.poll()


def test_a_rank_that_ends_alone_waits_for_its_own_job_a_while() -> None:
    """0.05 s for one that hangs, none of the next stages; a job that ends is waited for."""
    word, done = threading.Event(), list[str]()
    background = Background(ALONE)
    background.begin(noting([], lambda: word.wait(30), lambda: done.append("second")))
    started = time.monotonic()
    background.wait_alone(0.05)
    assert 0.04 < time.monotonic() - started < 5
    threading.Timer(0.1, word.set).start()
    background.wait_alone(30)
    assert word.is_set() and background.is_busy and done == []


def test_a_panic_in_a_thread_is_an_error_here() -> None:
    """A library's, which is no Exception: the work ends, and says what it was."""

    class PanicException(BaseException):
        pass

    def panic() -> None:
        raise PanicException("out of range")

    background = Background(ALONE)
    background.begin(noting([], panic))
    with pytest.raises(RuntimeError, match="PanicException: out of range"):
        background.wait()
    assert not background.is_busy
