"""config.json of Hugging Face folders: what is read, what is refused, what an export says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.interop.hf_config import config_json, numerics_of, read_hf_config
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.rotary import LinearScaling, Llama3Scaling

BASE = Architecture(  # what the small files below have in common
    vocab_size=40,
    max_seq_len=512,
    width=16,
    layers=2,
    heads=4,
    key_heads=2,
    rope_width=4,
    value_width=4,
    hidden_width=24,
    eps=1e-6,
    theta=10_000.0,
)
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "max_position_embeddings": 512,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **SIZES}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **SIZES}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
SCALED = Llama3Scaling(8.0, 1.0, 4.0, 128)


@pytest.mark.parametrize(
    ("found", "changes"),
    [
        (LLAMA, {}),
        ({**LLAMA, "num_key_value_heads": None}, {"key_heads": 4}),
        ({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}, {"key_heads": 4}),
        ({key: value for key, value in LLAMA.items() if key != "architectures"}, {}),
        ({key: value for key, value in LLAMA.items() if key != "model_type"}, {}),
        ({**LLAMA, "head_dim": 6}, {"rope_width": 6, "value_width": 6}),
        ({**LLAMA, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}, {"eps": 1e-5, "tied_head": True}),
        ({**LLAMA, "attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
        ({**LLAMA, "mlp_bias": True}, {"ffwd_bias": True}),
        # transformers 4 and 5 say the same
        ({**LLAMA, "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"}, {"theta": 5e5}),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "bfloat16"},
            {"theta": 5e5},
        ),
        (
            {**LLAMA, "rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2}},
            {"theta": 500, "rope_scaling": LinearScaling(2)},
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": 500, "rope_type": "linear", "factor": 2.0}},
            {"theta": 500, "rope_scaling": LinearScaling(2)},
        ),
        (
            {**LLAMA, "rope_theta": 500, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"theta": 500, "rope_scaling": SCALED},
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": 500, "rope_type": "llama3", **LLAMA3}},
            {"theta": 500, "rope_scaling": SCALED},
        ),
        # a window hides nothing from a sequence that is no longer; Mistral's is 4,096 where none is said
        (MISTRAL, {}),
        ({**MISTRAL, "sliding_window": 128}, {"max_seq_len": 128}),
        ({**MISTRAL, "sliding_window": None, "max_position_embeddings": 32768}, {"max_seq_len": 32768}),
        ({**MISTRAL, "max_position_embeddings": 32768}, {"max_seq_len": 4096}),
        # Qwen2: biases of queries, keys and values; its window is off
        ({**QWEN2, "sliding_window": 128, "use_sliding_window": False, "max_window_layers": 1}, {"qkv_bias": True}),
        ({**QWEN2, "sliding_window": 128, "use_sliding_window": True}, {"qkv_bias": True, "max_seq_len": 128}),
        ({**QWEN2, "layer_types": ["full_attention", "full_attention"]}, {"qkv_bias": True}),
        # Qwen3: norms of queries and keys, heads 128 wide where none is said
        (QWEN3, {"qk_norm": True, "rope_width": 128, "value_width": 128}),
        ({**QWEN3, "head_dim": 8}, {"qk_norm": True, "rope_width": 8, "value_width": 8}),
    ],
)
def test_files_of_each_family(found: dict[str, Any], changes: dict[str, Any]) -> None:
    """The architecture, and that an export's file means the same, in both spellings, with all other keys kept."""
    config = read_hf_config(found, "config.json")
    assert config.architecture == replace(BASE, **changes)
    assert config.raw == found
    out = config_json(config.architecture, torch.float32, found)
    assert read_hf_config(json.loads(json.dumps(out)), "config.json").architecture == config.architecture
    rope = {"rope_theta", "rope_scaling", "rope_parameters"}
    older = {key: value for key, value in out.items() if key != "rope_parameters"}
    newer = {key: value for key, value in out.items() if key not in {"rope_theta", "rope_scaling"}}
    assert read_hf_config(older, "").architecture == read_hf_config(newer, "").architecture == config.architecture
    kept = found.keys() - rope - {"torch_dtype", "dtype"}
    assert {key: out[key] for key in kept} == {key: found[key] for key in kept}
    assert (out["torch_dtype"], out["dtype"]) == ("float32", "float32")


