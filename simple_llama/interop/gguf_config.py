"""A GGUF file's metadata as config.json would say it: `general.architecture` llama, which Llama, TinyLlama, SmolLM2 and
Mistral have.

A key is read here, or is known to change nothing, or is refused by its name. Numbers of a file are fp32: they are taken
as the decimals that they were rounded from (1e-05, not 9.999999747378752e-06), as a config.json has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.interop.gguf_container import GGUFContainer
from simple_llama.interop.hf_config import HFModelConfig, numerics_of, read_hf_config
from simple_llama.interop.hf_names import LLAMA, NameMap, check_shapes
from simple_llama.pretraining.rotary import Llama3Scaling, stretched

_EMBEDDINGS, _HEAD, _FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
_MODULES = {  # by the last part of Hugging Face's name
    "embed_tokens": "token_embd",
    "input_layernorm": "{layer}.attn_norm",
    "q_proj": "{layer}.attn_q",
    "k_proj": "{layer}.attn_k",
    "v_proj": "{layer}.attn_v",
    "o_proj": "{layer}.attn_output",
    "post_attention_layernorm": "{layer}.ffn_norm",
    "gate_proj": "{layer}.ffn_gate",
    "up_proj": "{layer}.ffn_up",
    "down_proj": "{layer}.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
    "q_norm": "{layer}.attn_q_norm",
    "k_norm": "{layer}.attn_k_norm",
}
_NAMES = NameMap(
    layer="blk.{n}",
    names={ours: [_MODULES[their.rpartition(".")[2]] for their in theirs] for ours, theirs in LLAMA.names.items()},
    halves=False,  # converters bring the rows of queries and keys into this order
)
_WHOLE = {  # keys of whole numbers, by those of config.json; without "llama."
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
_NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_EPS, _THETA, _WINDOW = "attention.layer_norm_rms_epsilon", "rope.freq_base", "attention.sliding_window"
_OTHERS = (  # that are read below
    _EPS,
    _THETA,
    _WINDOW,
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
)
_ONLY_AS = {  # keys that change the mathematics, with the value under which they do not
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "tensor_data_layout": "Meta AI original pth",  # the order of rows of queries and keys
}
_HARMLESS = ("rope.scaling.original_context_length", "rope.scaling.finetuned")  # for yarn, or facts
_LLAMA3 = (1.0, 4.0, 8192)  # what all files with rope_freqs have: slow and fast turns, tokens before the stretch
_CLOSE = 1e-4  # of a factor, relative: they are fp32


def read_gguf_config(container: GGUFContainer) -> HFModelConfig:
    """What a LlamaForCausalLM's config.json would say of a file's model; `names` are those in the file.

    UserError for another architecture, a missing or wrong value, a key that might change the mathematics, and where the
    file's tensors are not those of the model.
    """
    try:
        _check_kind(container.metadata)
        found = {
            key.removeprefix("llama."): value for key, value in container.metadata.items() if key.startswith("llama.")
        }
        _check_keys(found)
        config = read_hf_config(_config_json(found, container), "as config.json")
        shapes = {name: container.shape(name) for name in container if name != _FREQUENCIES}
        check_shapes(shapes, config.architecture, _NAMES, "the metadata")
    except UserError as error:
        raise UserError(f"{container.path}: {error}") from error
    return HFModelConfig(config.architecture, _NAMES, config.raw, numerics_of(config.architecture))


def _check_kind(metadata: Mapping[str, Any]) -> None:
    """UserError for a file that is not a whole model of the one family."""
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise UserError(f"general.architecture: expected llama, found {shown(kind)}; other models cannot be trained")
    if metadata.get("general.type", "model") != "model":
        raise UserError(f"general.type: expected model, found {shown(metadata['general.type'])}")
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise UserError(f"split.count: expected the whole model, found one of {shown(parts)} files; merge them first")


def _check_keys(found: Mapping[str, Any]) -> None:
    """UserError for a key that might change the mathematics and is not read here."""
    for key, value in found.items():
        if key in _WHOLE.values() or key in _OTHERS or key in _HARMLESS:
            continue
        if key not in _ONLY_AS:
            raise UserError(f"expected keys that are known, found llama.{key} ({shown(value)})")
        if value != _ONLY_AS[key]:
            raise UserError(f"llama.{key}: expected {shown(_ONLY_AS[key])}, found {shown(value)}")


def _config_json(found: Mapping[str, Any], container: GGUFContainer) -> dict[str, Any]:
    """The values by the keys of config.json; what is left out there is the same default."""
    for key in (*_NEEDED, _EPS):
        if key not in found:
            raise UserError(f"expected llama.{key}, found none")
    for key in (_EMBEDDINGS, "blk.0.attn_q.weight"):
        if key not in container or len(container.shape(key)) != 2:
            raise UserError(f"expected a matrix {key}, found {container.shape(key) if key in container else 'none'}")
    sizes = {theirs: found[key] for theirs, key in _WHOLE.items() if key in found}
    for theirs, value in sizes.items():
        if type(value) is not int or value < 1:  # a list: another for each layer
            raise UserError(f"llama.{_WHOLE[theirs]}: expected a whole number from 1 on, found {shown(value)}")
    vocabulary = container.shape(_EMBEDDINGS)[0]
    if found.get("vocab_size", vocabulary) != vocabulary:
        raise UserError(
            f"llama.vocab_size: expected {vocabulary}, the rows of {_EMBEDDINGS}, found {shown(found['vocab_size'])}"
        )
    width = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.get(key, width) != width:
            raise UserError(f"llama.{key}: expected {width}, the width of a head, found {shown(found[key])}")
    theta = _decimal(_THETA, found.get(_THETA, 10000.0))
    return {
        **_family(found),
        "vocab_size": vocabulary,
        **sizes,
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(_EPS, found[_EPS]),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(found, container, theta, width),
        "tie_word_embeddings": _HEAD not in container,
        "attention_bias": "blk.0.attn_q.bias" in container,
        "mlp_bias": "blk.0.ffn_gate.bias" in container,
    }


def _family(found: Mapping[str, Any]) -> dict[str, Any]:
    """The family's names, Mistral's where there is a sliding window (0: none), with what it takes for granted."""
    window = found.get(_WINDOW, 0)
    if type(window) is not int or window < 0:
        raise UserError(f"llama.{_WINDOW}: expected a whole number, found {shown(window)}")
    if not window:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    heads = {"num_key_value_heads": found["attention.head_count"]}  # unless the file has fewer
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window, **heads}


def _rope_scaling(
    found: Mapping[str, Any], container: GGUFContainer, theta: float, width: int
) -> dict[str, Any] | None:
    """rope_scaling of config.json. UserError for a scaling that cannot be computed, or two of them."""
    kind, key = found.get("rope.scaling.type", "none"), "rope.scaling.factor"
    if kind not in ("none", "linear"):
        raise UserError(f"llama.rope.scaling.type: expected none or linear, found {shown(kind)}")
    if kind == "none" and key in found:
        raise UserError(f"llama.{key}: expected a rope.scaling.type, linear, beside it, found none")
    if kind == "none":
        key = "rope.scale_linear"  # of older files
    factor = _decimal(key, found.get(key, 1.0))
    if _FREQUENCIES in container:
        if factor != 1:
            raise UserError(f"llama.{key}: expected no linear scaling beside {_FREQUENCIES}, found {factor}")
        return _llama3_scaling(container, theta, width)
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


def _llama3_scaling(container: GGUFContainer, theta: float, width: int) -> dict[str, Any]:
    """The scaling whose effect on each pair's frequency stands in `rope_freqs.weight`: a divisor for each."""
    divisors = container[_FREQUENCIES]
    frequencies = theta ** -(torch.arange(0, width, 2).double() / max(1, width))
    slow, fast, trained = _LLAMA3
    factor = round(float(divisors.max()), 3) if torch.isfinite(divisors).all() else 0.0
    if theta > 1 and factor >= 1 and divisors.shape == frequencies.shape:
        expected = frequencies / stretched(frequencies, Llama3Scaling(factor, slow, fast, trained))
        if torch.allclose(divisors.double(), expected, rtol=_CLOSE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": slow,
                "high_freq_factor": fast,
                "original_max_position_embeddings": trained,
            }
    raise UserError(
        f"{_FREQUENCIES}: expected the divisors of Llama 3's scaling (low_freq_factor {slow}, high_freq_factor {fast}, "
        f"original_max_position_embeddings {trained}), found others; convert a Hugging Face folder of this model"
    )


def _decimal(key: str, value: Any) -> float:
    """The shortest decimal that is this fp32 number."""
    if type(value) is not float:
        raise UserError(f"llama.{key}: expected a number, found {shown(value)}")
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
