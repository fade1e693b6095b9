"""The GPU's head on this machine's CPU, by the plain row kernels: against the CPU's head, its launches and its memory.

A CPU has no GEMMs of bf16 operands with fp32 results: fp32 GEMMs of the same numbers stand in for them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from simple_llama.ops import logprob, logprob_cuda
from simple_llama.ops.logprob_chunks import rows_at_once
from simple_llama.ops.logprob_torch import TORCH_KERNELS, RowKernels

Counts = tuple[tuple[int, ...], ...]
COUNTS: Counts = ((3, 2), (1, 1), (4, 7), (2, 5), (1, 0))  # 26 rows


def problem(
    counts: Counts, width: int, vocab: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden rows, weight and targets."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(map(sum, counts))
    hidden_ND = torch.randn(n, width, generator=generator, dtype=torch.float64) / width**0.25
    weight_VD = torch.randn(vocab, width, generator=generator, dtype=torch.float64) / width**0.25
    targets_N = torch.randint(vocab, (n,), generator=generator)
    return hidden_ND.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_N


def margin_loss(sums_pC: torch.Tensor, groups: slice) -> torch.Tensor:
    """A DPO loss whose margins differ from pair to pair; of all sums, where there are those of squares too."""
    ref_b = 0.3 * torch.arange(64, dtype=sums_pC.dtype, device=sums_pC.device)[groups]
    sums_bK = logprob.by_pairs(sums_pC, 2)
    return -50 * F.logsigmoid(0.02 * (sums_bK[:, 0] - sums_bK[:, 1] - ref_b)) * sums_bK[:, 2:].sum(1).exp()


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """d loss / d inputs."""
    return torch.autograd.grad(loss, inputs)


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=9).map(tuple),
    width=st.integers(1, 17),
    vocab=st.integers(1, 67),
    rows=st.integers(1, 40),
    squares=st.booleans(),
    empty=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_cpus_head(
    counts: Counts, width: int, vocab: int, rows: int, squares: bool, empty: bool, seed: int
) -> None:
    """Random odd shapes in fp64, pairs of more rows than exist at once, empty parts, and empty pairs before and behind:
    loss, losses, sums, gradients of both modes, and sums without gradient."""
    counts = ((0, 0), *counts, (0, 0)) if empty else counts
    given_ = hidden, weight, _ = problem(counts, width, vocab, seed=seed)
    loss, losses, sums = logprob_cuda.part_loss(*given_, counts, margin_loss, rows, squares, factor=0.3)
    slow_loss, slow_losses, slow_sums = logprob.part_loss(*given_, counts, margin_loss, squares=squares, factor=0.3)
    for fast, slow in ((loss, slow_loss), (losses, slow_losses), (sums, slow_sums)):
        torch.testing.assert_close(fast, slow)
    assert loss.requires_grad and not losses.requires_grad and not sums.requires_grad
    expected = gradients(slow_loss, hidden, weight)
    for fast, slow in zip(gradients(loss, hidden, weight), expected, strict=True):
        torch.testing.assert_close(fast, slow)
    again = logprob_cuda.part_logps(*given_, counts, rows, squares)
    torch.testing.assert_close(again.detach(), slow_sums)
    value = 0.3 * margin_loss(torch.cat([again[:, :1], again[:, 1:].detach()], 1), slice(0, len(counts))).sum()
    for fast, slow in zip(gradients(value, hidden, weight), expected, strict=True):
        torch.testing.assert_close(fast, slow)
    with torch.no_grad():
        torch.testing.assert_close(logprob_cuda.part_logps(*given_, counts, rows, squares), slow_sums)


def test_losses_that_are_the_sums_themselves() -> None:
    """A loss that gives a column of what it is given may: in one chunk and in several."""
    given_ = hidden, weight, _ = problem(COUNTS, 5, 9)
    results = []
    for head, rows in ((logprob.part_loss, 2), (logprob_cuda.part_loss, 2), (logprob_cuda.part_loss, 100)):
        loss, losses, sums = head(*given_, COUNTS, lambda sums_p1, _: sums_p1[:, 0], rows)
        assert torch.equal(losses, sums[:, 0])
        results.append((loss, *gradients(loss, hidden, weight)))
    for found in results[1:]:
        for fast, slow in zip(found, results[0], strict=True):
            torch.testing.assert_close(fast, slow)


def mixed_product(
    left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """What stands in for a GPU's GEMM: products and sums in fp32, rounded once to `dtype`."""
    found = (left.float() @ right.float()).to(dtype)
    return found if out is None else out.copy_(found)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """GEMMs of bf16 operands; the list has the dtypes of their results, and of sums that are added to."""
    dtypes: list[torch.dtype] = []

    def product(
        left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        dtypes.append(dtype)
        return mixed_product(left, right, dtype, out)

    def add_product_(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        dtypes.append(sums.dtype)
        sums.add_(mixed_product(left, right, torch.float32))

    monkeypatch.setattr(logprob_cuda, "_product", product)
    monkeypatch.setattr(logprob_cuda, "_add_product_", add_product_)
    return dtypes


@pytest.mark.parametrize("rows", [7, 20, 1000])
def test_bf16_inputs(mixed: list[torch.dtype], rows: int) -> None:
    """Sums and loss are those of the bf16 values in fp64 up to fp32 rounding; a gradient carries the rounding to bf16
    of onehot - softmax, of the weighted rows and of the result (2^-9 each, some added up). In one chunk and in several,
    a group of more rows than a chunk among them."""
    counts = ((60, 64), (61, 1), (3, 2))
    hidden, weight, targets = problem(counts, 64, 257, torch.bfloat16)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    slow_loss, _, slow = logprob.part_loss(exact_hidden, exact_weight, targets, counts, margin_loss)
    loss, _, sums = logprob_cuda.part_loss(hidden, weight, targets, counts, margin_loss, rows)
    assert sums.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(sums.double(), slow, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss.double(), slow_loss, atol=1e-4, rtol=0)
    token = logprob_cuda.part_logps(hidden, weight, targets, counts, rows)
    torch.testing.assert_close(token.detach(), sums, atol=1e-4, rtol=0)
    expected = gradients(slow_loss, exact_hidden, exact_weight)
    for value, outer in ((loss, 1), (1.7 * margin_loss(token, slice(0, 3)).sum(), 1.7)):
        for fused, exact in zip(gradients(value, hidden, weight), expected, strict=True):
            assert fused.dtype == torch.bfloat16
            assert (fused.double() - outer * exact).norm() <= 2**-8 * outer * exact.norm()


def test_bf16_weight_gradient_is_rounded_once(mixed: list[torch.dtype]) -> None:
    """One chunk: its GEMM writes bf16. Four of 8 rows: 1 and three times 2^-9, where a bf16 sum would stay at 1.

    Weight 0 gives p = 1/2 for both tokens, so a chosen row x with coefficient 1 gives dW = (1 - 1/2) x at its target.
    """
    hidden = torch.zeros(32, 1, dtype=torch.bfloat16)
    hidden[::8, 0] = torch.tensor([2.0, 2**-8, 2**-8, 2**-8])
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(32, dtype=torch.int64)
    logits = torch.float32
    for rows, dtypes in ((2, [*[logits] * 4, torch.float32] * 4), (8, [*[logits] * 4, torch.bfloat16])):
        mixed.clear()
        loss, *_ = logprob_cuda.part_loss(
            hidden, weight, targets, ((1, 7),) * 4, lambda sums_p1, _: sums_p1[0::2, 0], rows
        )
        (gradient,) = gradients(loss, weight)
        assert gradient[0].item() == 1.0078125  # 1 + 3 * 2^-9 rounded once to the bf16 spacing of 2^-7
        assert mixed == dtypes


def test_backward_scales_once() -> None:
    """Backward of 3 * loss is three times that of loss; what it gives away it cannot give again, and says so, though
    autograd sees nothing of what a Triton kernel writes."""

    def unseen(gradients_: Any, factor: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        TORCH_KERNELS.scaled_([gradient.data for gradient in gradients_], factor, dtype)
        return gradients_

    kernels = TORCH_KERNELS._replace(scaled_=unseen)
    given_ = hidden, weight, _ = problem(COUNTS, 5, 9)
    for rows in (100, 2):
        loss, *_ = logprob_cuda.part_loss(*given_, COUNTS, margin_loss, rows)
        once = gradients(loss, hidden, weight)
        loss, *_ = logprob_cuda.part_loss(*given_, COUNTS, margin_loss, rows, kernels=kernels)
        thrice = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
        for a, b in zip(once, thrice, strict=True):
            torch.testing.assert_close(3 * a, b)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_side_costs_no_gemm(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GEMMs and not three, in both modes (three, not four); the other gradient is right."""
    calls: list[int] = []
    product: Callable[..., torch.Tensor] = logprob_cuda._product
    monkeypatch.setattr(logprob_cuda, "_product", lambda *args: calls.append(1) or product(*args))
    given_ = hidden, weight, _ = problem(COUNTS, 5, 9)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    (expected,) = gradients(logprob.part_loss(*given_, COUNTS, margin_loss)[0], free)
    losses = (
        (lambda: logprob_cuda.part_loss(*given_, COUNTS, margin_loss, 100)[0], 2),
        (lambda: margin_loss(logprob_cuda.part_logps(*given_, COUNTS, 100), slice(0, 5)).sum(), 3),
    )
    for make, gemms in losses:
        calls.clear()
        torch.testing.assert_close(gradients(make(), free)[0], expected)
        assert len(calls) == gemms


@pytest.mark.parametrize("squares", [False, True])
def test_logits_exist_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, squares: bool) -> None:
    """No more rows' logits than asked for, whatever the groups: of 26 rows 8 at a time, or of a group of 11 rows 2, of
    which 8 rows' gradients may exist, so that its logits are computed twice."""
    seen: list[int] = []
    rows_: Callable[..., torch.Tensor] = TORCH_KERNELS.rows_

    def watched(logits_nV: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert logits_nV.untyped_storage().nbytes() <= 8 * 9 * most
        seen.append(len(logits_nV))
        return rows_(logits_nV, *rest)

    kernels = TORCH_KERNELS._replace(rows_=watched)
    monkeypatch.setattr(logprob_cuda, "_fastest_kernels", lambda *_: kernels)
    given_ = problem(COUNTS, 5, 9)
    for most, total in ((8, 26), (2, 26 + 11)):
        seen.clear()
        logprob_cuda.part_loss(*given_, COUNTS, margin_loss, most, squares)
        assert max(seen) <= most and sum(seen) == total


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given: operations that compute or copy, but not views or memory."""

    FREE = (
        "empty",
        "new_empty.",
        "view.",
        "detach.",
        "slice.",
        "select.",
        "split_",
        "permute.",
        "expand.",
        "unsqueeze.",
        "promote_",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def one_launch_each(kernels: RowKernels, launches: Launches) -> RowKernels:
    """The kernels, each counted as the one launch that it is in Triton."""

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            launches.names[name] += 1
            with _disable_current_modes():
                return kernel(*args)

        return call

    return RowKernels(*(counted(name, kernel) for name, kernel in zip(kernels._fields, kernels, strict=True)))


def test_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk, forward and backward: 3 GEMMs, 4 kernels, the coefficients of the rows, the sum of the losses, and the
    ones that it is differentiated from; beside the caller's ones, and a sum, which is the loss."""
    given_ = hidden, weight, _ = problem(COUNTS, 5, 9, torch.float32)
    launches = Launches()
    sent: Callable[..., Any] = logprob_cuda._sent

    def on_the_host(*args: Any) -> Any:
        with _disable_current_modes():
            return sent(*args)

    monkeypatch.setattr(logprob_cuda, "_sent", on_the_host)
    with launches:
        loss, *_ = logprob_cuda.part_loss(
            *given_, COUNTS, lambda sums_p1, _: sums_p1.sum(1), 100, kernels=one_launch_each(TORCH_KERNELS, launches)
        )
        gradients(loss, hidden, weight)
    head = {"mm.out": 1, "mm.default": 2} | dict.fromkeys(RowKernels._fields, 1)
    coefficients = dict.fromkeys(["index_select.default", "sum.default", "full_like.default"], 1)
    assert launches.names == head | coefficients | {"ones_like.default": 1, "sum.dim_IntList": 1}


class Memory(TorchDispatchMode):
    """The most bytes that tensors of the meta device had at once, by their storages, beside those of some."""

    def __init__(self, *beside: torch.Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in beside}

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    key, size = storage._cdata, storage.nbytes()
                    self._known[key] = weakref.finalize(storage, self._gone, key, size)
                    self.now += size
                    self.most = max(self.most, self.now)
        return found


def bare_kernels() -> RowKernels:
    """What the Triton kernels allocate, and nothing that plain torch does on its way."""

    def rows_(logits_nV: torch.Tensor, _targets: Any, _gradient: Any, squares: bool) -> torch.Tensor:
        return logits_nV.new_empty(1 + squares, len(logits_nV))

    def part_sums(values_Cn: torch.Tensor, edges_p1: torch.Tensor) -> torch.Tensor:
        return values_Cn.new_empty(len(edges_p1) - 1, len(values_Cn))

    def scaled_(gradients_: Any, _factor: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        return [x if x.dtype == dtype else torch.empty_like(x, dtype=dtype) for x in gradients_]

    return RowKernels(rows_, part_sums, lambda *_: None, scaled_)


@pytest.mark.parametrize(
    ("size", "pair", "mib"),
    [
        # of bf16 1,002 a matrix of 4,096 x 128,256, 501 of 2,048 x 128,256; of fp32 twice that
        ((4096, 4096, 128256), 128, 2068),  # onehot - softmax and the gradient 1,002; hidden rows and weighted ones 32
        ((8192, 2048, 128256), 128, 2537),  # 1,002 and 501 of logits; 1,002 of the gradient; 32 of hidden rows
        ((4096, 2048, 8192), 128, 208),  # 64, logits 128; 16 of hidden rows
        ((6000, 4096, 128256), 6000, 3268),  # a pair in two parts, of 2,928 rows at last: 716, 501 of logits; 2,004; 47
        ((5000, 4096, 128256), 100, 3093),  # two chunks of 2,500 rows: 611, 438 of 896 rows of logits; 2,004; 39
    ],
)
def test_memory_by_the_sizes(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], pair: int, mib: float
) -> None:
    """The most that exists at once beside the inputs, at the sizes themselves: by tensors without contents."""

    def product(
        left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return left.new_empty(len(left), right.shape[1], dtype=dtype) if out is None else out

    monkeypatch.setattr(logprob_cuda, "_product", product)
    monkeypatch.setattr(logprob_cuda, "_add_product_", lambda *_: None)
    rows, width, vocabulary = size
    hidden, weight = (
        torch.empty(n, width, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (rows, vocabulary)
    )
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    counts = ((pair // 2, pair // 2),) * (rows // pair)
    memory = Memory(hidden, weight, targets)
    with memory:
        loss, *_ = logprob_cuda.part_loss(
            *(hidden, weight, targets, counts, margin_loss),
            rows_at_once("cuda", vocabulary),
            kernels=bare_kernels(),
        )
        gradients(loss, hidden, weight)
    assert memory.most / 2**20 == pytest.approx(mib, abs=1)


@pytest.mark.parametrize("squares", [False, True])
def test_a_gpus_tensors_are_given_to_it(monkeypatch: pytest.MonkeyPatch, squares: bool) -> None:
    """Each function of the head hands on all that it was given, with a GPU's rows or those asked for, and computes
    nothing itself."""
    hidden, weight, targets = problem(COUNTS, 5, 9)
    asked: list[int] = []

    def given_over(name: str) -> None:
        its_own: Callable[..., Any] = getattr(logprob_cuda, name)

        def call(there: Any, weight_VD: torch.Tensor, targets_N: torch.Tensor, *rest: Any) -> Any:
            assert there is on_gpu and weight_VD is weight and targets_N is targets
            asked.append(rest[0] if name == "token_logps" else rest[{"part_loss": 2, "part_logps": 1}[name]])
            return its_own(hidden, weight_VD, targets_N, *rest)

        monkeypatch.setattr(logprob_cuda, name, call)

    for name in ("part_loss", "part_logps", "token_logps"):
        given_over(name)
    on_gpu: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), requires_grad=True)
    both = []
    for rows_ND in (on_gpu, hidden):
        loss, losses, sums = logprob.part_loss(
            rows_ND, weight, targets, COUNTS, margin_loss, squares=squares, factor=0.3
        )
        token = logprob.token_logps(rows_ND, weight, targets, 7)
        apart = logprob.part_logps(rows_ND, weight, targets, COUNTS, 7, squares)
        with torch.no_grad():
            plain, *_ = logprob.part_loss(rows_ND, weight, targets, COUNTS, margin_loss, 6, squares, 0.3)
        both.append((loss, losses, sums, token, apart, plain))
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected)
    assert asked == [rows_at_once("cuda", 9), 7, 7, 6]


def test_no_row_at_all() -> None:
    """No log-probs, and sums of nothing: 0."""
    hidden, weight, targets = problem(((0, 0),), 5, 7)
    assert logprob_cuda.token_logps(hidden, weight, targets, 4).shape == (0,)
    assert logprob_cuda.part_logps(hidden, weight, targets, ((0, 0),), 4).tolist() == [[0], [0]]
