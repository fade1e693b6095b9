"""Attention over packed rows: each row sees its prefix and its own branch, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simple_llama.ops import attention
from simple_llama.ops.attention import PackedLayout, _suffix_mask, attend, attend_suffix

H, K, V = 2, 4, 6
MIXED = PackedLayout(((3, (2, 4)), (0, (1, 2)), (2, ()), (4, (0, 3)), (1, (2, 0, 1)), (3, (2, 4))))


def _visible(layout: PackedLayout) -> torch.Tensor:
    """Boolean (T, T) straight from the definition: same prefix or same branch, and not later."""
    owner: list[tuple[int, int]] = []  # (segment, branch) of each row; branch -1 is the prefix
    for segment, (prefix, branches) in enumerate(layout.segments):
        owner += [(segment, -1)] * prefix
        for branch, rows in enumerate(branches):
            owner += [(segment, branch)] * rows
    sees = [
        [key <= row and s == sk and bk in (b, -1) for key, (sk, bk) in enumerate(owner)]
        for row, (s, b) in enumerate(owner)
    ]
    return torch.tensor(sees)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float) -> torch.Tensor:
    """The formula over the whole stream, invisible scores at -inf."""
    scores = torch.einsum("thk,shk->hts", q, k) * scale
    weights = scores.masked_fill(~_visible(layout), -torch.inf).softmax(-1)
    return torch.einsum("hts,shv->thv", weights, v)


def _rows(
    layout: PackedLayout, dtype: torch.dtype = torch.float32, value: int = V, heads: tuple[int, int] = (H, H)
) -> list[torch.Tensor]:
    """Queries, keys and values for a layout, with gradients; `heads` are those of queries and of keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((layout.rows, n, width) for n, width in zip((*heads, heads[1]), (K, K, value), strict=True))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _with_gradients(
    run, layout: PackedLayout, dtype: torch.dtype = torch.float32, value: int = V, heads: tuple[int, int] = (H, H)
):
    """Value and the three gradients of `run`, for one fixed upstream gradient, all in fp32."""
    rows = _rows(layout, dtype, value, heads)
    out = run(*rows, layout, 0.7)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [x.float() for x in (out.detach(), *torch.autograd.grad(out, rows, grad))]


def test_layout_counts():
    """3 + 2 + 4, 0 + 1 + 2, 2, 4 + 0 + 3, 1 + 2 + 0 + 1 and 9 rows; the longest sequence is 4 + 3 tokens."""
    assert MIXED.rows == 9 + 3 + 2 + 7 + 4 + 9
    assert MIXED.longest == 7
    assert PackedLayout.causal([3, 5]).segments == ((3, ()), (5, ()))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=3))
