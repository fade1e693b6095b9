"""SimpleLLaMA's tensors as those of Hugging Face's models, and back: the same function, other names and rows.

What differs: queries, keys and values are one matrix here, key head by key head; and RoPE turns adjacent pairs
(x0, x1), (x2, x3), ... here, but (x_j, x_{j + K/2}) there. So there the rows of a head's queries and keys stand in
another order; a dot product of both does not see it. Gradients map as weights do.

A family is an Architecture and a NameMap. Shapes: K width of a head's query and key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import listed
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer

Tensors = Mapping[str, torch.Tensor]

_QKV = "{layer}.attention.qkv_linear"
_QK_NORMS = ("{layer}.attention.q_norm", "{layer}.attention.k_norm")


@dataclass(frozen=True)
class NameMap:
    """What a family calls our modules. `{layer}` stands for "decoder_blocks.N" here and for `layer` with N there."""

    layer: str
    names: Mapping[str, Sequence[str]]  # qkv_linear is three modules there, any other is one
    halves: bool = True  # RoPE turns pairs (x_j, x_{j + K/2}) there; otherwise adjacent ones, as here


_TARGETS = {  # our module of each layer that an adapter may stand beside, and which part of it
    "q": (_QKV, 0),
    "k": (_QKV, 1),
    "v": (_QKV, 2),
    "o": ("{layer}.attention.out", 0),
    **{name: (f"{{layer}}.ffwd.{name}", 0) for name in ("w1", "w2", "w3")},
}
_TURNED = ("q", "k")  # whose outputs RoPE turns

LLAMA = NameMap(
    layer="model.layers.{n}",
    names={
        "embeddings": ["model.embed_tokens"],
        "{layer}.norm1": ["{layer}.input_layernorm"],
        _QKV: ["{layer}.self_attn.q_proj", "{layer}.self_attn.k_proj", "{layer}.self_attn.v_proj"],
        _QK_NORMS[0]: ["{layer}.self_attn.q_norm"],
        _QK_NORMS[1]: ["{layer}.self_attn.k_norm"],
        "{layer}.attention.out": ["{layer}.self_attn.o_proj"],
        "{layer}.norm2": ["{layer}.post_attention_layernorm"],
        "{layer}.ffwd.w1": ["{layer}.mlp.gate_proj"],
        "{layer}.ffwd.w3": ["{layer}.mlp.up_proj"],
        "{layer}.ffwd.w2": ["{layer}.mlp.down_proj"],
        "norm": ["model.norm"],
        "final_linear": ["lm_head"],
    },
)


def names_in(name: str, family: NameMap = LLAMA) -> list[str]:
    """The family's names of one of our tensors: three for qkv_linear (queries, keys, values), else one. UserError where
    the family has none."""
    return _named(name, family)[1]


def to_ours(
    name: str, parts: Sequence[torch.Tensor], architecture: Architecture, family: NameMap = LLAMA
) -> torch.Tensor:
    """One of our tensors, in our order of rows, from the family's tensors (weights or gradients) of `names_in(name)`.

    A tensor that is the same in both is returned itself. The parts' shapes are to be those of `shapes_in`.
    """
    module, _ = _named(name, family)
    if family.halves and (module == _QKV or module in _QK_NORMS):
        back_K = _half_order(architecture.key_width).argsort()
        parts = [_reordered(part, back_K) for part in parts[:2]] + list(parts[2:])
    return _joined(parts, architecture) if module == _QKV else parts[0]


def to_theirs(
    name: str, tensor: torch.Tensor, architecture: Architecture, family: NameMap = LLAMA
) -> dict[str, torch.Tensor]:
    """The family's tensors, in its order of rows, from one of ours; a tensor that is the same in both is itself there,
    and those of other rows may be views."""
    module, theirs = _named(name, family)
    parts = _split(tensor, architecture) if module == _QKV else [tensor]
    if family.halves and (module == _QKV or module in _QK_NORMS):
        order_K = _half_order(architecture.key_width)
        parts = [_reordered(part, order_K) for part in parts[:2]] + parts[2:]
    return dict(zip(theirs, parts, strict=True))


def our_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of our model."""
    with torch.device("meta"):  # no memory
        return {name: tuple(tensor.shape) for name, tensor in LLaMaTransformer(architecture).state_dict().items()}


def shapes_in(architecture: Architecture, family: NameMap = LLAMA) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the family's model. UserError for an architecture that the family has not."""
    check_mappable(architecture)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in our_shapes(architecture).items():
        theirs = to_theirs(name, torch.empty(shape, device="meta"), architecture, family)
        shapes |= {their: tuple(part.shape) for their, part in theirs.items()}
    return shapes


