"""The mapping of weights between SimpleLLaMA and Hugging Face's Llama, without transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.interop.hf_names import (
    LLAMA,
    NameMap,
    _half_order,
    from_hf,
    names_in,
    shapes_in,
    to_hf,
    to_ours,
    to_theirs,
)
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.rotary import rotation

OURS = Architecture.of(TrainingConfig(n_embd=24, n_heads=4, n_layers=2, multiple_of=8, max_seq_len=64), 11)
FAMILIES = {
    "ours": OURS,
    "grouped": replace(OURS, key_heads=2, rope_width=8, value_width=8),
    "qwen2": replace(OURS, key_heads=1, qkv_bias=True, tied_head=True),
    "qwen3": replace(OURS, key_heads=2, qk_norm=True),
    "all biases": replace(OURS, qkv_bias=True, out_bias=True, ffwd_bias=True),
}
ROWS = 5  # T


def random_model(architecture: Architecture) -> LLaMaTransformer:
    """Every parameter random, biases and norms too."""
    model = LLaMaTransformer(architecture)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_exact(name: str) -> None:
    """There and back gives every tensor bit for bit; no name of ours is lost and none of theirs is left over."""
    ours = random_model(FAMILIES[name]).state_dict()
    theirs = to_hf(ours, FAMILIES[name])
    back = from_hf(theirs, FAMILIES[name])
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    fused = sum(".qkv_linear." in name for name in ours)
    assert len(theirs) == len(ours) + 2 * fused  # q, k and v are three matrices there
    assert not any(tensor.is_set_to(ours[name]) for name, tensor in back.items())  # copies


def test_shapes() -> None:
    """Width 24, 4 heads of 6 or 8; the feed-forward is 8/3 * 24 = 64 wide, a multiple of 8 already."""
    theirs = to_hf(random_model(OURS).state_dict(), OURS)
    assert theirs["model.layers.1.mlp.up_proj.weight"].shape == (64, 24)
    assert theirs["model.layers.1.mlp.down_proj.weight"].shape == (24, 64)
    assert theirs["model.embed_tokens.weight"].shape == theirs["lm_head.weight"].shape == (11, 24)
    grouped = FAMILIES["grouped"]
    theirs = to_hf(random_model(grouped).state_dict(), grouped)
    assert theirs["model.layers.0.self_attn.q_proj.weight"].shape == (4 * 8, 24)
    assert theirs["model.layers.0.self_attn.v_proj.weight"].shape == (2 * 8, 24)
    assert theirs["model.layers.0.self_attn.o_proj.weight"].shape == (24, 4 * 8)


def test_families_have_their_own_tensors() -> None:
    """Biases of q, k and v alone, no head of its own; norms of queries and keys."""
    qwen2 = to_hf(random_model(FAMILIES["qwen2"]).state_dict(), FAMILIES["qwen2"])
    assert {name.split(".", 3)[3] for name in qwen2 if name.endswith(".bias")} == {
        f"self_attn.{part}_proj.bias" for part in "qkv"
    }
    assert "lm_head.weight" not in qwen2
    qwen3 = to_hf(random_model(FAMILIES["qwen3"]).state_dict(), FAMILIES["qwen3"])
    assert qwen3["model.layers.0.self_attn.q_norm.weight"].shape == (6,)


def test_another_name_map_gives_other_names() -> None:
    """A family is data: the names of its modules, with the layer's number in them."""
    names = {ours: [their.replace("self_attn.", "attn/") for their in theirs] for ours, theirs in LLAMA.names.items()}
    family = NameMap(layer="h{n}", names={**names, "norm": ["last"]})
    ours = random_model(OURS).state_dict()
    theirs = to_hf(ours, OURS, family)
    assert {"last.weight", "h1.attn/k_proj.weight", "model.embed_tokens.weight"} < theirs.keys()
    assert torch.equal(from_hf(theirs, OURS, family)["norm.weight"], ours["norm.weight"])
    with pytest.raises(UserError, match=r"norm.weight: expected a tensor that the other"):
        to_hf(ours, OURS, NameMap("h{n}", {name: theirs for name, theirs in names.items() if name != "norm"}))


@pytest.mark.parametrize("name", FAMILIES)
def test_tensor_by_tensor_both_ways(name: str) -> None:
    """Each of our tensors alone: its parts have the names and shapes foretold, and give it back bit for bit."""
    architecture, found = FAMILIES[name], {}
    for ours, tensor in random_model(architecture).state_dict().items():
        theirs = to_theirs(ours, tensor, architecture)
        assert list(theirs) == names_in(ours)
        assert torch.equal(to_ours(ours, list(theirs.values()), architecture), tensor)
        found |= {their: tuple(part.shape) for their, part in theirs.items()}
    assert shapes_in(architecture) == found


