"""Rotary position embedding."""

from __future__ import annotations

import math

import torch

from simple_llama.pretraining.rotary import rotate, rotation


def test_by_hand():
    """Width 4, theta 100: pair 0 turns by the position, pair 1 by position / 10. (1, 0) becomes (cos, sin)."""
    by = rotation(torch.tensor([3]), width=4, theta=100)
    out = rotate(torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]), by)
    expected = [math.cos(3), math.sin(3), -2 * math.sin(0.3), 2 * math.cos(0.3)]
    assert torch.allclose(out, torch.tensor(expected), atol=1e-6)


def test_equals_complex_multiplication():
    """Adjacent pairs as complex numbers times e^(i angle), the form in the paper; heads share the angles."""
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    by = rotation(torch.arange(5), 8, 10_000)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(by.cos, by.sin)
    assert torch.allclose(rotate(x, by), torch.view_as_real(turned).flatten(-2), atol=1e-6)


def test_only_distance_counts():
    """The score of a query at 7 and a key at 4 is that of positions 3 and 0."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 8, generator=generator) for _ in range(2))

    def score(query: int, key: int) -> float:
        turned = (rotate(x, rotation(torch.tensor([at]), 8, 10_000)) for x, at in ((q, query), (k, key)))
        first, second = turned
        return float((first * second).sum())

    assert math.isclose(score(7, 4), score(3, 0), abs_tol=1e-5)


def test_gradient_is_the_rotation_back():
    """Finite differences in fp32 would be coarse: a rotation is linear, so <g, R x> = <R^T g, x> must hold."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 2, 6, generator=generator) for _ in range(2))
    x.requires_grad_()
    by = rotation(torch.arange(4), 6, 10_000)
    out = rotate(x, by)
    (x_grad,) = torch.autograd.grad(out, x, grad)
    assert torch.allclose((out * grad).sum(), (x * x_grad).sum(), atol=1e-5)
    assert torch.allclose(rotate(x_grad, by), grad, atol=1e-6)


def test_bf16_is_fp32_rounded_once():
    """Half-precision rows are turned in fp32; only the result is rounded."""
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    by = rotation(torch.arange(1000, 1004), 6, 10_000)
    assert torch.equal(rotate(x, by), rotate(x.float(), by).bfloat16())