def check_shapes(found: Mapping[str, Sequence[int]], architecture: Architecture, family: NameMap, source: str) -> None:
    """UserError where the shapes found, by the family's names, are not all those of `shapes_in`.

    Args:
        source: what describes the model, for the message.
    """
    said = f"expected the tensors that {source} describes, found"
    if architecture.layers > len(found):  # not worth the time to name what is missing of thousands
        raise UserError(f"{said} {len(found)} tensors for {architecture.layers} layers")
    expected = shapes_in(architecture, family)
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing {listed(missing)}")
    if surplus := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {listed(surplus)}")
    misfits = [name for name in expected if name in found and tuple(found[name]) != expected[name]]
    if misfits:
        shapes = [f"{name} {tuple(found[name])} instead of {expected[name]}" for name in misfits]
        problems.append(f"wrong shapes: {listed(shapes)}")
    if problems:
        raise UserError(f"{said} {'; '.join(problems)}")


def to_hf(state_dict: Tensors, architecture: Architecture, family: NameMap = LLAMA) -> dict[str, torch.Tensor]:
    """Copies of our tensors under the family's names, in its order of rows."""
    check_mappable(architecture)
    mapped: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        theirs = to_theirs(name, tensor, architecture, family)
        mapped |= {their: part.clone() for their, part in theirs.items()}
    return mapped


def from_hf(tensors: Tensors, architecture: Architecture, family: NameMap = LLAMA) -> dict[str, torch.Tensor]:
    """Copies of the family's tensors (weights or gradients) under our names, in our order of rows."""
    check_mappable(architecture)
    return {
        name: to_ours(name, [tensors[their] for their in names_in(name, family)], architecture, family).clone()
        for name in our_shapes(architecture)
    }


def adapted_module(layer: int, target: str, family: NameMap = LLAMA) -> str:
    """The family's name of the linear layer that an adapter of ours stands beside."""
    module, part = _TARGETS[target]
    return family.names[module][part].format(layer=family.layer.format(n=layer))


def adapter_rows(
    target: str, rows_OR: torch.Tensor, architecture: Architecture, family: NameMap = LLAMA, back: bool = False
) -> torch.Tensor:
    """What an adapter adds to a layer's outputs (O, R), in the family's order of outputs; `back`: in ours again."""
    if not (family.halves and target in _TURNED):
        return rows_OR
    order_K = _half_order(architecture.key_width)
    return _reordered(rows_OR, order_K.argsort() if back else order_K)


def _half_order(width: int) -> torch.Tensor:
    """Our row for each of their rows of a head (K,): the first of all pairs, then the second of all pairs."""
    return torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))


def _named(name: str, family: NameMap) -> tuple[str, list[str]]:
    """Our module of a tensor as NameMap has it, and the family's names of the tensor (or of its parts)."""
    module, kind = name.rsplit(".", 1)
    layer = ""
    if module.startswith("decoder_blocks."):
        _, number, rest = module.split(".", 2)
        module, layer = "{layer}." + rest, family.layer.format(n=number)
    if module not in family.names:
        raise UserError(f"{name}: expected a tensor that the other library's model has too, found none by that name")
    return module, [f"{their.format(layer=layer)}.{kind}" for their in family.names[module]]


def _split(tensor: torch.Tensor, architecture: Architecture) -> list[torch.Tensor]:
    """Queries, keys and values of qkv_linear's rows, each head by head."""
    key, value = architecture.key_width, architecture.value_width
    queries = architecture.heads // architecture.key_heads * key
    parts = tensor.unflatten(0, (architecture.key_heads, -1)).split((queries, key, value), dim=1)
    return [part.flatten(0, 1) for part in parts]


def _joined(parts: Sequence[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """qkv_linear's rows from queries, keys and values."""
    return torch.cat([part.unflatten(0, (architecture.key_heads, -1)) for part in parts], dim=1).flatten(0, 1)


def _reordered(tensor: torch.Tensor, order_K: torch.Tensor) -> torch.Tensor:
    """The rows of each head in another order."""
    return tensor.unflatten(0, (-1, len(order_K)))[:, order_K].flatten(0, 1)


def check_mappable(architecture: Architecture) -> None:
    """UserError for an architecture that these families do not have."""
    if architecture.latent or architecture.lora:
        raise UserError("model: expected multi-head attention without LoRA, as LlamaForCausalLM has, found MLA or LoRA")
