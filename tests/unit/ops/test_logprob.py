"""The head against log_softmax + gather: values, gradients, chunks, dtypes and what is not computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from simple_llama.ops import logprob, logprob_torch, machine
from simple_llama.ops.logprob import pair_logps, pair_loss, token_logps

Counts = tuple[tuple[int, int], ...]
COUNTS: Counts = ((3, 2), (1, 1), (4, 7), (2, 5))  # 25 rows; a one-token pair; a pair longer than a chunk of 8 rows


def problem(
    counts: Counts, width: int, vocab: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden rows, weight and targets; logits are about +-scale * sqrt(width)."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(map(sum, counts))
    hidden_ND = torch.randn(n, width, generator=generator, dtype=torch.float64) * scale
    weight_VD = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(vocab, (n,), generator=generator)
    return hidden_ND.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_N


def margin_loss(logps_b2: torch.Tensor, pairs: slice) -> torch.Tensor:
    """A DPO loss against made-up reference sums that differ from pair to pair.

    beta is small, so that no random pair is so far off that its gradient vanishes; the factor keeps gradients near 1.
    """
    ref_b = 0.3 * torch.arange(64, dtype=logps_b2.dtype, device=logps_b2.device)[pairs]
    return -50 * F.logsigmoid(0.02 * (logps_b2[:, 0] - logps_b2[:, 1] - ref_b))


def total_loss(logps_B2: torch.Tensor) -> torch.Tensor:
    """Summed margin_loss of all pairs at once."""
    return margin_loss(logps_B2, slice(0, len(logps_B2))).sum()


def slow_token_logps(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The textbook: all logits, log_softmax, gather."""
    return (hidden_ND @ weight_VD.T).log_softmax(-1).gather(1, targets_N[:, None])[:, 0]


def slow_pair_logps(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, counts: Counts
) -> torch.Tensor:
    """Sums over each answer's slice of the textbook's log-probs."""
    lengths = [length for pair in counts for length in pair]
    parts = slow_token_logps(hidden_ND, weight_VD, targets_N).split(lengths)
    return torch.stack([part.sum() for part in parts]).view(-1, 2)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """d loss / d inputs."""
    return torch.autograd.grad(loss, inputs)


