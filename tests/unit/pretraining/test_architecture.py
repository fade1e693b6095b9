"""Architecture: derived from SimpleLLaMA's configuration, and whatever else it says is what the layers compute.

The slow twin below computes one chat's logits in fp64 from a model's parameters: one head, one row and one pair of
RoPE at a time, keys read by the query heads that share them, every formula written out.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from simple_llama.common.errors import UserError
from simple_llama.ops.attention import PackedLayout
from simple_llama.pretraining.architecture import Architecture, Latent, LoRA
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.rotary import LinearScaling, Llama3Scaling
from tiny_job import MLA

VOCAB = 40
BASE = Architecture(
    vocab_size=VOCAB,
    max_seq_len=32,
    width=24,
    layers=2,
    heads=4,
    key_heads=4,
    rope_width=6,
    value_width=6,
    hidden_width=20,
)
GROUPED = replace(BASE, key_heads=2)
FAMILIES = {
    "plain": BASE,
    "grouped": GROUPED,
    "one key head": replace(BASE, key_heads=1),
    "wide heads": replace(GROUPED, rope_width=10, value_width=10),  # 4 * 10 is not the width
    "other values": replace(GROUPED, value_width=8),
    "biases of q, k, v": replace(GROUPED, qkv_bias=True),
    "all biases": replace(BASE, qkv_bias=True, out_bias=True, ffwd_bias=True),
    "norms of q and k": replace(GROUPED, qk_norm=True, eps=1e-3),
    "tied": replace(BASE, tied_head=True),
    "linear RoPE": replace(BASE, theta=500.0, rope_scaling=LinearScaling(4.0)),
    "Llama 3 RoPE": replace(BASE, rope_width=12, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, trained_len=16)),
    "grouped LoRA": replace(GROUPED, rope_width=8, lora=LoRA(rank=2, alpha=4, targets=("q", "k", "v", "o"))),
}


# === The slow twin ===


def twin(model: LLaMaTransformer, ids: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) of one chat, differentiable in the model's parameters."""
    a = model.architecture
    get = {name: parameter.double() for name, parameter in model.named_parameters()}
    x = [get["embeddings.weight"][token] for token in ids]
    for layer in range(a.layers):
        part = {n.split(".", 2)[2]: p for n, p in get.items() if n.startswith(f"decoder_blocks.{layer}.")}
        mixed = twin_attention(a, part, [norm(row, part["norm1.weight"], a.eps) for row in x])
        x = [row + added for row, added in zip(x, mixed, strict=True)]
        x = [row + twin_feed_forward(part, norm(row, part["norm2.weight"], a.eps)) for row in x]
    head = get["embeddings.weight" if a.tied_head else "final_linear.weight"]
    return torch.stack([head @ norm(row, get["norm.weight"], a.eps) for row in x])