def test_any_layout_equals_the_definition(segments: list[tuple[int, list[int]]]):
    """Value and gradients equal the dense formula under the definition's mask, empty prefixes and branches included."""
    layout = PackedLayout(tuple((prefix, tuple(branches)) for prefix, branches in segments))
    if layout.rows == 0:
        return
    for ours, exact in zip(_with_gradients(attend, layout), _with_gradients(_dense, layout), strict=True):
        assert torch.allclose(ours, exact, atol=1e-5)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_long_branches_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int]):
    """Branches of up to four rows in parts of one, two and three: as at once, value and gradients, and no mask is of
    more rows."""
    whole = _with_gradients(attend, MIXED, heads=heads)
    for most in (1, 2, 3):
        monkeypatch.setattr(attention, "_MOST_MASKED_ROWS", most)
        layout = PackedLayout(MIXED.segments)
        for found, expected in zip(_with_gradients(attend, layout, heads=heads), whole, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert max(key[0] for key in layout._made) == most


def test_rows_outside_get_no_gradient():
    """Rows of branch 1 depend on the prefix and themselves only: branch 0 (rows 3, 4) gets exactly zero."""
    layout = PackedLayout(((3, (2, 4)),))
    q, k, v = _rows(layout)
    for grad in torch.autograd.grad(attend(q, k, v, layout, 1.0)[5:].sum(), (k, v)):
        assert not grad[3:5].any()
        assert grad[:3].any()
        assert grad[5:].any()


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_is_near_fp32(monkeypatch: pytest.MonkeyPatch, fast: bool):
    """With and without bf16 units the result is bf16 and within its rounding (2^-8 of values below 4)."""
    monkeypatch.setattr("simple_llama.ops.linear.cpu_emulates_bf16", lambda: not fast)
    q, k, v = _rows(MIXED, torch.bfloat16)
    assert attend(q, k, v, MIXED, 0.7).dtype == torch.bfloat16
    low, exact = (_with_gradients(attend, MIXED, dtype) for dtype in (torch.bfloat16, torch.float32))
    for ours, theirs in zip(low, exact, strict=True):
        assert torch.allclose(ours, theirs, atol=0.06)


def test_what_is_computed_in_fp32_hangs_on_a_sequence_alone(monkeypatch: pytest.MonkeyPatch):
    """Of bf16 with bf16 units, blocks of up to 12 keys: whatever else is packed, the same bits; the nearer to fp32 the
    more of them are wide."""
    monkeypatch.setattr("simple_llama.ops.linear.cpu_emulates_bf16", lambda: False)
    errors = []
    for most in (0, 12, 99):
        monkeypatch.setattr(attention, "_MOST_WIDE_KEYS", most)
        layout = PackedLayout(((5, (3, 6)), (20, ()), (5, (30, 7))))
        q, k, v = _rows(layout, torch.bfloat16, value=K)
        whole = attend(q, k, v, layout, 0.7)
        alone = attend(q[:14], k[:14], v[:14], PackedLayout(((5, (3, 6)),)), 0.7)
        assert torch.equal(whole[:14], alone)
        exact = attend(q.float(), k.float(), v.float(), layout, 0.7)
        errors.append((whole.float() - exact).abs().mean().item())
    assert errors[0] > errors[1] > errors[2]


def _repeated(run):
    """`run` on keys and values repeated to one a query head: key head 0 for the first H / G query heads, and so on."""

    def with_own_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float):
        copies = q.shape[1] // k.shape[1]
        return run(q, k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1), layout, scale)

    return with_own_keys


