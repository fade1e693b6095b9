"""Rotary position embedding."""

from __future__ import annotations

import math

import pytest
import torch

from simple_llama.pretraining.rotary import LinearScaling, Llama3Scaling, rotate, rotation


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


def _frequencies(width: int, theta: float, scaling: LinearScaling | Llama3Scaling) -> list[float]:
    """Angles of position 1."""
    by = rotation(torch.tensor([1]), width, theta, scaling)
    return torch.atan2(by.sin, by.cos).flatten().tolist()


def test_linear_scaling_by_hand():
    """Width 4, theta 100: frequencies 1 and 0.1, both by 4."""
    assert _frequencies(4, 100.0, LinearScaling(4.0)) == pytest.approx([0.25, 0.025], rel=1e-6)


def test_llama3_scaling_by_hand():
    """Width 6, theta 1000: 1, 0.1 and 0.01 radians a token; over 88 tokens (28 pi) 14, 1.4 and 0.14 whole turns.

    14 is at least 4: kept. 0.14 is at most 1: by 8. 1.4 lies 0.1335 (88 / 20 pi = 1.4006) of the way from 1 to 4.
    """
    found = _frequencies(6, 1000.0, Llama3Scaling(factor=8.0, slow_turns=1.0, fast_turns=4.0, trained_len=88))
    assert found == pytest.approx([1.0, 0.1 * (0.13352 + 0.86648 / 8), 0.01 / 8], rel=1e-4)
