"""What a run reads: the tokenizer, the pairs, the SFT model, and the identity of the frozen reference."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tokenizers import Tokenizer

from simple_llama.cluster.distributed import Ranks, fail_together, require_same
from simple_llama.common.errors import UserError
from simple_llama.common.files import digest
from simple_llama.dataset.tokenizer import load_tokenizer, token_count, tokenizer_digest
from simple_llama.ops.attention import ATTENTION_VERSION
from simple_llama.ops.logprob import HEAD_VERSION
from simple_llama.pretraining.config import TrainingConfig, architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import (
    build_model,
    check_weights,
    find_weights,
    load_weights,
    vocab_size,
    weights_digest,
)
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import model_dtype, read_ds_config
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import reference_id

PACKAGES = ("torch", "deepspeed", "tokenizers", "numpy", "safetensors", "tensorboard", "simple-llama-dpo")


@dataclass(frozen=True)
class Inputs:
    """Everything read from disk before the first computation."""

    tokenizer: Tokenizer
    data: RLDatasetLoader
    start_path: Path  # the SFT model: start of the policy, and the reference
    model_config: TrainingConfig  # its shape
    vocab_size: int  # rows of its vocabulary matrix
    dtype: torch.dtype  # of the computing weights
    max_seq_len: int
    reference: dict  # what names the reference: weights, tokenizer, numerics
    compiled: bool = False  # whether the decoder layers are compiled, of the policy and of the reference alike

    def build_model(self, device: torch.device | str, dropout: float = 0.0) -> LLaMaTransformer:
        """The start model in the computing dtype, read from disk again: its fp32 copy does not stay in memory."""
        model = build_model(load_weights(self.start_path), self.dtype, device, dropout=dropout)
        if self.compiled:
            model.compile_layers()
        return model

    @property
    def train_pairs(self) -> list[TokenizedPair]:
        """Token ids of the training pairs."""
        return [pair.tokenized for pair in self.data.train]

    @property
    def data_digest(self) -> str:
        """Hex digest of all pairs in order, training then held-out."""
        return digest(*(pair.digest for pair in self.train_pairs + self.validation_pairs)).hex()

    @property
    def validation_pairs(self) -> list[TokenizedPair]:
        """Token ids of the held-out pairs."""
        return [pair.tokenized for pair in self.data.validation]


def load_inputs(config: DPOConfig, ranks: Ranks) -> Inputs:
    """Reads and checks all inputs on every rank, then that all ranks have read the same (collective).

    Raises UserError with the file and what is wrong, or with the host and rank that differ from rank 0.
    """
    with fail_together(ranks):
        inputs = read_inputs(config)
    require_same("package versions", versions(), ranks)
    require_same("settings", asdict(config), ranks)
    require_same("data set (digest)", inputs.data_digest, ranks)
    require_same("reference model (digests)", inputs.reference, ranks)
    return inputs


def read_inputs(config: DPOConfig) -> Inputs:
    """The inputs as this rank sees them."""
    check_folders(config)
    check_compiler(config)
    dtype = model_dtype(read_ds_config(config))
    tokenizer = load_tokenizer(config.tokenize_path)
    start = load_weights(find_weights(config.model_path))
    check_weights(start, dtype)
    vocab = vocab_size(start.state_dict)
    if token_count(tokenizer) > vocab:
        raise UserError(
            f"{config.tokenize_path}: {token_count(tokenizer)} tokens, but the model {start.path} knows {vocab}; "
            "expected the tokenizer that the model was trained with (tokenize_path)"
        )
    max_seq_len = config.max_seq_len or start.config.max_seq_len
    if max_seq_len > start.config.max_seq_len:
        raise UserError(
            f"max_seq_len: expected at most the model's {start.config.max_seq_len} tokens ({start.path}), "
            f"found {config.max_seq_len}"
        )
    data = RLDatasetLoader(
        config.rlhf_dataset_path,
        tokenizer,
        max_seq_len,
        val_share=config.val_share,
        seed=config.seed,
        default_system=config.system_prompt,
    )
    numerics = {
        "dtype": str(dtype).removeprefix("torch."),
        "attention": ATTENTION_VERSION,
        "head": HEAD_VERSION,
        **{name: str(value) for name, value in architecture(start.config).items()},  # theta, eps, heads: not weights
        **({"compiled": "True"} if config.compile else {}),  # rounds elsewhere: rewards would not start at 0
    }
    reference = reference_id(weights_digest(start.state_dict), tokenizer_digest(config.tokenize_path), numerics)
    return Inputs(tokenizer, data, start.path, start.config, vocab, dtype, max_seq_len, reference, config.compile)


def check_folders(config: DPOConfig) -> None:
    """Raises UserError where a folder that a run writes to cannot be one: not after an epoch, when it is needed."""
    for name in ("log_dir", "ckpt_dir", "ref_cache_dir"):
        folder = Path(getattr(config, name))
        folder = folder if name == "ref_cache_dir" else folder / config.run_name
        try:
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        except OSError as error:
            raise UserError(f"{name}: {folder}: cannot be a folder: {error.strerror}") from error
        if not there.is_dir():
            raise UserError(f"{name}: {there}: expected a folder, or nothing there yet; found something else")


def check_compiler(config: DPOConfig) -> None:
    """Raises UserError where layers are to be compiled for a CPU and no C++ compiler is there ($CXX, or g++)."""
    compiler = os.environ.get("CXX", "g++")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.compile and on_cpu and not shutil.which(compiler):
        raise UserError(f"compile: expected a C++ compiler, found no {compiler}; install g++ or leave compile out")


def versions() -> dict[str, str | None]:
    """Installed versions of what decides a run's numbers; None for a package that is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