@pytest.mark.parametrize("value", [K, V], ids=["equal widths", "wider values"])  # two kernels of SDPA
@pytest.mark.parametrize("key_heads", [1, 2, 3])
def test_fewer_key_heads_are_shared(key_heads: int, value: int):
    """6 query heads over 1, 2 or 3 key heads: value and gradients of the definition with each key head repeated."""
    ours = _with_gradients(attend, MIXED, value=value, heads=(6, key_heads))
    exact = _with_gradients(_repeated(_dense), MIXED, value=value, heads=(6, key_heads))
    assert [x.shape[1] for x in ours] == [6, 6, key_heads, key_heads]
    for mine, theirs in zip(ours, exact, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_shared_key_head_by_hand():
    """Keys 0 weigh both rows alike: heads 0 and 1 average key head 0's values 2 and 4, heads 2 and 3 its 20 and 40."""
    q, k = torch.ones(2, 4, 1), torch.zeros(2, 2, 1)
    v = torch.tensor([[[2.0], [20.0]], [[4.0], [40.0]]])
    assert attend_suffix(q[1:], k, v, 1.0).flatten().tolist() == [3, 3, 30, 30]
    whole = attend(q, k, v, PackedLayout.causal([2]), 1.0)
    assert whole[..., 0].tolist() == [[2, 2, 20, 20], [3, 3, 30, 30]]


@pytest.mark.parametrize("fast", [False, True])
def test_shared_key_heads_in_bf16(monkeypatch: pytest.MonkeyPatch, fast: bool):
    """With and without bf16 units: bf16 results within the rounding of fp32 ones (2^-8 of values below 8)."""
    monkeypatch.setattr("simple_llama.ops.linear.cpu_emulates_bf16", lambda: not fast)
    q, k, v = _rows(MIXED, torch.bfloat16, heads=(4, 2))
    assert attend(q, k, v, MIXED, 0.7).dtype == torch.bfloat16
    low, exact = (_with_gradients(attend, MIXED, dtype, heads=(4, 2)) for dtype in (torch.bfloat16, torch.float32))
    for ours, theirs in zip(low, exact, strict=True):
        assert torch.allclose(ours, theirs, atol=0.06)


def test_masks_are_made_once_a_layout(monkeypatch: pytest.MonkeyPatch):
    """Two layers over a layout with two equal rectangles (3 + 4 keys, 4 rows) make that mask once."""
    made: list[tuple[int, int]] = []
    real = attention._suffix_mask
    monkeypatch.setattr(attention, "_suffix_mask", lambda r, k, like: made.append((r, k)) or real(r, k, like))
    layout = PackedLayout(((3, (2, 4)), (3, (1, 4))))
    for _ in range(2):
        q, k, v = _rows(layout)
        attend(q, k, v, layout, 1.0)
    assert made == [(4, 7)]


def test_suffix_mask_by_hand():
    """Two rows that are the last of four: the first sees three keys, the second all."""
    assert _suffix_mask(2, 4, torch.zeros(())).tolist() == [[0, 0, 0, -torch.inf], [0, 0, 0, 0]]


@pytest.mark.parametrize("heads", [(H, H), (4, 2)], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("last", [1, 3, 5])
def test_suffix_is_the_end_of_the_whole(last: int, heads: tuple[int, int]):
    """The last rows against all keys give what they give inside the whole sequence."""
    layout = PackedLayout.causal([5])
    q, k, v = _rows(layout, heads=heads)
    whole = attend(q, k, v, layout, 0.5)
    assert torch.allclose(attend_suffix(q[-last:], k, v, 0.5), whole[-last:], atol=1e-6)


def _varlen_of_old(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """The same of a torch that knows no flag for fewer key heads, and takes them."""
    flag = q.shape[1] != k.shape[1]
    return _varlen_by_definition(
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=flag
    )


def _varlen_by_definition(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen promises for a causal window, in plain torch: blocks aligned at the last row."""
    assert window_size == (-1, 0)
    assert enable_gqa == (q.shape[1] != k.shape[1])  # it refuses fewer key heads without
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    spans = list(zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True))
    assert max_q == max(b - a for (a, b), _ in spans)
    assert max_k == max(b - a for _, (a, b) in spans)
    return torch.cat([attend_suffix(q[a:b], k[c:d], v[c:d], scale) for (a, b), (c, d) in spans])


@pytest.mark.parametrize("varlen", [_varlen_by_definition, _varlen_of_old], ids=["torch 2.13", "torch 2.11"])
@pytest.mark.parametrize("heads", [(H, H), (4, 2), (3, 1)], ids=["own keys", "shared keys", "one key head"])
@pytest.mark.parametrize("value", [2, V])
@pytest.mark.parametrize("layout", [MIXED, PackedLayout.causal([3, 1, 4])], ids=["branches", "causal"])
def test_varlen_arguments(
    monkeypatch: pytest.MonkeyPatch,
    layout: PackedLayout,
    value: int,
    heads: tuple[int, int],
    varlen: Callable[..., torch.Tensor],
):
    """The one varlen call for GPUs gets blocks, gathered keys and padded widths that add up to the SDPA path."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    ours = _with_gradients(attention._attend_varlen, layout, value=value, heads=heads)
    for mine, exact in zip(ours, _with_gradients(attend, layout, value=value, heads=heads), strict=True):
        assert torch.allclose(mine, exact, atol=1e-5)


def test_gather_of_keys_and_its_gradient():
    """As `index_select` and its gradient, for up to three branches and empty ones.

    The rows are copies, so equal bit for bit on any CPU; the gradient's sums may differ in their order.
    """
    layouts = [((2, (3, 1)),), ((3, (0, 2, 4, 1)), (0, (2, 3)), (2, (1, 0, 2)), (4, ())), ((1, (1, 1)), (5, (2, 2)))]
    for segments in layouts:
        layout = PackedLayout(segments)
        plan = layout.varlen_plan(torch.device("cpu")).keys
        assert plan is not None
        rows = torch.randn(layout.rows, 2, 3, dtype=torch.float64, requires_grad=True)
        expected, found = rows.index_select(0, plan.rows_S), attention._GatherKeys.apply(rows, plan)
        assert torch.equal(found, expected)
        grad = torch.randn_like(found)
        (exact,), (ours,) = (torch.autograd.grad(out, rows, grad) for out in (expected, found))
        torch.testing.assert_close(ours, exact)


def test_causal_layouts_gather_no_keys():
    """Sequences that share nothing use the stream itself as keys: no copy."""
    assert PackedLayout.causal([3, 4]).varlen_plan(torch.device("cpu")).keys is None
    gathered = PackedLayout(((2, (3, 1)),)).varlen_plan(torch.device("cpu")).keys
    assert gathered is not None
    assert gathered.rows_S.tolist() == [0, 1, 2, 3, 4, 0, 1, 5]
