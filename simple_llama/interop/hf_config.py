"""config.json of a Hugging Face folder as an Architecture, and back.

A key is read here, or is known to change nothing, or is refused by its name: a model is computed as its family computes
it, never nearly so. Both spellings are read, transformers 4's (`rope_theta` and `rope_scaling`, `torch_dtype`) and 5's
(`rope_parameters`, `dtype`, `layer_types`); exports have both.

OLMo-2 is no family here: its norms stand behind attention and feed-forward, those of queries and keys span all heads,
and they round after the weight. A second decoder block, attention and norm would be needed, for one family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.interop.hf_names import LLAMA, NameMap, check_mappable
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.rotary import LinearScaling, Llama3Scaling, RopeScaling

_MOST_WIDTH = 1 << 20  # far above any model's
_MOST = {"vocab_size": 1 << 24, "num_hidden_layers": 1000, "num_attention_heads": 1 << 16, "head_dim": 1 << 16}
_MOST_TOKENS = 1 << 30  # of a sequence
_LARGEST_FLOAT = 1e30
_THETA = 10_000.0  # where a file has none
_NEEDED = object()  # of a key that has no default

_SIZES = {  # their keys, and what transformers takes where a file lacks one
    "vocab_size": _NEEDED,
    "max_position_embeddings": _NEEDED,
    "hidden_size": _NEEDED,
    "intermediate_size": _NEEDED,
    "num_hidden_layers": _NEEDED,
    "num_attention_heads": _NEEDED,
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / num_attention_heads
}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_SLIDING = {"sliding_window": 4096, "use_sliding_window": False}
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_ROPE_KEYS = {  # of a dictionary of RoPE, beside theta and type
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

_ONLY_AS = {  # keys that change the mathematics, with the one value under which they do not
    "add_cross_attention": False,
    "alibi": False,
    "attention_bias": False,  # of families that have no choice
    "attention_dropout": 0,
    "auto_map": {},  # code of the folder's own
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}
# keys of files in use that do not change logits
_HARMLESS = """
    architectures model_type transformers_version torch_dtype dtype use_cache initializer_range pretraining_tp
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class prefix
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss is_decoder
    chunk_size_feed_forward cross_attention_hidden_size finetuning_task task_specific_params problem_type
    id2label label2id num_labels name_or_path max_window_layers is_llama_config transformers.js_config
    unsloth_fixed unsloth_version gradient_checkpointing max_sequence_length
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff eta_cutoff
    """


@dataclass(frozen=True)
class _Family:
    """What differs between families whose decoder block is LLaMA's."""

    architecture: str  # its class in transformers
    reads: Mapping[str, Any]  # keys beside those of all families, and other defaults
    qkv_bias: bool = False  # always there
    qk_norm: bool = False


_FAMILIES = {  # by model_type
    "llama": _Family("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    "mistral": _Family("MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": _Family("Qwen2ForCausalLM", {"num_key_value_heads": 32, **_SLIDING}, qkv_bias=True),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, **_SLIDING},
        qk_norm=True,
    ),
}


@dataclass(frozen=True)
class HFModelConfig:
    """A config.json, understood."""

    architecture: Architecture  # its max_seq_len ends where a sliding window would hide the first token
    names: NameMap
    raw: dict[str, Any]  # as it was found
    numerics: dict[str, str]  # of `numerics_of`

    @property
    def slides(self) -> bool:
        """Whether a sliding window bounds `architecture.max_seq_len`."""
        return self.architecture.max_seq_len < self.raw["max_position_embeddings"]


def read_hf_config(found: Any, source: str) -> HFModelConfig:
    """Reads what stands in a config.json.

    Args:
        found: the JSON value.
        source: the file's name, for messages.

    Raises UserError for another family, a missing or wrong value, and any key that might change the mathematics.
    """
    try:
        if not isinstance(found, dict):
            raise UserError(f"expected an object, found {shown(found)}")
        family = _family_of(found)
        values = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, **_SIZES, **family.reads}
        _check_keys(found, values.keys() | set(_ROPE) | {"layer_types"})
        architecture = _architecture(family, {key: found.get(key, value) for key, value in values.items()}, found)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return HFModelConfig(architecture, LLAMA, dict(found), numerics_of(architecture))


