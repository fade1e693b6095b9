"""The Triton element-wise kernels on a GPU against torch's own operators there; needs CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from host_waits import no_host_waits
from simple_llama.ops import attention, elementwise
from simple_llama.ops.attention import PackedLayout
from simple_llama.pretraining.rotary import _Rotate, rotate, rotation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPS = 1e-5
DTYPES = (torch.bfloat16, torch.float32)
# of the largest number of a tensor: sums in another order, another exponential, and roundings of their results
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def needs_triton() -> None:
    """Without it there is nothing to compare."""
    pytest.importorskip("triton")
    assert elementwise.fused_kernels(torch.zeros(1, device="cuda"))


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal random numbers on the GPU."""
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def near(fast: Callable[..., Any], slow: Callable[..., Any], given: list[torch.Tensor], seed: int = 100) -> None:
    """Values and gradients of both are near, and those of `fast` the same at each call."""
    found = []
    for call in (fast, slow, fast):
        leaves = [x.detach().clone().requires_grad_() for x in given]
        out = call(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        grads = [randn(*y.shape, dtype=y.dtype, seed=seed + k) for k, y in enumerate(outs)]
        found.append([*outs, *torch.autograd.grad(outs, leaves, grads)])
    for mine, plain, again in zip(*found, strict=True):
        assert mine.dtype == plain.dtype and torch.equal(mine, again)
        assert (mine - plain).abs().max() <= 2 * ROUNDING[plain.dtype] * plain.abs().max()


def plain_add_norm(x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification."""
    total = x + update
    return total, weight * F.rms_norm(total, weight.shape, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (300, 576), (3000, 2048), (513, 4096), (100, 8192), (7, 1000)])
def test_add_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    """Sum, norm and gradients; the sum bit for bit."""
    x, update = (randn(rows, width, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = randn(width, dtype=dtype, seed=2)
    near(lambda x, u, w: elementwise.add_norm(x, u, w, EPS), plain_add_norm, [x, update, weight])
    assert torch.equal(elementwise.add_norm(x, update, weight, EPS)[0], x + update)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads(dtype: torch.dtype) -> None:
    """Of queries that are parts of wider rows, as Qwen3 has them."""
    given = [randn(500, 4, 3, 200, dtype=dtype), randn(128, dtype=dtype, seed=1)]
    near(
        lambda x, w: elementwise.rms_norm(x[..., 8:136], w, EPS),
        lambda x, w: w * F.rms_norm(x[..., 8:136], (128,), eps=EPS),
        given,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (1000, 5632), (333, 1537)])
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The product and both gradients."""
    given = [4 * randn(*shape, dtype=dtype, seed=seed) for seed in (0, 1)]
    near(elementwise.swiglu, lambda gate, up: F.silu(gate) * up, given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 32, 64), (500, 4, 8, 128), (300, 3, 96), (50, 1, 20)])
def test_rotate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Heads, and queries by groups, as slices of wider rows, against complex numbers."""
    by = rotation(torch.arange(shape[0], device="cuda") * 5, shape[-1], 1e4)
    turns = by.turns if len(shape) == 3 else by.turns.unsqueeze(1)
    wide = randn(*shape[:-1], shape[-1] + 8, dtype=dtype)
    near(lambda x: rotate(x[..., 8:], by), lambda x: _Rotate.apply(x[..., 8:], turns), [wide])


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_of_shared_prefixes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Keys and their gradients, bit for bit."""
    layout = PackedLayout(((130, (40, 70)), (33, (0, 5, 9)), (0, (7, 9)), (64, (64, 1)))).to("cuda")
    plan = layout.varlen_plan(torch.device("cuda", torch.cuda.current_device())).keys
    assert plan is not None
    rows = randn(layout.rows, 4, 72, dtype=dtype).requires_grad_()
    grad = randn(len(plan.rows_S), 4, 64, dtype=dtype, seed=1)
    found = []
    for kernels in (elementwise._kernels("cuda"), None):
        monkeypatch.setattr(elementwise, "_kernels", lambda _, kernels=kernels: kernels)
        keys = attention._GatherKeys.apply(rows[..., :64], plan)
        found.append((keys, *torch.autograd.grad(keys, rows, grad)))
    assert all(torch.equal(fast, slow) for fast, slow in zip(*found, strict=True))


def test_no_host_sync() -> None:
    """Forward and backward wait for the device nowhere (after the kernels were compiled)."""
    x, update, gate = (randn(300, 256, dtype=torch.bfloat16, seed=seed).requires_grad_() for seed in range(3))
    weight = torch.ones(256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    by = rotation(torch.arange(300, device="cuda"), 64, 1e4)

    def both() -> None:
        total, y = elementwise.add_norm(x, update, weight, EPS)
        (rotate(elementwise.swiglu(gate, y).view(300, 4, 64), by).sum() + total.sum()).backward()

    both()
    with no_host_waits():
        both()