def twin_attention(a: Architecture, part: dict[str, torch.Tensor], x: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each row's output: for each query head the softmax over the rows up to it."""
    shared, key = a.heads // a.key_heads, a.rope_width
    block = shared * key + key + a.value_width  # rows of qkv_linear that belong to one key head
    fused = [affine(part, "attention.qkv_linear", row) for row in x]

    def lora(name: str, rows: list[torch.Tensor]) -> list[torch.Tensor] | None:
        if not a.lora:
            return None
        down, up = (part[f"attention.{name}_lora_layer.lora_{end}"] for end in "ab")
        return [a.lora.alpha / a.lora.rank * (row @ down @ up) for row in rows]

    def projected(name: str, head: int, start: int, width: int, t: int) -> torch.Tensor:
        update = updates[name]
        row = fused[t][start : start + width]
        row = row if update is None else row + update[t][head * width : (head + 1) * width]
        if name == "v":
            return row
        if a.qk_norm:
            row = norm(row, part[f"attention.{name}_norm.weight"], a.eps)
        return turned(row, t, a)

    updates = {name: lora(name, x) for name in "qkv"}
    outputs = []
    for t in range(len(x)):
        values = []
        for h in range(a.heads):
            g = h // shared
            start = g * block
            q = projected("q", h, start + (h - g * shared) * key, key, t)
            k = [projected("k", g, start + shared * key, key, s) for s in range(t + 1)]
            v = [projected("v", g, start + shared * key + key, a.value_width, s) for s in range(t + 1)]
            weights = torch.stack([(q * row).sum() / math.sqrt(key) for row in k]).softmax(0)
            values.append(sum(weight * row for weight, row in zip(weights, v, strict=True)))
        outputs.append(torch.cat(values))
    added = lora("o", outputs) or [0.0] * len(x)
    return [affine(part, "attention.out", row) + more for row, more in zip(outputs, added, strict=True)]


def twin_feed_forward(part: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
    """w2 (silu(w1 x) * w3 x) with whatever biases there are."""
    gate, up = affine(part, "ffwd.w1", row), affine(part, "ffwd.w3", row)
    return affine(part, "ffwd.w2", gate * torch.sigmoid(gate) * up)


def affine(part: dict[str, torch.Tensor], name: str, row: torch.Tensor) -> torch.Tensor:
    """W x, plus the bias where there is one."""
    return part[f"{name}.weight"] @ row + part.get(f"{name}.bias", 0.0)


def norm(row: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps)."""
    return weight * row / (row.square().mean() + eps).sqrt()


def turned(row: torch.Tensor, position: int, a: Architecture) -> torch.Tensor:
    """Each pair as a complex number times e^(i * position * frequency)."""
    out = []
    for j in range(a.rope_width // 2):
        turn = cmath.exp(1j * position * frequency(a, j))
        x0, x1 = row[2 * j], row[2 * j + 1]
        out += [x0 * turn.real - x1 * turn.imag, x0 * turn.imag + x1 * turn.real]
    return torch.stack(out)


def frequency(a: Architecture, pair: int) -> float:
    """As published: by wavelength, as in Meta's `apply_scaling` of Llama 3.1."""
    base, scaling = a.theta ** (-2 * pair / a.rope_width), a.rope_scaling
    if scaling is None:
        return base
    if isinstance(scaling, LinearScaling):
        return base / scaling.factor
    wavelength = 2 * math.pi / base
    if wavelength < scaling.trained_len / scaling.fast_turns:
        return base
    if wavelength > scaling.trained_len / scaling.slow_turns:
        return base / scaling.factor
    smooth = (scaling.trained_len / wavelength - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)
    return (1 - smooth) * base / scaling.factor + smooth * base


# === The model is the twin ===


def _model(architecture: Architecture) -> LLaMaTransformer:
    """A small model in fp32 with every parameter random: biases and norms too."""
    torch.manual_seed(0)
    model = LLaMaTransformer(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


IDS = torch.tensor([3, 14, 15, 9, 26, 5, 35, 8])
# the first 3 tokens as a prefix of the chats 3, 14, 15, 9, 26 and 3, 14, 15, 5, 35, 8
PAIR, POSITIONS = PackedLayout(((3, (2, 3)),)), torch.tensor([0, 1, 2, 3, 4, 3, 4, 5])
CHATS = {(3, 14, 15, 9, 26): [0, 1, 2, 3, 4], (3, 14, 15, 5, 35, 8): [0, 1, 2, 5, 6, 7]}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_the_twins(name: str):
    """Logits within 1e-4 and every parameter's gradient within 1e-4 of its largest entry, packed with a shared prefix;
    a tied matrix gets both ends' gradient, a shared key that of all its queries."""
    model = _model(FAMILIES[name])
    hidden = model.hidden(IDS, POSITIONS, PAIR)
    logits = F.linear(hidden, model.head_weight)
    expected = {chat: twin(model, chat) for chat in CHATS}
    for chat, rows in CHATS.items():
        assert torch.allclose(logits[rows].double(), expected[chat], atol=1e-4)
    direction = torch.randn(len(IDS), VOCAB)
    loss = (logits * direction).sum()
    slow = sum((expected[chat][3:] * direction[rows[3:]]).sum() for chat, rows in CHATS.items())
    slow = slow + (expected[next(iter(CHATS))][:3] * direction[:3]).sum()  # the prefix's rows once
    mine, other = (torch.autograd.grad(total, list(model.parameters())) for total in (loss, slow))
    for (parameter, _), found, wanted in zip(model.named_parameters(), mine, other, strict=True):
        assert wanted.abs().max() > 0, parameter
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_and_generation_are_the_twins(name: str):
    """A plain batch; and a prompt of 5 tokens at once, then one by one, with a cache that holds only the key heads."""
    model, a = _model(FAMILIES[name]), FAMILIES[name]
    with torch.no_grad():
        expected = twin(model, IDS.tolist())
        assert torch.allclose(model(IDS[None])[0].double(), expected, atol=1e-4)
    cache = model.new_cache(len(IDS))
    assert cache.keys_LSGK.shape == (a.layers, len(IDS), a.key_heads, a.rope_width)
    assert cache.values_LSGV.shape == (a.layers, len(IDS), a.key_heads, a.value_width)
    ends = [5, 6, 7, 8]
    for start, end in zip([0, *ends], ends, strict=False):
        assert torch.allclose(model.decode(IDS[start:end], cache).double(), expected[end - 1], atol=1e-4)


@pytest.mark.parametrize(
    ("switch", "latent", "projections"),
    [
        ("qkv_bias", None, {"attention.qkv_linear"}),
        ("out_bias", None, {"attention.out"}),
        ("ffwd_bias", None, {"ffwd.w1", "ffwd.w2", "ffwd.w3"}),
        ("qkv_bias", Latent(0, 8, 4), {"attention.wq", "attention.wkv_a", "attention.wkv_b"}),
        ("qkv_bias", Latent(5, 8, 4), {f"attention.{name}" for name in ("wq_a", "wq_b", "wkv_a", "wkv_b")}),
        ("out_bias", Latent(0, 8, 4), {"attention.wo"}),
    ],
)
def test_each_switch_gives_its_own_biases(switch: str, latent: Latent | None, projections: set[str]):
    """The twin adds whatever biases it finds; these are to be there, and no others."""
    names = LLaMaTransformer(replace(BASE, latent=latent, **{switch: True})).state_dict()
    found = {name.removesuffix(".bias") for name in names if name.endswith(".bias")}
    assert found == {f"decoder_blocks.{layer}.{name}" for layer in range(2) for name in projections}


def test_grouped_is_multi_head_with_repeated_keys():
    """Two key heads, each copied for its two queries: the same logits; a key's gradient is the sum of its copies'."""
    grouped, whole = _model(GROUPED), _model(BASE)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith("qkv_linear.weight"):
            rows = state[name].view(2, 4, 6, 24)  # of a key head: two queries, a key, a value
            queries, keys = rows[:, :2].reshape(4, 1, 6, 24), rows[:, 2:].repeat_interleave(2, dim=0)
            state[name] = torch.cat((queries, keys), dim=1).reshape(-1, 24)
    whole.load_state_dict(state)
    mine, other = grouped(IDS[None]), whole(IDS[None])
    assert torch.allclose(mine, other, atol=1e-5)
    gradients = []
    for model, logits in ((grouped, mine), (whole, other)):
        logits.square().sum().backward()
        gradients.append(dict(model.named_parameters())["decoder_blocks.0.attention.qkv_linear.weight"].grad)
    repeated = gradients[1].view(2, 2, 3, 6, 24)
    summed = torch.cat((repeated[:, :, 0], repeated[:, :, 1:].sum(1)), dim=1).flatten(0, 2)
    assert torch.allclose(gradients[0], summed, atol=1e-4 * float(summed.abs().max()))


def test_a_tied_head_is_one_parameter_with_both_gradients():
    """The gradient is that of the embeddings plus that of an untied head with the same numbers; one tensor is saved."""
    tied, untied = _model(FAMILIES["tied"]), _model(BASE)
    assert "final_linear.weight" not in tied.state_dict() and tied.head_weight is tied.embeddings.weight
    untied.load_state_dict({**tied.state_dict(), "final_linear.weight": tied.embeddings.weight.detach().clone()})
    (mine,) = torch.autograd.grad(tied(IDS[None]).square().sum(), tied.head_weight)
    ends = torch.autograd.grad(untied(IDS[None]).square().sum(), (untied.embeddings.weight, untied.head_weight))
    assert all(end.any() for end in ends)
    assert torch.allclose(mine, ends[0] + ends[1], atol=1e-5 * float(mine.abs().max()))


# === Made from a configuration ===

SMALL: dict[str, Any] = {"n_embd": 64, "n_heads": 4, "n_layers": 3, "multiple_of": 32, "max_seq_len": 64, "eps": 1e-6}


def test_of_multi_head_attention():
    """64 / 4 = 16 a head, turned whole; 8/3 * 64 = 170.7, up to a multiple of 32: 192; no biases."""
    assert Architecture.of(TrainingConfig(**SMALL, theta=500, dropout=0.1), 7) == Architecture(
        vocab_size=7,
        max_seq_len=64,
        width=64,
        layers=3,
        heads=4,
        key_heads=4,
        rope_width=16,
        value_width=16,
        hidden_width=192,
        eps=1e-6,
        theta=500,
        dropout=0.1,
    )


def test_of_latent_attention_and_lora():
    """The key is 6 + 4 wide; all projections have biases; updates where the switches say so."""
    made = Architecture.of(TrainingConfig(**{**SMALL, **MLA, "v_head_dim": 16}, use_lora=True, k_lora=True), 7)
    assert made.latent == Latent(query_rank=0, key_rank=MLA["kv_lora_rank"], plain_width=MLA["qk_nope_head_dim"])
    assert (made.rope_width, made.key_width, made.value_width) == (4, 10, 16)
    assert made.qkv_bias and made.out_bias and not made.ffwd_bias
    assert made.lora == LoRA(rank=16, alpha=8, targets=("q", "k", "v"))


@pytest.mark.parametrize(
    ("width", "multiple_of", "hidden"), [(2048, 256, 5632), (64, 32, 192), (6, 1, 16), (6, 8, 16), (2, 3, 6)]
)
def test_feed_forward_width(width: int, multiple_of: int, hidden: int):
    """8/3 * 2048 = 5461.3, up to a multiple of 256: 5632; 170.7 to 192; 16 stays 16; 5.3 to 6."""
    config = TrainingConfig(n_embd=width, n_heads=1, n_layers=1, multiple_of=multiple_of)
    assert Architecture.of(config, 7).hidden_width == hidden


def test_impossible_sizes_are_named():
    """A configuration's own rules first, under its names; then what would not fit together."""
    with pytest.raises(UserError, match="n_embd: expected a multiple of n_heads = 5"):
        Architecture.of(TrainingConfig(**{**SMALL, "n_heads": 5}), 7)
    for changes, message in (
        ({"key_heads": 3}, "key_heads: expected a divisor of heads = 4, found 3"),
        ({"rope_width": 5}, "rope_width: expected an even number for RoPE, found 5"),
        ({"latent": Latent(0, 8, 4), "key_heads": 2}, "latent attention: expected a key for each head"),
        ({"latent": Latent(0, 8, 4), "qk_norm": True}, "no qk_norm"),
    ):
        with pytest.raises(UserError, match=message):
            replace(BASE, **changes)