def test_value_by_hand() -> None:
    """Logits (0, ln 3) twice: p(target 1) = 3/4, p(target 0) = 1/4; one pair of one token a side."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[1.0], [3.0]]).log()
    logps = pair_logps(hidden, weight, torch.tensor([1, 0]), ((1, 1),))
    torch.testing.assert_close(logps, torch.tensor([[-0.2876820725, -1.3862943611]]))
    assert logps.dtype == torch.float32


def test_gradcheck_of_every_mode() -> None:
    """Analytic gradients equal finite differences in fp64, with a chunk smaller than one of the pairs."""
    counts = ((2, 1), (1, 1), (2, 4))
    hidden, weight, targets = problem(counts, 2, 3)

    def summed_loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return pair_loss(h, w, targets, counts, margin_loss, chunk_rows=4)[0]

    assert torch.autograd.gradcheck(summed_loss, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, targets, chunk_rows=4), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: pair_logps(h, w, targets, counts, chunk_rows=4), (hidden, weight))


@pytest.mark.parametrize("chunk_rows", [1, 5, 8, 25, 1000])
def test_chunks_change_nothing(chunk_rows: int) -> None:
    """Any chunk size gives the loss, sums and gradients of the textbook in fp64."""
    hidden, weight, targets = problem(COUNTS, 7, 11)
    slow = slow_pair_logps(hidden, weight, targets, COUNTS)
    slow_loss = total_loss(slow)
    loss, _, logps = pair_loss(hidden, weight, targets, COUNTS, margin_loss, chunk_rows)
    torch.testing.assert_close(logps, slow.detach())
    torch.testing.assert_close(loss, slow_loss)
    for fused, expected in zip(gradients(loss, hidden, weight), gradients(slow_loss, hidden, weight), strict=True):
        torch.testing.assert_close(fused, expected)


@settings(deadline=None, max_examples=30)
@given(
    counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6).map(tuple),
    width=st.integers(1, 17),
    vocab=st.integers(1, 67),
    chunk_rows=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_fp32_equals_textbook(counts: Counts, width: int, vocab: int, chunk_rows: int, seed: int) -> None:
    """Random odd shapes in fp32: both modes equal log_softmax + gather in fp64 to 1e-4 of 9 summed tokens."""
    hidden, weight, targets = problem(counts, width, vocab, torch.float32, seed=seed)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    slow = slow_pair_logps(exact_hidden, exact_weight, targets, counts)
    expected = gradients(total_loss(slow), exact_hidden, exact_weight)
    loss, _, logps = pair_loss(hidden, weight, targets, counts, margin_loss, chunk_rows)
    recomputed = pair_logps(hidden, weight, targets, counts, chunk_rows)
    torch.testing.assert_close(logps.double(), slow.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(recomputed, logps, atol=1e-4, rtol=1e-5)
    for value in (loss, total_loss(recomputed)):
        for fused, exact in zip(gradients(value, hidden, weight), expected, strict=True):
            torch.testing.assert_close(fused.double(), exact, atol=1e-4, rtol=1e-4)


def test_huge_logits() -> None:
    """|logits| 1e4 in fp32: finite, log-probs of fp64 to 1e-2 of up to 2e4, and the same gradient rows."""
    counts = ((5, 3), (2, 2))
    hidden, weight, targets = problem(counts, 1, 13, torch.float32, scale=1e4)
    exact = slow_token_logps(hidden.detach().double(), weight.detach().double(), targets)
    assert exact.min() < -5e3
    logps = token_logps(hidden, weight, targets)
    torch.testing.assert_close(logps.detach().double(), exact, atol=1e-2, rtol=1e-6)
    assert (logps <= 0).all()
    loss, *_ = pair_loss(hidden, weight, targets, counts, lambda logps_b2, _: logps_b2[:, 0] - logps_b2[:, 1])
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, hidden, weight))


def test_probabilities_sum_to_one() -> None:
    """exp(log p) over all targets of one hidden row adds up to 1, and each log p is at most 0."""
    hidden, weight, _ = problem(((1, 1),), 6, 101, torch.float32)
    logps = token_logps(hidden[:1].expand(101, 6), weight, torch.arange(101)).detach()
    assert (logps <= 0).all()
    assert logps.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_each_pair_sum_is_its_own() -> None:
    """Sums are of the pair's own tokens, and bit for bit the same alone and between batch mates of any size.

    On any CPU, with any number of threads: torch adds up each segment by itself, here in fp64.
    """
    logps_N = -300 * torch.rand(25, generator=torch.Generator().manual_seed(0))
    sums = logprob.by_pairs(logprob_torch.part_sums(logps_N, logprob._lengths(COUNTS)), 2)
    alone = logprob.by_pairs(logprob_torch.part_sums(logps_N[7:18], torch.tensor([4, 7])), 2)
    assert torch.equal(sums[2:3], alone)
    assert sums[2].tolist() == [
        logps_N[7:11].double().sum().float().item(),
        logps_N[11:18].double().sum().float().item(),
    ]


@pytest.mark.parametrize("fast_bf16", [False, True])
def test_bf16_inputs(monkeypatch: pytest.MonkeyPatch, fast_bf16: bool) -> None:
    """bf16 hidden and weight, on CPUs with and without bf16 units.

    Logits, sums and loss are those of the bf16 values in fp64 up to fp32 rounding (a bf16 sum near 300 would be off by
    up to 1); gradients carry at most the rounding of G and of the result to bf16 (2^-9 each, some added up).
    """
    monkeypatch.setattr(logprob, "has_fast_bf16", lambda _device: fast_bf16)
    monkeypatch.setattr(logprob, "WIDENED_ROWS", 100)  # the last rows of the weight are 57
    counts = ((60, 64), (61, 1))
    hidden, weight, targets = problem(counts, 64, 257, torch.bfloat16, scale=0.25)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    slow = slow_pair_logps(exact_hidden, exact_weight, targets, counts)
    slow_loss = total_loss(slow)
    loss, _, logps = pair_loss(hidden, weight, targets, counts, margin_loss, chunk_rows=100)
    assert slow.min() < -256 and logps.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(logps.double(), slow.detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(loss.double(), slow_loss, atol=1e-4, rtol=0)
    recomputed = total_loss(pair_logps(hidden, weight, targets, counts, chunk_rows=100))
    expected = gradients(slow_loss, exact_hidden, exact_weight)
    for value in (loss, recomputed):
        for fused, exact in zip(gradients(value, hidden, weight), expected, strict=True):
            assert fused.dtype == torch.bfloat16
            assert (fused.double() - exact).norm() <= 2**-8 * exact.norm()


@pytest.mark.parametrize(("factor", "outer"), [(0.3, 1.0), (0.3, 2.5), (1.0, 2.5)])
def test_a_factor_belongs_to_the_sum_and_its_gradient(
    monkeypatch: pytest.MonkeyPatch, factor: float, outer: float
) -> None:
    """Given as `factor` or multiplied afterwards, the same; not the losses beside the sum. A gradient of 1 on a CPU is
    multiplied by nothing."""
    hidden, weight, targets = problem(COUNTS, 5, 9)
    plain, losses, _ = pair_loss(hidden, weight, targets, COUNTS, margin_loss, chunk_rows=8)
    expected = gradients(factor * outer * plain, hidden, weight)
    scaled = []
    monkeypatch.setattr(logprob, "scaled", lambda *args: scaled.append(1) or logprob_torch.scaled(*args))
    loss, same, _ = pair_loss(hidden, weight, targets, COUNTS, margin_loss, 8, factor=factor)
    assert torch.equal(losses, same) and torch.allclose(loss, factor * plain)
    for found, theirs in zip(gradients(outer * loss, hidden, weight), expected, strict=True):
        assert torch.allclose(found, theirs, rtol=1e-12)
    assert len(scaled) == (0 if outer == 1 else 2)
    with torch.no_grad():
        loss, same, _ = pair_loss(hidden, weight, targets, COUNTS, margin_loss, 8, factor=factor)
    assert torch.equal(losses, same) and torch.allclose(loss, factor * plain)


def test_bf16_gradient_adds_up_in_fp32() -> None:
    """Four chunks with weight gradients 1, 2^-9, 2^-9, 2^-9: a bf16 accumulator would stay at 1.

    Weight 0 gives p = 1/2 for both tokens, so a chosen row x with coefficient 1 gives dW = (1 - 1/2) x at its target.
    """
    hidden = torch.tensor([[2.0], [2**-8], [2**-8], [2**-8]], dtype=torch.bfloat16).repeat_interleave(2, 0)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    counts = ((1, 1),) * 4
    loss, *_ = pair_loss(
        hidden, weight, torch.zeros(8, dtype=torch.int64), counts, lambda logps_b2, _: logps_b2[:, 0], chunk_rows=2
    )
    (gradient,) = gradients(loss, weight)
    assert gradient[0].item() == 1.0078125  # 1 + 3 * 2^-9 rounded once to the bf16 spacing of 2^-7


def test_incoming_gradient_scales() -> None:
    """Backward of 3 * loss is three times that of loss, and a kept graph can be used twice."""
    hidden, weight, targets = problem(COUNTS, 5, 9)
    loss, *_ = pair_loss(hidden, weight, targets, COUNTS, margin_loss)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_losses_and_sums_are_detached() -> None:
    """What pair_loss gives beside the loss is for metrics: no gradient flows into it."""
    hidden, weight, targets = problem(COUNTS, 5, 9)
    loss, losses, logps = pair_loss(hidden, weight, targets, COUNTS, margin_loss)
    assert loss.requires_grad and not losses.requires_grad and not logps.requires_grad


def test_losses_by_hand() -> None:
    """Weight 0 over 4 words: -ln 4 a token. Pair (1, 3) has the margin 2 ln 4, pair (2, 1) has -ln 4; a chunk each."""
    hidden, weight = torch.ones(7, 1), torch.zeros(4, 1, requires_grad=True)
    loss, losses, _ = pair_loss(
        hidden,
        weight,
        torch.zeros(7, dtype=torch.int64),
        ((1, 3), (2, 1)),
        lambda logps_b2, pairs: (logps_b2[:, 0] - logps_b2[:, 1]) * torch.tensor([10.0, 1.0])[pairs],
        chunk_rows=3,
    )
    torch.testing.assert_close(losses, torch.tensor([27.7258872, -1.3862944]))
    assert loss.item() == losses.sum().item()


@settings(deadline=None, max_examples=30)
@given(
    counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=40).map(tuple),
    chunk_rows=st.integers(1, 80),
    seed=st.integers(0, 1000),
)
def test_losses_are_those_of_the_whole_batch(counts: Counts, chunk_rows: int, seed: int) -> None:
    """The losses that the chunks gave are bit for bit those of one call with all log-probs, on any CPU and threads.

    The loss is elementwise: torch gives an element the same bits wherever it stands in a tensor of whatever length.
    """
    hidden, weight, targets = problem(counts, 5, 9, torch.float32, seed=seed)
    loss, losses, logps = pair_loss(hidden, weight, targets, counts, margin_loss, chunk_rows)
    assert torch.equal(losses, margin_loss(logps, slice(0, len(counts))))
    assert torch.equal(loss, losses.sum())


@pytest.mark.parametrize("squares", [False, True])
def test_a_group_of_many_rows_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch, squares: bool) -> None:
    """90 rows in one group, of which eight may exist at once: the values and gradients of all at once, and never more
    than a part's logits; 32 rows, four times as many as a chunk, still exist at once."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16).requires_grad_() for n in (90 + 32, 50))
    targets, counts = torch.randint(50, (90 + 32,)), [(60, 30), (20, 12)]
    sizes: list[int] = []
    make = logprob._Gemms.logits_buffer

    def watched(self: logprob._Gemms, chunks: list[slice]) -> torch.Tensor:
        sizes.append(max(chunk.stop - chunk.start for chunk in chunks))
        return make(self, chunks)

    monkeypatch.setattr(logprob._Gemms, "logits_buffer", watched)
    found = []
    for chunk_rows in (1000, 8):
        loss, _, sums = logprob.part_loss(
            hidden,
            weight,
            targets,
            counts,
            lambda sums, _: (sums * 1e-2).sin().sum()[None],
            chunk_rows,
            squares=squares,
        )
        found.append([loss.detach(), sums, *torch.autograd.grad(loss, (hidden, weight))])
    assert sizes == [122, 32]
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_side_costs_no_gemm(monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    """A frozen weight needs no dW and frozen hidden rows no dh; neither GEMM runs, the other gradient is right."""

    def forbidden(*_args: object, **_kwargs: object) -> None:
        raise AssertionError(f"the gradient of the frozen {frozen} was computed")

    method = {"hidden": "hidden_gradient_", "weight": "weight_gradient"}[frozen]
    monkeypatch.setattr(logprob._Gemms, method, forbidden)
    hidden, weight, targets = problem(COUNTS, 5, 9)
    free = weight if frozen == "hidden" else hidden
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    slow_loss = total_loss(slow_pair_logps(hidden, weight, targets, COUNTS))
    (expected,) = gradients(slow_loss, free)
    fused, *_ = pair_loss(hidden, weight, targets, COUNTS, margin_loss, chunk_rows=8)
    recomputed = total_loss(pair_logps(hidden, weight, targets, COUNTS))
    for loss in (fused, recomputed):
        torch.testing.assert_close(gradients(loss, free)[0], expected)


@pytest.mark.parametrize("no_grad", [False, True])
def test_without_gradient_only_sums(monkeypatch: pytest.MonkeyPatch, no_grad: bool) -> None:
    """Under no_grad, or with frozen inputs: same values, no gradient GEMM, nothing saved."""
    hidden, weight, targets = problem(COUNTS, 5, 9)
    expected_loss, expected_losses, expected = pair_loss(hidden, weight, targets, COUNTS, margin_loss)
    monkeypatch.setattr(logprob, "_Gradients", None)
    if not no_grad:
        hidden, weight = hidden.detach(), weight.detach()
    with torch.set_grad_enabled(not no_grad):
        loss, losses, logps = pair_loss(hidden, weight, targets, COUNTS, margin_loss)
        sums = pair_logps(hidden, weight, targets, COUNTS)
    for value in (loss, losses, logps, sums):
        assert value.grad_fn is None and not value.requires_grad
    torch.testing.assert_close(loss, expected_loss.detach())
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(sums, expected)


def test_loss_function_sees_each_pair_once() -> None:
    """The slices given to the loss function cover the pairs in order, and its rows are theirs."""
    hidden, weight, targets = problem(COUNTS, 5, 9)
    seen: list[tuple[int, int]] = []

    def recording(logps_b2: torch.Tensor, pairs: slice) -> torch.Tensor:
        seen.append((pairs.start, pairs.stop))
        assert logps_b2.shape == (pairs.stop - pairs.start, 2)
        return logps_b2[:, 0]

    pair_loss(hidden, weight, targets, COUNTS, recording, chunk_rows=8)
    assert [pair for start, stop in seen for pair in range(start, stop)] == [0, 1, 2, 3]
    assert len(seen) > 1


def test_sums_of_parts_and_of_squares() -> None:
    """Answers in two parts, some of them empty, and log sum p^2 beside each: the loss is given all, its gradient by the
    log-probs goes through, that by the squares nowhere; fp64 against log_softmax. Without gradient the same sums."""
    counts = ((2, 1, 2, 0), (1, 0, 1, 0), (4, 0, 4, 3), (2, 0, 2, 3))
    hidden, weight, targets = problem(COUNTS, 7, 11)
    whole = (hidden @ weight.T).log_softmax(-1)
    lengths = [length for pair in counts for length in pair]

    def sums(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.sum() for part in values.split(lengths)]).view(-1, 4)

    logps = sums(whole.gather(1, targets[:, None])[:, 0])
    squares = sums(whole.exp().square().sum(1).log()).detach()
    factors = torch.tensor([1.0, 0.3, -0.5, 2.0], dtype=torch.float64)

    def loss_fn(sums_b8: torch.Tensor, pairs: slice) -> torch.Tensor:
        return (sums_b8[:, :4] * factors).sum(1) * (sums_b8[:, 4:].sum(1) / 10).exp()

    expected = loss_fn(torch.cat([logps, squares], 1), slice(0))
    slow = gradients(expected.sum(), hidden, weight)
    for chunk_rows in (5, 100):
        loss, losses, found = pair_loss(hidden, weight, targets, counts, loss_fn, chunk_rows, squares=True)
        torch.testing.assert_close(found, torch.cat([logps, squares], 1).detach())
        torch.testing.assert_close(losses, expected.detach())
        for fused, exact in zip(gradients(loss, hidden, weight), slow, strict=True):
            torch.testing.assert_close(fused, exact)
        with torch.no_grad():
            torch.testing.assert_close(pair_logps(hidden, weight, targets, counts, chunk_rows, squares=True), found)
            plain, *_ = pair_loss(hidden, weight, targets, counts, loss_fn, chunk_rows, squares=True)
        torch.testing.assert_close(plain, loss.detach())


