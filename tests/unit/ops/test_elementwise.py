"""RMSNorm and SwiGLU that keep less for the backward pass, against torch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kept_bytes import kept_bytes
from simple_llama.ops.elementwise import rms_norm, swiglu

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((1, 3), (3, 7), (130, 96), (513, 576))
EPS = 1e-5


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The specification."""
    return weight * F.rms_norm(x, weight.shape, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_is_torchs_bit_for_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Value and both gradients; the value without gradient too."""
    torch.manual_seed(0)
    gate, up = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(shape).to(dtype)
    expected, found = F.silu(gate) * up, swiglu(gate, up)
    assert torch.equal(found, expected)
    gradients, plain = (torch.autograd.grad(out, (gate, up), grad) for out in (found, expected))
    for one, other in zip(gradients, plain, strict=True):
        assert one.dtype == dtype and torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(swiglu(gate, up), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_torchs(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The value and the weight's gradient bit for bit, x's to a rounding of fp32, and then of the dtype."""
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1]).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    expected, found = plain_norm(x, weight), rms_norm(x, weight, EPS)
    assert torch.equal(found, expected)
    (dx, dweight), (plain_dx, plain_dweight) = (torch.autograd.grad(y, (x, weight), grad) for y in (found, expected))
    assert torch.equal(dweight, plain_dweight) and dx.dtype == dtype
    scale = plain_dx.float().abs().max().clamp_min(1e-3)
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-6
    assert ((dx.float() - plain_dx.float()).abs() <= rounding * scale).all()
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS), expected)


def test_gradients_by_differences() -> None:
    """In fp64, of rows with any leading shape."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (x, (x * 2).detach().requires_grad_()))


def test_a_frozen_weight_and_frozen_rows() -> None:
    """Only what is asked for has a gradient."""
    x, weight = torch.randn(4, 8), torch.randn(8)
    for needs_x, needs_weight in ((True, False), (False, True)):
        x, weight = x.detach().requires_grad_(needs_x), weight.detach().requires_grad_(needs_weight)
        rms_norm(x, weight, EPS).sum().backward()
        assert (x.grad is not None, weight.grad is not None) == (needs_x, needs_weight)


def test_only_what_they_are_given_is_kept() -> None:
    """A norm keeps 4 bytes a row beside its rows, which torch's keeps three times; SwiGLU nothing but its factors."""
    x, weight = torch.randn(64, 32).bfloat16().requires_grad_(), torch.ones(32).bfloat16().requires_grad_()
    up = torch.randn(64, 32).bfloat16().requires_grad_()
    assert kept_bytes(lambda: rms_norm(x, weight, EPS), (x, weight)) == 64 * 4
    assert kept_bytes(lambda: plain_norm(x, weight), (x, weight)) > 64 * 32 * 4
    assert kept_bytes(lambda: swiglu(x, up), (x, up)) == 0
    assert kept_bytes(lambda: F.silu(x) * up, (x, up)) == 64 * 32 * 2