def test_keys_without_effect_stay() -> None:
    """What the files of SmolLM2 and Qwen2.5 have beside the numbers is kept in an export."""
    extra = {
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "_name_or_path": "somewhere",
        "is_llama_config": True,
        "rope_interleaved": False,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_mrope": False,
        "eos_token_id": [0, 2],
    }
    found = {**LLAMA, **extra}
    out = config_json(read_hf_config(found, "").architecture, torch.bfloat16, found)
    assert out == {
        **found,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], r"expected an object, found \[\]"),
        (SIZES, "expected one of the families LlamaForCausalLM .llama., .* found architectures None, model_type None"),
        ({**LLAMA, "model_type": "mixtral"}, "found architectures .*, model_type 'mixtral'"),
        ({**LLAMA, "model_type": "mistral"}, "expected one of the families"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({**LLAMA, "architectures": [{}], "model_type": []}, "expected one of the families"),
        ({**SIZES, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}, "'olmo2'"),
        ({**QWEN2, "num_experts": 60}, r"expected keys that are known, found 'num_experts' \(60\)"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "found a quantization_config"),
        ({**LLAMA, "auto_map": {"AutoModelForCausalLM": "my.Model"}}, "auto_map: expected {}, found {'Auto"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({**LLAMA, "attention_dropout": 0.1}, "attention_dropout: expected 0, found 0.1"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, found 0.5"),
        ({**MISTRAL, "attention_bias": True}, "attention_bias: expected False, found True"),
        ({**LLAMA, "sliding_window": 128}, "found 'sliding_window'"),
        ({key: value for key, value in LLAMA.items() if key != "vocab_size"}, "vocab_size: expected a whole .* none"),
        ({**LLAMA, "vocab_size": None}, "vocab_size: expected a whole number from 1 to 16777216, found None"),
        ({**LLAMA, "hidden_size": 16.0}, "hidden_size: expected a whole number from 1 to 1048576, found 16.0"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers: expected a whole number from 1 to 1000"),
        ({**LLAMA, "num_attention_heads": True}, "num_attention_heads: .* found True"),
        ({**LLAMA, "num_key_value_heads": 3}, "key_heads: expected a divisor of heads = 4, found 3"),
        ({**LLAMA, "hidden_size": 18}, "hidden_size: expected a multiple of num_attention_heads = 4, found 18"),
        ({**LLAMA, "head_dim": 5}, "rope_width: expected an even number"),
        ({**LLAMA, "rms_norm_eps": 0}, "rms_norm_eps: expected a positive number, found 0"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number, found nan"),
        ({**LLAMA, "tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, found 'yes'"),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types: expected one for each of 2 layers, found 1"),
        ({**QWEN2, "layer_types": ["full_attention", "chunked_attention"]}, "layer_types: expected a list of full"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, "expected a sliding_window"),
        ({**MISTRAL, "sliding_window": 0}, "sliding_window: expected a whole number"),
        ({**LLAMA, "rope_theta": "1e4"}, "rope_theta: expected a positive number"),
        ({**LLAMA, "rope_scaling": "linear"}, "rope_scaling: expected an object"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "expected rope_type default, .*'yarn'"),
        ({**LLAMA, "rope_scaling": {"rope_type": [], "factor": 4.0}}, "expected rope_type default, linear, llama3"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "rope_type": "llama3", **LLAMA3}}, "found 'llama3' and 'linear'"),
        ({**LLAMA, "rope_scaling": {"factor": 2.0}}, "expected nothing beside rope_type default"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "expected factor beside rope_type linear"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling: factor: expected a positive"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, "expected factor beside"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "expected nothing beside"),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "expected low_freq_factor below high_freq_factor",
        ),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8.5}},
            "original_max_position_embeddings: expected a whole number",
        ),
        (
            {**LLAMA, "rope_theta": 500, "rope_parameters": {"rope_type": "default", "rope_theta": 600}},
            "rope_parameters: expected rope_theta as beside it, 500, found 600",
        ),
        (
            {
                **LLAMA,
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "linear", "factor": 4},
            },
            "expected rope_scaling and rope_parameters to say the same",
        ),
    ],
)
def test_refused(found: Any, message: str) -> None:
    """One message each, with the file's name in front."""
    with pytest.raises(UserError, match=rf"^models/x/config.json: .*{message}"):
        read_hf_config(found, "models/x/config.json")


def test_simple_llama_as_llama() -> None:
    """A SimpleLLaMA checkpoint of multi-head attention is a LlamaForCausalLM; ids of tokens may stand beside."""
    ours = Architecture.of(TrainingConfig(n_embd=24, n_heads=4, n_layers=2, multiple_of=8, max_seq_len=64), 11)
    out = config_json(ours, torch.bfloat16, {"bos_token_id": 1})
    assert out == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 24,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": ours.eps,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "rope_theta": ours.theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.theta},
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    assert read_hf_config(out, "").architecture == replace(ours, dropout=0.0)


def test_what_is_no_llama() -> None:
    """Latent attention, LoRA, Qwen's parts."""
    for config in (TrainingConfig(use_mla=True), TrainingConfig(use_lora=True)):
        with pytest.raises(UserError, match="MLA or LoRA"):
            config_json(Architecture.of(config, 11), torch.float32)
    for parts in ({"qkv_bias": True}, {"qk_norm": True}):
        with pytest.raises(UserError, match="expected a LlamaForCausalLM"):
            config_json(replace(BASE, **parts), torch.float32)


def test_numerics_tell_models_apart_that_have_the_same_tensors() -> None:
    """2 heads of 8 have the tensors of 4 of 4 where keys are as many; so have other bases, scalings and epsilons."""
    equal = replace(BASE, key_heads=4)
    others = [
        replace(equal, heads=2, key_heads=2, rope_width=8, value_width=8),
        replace(equal, eps=1e-5),
        replace(equal, theta=500.0),
        replace(equal, rope_scaling=LinearScaling(2.0)),
        replace(equal, rope_scaling=SCALED),
    ]
    found = [json.dumps(numerics_of(architecture)) for architecture in (equal, *others)]
    assert len(set(found)) == 6
    assert numerics_of(replace(equal, theta=10_000, max_seq_len=64)) == numerics_of(equal)
