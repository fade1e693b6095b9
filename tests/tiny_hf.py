"""A tiny model in a folder of Hugging Face's form, written without transformers, and a job that starts from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from simple_llama.interop.hf_names import to_hf
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from tiny_job import WORDS, TinyJob, write_pairs

VOCAB = 300
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
    "chat_template": TEMPLATE,
}
ARCHITECTURE = Architecture(
    vocab_size=VOCAB,
    max_seq_len=512,
    width=32,
    layers=2,
    heads=4,
    key_heads=2,
    rope_width=8,
    value_width=8,
    hidden_width=48,
    tied_head=True,
)


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens with the special tokens of ChatML, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return tokenizer


def random_weights(seed: int = 7) -> dict[str, torch.Tensor]:
    """Our tensors of ARCHITECTURE."""
    torch.manual_seed(seed)
    return LLaMaTransformer(ARCHITECTURE).state_dict()


def make_hf_folder(folder: Path, seed: int = 7) -> Path:
    """Writes config.json, model.safetensors (fp32) and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_hf(random_weights(seed), ARCHITECTURE), folder / "model.safetensors", {"format": "pt"})
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    files = {"config.json": CONFIG, "tokenizer_config.json": TOKENIZER_CONFIG}
    files["generation_config.json"] = {"bos_token_id": 1, "eos_token_id": 2}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


class TinyHFJob(TinyJob):
    """The tiny job with a folder of Hugging Face's form, `model`, and its own tokenizer."""

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.folder / "model"

    @property
    def settings(self) -> dict[str, object]:
        """As the tiny job's, with the tokenizer left to the model."""
        settings = {**super().settings, "model_path": str(self.model)}
        del settings["tokenize_path"]
        return settings


def make_hf_job(folder: Path, pairs: int = 24) -> TinyHFJob:
    """Writes the model and the pairs below `folder`."""
    make_hf_folder(folder / "model")
    write_pairs(folder / "pairs.jsonl", range(pairs))
    return TinyHFJob(folder)
