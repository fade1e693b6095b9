"""The small layers of the transformer."""

from __future__ import annotations

import pytest
import torch

from simple_llama.pretraining.architecture import Architecture, LoRA
from simple_llama.pretraining.layers import FeedForward, LoRAInjection, RMSNorm, TiedEmbedding


def test_rms_norm_by_hand():
    """(3, 4): mean square 12.5, so (3, 4) / sqrt(12.5) = (0.848528, 1.131371); the weight multiplies after that."""
    norm = RMSNorm(2, eps=1e-12)
    norm.weight.data = torch.tensor([1.0, 10.0])
    assert norm(torch.tensor([[3.0, 4.0]])).tolist() == [pytest.approx([0.848528, 11.31371], rel=1e-6)]


def test_rms_norm_computes_in_fp32():
    """bf16 rows: the fraction is that of fp32 arithmetic, rounded once, and only then multiplied with the weight."""
    x, weight = (torch.randn(*shape).bfloat16() for shape in ((8, 64), (64,)))
    norm = RMSNorm(64, eps=1e-5).bfloat16()
    norm.weight.data = weight
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), weight * exact.bfloat16())


def test_rms_norm_eps():
    """A row of zeros stays zero; 0.001 with eps 1 is 0.001 / sqrt(1.000001)."""
    assert RMSNorm(1, eps=1.0)(torch.tensor([[0.0], [1e-3]])).flatten().tolist() == pytest.approx([0, 1e-3], rel=1e-5)


def test_feed_forward_by_hand():
    """One number, all weights 1: w2(silu(2) * 2) = 2 / (1 + e^-2) * 2 = 3.523188, once for each of 3 hidden ones."""
    layer = FeedForward(_one_wide())
    for parameter in layer.parameters():
        parameter.data.fill_(1.0)
    assert layer(torch.tensor([[2.0]])).item() == pytest.approx(3 * 3.523188, rel=1e-6)


def test_feed_forward_with_biases_by_hand():
    """All weights and biases 1: w2 (silu(2 + 1) * (2 + 1)) + 1 = 3 / (1 + e^-3) * 3 = 8.573167 for each of 3, and 1."""
    layer = FeedForward(_one_wide(ffwd_bias=True))
    for parameter in layer.parameters():
        parameter.data.fill_(1.0)
    assert layer(torch.tensor([[2.0]])).item() == pytest.approx(3 * 8.573167 + 1, rel=1e-6)


def _one_wide(ffwd_bias: bool = False) -> Architecture:
    """One number a row, three hidden ones."""
    return Architecture(
        vocab_size=1,
        max_seq_len=1,
        width=1,
        layers=1,
        heads=1,
        key_heads=1,
        rope_width=2,
        value_width=1,
        hidden_width=3,
        ffwd_bias=ffwd_bias,
    )


def test_tied_embedding_by_hand():
    """Token 2 is row (5, 6); the logits of row (1, 10) are 1 + 20, 3 + 40, 5 + 60."""
    table = TiedEmbedding(3, 2)
    table.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert table(torch.tensor([2])).tolist() == [[5.0, 6.0]]
    assert table(torch.tensor([[1.0, 10.0]])).tolist() == [[21.0, 43.0, 65.0]]


def test_lora_by_hand():
    """alpha/rank = 8/2 times (1 * 1 + 2 * 0.5, 0) . (3, 7) = 4 * 2 * 3 = 24; zero as it starts."""
    layer = LoRAInjection(2, 1, LoRA(rank=2, alpha=8, targets=()))
    x = torch.tensor([[1.0, 2.0]])
    assert layer(x).item() == 0
    layer.lora_a.data = torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    layer.lora_b.data = torch.tensor([[3.0], [7.0]])
    assert layer(x).item() == 24
