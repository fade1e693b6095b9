"""The varlen kernels against the SDPA path in fp32."""

from __future__ import annotations

import pytest
import torch

from host_waits import no_host_waits
from simple_llama.ops.attention import PackedLayout, _attend_by_block, attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYOUTS = {
    "pairs": PackedLayout(((130, (40, 70)), (33, (0, 5)), (0, (7, 9)), (64, (64, 1)))),
    "causal": PackedLayout.causal([1, 100, 257]),
}


def _run(run, layout: PackedLayout, dtype: torch.dtype, key: int, value: int, key_heads: int = 4) -> list[torch.Tensor]:
    """Value and gradients in fp32, for operands that bf16 can hold; 4 query heads."""
    generator = torch.Generator().manual_seed(0)
    heads_and_widths = ((4, key), (key_heads, key), (key_heads, value), (4, value))
    shapes = [(layout.rows, *numbers) for numbers in heads_and_widths]
    q, k, v, grad = (torch.randn(*shape, generator=generator).bfloat16().to("cuda", dtype) for shape in shapes)
    operands = [x.requires_grad_() for x in (q, k, v)]
    out = run(*operands, layout.to("cuda"), key**-0.5)
    assert out.dtype == dtype
    return [x.float() for x in (out.detach(), *torch.autograd.grad(out, operands, grad))]


@pytest.mark.parametrize(("key", "value"), [(64, 64), (24, 16), (96, 64), (20, 20)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_varlen_equals_sdpa(name: str, key: int, value: int):
    """bf16 varlen is within bf16 rounding of fp32 SDPA, value and all gradients, also where widths differ (MLA)."""
    fast = _run(attend, LAYOUTS[name], torch.bfloat16, key, value)
    exact = _run(_attend_by_block, LAYOUTS[name], torch.float32, key, value)
    for ours, theirs in zip(fast, exact, strict=True):
        assert torch.allclose(ours, theirs, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shared_key_heads(name: str, key_heads: int):
    """4 query heads over 1 or 2 key heads: bf16 varlen is within bf16 rounding of fp32 SDPA, value and gradients."""
    fast = _run(attend, LAYOUTS[name], torch.bfloat16, 64, 64, key_heads)
    exact = _run(_attend_by_block, LAYOUTS[name], torch.float32, 64, 64, key_heads)
    for ours, theirs in zip(fast, exact, strict=True):
        assert torch.allclose(ours, theirs, atol=0.05, rtol=0.02)


def test_branches_do_not_see_each_other():
    """Rows of branch 0 (130..169) get exactly no gradient from branch 1 (170..239)."""
    layout = LAYOUTS["pairs"].to("cuda")
    q, k, v = (torch.randn(layout.rows, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    k_grad, v_grad = torch.autograd.grad(attend(q, k, v, layout, 0.125)[170:240].sum(), (k, v))
    assert not k_grad[130:170].any()
    assert not v_grad[130:170].any()
    assert v_grad[:130].any()


def test_moving_a_layout_does_not_wait():
    """The copies to the device are asynchronous: torch's own sync detector stays silent."""
    layout = PackedLayout(((5, (2, 3)),))
    with no_host_waits():
        layout.to("cuda")
