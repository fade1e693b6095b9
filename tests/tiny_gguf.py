"""The tiny model of `tiny_hf` in a GGUF file, as llama.cpp's converter writes it, and a job with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from simple_llama.interop.hf_names import to_hf
from tiny_hf import ARCHITECTURE, SPECIALS, TEMPLATE, byte_level_tokenizer, random_weights
from tiny_job import TinyJob, write_pairs

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # token types
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODEL: dict[str, Any] = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.name": "Tiny",
    "general.file_type": 0,
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 300,
}


def byte_level(pre: str = "smollm") -> dict[str, Any]:
    """The metadata of the tiny tokenizer."""
    found = json.loads(byte_level_tokenizer().to_str())["model"]
    tokens = sorted(found["vocab"], key=found["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in SPECIALS else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in found["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def converted(hf: Mapping[str, torch.Tensor], heads: int = 4, key_heads: int = 2) -> dict[str, torch.Tensor]:
    """Tensors of a Hugging Face folder by GGUF's names, rows of queries and keys from halves to adjacent pairs."""
    found = {}
    for name, tensor in hf.items():
        module, _, kind = name.rpartition(".")
        layer = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            layer = f"blk.{number}."
        if module in ("self_attn.q_proj", "self_attn.k_proj"):
            count = heads if module == "self_attn.q_proj" else key_heads
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        found[f"{layer}{NAMES[module]}.{kind}"] = tensor
    return found


def make_gguf(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
    types: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the file.

    Args:
        changes: of metadata; None takes a key out. Whole numbers are uint32, others fp32.
        tensors: others by GGUF's names; None takes one out.
        types: quantizations by the names of tensors ("Q8_0"), fp32 where there is none.
        tokenizer: metadata in the place of `byte_level()`.
    """
    import gguf  # here: where it is not installed, the other tests run

    writer = gguf.GGUFWriter(path, "llama")
    metadata = {**MODEL, **(byte_level() if tokenizer is None else tokenizer), **(changes or {})}
    writer.kv_data[0].clear()  # general.architecture, which is ours to spoil
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    all_tensors = {**converted(to_hf(random_weights(), ARCHITECTURE)), **(tensors or {})}
    for name, tensor in all_tensors.items():
        if tensor is None:
            continue
        kind = gguf.GGMLQuantizationType[(types or {}).get(name, "F32")]
        data = gguf.quantize(tensor.contiguous().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TinyGGUFJob(TinyJob):
    """The tiny job with a GGUF file, `model.gguf`, and its own tokenizer."""

    @property
    def model(self) -> Path:
        """The model's file."""
        return self.folder / "model.gguf"

    @property
    def settings(self) -> dict[str, object]:
        """As the tiny job's, with the tokenizer left to the model."""
        settings = {**super().settings, "model_path": str(self.model)}
        del settings["tokenize_path"]
        return settings


def make_gguf_job(folder: Path, pairs: int = 24) -> TinyGGUFJob:
    """Writes the model and the pairs below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_gguf(folder / "model.gguf")
    write_pairs(folder / "pairs.jsonl", range(pairs))
    return TinyGGUFJob(folder)
