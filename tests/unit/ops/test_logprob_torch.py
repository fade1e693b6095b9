"""The torch row kernels by hand, and where they leave the gradient; the head's tests compare them with the textbook."""

from __future__ import annotations

import math

import pytest
import torch

from simple_llama.ops.logprob_torch import TORCH_KERNELS, gradient_, log_squares, logps_, scaled


def _run(logits_nV: torch.Tensor, targets: list[int], coefs: list[float], dtype: torch.dtype):
    """Log-probs and gradient of a buffer, and that gradient's place in the buffer (bytes from its start)."""
    targets_n = torch.tensor(targets)
    logps_n, state_n = logps_(logits_nV, targets_n)
    gradient_nV = gradient_(logits_nV, targets_n, state_n, torch.tensor(coefs), dtype)
    return logps_n, gradient_nV, gradient_nV.data_ptr() - logits_nV.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_by_hand(dtype: torch.dtype) -> None:
    """Logits (0, ln 3): p = (1/4, 3/4). Target 1, coefficient 4: 4 (-1/4, 1/4); target 0, -8: -8 (3/4, -3/4)."""
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    logps, gradient, place = _run(logits, [1, 0], [4.0, -8.0], dtype)
    torch.testing.assert_close(logps, torch.tensor([-0.2876820725, -1.3862943611]))
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0], [-6.0, 6.0]], dtype=dtype))
    assert place == 0


def test_log_squares_by_hand() -> None:
    """p = (1/4, 3/4): 10/16; one logit 1e4 above the other: 1; both equal: 1/2. The buffer is still the gradient's."""
    logits = torch.tensor([[0.0, math.log(3)], [1e4, 0.0], [-1e4, -1e4]])
    targets = torch.tensor([1, 0, 0])
    _, state = logps_(logits, targets)
    before = logits.clone()
    found = log_squares(logits, state)
    torch.testing.assert_close(found, torch.tensor([10 / 16, 1.0, 0.5]).log(), atol=1e-7, rtol=1e-6)
    assert torch.equal(logits, before)


def test_huge_logits_by_hand() -> None:
    """One logit 1e4 above the other: 0 at it and -1e4 beside it, and no gradient at the one that is sure."""
    logps, gradient, _ = _run(torch.tensor([[1e4, 0.0]] * 2), [0, 1], [1.0, 1.0], torch.float32)
    assert logps.tolist() == [0.0, -1e4]
    assert gradient.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 40, 100])
@pytest.mark.parametrize("vocabulary", [1, 5, 64])
def test_bf16_gradient_lies_in_the_buffer(rows: int, vocabulary: int) -> None:
    """Rounded in place, in up to 16 parts: dense, nothing written past the chunk, and the fp32 gradient rounded.

    Bit for bit on any CPU, with any number of threads: both have the same steps on tensors of one shape, then a cast.
    """
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator).tolist()
    coefs = torch.randn(rows, generator=generator).tolist()
    workspace = torch.cat([logits, torch.full((1, vocabulary), 7.0)])
    _, narrow, place = _run(workspace[:rows], targets, coefs, torch.bfloat16)
    _, wide, _ = _run(logits, targets, coefs, torch.float32)
    assert torch.equal(narrow, wide.bfloat16())
    assert place == 0 and narrow.is_contiguous()
    assert (workspace[rows] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_by_hand(dtype: torch.dtype) -> None:
    """1 + 2^-7 times 3 is 3 + 3/128: bf16, with spacing 1/64 from 2 on, rounds that tie to 3 + 1/32 (even)."""
    gradient = torch.tensor([1 + 2**-7])
    found = scaled(gradient, torch.tensor(3.0), dtype)
    assert found.dtype == dtype and gradient.item() == 1 + 2**-7
    assert found.item() == (3.0234375 if dtype == torch.float32 else 3.03125)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_coefficients_by_hand(dtype: torch.dtype, squares: bool) -> None:
    """p = (1/4, 3/4): log-probs and 10/16, and onehot - softmax where a gradient is asked for, written beside."""
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    out = torch.full((2, 4), 7.0, dtype=dtype)
    values = TORCH_KERNELS.rows_(logits.clone(), torch.tensor([1, 0]), out[:, :2], squares)
    logps = [-0.2876820725, -1.3862943611]
    expected = [logps] + ([[math.log(10 / 16)] * 2] if squares else [])
    torch.testing.assert_close(values, torch.tensor(expected))
    expected = torch.tensor([[-0.25, 0.25, 7, 7], [0.75, -0.75, 7, 7]], dtype=dtype)
    torch.testing.assert_close(out, expected)
    assert torch.equal(TORCH_KERNELS.rows_(logits, torch.tensor([1, 0]), None, squares), values)


def test_part_sums_by_hand() -> None:
    """1 + 2, nothing, 3, of two kinds of values. 2^24 + 1 - 2^24 is 1 in fp64, and 0 in fp32."""
    values = torch.tensor([[2.0**24, 1.0, -(2.0**24), 3.0], [1.0, 2.0, 3.0, 4.0]])
    found = TORCH_KERNELS.part_sums(values, torch.tensor([0, 3, 3, 4]))
    assert found.tolist() == [[1.0, 6.0], [0.0, 0.0], [3.0, 4.0]]


def test_weighted_by_hand() -> None:
    """1 + 2^-7 times 3 is 3 + 3/128, as above; a row is multiplied by its own coefficient."""
    out = torch.zeros(2, 1, dtype=torch.bfloat16)
    TORCH_KERNELS.weighted([(torch.tensor([[1 + 2**-7], [2.0]]).bfloat16(), out)], torch.tensor([3.0, -0.5]))
    assert out.tolist() == [[3.03125], [-1.0]]


def test_scaled_in_place_by_hand() -> None:
    """Of the dtype asked for, the gradient itself is multiplied; else it stays."""
    gradient = torch.tensor([2.0])
    (narrow,) = TORCH_KERNELS.scaled_([gradient], torch.tensor(3.0), torch.bfloat16)
    assert narrow.item() == 6 and narrow.dtype == torch.bfloat16 and gradient.item() == 2
    (same,) = TORCH_KERNELS.scaled_([gradient], torch.tensor(3.0), torch.float32)
    assert same is gradient and gradient.item() == 6
