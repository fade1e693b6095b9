"""Checks of the Triton element-wise kernels against their plain twins, for a process with TRITON_INTERPRET=1.

`test_elementwise_triton.py` runs this file in such a process; by itself pytest does not collect it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from triton.runtime import interpreter

from gpu_way import rounded
from simple_llama.ops import attention, elementwise, elementwise_triton
from simple_llama.ops.attention import PackedLayout
from simple_llama.ops.elementwise_triton import TRITON_KERNELS
from simple_llama.pretraining.rotary import Rotation, rotate, rotation

EPS = 1e-5
DTYPES = (torch.bfloat16, torch.float32)
# of the largest number of a tensor: how far fp32 sums in another order, and roundings of their results, may be apart
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True, scope="module")
def a_gpu_that_rounds() -> Iterator[None]:
    """The interpreter's, and programs of 64 numbers, so that small rows have several and a ragged last one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(elementwise_triton, "_TILE", 64)
        patch.setattr(elementwise_triton, "_MOST_PROGRAMS", 3)
        yield


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Takes the kernels for rows on the CPU, or the plain twins."""

    def take(kernels: bool) -> None:
        monkeypatch.setattr(elementwise, "_kernels", lambda _: TRITON_KERNELS if kernels else None)

    return take


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(
    fused: Callable[[bool], None],
    call: Callable[..., Any],
    given: list[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Values and gradients of a call, by the kernels and by the twins."""
    found = []
    for kernels in (True, False):
        fused(kernels)
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in given]
        out = call(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        asked = [(y, grad) for y, grad in zip(outs, grads, strict=True) if grad is not None]
        floats = [x for x in leaves if x.requires_grad]
        back = torch.autograd.grad([y for y, _ in asked], floats, [grad for _, grad in asked], allow_unused=True)
        found.append([*outs, *back])
    return [(fast, slow) for fast, slow in zip(*found, strict=True) if slow is not None]


def assert_near(pairs: list[tuple[torch.Tensor, torch.Tensor]], times: float = 1.0) -> None:
    """All finite or both not, of one dtype and shape, near to rounding; most of them equal bit for bit."""
    for fast, slow in pairs:
        assert fast.dtype == slow.dtype and fast.shape == slow.shape
        limit = times * ROUNDING[slow.dtype] * max(float(slow.detach().abs().max()) if slow.numel() else 0.0, 1e-20)
        assert ((fast - slow).abs() <= limit).all(), (fast - slow).abs().max() / limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 64), (9, 65), (3, 130), (0, 8)])
