"""The torch row kernels by hand, and where they leave the gradient; the head's tests compare them with the textbook."""

from __future__ import annotations

import math

import pytest
import torch

from simple_llama.ops.logprob_torch import TORCH_KERNELS


def _run(logits_nV: torch.Tensor, targets: list[int], coefs: list[float], dtype: torch.dtype):
    """Log-probs and gradient of a buffer, and that gradient's place in the buffer (bytes from its start)."""
    targets_n = torch.tensor(targets)
    logps_n, state_n = TORCH_KERNELS.logps_(logits_nV, targets_n)
    gradient_nV = TORCH_KERNELS.gradient_(logits_nV, targets_n, state_n, torch.tensor(coefs), dtype)
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
    _, state = TORCH_KERNELS.logps_(logits, targets)
    before = logits.clone()
    found = TORCH_KERNELS.log_squares(logits, state)
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
    found = TORCH_KERNELS.scaled(gradient, torch.tensor(3.0), dtype)
    assert found.dtype == dtype and gradient.item() == 1 + 2**-7
    assert found.item() == (3.0234375 if dtype == torch.float32 else 3.03125)
