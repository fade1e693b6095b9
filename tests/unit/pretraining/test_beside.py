"""Values that a thread makes, and tensors that are read one ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import pytest
import torch

from simple_llama.pretraining.beside import Beside, read_ahead


def test_a_value_is_made_meanwhile() -> None:
    """The maker waits for what this thread does after it began."""
    go = threading.Event()
    made = Beside(lambda: go.wait(60))
    go.set()
    assert made.result() is True and made.result() is True


def test_an_error_is_raised_to_everybody_who_waits() -> None:
    """Twice the same one."""

    def fail() -> None:
        raise OSError("no such file")

    made = Beside(fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no such file"):
            made.result()


class Slow(Mapping[str, torch.Tensor]):
    """Tensors that say who makes which of them."""

    def __init__(self, names: str):
        self.names, self.made = names, []
        self.threads = set[int]()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "!":
            raise KeyError(name)
        self.made.append(name)
        self.threads.add(threading.get_ident())
        return torch.tensor(float(ord(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_one_tensor_is_read_ahead() -> None:
    """While `b` is used `c` may be there, and never `d`; all in order, by one other thread."""
    tensors, found = Slow("abcd"), []
    for name, tensor in read_ahead(tensors, "abcd"):
        found.append((name, tensor.item()))
        assert len(tensors.made) <= len(found) + 1
    assert found == [("a", 97.0), ("b", 98.0), ("c", 99.0), ("d", 100.0)]
    assert tensors.made == list("abcd")
    assert len(tensors.threads) == 1 and threading.get_ident() not in tensors.threads
    assert list(read_ahead(tensors, "")) == []


def test_an_error_comes_at_its_tensor() -> None:
    """What stands before it is given."""
    found = []
    with pytest.raises(KeyError):
        for name, _ in read_ahead(Slow("a!b"), "a!b"):
            found.append(name)
    assert found == ["a"]


def test_what_is_waited_for_is_made_in_this_thread() -> None:
    """There is no other one, whose heap would keep what it took; an error comes at once."""
    assert Beside(threading.get_ident, at_once=True).result() == threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        Beside(lambda: 1 // 0, at_once=True)
