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

from simple_llama.ops import logprob_cuda, logprob_triton
from simple_llama.ops.logprob_torch import TORCH_KERNELS, RowKernels

# Triton's interpreter cuts fp32 to bf16, where the GPU rounds: 2^-7
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2**-7}


@pytest.fixture(scope="module")
def triton_kernels() -> Iterator[RowKernels]:
    """The kernels with blocks of 64 numbers, so that a short row has several and a ragged last one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob_triton, "_MAX_BLOCK", 64)
        patch.setattr(logprob_triton, "_SUM_BLOCK", 16)
        patch.setattr(logprob_triton, "_SCALE_STEPS", 2)
        yield logprob_triton.TRITON_KERNELS


def compare_rows(triton_kernels: RowKernels, logits_nV: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> None:
    """Values and gradient of both kernels, and nothing written past the rows' ends; with and without each of them."""
    generator = torch.Generator().manual_seed(seed)
    n, vocab = logits_nV.shape
    targets = torch.randint(vocab, (n,), generator=generator)
    # the chunk is the front of a larger workspace, and its gradient lies in wider rows
    workspace = torch.cat([logits_nV, torch.full((1, vocab), 7.0)])
    outs = [torch.full((n + 1, vocab + 3), 7.0, dtype=dtype) for _ in range(2)]
    values = triton_kernels.rows_(workspace[:n], targets, outs[0][:n, :vocab], True)
    assert torch.equal(workspace[:n], logits_nV) and (workspace[n] == 7).all()
    slow = TORCH_KERNELS.rows_(logits_nV.clone(), targets, outs[1][:n, :vocab], True)
    exact = logits_nV.double().log_softmax(1)
    for found in (values, slow):
        torch.testing.assert_close(found[1].double(), exact.exp().square().sum(1).log(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(values[0], slow[0], rtol=1e-6, atol=2e-6)
    gradient, slow_gradient = (out[:n, :vocab].float() for out in outs)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-5 + ROUNDED[dtype], atol=1e-6)
    assert (outs[0][n:] == 7).all() and (outs[0][:, vocab:] == 7).all()
    assert torch.equal(triton_kernels.rows_(workspace[:n], targets, None, False), values[:1])
    assert torch.equal(triton_kernels.rows_(workspace[:n], targets, None, True), values)
    before = outs[0].clone()
    assert torch.equal(triton_kernels.rows_(workspace[:n], targets, outs[0][:n, :vocab], False), values[:1])
    assert torch.equal(outs[0], before)


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


@pytest.mark.parametrize("kinds", [1, 2])
def test_part_sums_match_and_are_each_parts_own(triton_kernels: RowKernels, kinds: int) -> None:
    """Parts of no row to more than a block of 16; bit for bit the same alone; a sum that fp32 would round away."""
    lengths = [3, 0, 16, 1, 17, 40, 0]
    values = -300 * torch.rand(kinds, sum(lengths), generator=torch.Generator().manual_seed(0))
    values[:, :3] = torch.tensor([2.0**24, 1.0, -(2.0**24)])
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    sums = triton_kernels.part_sums(values, edges)
    assert torch.equal(sums, TORCH_KERNELS.part_sums(values, edges)) and sums[0, 0] == 1
    alone = triton_kernels.part_sums(values[:, 37:77].contiguous(), torch.tensor([0, 40]))
    assert torch.equal(sums[5:6], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 64), (4, 71), (2, 150)])
def test_weighted_matches(triton_kernels: RowKernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows of any width, fp32 and such as come out, each to the dtype of its result, alone and together."""
    generator = torch.Generator().manual_seed(0)
    wide, coefs = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    narrow = torch.randn(shape, generator=generator).to(dtype)
    for given_rows in ([wide], [narrow], [wide, narrow]):
        outs, slow = ([(rows, torch.empty(shape, dtype=dtype)) for rows in given_rows] for _ in range(2))
        triton_kernels.weighted(outs, coefs)
        TORCH_KERNELS.weighted(slow, coefs)
        for (_, out), (_, expected) in zip(outs, slow, strict=True):
            torch.testing.assert_close(out, expected, rtol=ROUNDED[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [[(0, 5)], [(1, 1)], [(3, 64)], [(2, 3, 71)], [(2, 64), (1, 300)], [(300, 1), (0,)]])
def test_scaled_matches(triton_kernels: RowKernels, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Any sizes beside the two blocks of 64 of a program, by a factor in a tensor: in place where the dtype is the
    gradient's, which stays bit for bit by a factor of 1; else beside it. The last one in the dtype of the result."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients[-1] = gradients[-1].to(dtype)
    for factor in (torch.tensor(-0.37), torch.tensor(1.0)):
        mine, slow = ([gradient.clone() for gradient in gradients] for _ in range(2))
        found = triton_kernels.scaled_(mine, factor, dtype)
        expected = TORCH_KERNELS.scaled_(slow, factor, dtype)
        for before, there, out, right in zip(gradients, mine, found, expected, strict=True):
            assert out.dtype == dtype and (out is there) == (before.dtype == dtype)
            assert out is there or torch.equal(there, before)
            same = factor == 1 and before.dtype == dtype
            torch.testing.assert_close(out, right, rtol=0.0 if same else ROUNDED[dtype], atol=0)


def test_equal_and_lone_maximum_by_hand(triton_kernels: RowKernels) -> None:
    """All logits equal: -ln V. One logit 1e4 above 69 others: 0 at it and -1e4 beside it."""
    logits = torch.full((3, 70), 1e4)
    logits[1:, 1:] = 0
    values = triton_kernels.rows_(logits, torch.tensor([69, 0, 1]), None, False)
    torch.testing.assert_close(values, torch.tensor([[-4.2484952, 0.0, -1e4]]))


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 100])
def test_whole_head_matches(triton_kernels: RowKernels, rows: int, squares: bool) -> None:
    """Loss, sums and both gradients of the three- and the four-GEMM mode are those of the specification."""
    generator = torch.Generator().manual_seed(0)
    counts = ((3, 2), (1, 1), (4, 7))
    hidden = torch.randn(18, 5, generator=generator, requires_grad=True)
    weight = torch.randn(71, 5, generator=generator, requires_grad=True)
    given = hidden, weight, torch.randint(71, (18,), generator=generator)

    def loss_fn(sums_pC: torch.Tensor, _groups: slice) -> torch.Tensor:
        return -F.logsigmoid(0.5 * (sums_pC[0::2, 0] - sums_pC[1::2, 0])) + sums_pC[0::2].exp().sum(1)

    results = []
    for kernels in (triton_kernels, TORCH_KERNELS):
        loss, losses, sums = logprob_cuda.part_loss(*given, counts, loss_fn, rows, squares, 0.7, kernels)
        token = logprob_cuda.token_logps(*given, rows, kernels)
        grads = (*torch.autograd.grad(loss, (hidden, weight)), *torch.autograd.grad(token.sum(), (hidden, weight)))
        results.append((loss, losses, sums, token, *grads))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
