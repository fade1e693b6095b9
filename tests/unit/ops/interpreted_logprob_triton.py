"""Checks of the Triton row kernels against the plain torch ones, for a process with TRITON_INTERPRET=1.

`test_logprob_triton.py` runs this file in such a process; by itself pytest does not collect it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from simple_llama.ops import logprob, logprob_triton
from simple_llama.ops.logprob_torch import TORCH_KERNELS, RowKernels


@pytest.fixture(scope="module")
def triton_kernels() -> Iterator[RowKernels]:
    """The kernels with blocks of 64 logits, so that a small vocabulary has several and a ragged last one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob_triton, "_MAX_BLOCK", 64)
        yield logprob_triton.TRITON_KERNELS


def compare_rows(triton_kernels: RowKernels, logits_nV: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> None:
    """Log-probs and gradient of both kernels on their own copies of the logits, and nothing written past the end."""
    generator = torch.Generator().manual_seed(seed)
    n, vocab = logits_nV.shape
    targets = torch.randint(vocab, (n,), generator=generator)
    coefs = torch.randn(n, generator=generator)
    # the chunk is the front of a larger workspace, whose other rows must stay as they are
    workspace = torch.cat([logits_nV, torch.full((1, vocab), 7.0)])
    logps, state = triton_kernels.logps_(workspace[:n], targets)
    squares = triton_kernels.log_squares(workspace[:n], state)
    gradient = triton_kernels.gradient_(workspace[:n], targets, state, coefs, dtype)
    slow_logits = logits_nV.clone()
    slow_logps, slow_state = TORCH_KERNELS.logps_(slow_logits, targets)
    slow_squares = TORCH_KERNELS.log_squares(slow_logits, slow_state)
    exact = logits_nV.double().softmax(1).square().sum(1).log()
    for found in (squares, slow_squares):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6)
    slow_gradient = TORCH_KERNELS.gradient_(slow_logits, targets, slow_state, coefs, torch.float32)
    torch.testing.assert_close(logps, slow_logps, rtol=1e-6, atol=2e-6)
    assert gradient.dtype == dtype and gradient.data_ptr() == workspace.data_ptr()
    # 2^-7: Triton's interpreter cuts fp32 to bf16, where the GPU rounds
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(gradient.float(), slow_gradient, rtol=tolerance, atol=1e-6)
    assert (workspace[n] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (3, 5), (5, 63), (2, 64), (4, 65), (3, 257)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_rows_match(triton_kernels: RowKernels, n: int, vocab: int, scale: float, dtype: torch.dtype) -> None:
    """Vocabularies below, at and above the block of 64, none of them need be a multiple; |logits| up to 1e4."""
    logits = (2 * torch.rand(n, vocab, generator=torch.Generator().manual_seed(1)) - 1) * scale
    compare_rows(triton_kernels, logits, dtype)


@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 4), vocab=st.integers(1, 200), exponent=st.integers(-3, 4), seed=st.integers(0, 999))
def test_rows_match_random_shapes(triton_kernels: RowKernels, n: int, vocab: int, exponent: int, seed: int) -> None:
    """Random shapes and magnitudes."""
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    compare_rows(triton_kernels, logits, torch.bfloat16 if seed % 2 else torch.float32, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 64), (2, 3, 71)])
def test_scaled_matches(triton_kernels: RowKernels, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Any size beside the block of 64, by a factor in a tensor; the gradient itself stays."""
    gradient, factor = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor(-0.37)
    before = gradient.clone()
    found = triton_kernels.scaled(gradient, factor, dtype)
    assert found.dtype == dtype and torch.equal(gradient, before)
    # 2^-7: Triton's interpreter cuts fp32 to bf16, where the GPU rounds
    tolerance = 0.0 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.float(), gradient * factor, rtol=tolerance, atol=0)


def test_equal_and_lone_maximum_by_hand(triton_kernels: RowKernels) -> None:
    """All logits equal: -ln V. One logit 1e4 above 69 others: 0 at it and -1e4 beside it."""
    logits = torch.full((3, 70), 1e4)
    logits[1:, 1:] = 0
    logps, _ = triton_kernels.logps_(logits, torch.tensor([69, 0, 1]))
    torch.testing.assert_close(logps, torch.tensor([-4.2484952, 0.0, -1e4]))


def test_whole_head_matches(triton_kernels: RowKernels) -> None:
    """Loss, sums and both gradients of the three- and the four-GEMM mode are those of the specification."""
    generator = torch.Generator().manual_seed(0)
    counts = ((3, 2), (1, 1), (4, 7))
    hidden = torch.randn(18, 5, generator=generator, requires_grad=True)
    weight = torch.randn(71, 5, generator=generator, requires_grad=True)
    targets = torch.randint(71, (18,), generator=generator)

    def loss_fn(logps_b2: torch.Tensor, _pairs: slice) -> torch.Tensor:
        return -F.logsigmoid(0.5 * (logps_b2[:, 0] - logps_b2[:, 1]))

    results = []
    for kernels in (triton_kernels, TORCH_KERNELS):
        loss, losses, logps = logprob.pair_loss(hidden, weight, targets, counts, loss_fn, 6, kernels)
        token = logprob.token_logps(hidden, weight, targets, 6, kernels)
        grads = (*torch.autograd.grad(loss, (hidden, weight)), *torch.autograd.grad(token.sum(), (hidden, weight)))
        results.append((loss, losses, logps, token, *grads))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
