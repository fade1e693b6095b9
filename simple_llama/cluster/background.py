"""Work in a thread while the main thread does something else, in stages that all ranks go through together.

Such work is a generator: it runs in the main thread, where it may call collectives, and yields what each rank's thread
is to do until it goes on (a `Job`: no collectives, they would mix with the main thread's). It is then given the job's
Future, done. Whether all ranks' jobs are done, the main threads ask each other in `poll`; nobody waits for the answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from typing import Any

import torch
import torch.distributed as dist

from simple_llama.cluster.distributed import Ranks

Job = Callable[[], Any]


class Background:
    """One such work at a time. All methods are for the main thread; its errors are those of the stage that raised."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._stages: Generator[Job, Future[Any], Any] | None = None
        self._job: Future[Any] = Future()
        self._pending: tuple[torch.Tensor, Any] | None = None  # whether any rank's job goes on, as ranks are asked

    @property
    def is_busy(self) -> bool:
        """Whether there is work that is not at its end; the same on all ranks."""
        return self._stages is not None

    def begin(self, stages: Generator[Job, Future[Any], Any]) -> None:
        """Begins work (collective): its first stage is under way when this returns."""
        assert not self.is_busy
        self._stages = stages
        self._go_on(None)

    def poll(self) -> None:
        """Begins the next stage where the last one is done on all ranks (collective while there is work).

        What all ranks said at the last call is read at this one, so that nobody waits for an answer.
        """
        if not self.is_busy:
            return
        if self.ranks.world_size == 1:
            if self._job.done():
                self._go_on(self._job)
        elif self._all_are_done():
            self._go_on(self._job)
        else:
            going_on = torch.tensor([0 if self._job.done() else 1], dtype=torch.int32)  # on the CPU: no device waits
            self._pending = going_on, dist.all_reduce(going_on, async_op=True)

    def wait(self) -> None:
        """Returns when all stages are done (collective)."""
        self._all_are_done()
        while self.is_busy:
            wait([self._job])
            self._go_on(self._job)

    def wait_alone(self, at_most_s: float) -> None:
        """Lets this rank's job end, where the others need not be asked any more; no further stage begins."""
        if self.is_busy:
            wait([self._job], at_most_s)

    def _all_are_done(self) -> bool:
        """What the ranks answered to the last question, which is then none any more; False without one."""
        if self._pending is None:
            return False
        (going_on, work), self._pending = self._pending, None
        work.wait()
        return not going_on.item()

    def _go_on(self, done: Future[Any] | None) -> None:
        """Runs the work in this thread up to its next stage, and begins that one."""
        stages, self._stages = self._stages, None
        assert stages is not None
        try:
            job = stages.send(done) if done else next(stages)
        except StopIteration:
            return
        self._stages, self._job = stages, _in_a_thread(job)


def nothing() -> None:
    """The job of a rank that has none in a stage."""


def _in_a_thread(job: Job) -> Future[Any]:
    """Begins a job; a daemon, since a disk that hangs must not keep the process."""
    future: Future[Any] = Future()
    threading.Thread(target=_do, args=(job, future), name="background", daemon=True).start()
    return future


def _do(job: Job, future: Future[Any]) -> None:
    """The job, and what came of it."""
    try:
        future.set_result(job())
    except Exception as error:  # noqa: BLE001 - raised where the result is asked for
        future.set_exception(error)
    except BaseException as error:  # noqa: BLE001 - a panic of a library in Rust, say: a bug, not a wish to leave
        future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
