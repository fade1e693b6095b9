"""The log-prob gather on a GPU (cuBLAS GEMMs, Triton rows) against the fp64 textbook; needs CUDA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from host_waits import no_host_waits
from simple_llama.ops import logprob, logprob_cuda
from simple_llama.ops.logprob_torch import TORCH_KERNELS, RowKernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COUNTS = ((60, 64), (1, 1), (33, 200), (61, 5))  # 425 rows


def loss_fn(logps_b2: torch.Tensor, _pairs: slice) -> torch.Tensor:
    """DPO's loss with a reference of 0."""
    return -F.logsigmoid(0.5 * (logps_b2[:, 0] - logps_b2[:, 1]))


def problem(vocab: int, dtype: torch.dtype, width: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden rows, weight and targets on the GPU."""
    generator = torch.Generator().manual_seed(0)
    n = sum(map(sum, COUNTS))
    hidden = torch.randn(n, width, generator=generator).to("cuda", dtype).requires_grad_()
    weight = (0.25 * torch.randn(vocab, width, generator=generator)).to("cuda", dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (n,), generator=generator).cuda()


def kernels_named(name: str) -> RowKernels:
    """The two implementations, by name: the Triton one cannot be imported where Triton is not installed."""
    if name == "torch":
        return TORCH_KERNELS
    pytest.importorskip("triton")
    from simple_llama.ops.logprob_triton import TRITON_KERNELS

    return TRITON_KERNELS


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 257, 8192, 9001])
@pytest.mark.parametrize("rows", [150, 50])
def test_head_equals_textbook(
    vocab: int, dtype: torch.dtype, name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three- and four-GEMM modes, one chunk and several, one of them with a pair in parts: sums to 1e-3, gradients to
    the rounding of the dtype."""
    hidden, weight, targets = problem(vocab, dtype)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact_token = (exact_hidden @ exact_weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    lengths = [length for pair in COUNTS for length in pair]
    exact = torch.stack([part.sum() for part in exact_token.split(lengths)]).view(-1, 2)
    expected = torch.autograd.grad(loss_fn(exact, slice(0)).sum(), (exact_hidden, exact_weight))
    kernels = kernels_named(name)
    monkeypatch.setattr(logprob_cuda, "_fastest_kernels", lambda *_: kernels)
    loss, losses, logps = logprob.pair_loss(hidden, weight, targets, COUNTS, loss_fn, rows)
    recomputed = logprob.pair_logps(hidden, weight, targets, COUNTS, rows)
    assert torch.equal(losses, loss_fn(logps, slice(0)))
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), exact.detach(), atol=1e-3, rtol=1e-6)
    torch.testing.assert_close(recomputed.detach(), logps, atol=1e-3, rtol=1e-6)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-8
    for value in (loss, loss_fn(recomputed, slice(0)).sum()):
        for fused, exact_gradient in zip(torch.autograd.grad(value, (hidden, weight)), expected, strict=True):
            assert fused.dtype == dtype
            assert (fused.double() - exact_gradient).norm() <= tolerance * exact_gradient.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "scale"), [(5, 1.0), (4096, 1.0), (32003, 1e4), (128256, 1.0)])
def test_row_kernels_match(vocab: int, scale: float, dtype: torch.dtype) -> None:
    """Triton rows == torch rows; the bf16 gradient overwrites the logits that it is read from, row by row."""
    triton_kernels = kernels_named("triton")
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (2 * torch.rand(301, vocab, generator=generator, device="cuda") - 1) * scale
    targets = torch.randint(vocab, (301,), generator=generator, device="cuda")
    coefs = torch.randn(301, generator=generator, device="cuda")
    exact = logits.double().log_softmax(1)
    found = []
    for kernels in (triton_kernels, TORCH_KERNELS):
        gradient = torch.empty(301, vocab, dtype=dtype, device="cuda")
        values = kernels.rows_(logits.clone(), targets, gradient, True)
        edges = torch.tensor([0, 1, 1, 200, 301], device="cuda")
        outs = [torch.empty_like(gradient) for _ in range(2)]
        kernels.weighted([(logits.to(dtype), outs[0]), (logits, outs[1])], coefs)
        scaled = kernels.scaled_(
            [logits.to(dtype, copy=True), logits.clone()], torch.tensor(-0.37, device="cuda"), dtype
        )
        found.append((values, gradient, kernels.part_sums(values, edges), *outs, *scaled))
        torch.testing.assert_close(values[1].double(), exact.exp().square().sum(1).log(), rtol=1e-5, atol=1e-5)
    (values, *fast), (slow_values, *slow) = found
    torch.testing.assert_close(values, slow_values, rtol=1e-5, atol=1e-5)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-7
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=tolerance, atol=1e-4)


def test_many_gradients_add_up_where_they_lie() -> None:
    """A GEMM adds to fp32 sums without a copy of them, and rounds nothing to bf16 on the way to a bf16 result."""
    generator = torch.Generator("cuda").manual_seed(0)
    left = torch.randn(8192, 512, generator=generator, device="cuda").bfloat16()
    right = torch.randn(8192, 2048, generator=generator, device="cuda").bfloat16()
    sums = torch.zeros(512, 2048, device="cuda")
    logprob_cuda._add_product_(sums, left.T, right)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprob_cuda._add_product_(sums, left.T, right)
    assert torch.cuda.max_memory_allocated() - before < sums.nbytes
    exact = left.double().T @ right.double()
    torch.testing.assert_close(sums.double(), 2 * exact, rtol=1e-5, atol=1e-2)
    with logprob_cuda._whole_sums():
        narrow = logprob_cuda._product(left.T, right, torch.bfloat16)
    torch.testing.assert_close(narrow.double(), exact, rtol=2**-8, atol=1e-2)


def test_no_host_sync() -> None:
    """A forward and backward of the head waits for the device nowhere (after the kernels were compiled)."""
    hidden, weight, targets = problem(8192, torch.bfloat16)
    logprob.pair_loss(hidden, weight, targets, COUNTS, loss_fn, 150)[0].backward()
    with no_host_waits():
        logprob.pair_loss(hidden, weight, targets, COUNTS, loss_fn, 150)[0].backward()
        logprob.pair_logps(hidden, weight, targets, COUNTS, 150).sum().backward()
