"""Reading beside other work: a value that a thread makes, and tensors of which the next is read meanwhile.

Both gain because reading, hashing and torch's work on large tensors let other threads run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Made = TypeVar("Made")


class Beside(Generic[Made]):
    """What a function gives, made in a thread of its own. A process may end without it."""

    def __init__(self, make: Callable[[], Made], at_once: bool = False):
        """`at_once`: it is waited for, and so made in this thread, whose heap has the memory that it takes already."""
        self._made: list[Made] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if at_once:
            self._run(make)
            self.result()
        else:
            self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
            self._thread.start()

    def result(self) -> Made:
        """Waits for it. Raises what the function raised, each time."""
        if self._thread:
            self._thread.join()
        if self._error:
            raise self._error
        return self._made[0]

    def _run(self, make: Callable[[], Made]) -> None:
        try:
            self._made.append(make())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self._error = error


def read_ahead(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each; while one is used a thread reads the next, so two are in memory. The user is to let go of
    each before it takes the next."""
    ahead = list(names)
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(tensors.__getitem__, name) for name in ahead[:1]]
        for number, name in enumerate(ahead, 1):
            tensor = coming.pop().result()
            coming += [reader.submit(tensors.__getitem__, following) for following in ahead[number : number + 1]]
            yield name, tensor
            del tensor
