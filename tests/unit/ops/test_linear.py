"""The linear layer that multiplies in fp32 where the CPU emulates bf16."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from simple_llama.ops import linear as linear_module
from simple_llama.ops.linear import Linear, linear


def _operands(dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows (5, 7), weight (3, 7), bias (3,), with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (3, 7), (3,))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def test_upcast_is_the_fp32_result_rounded_once():
    """Value and all three gradients are bitwise those of fp32 arithmetic on the same bf16 numbers, rounded to bf16.

    On any CPU, with any number of threads: both sides make the same three fp32 GEMMs in one process.
    """
    ours, exact = _operands(torch.bfloat16), [x.detach().float().requires_grad_() for x in _operands(torch.bfloat16)]
    out, expected = linear(*ours, upcast=True), F.linear(*exact)
    grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, exact, grad.float())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs.bfloat16())


def test_upcast_by_hand():
    """(1, 2) . (3, 4) + 5 = 16; d/dx = weight, d/dw = x, d/db = 1."""
    x, w, b = (torch.tensor(v).bfloat16().requires_grad_() for v in ([[1.0, 2.0]], [[3.0, 4.0]], [5.0]))
    out = linear(x, w, b, upcast=True)
    assert out.tolist() == [[16.0]]
    gradients = torch.autograd.grad(out.sum(), (x, w, b))
    assert [grad.tolist() for grad in gradients] == [[[3.0, 4.0]], [[1.0, 2.0]], [1.0]]


def test_upcast_keeps_bf16_for_backward():
    """What the graph holds are the two bf16 operands, not fp32 copies of them."""
    saved: list[torch.dtype] = []
    x, w, b = _operands(torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        linear(x, w, b, upcast=True)
    assert saved == [torch.bfloat16, torch.bfloat16]


def test_upcast_computes_only_the_gradients_asked_for():
    """A GEMM forward, and one each in backward for rows and weight that need a gradient: 3, or 2 with one frozen."""
    for frozen, gemms in ((None, 3), (0, 2), (1, 2), (2, 3)):
        operands = _operands(torch.bfloat16)
        if frozen is not None:
            operands[frozen].requires_grad_(False)
        x, w, b = operands
        with FlopCounterMode(display=False) as counter:
            linear(x, w, b, upcast=True).sum().backward()
        assert counter.get_total_flops() == gemms * 2 * 5 * 7 * 3
        assert [operand.grad is None for operand in operands] == [index == frozen for index in range(3)]


@pytest.mark.parametrize(
    ("dtype", "fast", "upcasts"),
    [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False)],
)
def test_machine_decides(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fast: bool, upcasts: bool):
    """Only bf16 on a CPU without bf16 units is multiplied in fp32; else the layer is F.linear itself."""
    monkeypatch.setattr(linear_module, "cpu_emulates_bf16", lambda: not fast)
    x, w, b = _operands(dtype)
    out = linear(x, w, b)
    assert (type(out.grad_fn).__name__ == "_UpcastLinearBackward") == upcasts
    assert torch.allclose(out.float(), F.linear(x.float(), w.float(), b.float()), atol=0.05)


def test_layer_has_the_parameters_of_nn_linear():
    """Same names and shapes; weights start near normal(0, 0.02), biases at zero."""
    torch.manual_seed(0)
    layer = Linear(200, 100)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (100, 200), "bias": (100,)}
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not layer.bias.any()