def test_add_norm(fused: Callable[[bool], None], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Sum (bit for bit), norm, and the gradients of both and of the weight; rows below, at and above a program's."""
    x, update, *grads = (3 * randn(*shape, dtype=dtype, seed=seed) for seed in range(4))
    weight = randn(shape[1], dtype=dtype, seed=9)
    for chosen in (grads, [None, grads[1]], [grads[0], None]):
        found = both(fused, lambda x, u, w: elementwise.add_norm(x, u, w, EPS), [x, update, weight], chosen)
        assert torch.equal(*found[0])
        assert_near(found[:-1])
        assert_near(found[-1:], times=2)  # the weight's: products that the twin rounds, and its sum


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (6, 3, 8), (2, 5, 3, 33)])
def test_rms_norm_of_slices(fused: Callable[[bool], None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Any leading shape, and rows that are the front of wider ones, as a projection's parts are."""
    wide = randn(*shape[:-1], shape[-1] + 3, dtype=dtype)
    grad, weight = randn(*shape, dtype=dtype, seed=1), randn(shape[-1], dtype=dtype, seed=2)
    call = lambda x, w: elementwise.rms_norm(x[..., : shape[-1]], w, EPS)  # noqa: E731
    assert_near(both(fused, call, [wide, weight], [grad]), times=2)


def test_a_frozen_weight_has_no_gradient(fused: Callable[[bool], None]) -> None:
    """Adapters alone are trained: then the weight's sum is not made."""
    fused(True)
    x, update = (randn(4, 8, dtype=torch.float32, seed=seed).requires_grad_() for seed in (0, 1))
    weight = torch.ones(8)
    total, y = elementwise.add_norm(x, update, weight, EPS)
    (total.sum() + y.square().sum()).backward()
    assert weight.grad is None and torch.equal(x.grad, update.grad)  # pyright: ignore


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of numpy's, where a GPU says inf
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 43), (4, 64), (2, 3, 65), (0, 5)])
def test_swiglu(fused: Callable[[bool], None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The product and both gradients, of gates from -100 to 100, where silu is 0 and the gate itself."""
    gate, up, grad = (randn(*shape, dtype=dtype, seed=seed) for seed in range(3))
    gate = gate * torch.logspace(-2, 1.7, gate.numel()).view(shape).to(dtype)
    assert_near(both(fused, elementwise.swiglu, [gate, up], [grad]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 10), (4, 2, 64), (3, 2, 3, 6), (2, 1, 4, 48)])
def test_rotate_parts_of_rows(fused: Callable[[bool], None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Queries by groups and keys, as slices of the rows that one matrix made, at positions up to 4,000."""
    by = rotation(torch.linspace(0, 4000, shape[0]).long(), shape[-1], 1e4)
    wide = randn(*shape[:-1], shape[-1] + 4, dtype=dtype)
    grad = randn(*shape, dtype=dtype, seed=1)
    found = both(fused, lambda x: rotate(x[..., 2:-2], by), [wide], [grad])
    assert found[0][0].is_contiguous()
    assert_near(found)


def test_rotation_by_hand(fused: Callable[[bool], None]) -> None:
    """(1, 0) turned by a right angle is (0, 1); (3, 4) by two is (-3, -4)."""
    fused(True)
    cos, sin = torch.tensor([0.0, -1.0])[:, None, None], torch.tensor([1.0, 0.0])[:, None, None]
    turned = rotate(torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]]), Rotation(cos, sin, torch.complex(cos, sin)))
    assert turned.tolist() == [[[0.0, 1.0]], [[-3.0, -4.0]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "segments",
    [((2, (3, 1)),), ((3, (0, 2, 4, 1)), (0, (2, 3)), (2, (1, 0, 2)), (4, ())), ((1, (1, 1)), (5, (2, 2)))],
)
def test_keys_of_shared_prefixes(fused: Callable[[bool], None], segments: Any, dtype: torch.dtype) -> None:
    """Keys, and gradients of rows that are several keys: bit for bit, by one program a row."""
    layout = PackedLayout(segments)
    plan = layout.varlen_plan(torch.device("cpu")).keys
    assert plan is not None
    rows, grad = randn(layout.rows, 3, 33, dtype=dtype), randn(len(plan.rows_S), 3, 31, dtype=dtype, seed=1)
    found = both(fused, lambda x: attention._GatherKeys.apply(x[..., 1:-1], plan), [rows], [grad])
    assert all(torch.equal(fast, slow) for fast, slow in found)


@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 9), width=st.integers(1, 150), exponent=st.integers(-4, 4), seed=st.integers(0, 999))
def test_norm_of_random_shapes(rows: int, width: int, exponent: int, seed: int) -> None:
    """Random shapes and magnitudes, against fp64."""
    x, update, grad, onward = (
        randn(rows, width, dtype=torch.float32, seed=seed + k) * 10.0**exponent for k in range(4)
    )
    weight = randn(width, dtype=torch.float32, seed=seed)
    exact = [part.double().requires_grad_() for part in (x, update, weight)]
    given_ = [part.clone().requires_grad_() for part in (x, update, weight)]
    total = exact[0] + exact[1]
    y = F.rms_norm(total, (width,), exact[2], EPS)
    wanted = [total, y, *torch.autograd.grad([total, y], exact, [onward.double(), grad.double()])]
    found = TRITON_KERNELS.add_norm(given_[0], given_[1], given_[2], EPS)
    for fast, slow in zip([*found, *torch.autograd.grad(found, given_, [onward, grad])], wanted, strict=True):
        assert (fast - slow).abs().max() <= 2e-5 * slow.abs().max() + 1e-12