def config_json(
    architecture: Architecture, dtype: torch.dtype, found: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of an export in `dtype`, which transformers from 4.45 on reads.

    Args:
        found: the config.json that the model came with, kept but for the dtype and the spellings of RoPE; with a part
            of one (ids of tokens, say), or nothing, the rest is a LlamaForCausalLM's. UserError where it has no such.
    """
    found = dict(found or {})
    facts = {} if "model_type" in found or "architectures" in found else _llama(architecture)
    rope = _rope_parameters(architecture)
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    name = str(dtype).removeprefix("torch.")
    return {
        **facts,
        **found,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaled if architecture.rope_scaling else None,
        "rope_parameters": rope,
        "torch_dtype": name,
        "dtype": name,
    }


def numerics_of(architecture: Architecture) -> dict[str, str]:
    """What decides a model's output beside its tensors' names, shapes and values."""
    return {
        "heads": f"{architecture.heads} of {architecture.key_width}, keys {architecture.key_heads}",
        "eps": str(float(architecture.eps)),
        "rope": json.dumps(_rope_parameters(architecture)),
    }


def _family_of(found: Mapping[str, Any]) -> _Family:
    """The family that a file names, by one or both of its two names."""
    model_type, classes = found.get("model_type"), found.get("architectures")
    known = ", ".join(f"{family.architecture} ({name})" for name, family in _FAMILIES.items())
    by_class = {family.architecture: family for family in _FAMILIES.values()}
    families = []
    if model_type is not None:
        families.append(_FAMILIES.get(model_type) if isinstance(model_type, str) else None)
    if classes is not None:
        one = classes[0] if isinstance(classes, list) and len(classes) == 1 else None
        families.append(by_class.get(one) if isinstance(one, str) else None)
    if not families or None in families or len(set(map(id, families))) > 1:
        raise UserError(
            f"expected one of the families {known}, found architectures {shown(classes)}, "
            f"model_type {shown(model_type)}; other models cannot be trained"
        )
    return families[0]


def _check_keys(found: Mapping[str, Any], read: set[str]) -> None:
    """UserError for a key that might change the mathematics and is not read here."""
    if found.get("quantization_config") is not None:
        raise UserError("expected plain weights, found a quantization_config; give the model before it was quantized")
    for key, value in found.items():
        if key in read or key in _HARMLESS.split() or key.startswith("_") or value is None:
            continue
        if key not in _ONLY_AS:
            raise UserError(
                f"expected keys that are known, found {shown(key)} ({shown(value)}); where the model's output does not "
                "depend on it, take it out"
            )
        if value != _ONLY_AS[key]:
            raise UserError(f"{key}: expected {shown(_ONLY_AS[key])}, found {shown(value)}; no other can be computed")


def _architecture(family: _Family, values: dict[str, Any], found: Mapping[str, Any]) -> Architecture:
    """The sizes and switches of `values`, checked."""
    for key, default in _SIZES.items():
        if values[key] is not None or default is _NEEDED:
            most = _MOST_TOKENS if key == "max_position_embeddings" else _MOST.get(key, _MOST_WIDTH)
            values[key] = _size(key, values[key], most)
    heads, width, head_width = values["num_attention_heads"], values["hidden_size"], values["head_dim"]
    if head_width is None:
        if width % heads:
            raise UserError(f"hidden_size: expected a multiple of num_attention_heads = {heads}, found {width}")
        head_width = width // heads
    switches = {key: _switch(key, values[key]) for key in _SWITCHES if key in values}
    theta, scaling = _rope(found)
    bias = switches.get("attention_bias", False)
    return Architecture(
        vocab_size=values["vocab_size"],
        max_seq_len=min(values["max_position_embeddings"], _window(values, found.get("layer_types"))),
        width=width,
        layers=values["num_hidden_layers"],
        heads=heads,
        key_heads=values["num_key_value_heads"] or heads,
        rope_width=head_width,
        value_width=head_width,
        hidden_width=values["intermediate_size"],
        eps=_positive("rms_norm_eps", values["rms_norm_eps"]),
        theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias or bias,
        out_bias=bias,
        ffwd_bias=switches.get("mlp_bias", False),
        qk_norm=family.qk_norm,
        tied_head=switches["tie_word_embeddings"],
    )


def _window(values: Mapping[str, Any], layer_types: Any) -> int:
    """The longest sequence of which every layer sees all: the sliding window, where there is one."""
    window, slides = values.get("sliding_window"), values.get("use_sliding_window", True)
    if layer_types is not None:
        layers, known = values["num_hidden_layers"], ("full_attention", "sliding_attention")
        if not isinstance(layer_types, list) or not all(kind in known for kind in layer_types):
            raise UserError(f"layer_types: expected a list of full_attention, found {shown(layer_types)}")
        if len(layer_types) != layers:
            raise UserError(f"layer_types: expected one for each of {layers} layers, found {len(layer_types)}")
        if "sliding_attention" in layer_types and (window is None or not slides):
            raise UserError("layer_types: expected a sliding_window for sliding_attention, found none in use")
    return _MOST_TOKENS if window is None or not slides else _size("sliding_window", window, _MOST_TOKENS)


def _rope(found: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of RoPE, in whichever spelling; UserError where two spellings differ."""
    top = found.get("rope_theta")
    spelled = {key: found[key] for key in ("rope_scaling", "rope_parameters") if found.get(key) not in (None, {})}
    results = {key: _rope_in(key, value, top) for key, value in spelled.items()}
    if not results:
        return _positive("rope_theta", _THETA if top is None else top), None
    first = next(iter(results.values()))
    if any(result != first for result in results.values()):
        raise UserError(f"expected rope_scaling and rope_parameters to say the same, found {shown(spelled)}")
    return first


def _rope_in(key: str, spelled: Any, top: Any) -> tuple[float, RopeScaling | None]:
    """What one dictionary of RoPE says; `top` is the rope_theta beside it."""
    if not isinstance(spelled, dict):
        raise UserError(f"{key}: expected an object, found {shown(spelled)}")
    values = {name: value for name, value in spelled.items() if value is not None}
    kinds = {shown(values.pop(name)): None for name in ("rope_type", "type") if name in values}
    kind = next((kind for kind in _ROPE_KEYS if [*kinds] == [shown(kind)]), "default" if not kinds else None)
    if kind is None:
        raise UserError(f"{key}: expected rope_type {', '.join(_ROPE_KEYS)}, found {' and '.join(kinds)}")
    inner = values.pop("rope_theta", top)
    if top is not None and inner != top:
        raise UserError(f"{key}: expected rope_theta as beside it, {shown(top)}, found {shown(inner)}")
    theta = _positive("rope_theta", _THETA if inner is None else inner)
    if values.pop("partial_rotary_factor", 1) != 1:
        raise UserError(f"{key}: expected no partial_rotary_factor but 1, found {shown(spelled)}")
    if values.keys() != set(_ROPE_KEYS[kind]):
        wanted = ", ".join(_ROPE_KEYS[kind]) or "nothing"
        raise UserError(f"{key}: expected {wanted} beside rope_type {kind}, found {shown(spelled)}")
    if kind == "default":
        return theta, None
    factor, *turns = (_positive(f"{key}: {name}", values[name]) for name in _ROPE_KEYS[kind][:3])
    if kind == "linear":
        return theta, LinearScaling(factor)
    slow, fast = turns
    if not slow < fast:
        raise UserError(f"{key}: expected low_freq_factor below high_freq_factor, found {shown(spelled)}")
    trained = "original_max_position_embeddings"
    return theta, Llama3Scaling(factor, slow, fast, _size(f"{key}: {trained}", values[trained], _MOST_TOKENS))


def _size(key: str, value: Any, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        what = "none" if value is _NEEDED else shown(value)
        raise UserError(f"{key}: expected a whole number from 1 to {most}, found {what}")
    return value


def _switch(key: str, value: Any) -> bool:
    if type(value) is not bool:
        raise UserError(f"{key}: expected true or false, found {shown(value)}")
    return value


def _positive(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= _LARGEST_FLOAT:
        raise UserError(f"{key}: expected a positive number, found {shown(value)}")
    return float(value)


def _llama(architecture: Architecture) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM but for RoPE and dtype. UserError for an architecture that is none."""
    check_mappable(architecture)
    if architecture.qk_norm or architecture.qkv_bias != architecture.out_bias:
        raise UserError("model: expected a LlamaForCausalLM, found norms of queries or biases of some projections")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.width,
        "intermediate_size": architecture.hidden_width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.key_heads,
        "head_dim": architecture.key_width,
        "hidden_act": "silu",
        "max_position_embeddings": architecture.max_seq_len,
        "rms_norm_eps": float(architecture.eps),
        "tie_word_embeddings": architecture.tied_head,
        "attention_bias": architecture.qkv_bias,
        "mlp_bias": architecture.ffwd_bias,
    }


def _rope_parameters(architecture: Architecture) -> dict[str, Any]:
    """transformers 5's dictionary of RoPE."""
    theta, scaling = {"rope_theta": float(architecture.theta)}, architecture.rope_scaling
    if scaling is None:
        return {"rope_type": "default", **theta}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", **theta, "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        **theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.slow_turns,
        "high_freq_factor": scaling.fast_turns,
        "original_max_position_embeddings": scaling.trained_len,
    }
