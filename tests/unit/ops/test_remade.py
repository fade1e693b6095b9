"""What is made again in the backward pass instead of being kept, against keeping it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from simple_llama.ops.remade import keeping_all, remade


def product(x: torch.Tensor, weight: torch.Tensor, calls: list[int]) -> torch.Tensor:
    """(2 x) W^T, of which 2 x is made again."""
    doubled = 2 * x

    def make() -> torch.Tensor:
        calls.append(1)
        return 2 * x.detach()

    with remade(doubled, make):
        return F.linear(doubled, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_gradients_once_made_again(dtype: torch.dtype) -> None:
    """Bit for bit those of what is kept; made once, in the backward pass."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8).to(dtype).requires_grad_(), torch.randn(3, 8).to(dtype).requires_grad_()
    calls: list[int] = []
    out = product(x, weight, calls)
    assert not calls
    found = torch.autograd.grad(out.square().sum(), (x, weight))
    assert calls == [1]
    with keeping_all():
        expected = torch.autograd.grad(product(x, weight, calls).square().sum(), (x, weight))
    assert calls == [1]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_is_made_again_has_no_room() -> None:
    """After the forward pass nothing holds it; within `keeping_all` the graph does."""
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)

    def held(context: Callable[[], AbstractContextManager[object]]) -> bool:
        doubled = 2 * x
        storage = StorageWeakRef(doubled.untyped_storage())
        with context(), remade(doubled, lambda: 2 * x.detach()):
            out = F.linear(doubled, weight)
        del doubled
        return not storage.expired() and out.requires_grad

    assert not held(nullcontext)
    assert held(keeping_all)


def test_two_uses_are_served_by_one_making() -> None:
    """Of a graph that is gone through twice, by one each time; behind the last use nothing holds it."""
    x, weights = torch.randn(5, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    made: list[StorageWeakRef] = []

    def make() -> torch.Tensor:
        again = 2 * x.detach()
        made.append(StorageWeakRef(again.untyped_storage()))
        return again

    doubled = 2 * x
    with remade(doubled, make):
        out = F.linear(doubled, weights[0]) * F.linear(doubled, weights[1])
    expected = torch.autograd.grad(((2 * x) @ weights[0].T * ((2 * x) @ weights[1].T)).sum(), (x, weights))
    for times in (1, 2):
        found = torch.autograd.grad(out.sum(), (x, weights), retain_graph=True)
        assert len(made) == times and all(storage.expired() for storage in made)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_what_is_kept_of_an_output_does_not_hold_it() -> None:
    """exp keeps its own output: within, too, all of that is gone with the last name, without a backward pass."""
    x = torch.randn(5, requires_grad=True)
    with remade(torch.ones(3), lambda: torch.ones(3)):
        out = x.exp()
    storage = StorageWeakRef(out.untyped_storage())
    (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert torch.equal(grad, out)
    del out, grad
    assert storage.expired()


def test_others_of_the_same_form_are_kept() -> None:
    """Only the tensor itself is made again: another one, a view of another form or turned, one of before or behind are
    not."""
    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    made = 3 * x

    def never() -> torch.Tensor:
        raise AssertionError

    before = F.linear(made, weight)
    with remade(made, never):
        other = (
            F.linear(made + 1, weight)
            + made.T @ weight
            + F.linear(made.flatten(), torch.ones(2, 16, requires_grad=True)).sum()
        )
    behind = F.linear(made, weight)
    (before + other + behind).sum().backward()
    assert x.grad is not None and weight.grad is not None


@pytest.mark.parametrize("why", ["no maker", "no gradient", "another device"])
def test_where_nothing_changes(why: str) -> None:
    """There autograd keeps what it always does."""
    made = torch.ones(2, 2, device="meta" if why == "another device" else "cpu")
    with torch.set_grad_enabled(why != "no gradient"):
        assert isinstance(remade(made, None if why == "no maker" else lambda: made), nullcontext)


def test_an_error_within_keeping_all_ends_it() -> None:
    """And one within another leaves the outer one."""
    made = torch.ones(2)
    with pytest.raises(ValueError, match="x"), keeping_all(), keeping_all():
        raise ValueError("x")
    with keeping_all():
        with keeping_all():
            pass
        assert isinstance(remade(made, lambda: made), nullcontext)
    assert not isinstance(remade(made, lambda: made), nullcontext)