def test_one_logits_buffer_for_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk's logits are written to the same memory, no larger than the largest chunk."""
    hidden, weight, targets = problem(COUNTS, 5, 9)
    places: list[int] = []
    original: Callable[..., torch.Tensor] = logprob._Gemms.logits_

    def spying(self: object, buffer_nV: torch.Tensor, rows: slice) -> torch.Tensor:
        logits_nV = original(self, buffer_nV, rows)
        places.extend((buffer_nV.data_ptr(), logits_nV.data_ptr()))
        assert len(buffer_nV) < 25
        return logits_nV

    monkeypatch.setattr(logprob._Gemms, "logits_", spying)
    pair_loss(hidden, weight, targets, COUNTS, margin_loss, chunk_rows=8)
    assert len(places) > 2 and len(set(places)) == 1


@pytest.fixture
def fp32_setting() -> Iterator[Any]:
    """torch's own setting for fp32 GEMMs on the CPU, at a value that is not its default; put back afterwards."""
    setting = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    yield setting
    setting.fp32_precision = before


def test_bf16_valued_gemms_is_exact_and_restores(fp32_setting: Any) -> None:
    """fp32 GEMMs of bf16 values are fp32-accurate within, and the user's setting is back afterwards, also on errors."""
    a, b = (x.bfloat16().float() for x in (torch.randn(64, 64), torch.randn(64, 64)))
    with machine.bf16_valued_gemms():
        assert fp32_setting.fp32_precision == "bf16"
        torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), atol=1e-4, rtol=1e-5)
    with pytest.raises(KeyError), machine.bf16_valued_gemms():
        raise KeyError
    assert fp32_setting.fp32_precision == "ieee"