def test_rows_stay_where_the_family_turns_adjacent_pairs() -> None:
    """One key head, two heads of width 2: the rows are q0 q0 q1 q1 k k v v in both."""
    architecture = replace(OURS, width=4, heads=2, key_heads=1, rope_width=2, value_width=2)
    adjacent = replace(LLAMA, halves=False)
    name = "decoder_blocks.0.attention.qkv_linear.weight"
    rows = torch.arange(8.0)[:, None].expand(8, 4)
    q, k, v = to_theirs(name, rows, architecture, adjacent).values()
    assert (q[:, 0].tolist(), k[:, 0].tolist(), v[:, 0].tolist()) == ([0, 1, 2, 3], [4, 5], [6, 7])
    assert torch.equal(to_ours(name, [q, k, v], architecture, adjacent), rows)
    wider = replace(architecture, heads=1, rope_width=4, value_width=4)  # rows of a head: 0 1 2 3 -> 0 2 1 3
    q, k, v = to_theirs(name, torch.arange(12.0)[:, None], wider).values()
    assert (q[:, 0].tolist(), k[:, 0].tolist(), v[:, 0].tolist()) == ([0, 2, 1, 3], [4, 6, 5, 7], [8, 9, 10, 11])


def test_half_order_by_hand() -> None:
    """Pairs (0, 1), (2, 3), (4, 5): first members, then second ones."""
    assert _half_order(6).tolist() == [0, 2, 4, 1, 3, 5]


def rotate_half(x_THK: torch.Tensor, positions_T: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE on pairs (x_j, x_{j + K/2}), written out: pair j turns by position * theta^(-2j / K)."""
    half = x_THK.shape[-1] // 2
    out = torch.empty_like(x_THK)
    for j in range(half):
        angle_T1 = (positions_T * theta ** (-2 * j / x_THK.shape[-1]))[:, None]
        first, second = x_THK[..., j], x_THK[..., j + half]
        out[..., j] = first * angle_T1.cos() - second * angle_T1.sin()
        out[..., j + half] = first * angle_T1.sin() + second * angle_T1.cos()
    return out


@pytest.mark.parametrize("name", ["ours", "grouped", "qwen3"])
def test_scores_of_mapped_queries_and_keys_are_ours(name: str) -> None:
    """q k^T after rotate-half RoPE of their projections equals ours after RoPE of adjacent pairs; values are equal."""
    a = FAMILIES[name]
    model, width, shared = random_model(a).double(), a.key_width, a.heads // a.key_heads
    theirs = to_hf(model.state_dict(), a)
    x_TD, positions_T = torch.randn(ROWS, a.width).double(), torch.arange(ROWS) + 3
    seen = []

    def attend(q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor, *, scale: float) -> torch.Tensor:
        seen.extend((q_THK, k_TGK, v_TGV))
        return q_THK

    model.decoder_blocks[1].attention(x_TD, rotation(positions_T, width, a.theta), attend)  # pyright: ignore
    projected = {
        part: (x_TD @ theirs[f"model.layers.1.self_attn.{part}_proj.weight"].T).view(ROWS, -1, width) for part in "qkv"
    }
    q, k, v = seen
    assert torch.allclose(projected["v"], v, rtol=1e-12, atol=1e-12)  # other GEMMs round otherwise
    for part in "qk" if a.qk_norm else "":
        weight_K = theirs[f"model.layers.1.self_attn.{part}_norm.weight"]
        rows = projected[part]
        projected[part] = weight_K * rows / (rows.square().mean(-1, keepdim=True) + a.eps).sqrt()
    their_q, their_k = (rotate_half(projected[part], positions_T, a.theta) for part in "qk")
    scores = [torch.einsum("thk,shk->hts", a, b.repeat_interleave(shared, 1)) for a, b in ((their_q, their_k), (q, k))]
    assert torch.allclose(*scores, rtol=1e-5, atol=1e-5)  # our RoPE computes in fp32


def test_other_architectures_are_refused() -> None:
    """These families have neither latent attention nor LoRA."""
    for config in (TrainingConfig(use_mla=True), TrainingConfig(use_lora=True)):
        with pytest.raises(UserError, match="MLA or LoRA"):
            to_hf({}, Architecture.of(config, 11))
