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


def test_equals_the_real_form():
    """Adjacent pairs turned by cosine and sine (RoFormer, Eq. 34); heads share the angles."""
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    by = rotation(torch.arange(5), 8, 10_000)
    x0, x1 = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((x0 * by.cos - x1 * by.sin, x0 * by.sin + x1 * by.cos), dim=-1)
    assert torch.allclose(rotate(x, by), turned.flatten(-2), atol=1e-6)


def test_a_slice_that_starts_at_an_odd_place():
    """One row of a wider matrix from its third number on, as MLA's shared key: no complex number starts there."""
    wide = torch.arange(7.0).view(1, 1, 7)
    by = rotation(torch.tensor([3]), 4, 100)
    assert torch.equal(rotate(wide[..., 3:], by), rotate(wide[..., 3:].clone(), by))
    assert torch.equal(wide, torch.arange(7.0).view(1, 1, 7))


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
