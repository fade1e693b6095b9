"""What the ranks send each other for a step: bytes and time of DeepSpeed's collectives, counted where it calls torch.

Bytes are those a rank sends by a ring of n ranks, the least that moves the data; S is a collective's whole tensor:

    all_reduce                                       2 S (n - 1) / n
    all_gather, reduce_scatter, all_to_all             S (n - 1) / n
    reduce, broadcast (mean over the ranks)            S (n - 1) / n

So one rank alone sends 0, whatever collectives DeepSpeed calls there. Headers are not counted, nor are our own
collectives in cluster/distributed.py: a few numbers a micro-batch, and a few hundred bytes when metrics are written.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Collectives of a deepspeed.comm backend: name of the first argument, and what of its bytes n ranks send each.
_SHARES: dict[str, tuple[str, Callable[[int], float]]] = {
    "all_reduce": ("tensor", lambda n: 2 * (n - 1) / n),
    "all_reduce_coalesced": ("tensors", lambda n: 2 * (n - 1) / n),
    "all_gather": ("tensor_list", lambda n: (n - 1) / n),
    "all_gather_into_tensor": ("output_tensor", lambda n: (n - 1) / n),
    "all_gather_coalesced": ("output_tensors", lambda n: (n - 1) / n),
    "reduce_scatter": ("output", lambda n: n - 1),  # the output is S / n
    "reduce_scatter_tensor": ("output_tensor", lambda n: n - 1),
    "all_to_all_single": ("output", lambda n: (n - 1) / n),
    "reduce": ("tensor", lambda n: (n - 1) / n),
    "broadcast": ("tensor", lambda n: (n - 1) / n),
    "barrier": ("", lambda n: 0.0),  # takes time only
}


class CommunicationMeter:
    """Bytes that this rank sends, and the time that it stands still for it, inside `counting()`.

    Time on a CPU: host time in a collective and in the wait for one that was started before. On CUDA: how long the
    stream that asked stands still, by events, without a host sync in a step; a stream beside the computation counts
    too, so overlapped communication is in it. Both include the wait for the slowest rank.

    DeepSpeed's own comms_logger synchronizes the device after each collective; this does not.
    """

    def __init__(self, backend: Any, device: torch.device):
        """Args: backend: the object whose methods DeepSpeed calls (`deepspeed.comm.comm.cdb`)."""
        self.backend = backend
        self.on_cuda = device.type == "cuda"
        self.events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # not added to `seconds` yet
        self.reset()

    def reset(self) -> None:
        """Starts again from zero."""
        self.sent_bytes, self.seconds = 0.0, 0.0
        self.events.clear()

    def settle(self, wait: bool) -> None:
        """Adds the events of finished collectives to the seconds; with `wait` of all, which waits for the device."""
        while self.events and (wait or self.events[0][1].query()):
            start, end = self.events.popleft()
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1e3

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what DeepSpeed communicates in the body, in which the backend's methods are shadowed on the object."""
        ours = {name: self.counted(name, getattr(self.backend, name)) for name in _SHARES}
        vars(self.backend).update(ours)
        try:
            yield
        finally:
            for name in ours:
                delattr(self.backend, name)
            self.settle(wait=False)  # keeps the queue short

    def counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A collective of the backend that adds its bytes and time."""
        first, share = _SHARES[name]

        def collective(*args: Any, **kwargs: Any) -> Any:
            # DeepSpeed gives groups by name, but for all_reduce's, which is the third argument
            group = kwargs["group"] if "group" in kwargs else args[2] if len(args) > 2 else None
            payload = args[0] if args else kwargs.get(first)
            self.sent_bytes += share(self.backend.get_world_size(group)) * _tensor_bytes(payload)
            with self.timed():
                work = method(*args, **kwargs)
            return work if work is None else _TimedWork(work, self)

        return collective

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the body's time."""
        if self.on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - started


class _TimedWork:
    """A collective under way: the work handle of torch, whose `wait` is timed."""

    def __init__(self, work: Any, meter: CommunicationMeter):
        self.work, self.meter = work, meter

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.timed():
            return self.work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def _tensor_bytes(payload: Any) -> int:
    """Bytes of a tensor, or of all tensors of a list."""
    if isinstance(payload, torch.Tensor):
        return payload.numel() * payload.element_size()
    return sum(_tensor_bytes(part) for part in payload) if isinstance(payload, list | tuple) else 0
