"""What the benches of the whole job compute on: start models, mixes of pairs, and how pairs become a batch.

A batch can be built in three ways that give the same log-probs: shared (ours), whole (both chats of a pair, packed
without sharing the prompt) and padded (both chats of all pairs, each as long as the longest).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import WeightsFile, load_weights
from simple_llama.reinforcement_learning.rlhf.data.convert import PrepareConfig, prepare
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig

HH_DATA = root_path("..", "shared", "data", "hh_harmless_dev.jsonl.gz")
UPSTREAM_TOKENIZER = root_path("..", "shared", "tokenizer", "bpe_8k.json")
TOKENIZER = UPSTREAM_TOKENIZER if Path(UPSTREAM_TOKENIZER).exists() else DPOConfig.tokenize_path
HH_MAX_TOKENS = 1024  # longer chats are left out
FIRST_TEXT_TOKEN = 10  # ids below are the tokenizer's special tokens


class Shape(NamedTuple):
    """A model's size."""

    n_embd: int
    n_layers: int
    n_heads: int
    multiple_of: int
    vocab: int


SHAPES = {
    "tiny": Shape(128, 2, 4, 256, 8192),  # to try a bench
    "36m": Shape(512, 8, 8, 256, 8192),
    "1.3b": Shape(2048, 24, 32, 256, 8192),
    "llama-3.2-1b": Shape(2048, 16, 32, 8192, 128256),  # but with as many key as query heads, and an untied head
}


class Mix(NamedTuple):
    """Lengths of synthetic pairs: tokens from ... to, uniform."""

    prompt: tuple[int, int]
    response: tuple[int, int]


MIXES = {
    "short": Mix((16, 48), (32, 96)),
    "long": Mix((560, 640), (40, 80)),
    "uf-71-169": Mix((36, 106), (85, 253)),  # mean lengths of UltraFeedback by two tokenizers' counts
    "uf-200-300": Mix((100, 300), (150, 450)),
}


def start_model(shape: str, model_path: str, seed: int, device: torch.device | str = "cpu") -> WeightsFile:
    """The weights file at `model_path`, or for "" random weights of a shape, fp32 on the CPU.

    Args: device: where they are drawn: a billion numbers take a CPU a minute.
    """
    if model_path:
        return load_weights(model_path)
    width, layers, heads, multiple_of, vocab = SHAPES[shape]
    config = TrainingConfig(
        n_embd=width, n_layers=layers, n_heads=heads, multiple_of=multiple_of, max_seq_len=HH_MAX_TOKENS
    )
    torch.manual_seed(seed)
    with torch.device(device):
        drawn = LLaMaTransformer(Architecture.of(config, vocab)).state_dict()
    weights = {name: tensor.cpu() for name, tensor in drawn.items()}
    return WeightsFile(weights, config, {}, Path(f"random-{shape}"))


def mixes_at_hand(names: Sequence[str], data: str) -> tuple[str, ...]:
    """`names` without hh where its file is not there, which is said."""
    if "hh" in names and not Path(data).exists():
        print(f"without the mix hh: {data} is not there (--data)", file=sys.stderr, flush=True)
        return tuple(name for name in names if name != "hh")
    return tuple(names)


def make_pairs(mix: str, count: int, vocab: int, seed: int, data: str = HH_DATA) -> list[TokenizedPair]:
    """`count` pairs of a mix, whose two chats have one whole prompt in common; a seed gives the same ones again."""
    if mix == "hh":
        return hh_pairs(data, count, seed)
    lengths, rng = MIXES[mix], np.random.default_rng(seed)

    def tokens(between: tuple[int, int]) -> np.ndarray:
        return rng.integers(FIRST_TEXT_TOKEN, vocab, rng.integers(between[0], between[1] + 1))

    def pair() -> TokenizedPair:
        prompt, chosen, rejected = tokens(lengths.prompt), tokens(lengths.response), tokens(lengths.response)
        chats = [np.concatenate([prompt, response]).tolist() for response in (chosen, rejected)]
        return TokenizedPair.from_chats(chats[0], len(chosen), chats[1], len(rejected))

    return [pair() for _ in range(count)]


def hh_pairs(data: str, count: int, seed: int) -> list[TokenizedPair]:
    """A random choice of HH-RLHF pairs in the chat format; UserError where the file has fewer.

    Pairs whose earlier answers differ too are left out: TRL's format has one prompt for both chats.
    """
    if not Path(data).exists():
        raise UserError(
            f"{data}: not there. The mix hh needs HH-RLHF (harmless-base, as published: --data), the others no file"
        )
    with tempfile.TemporaryDirectory() as folder:
        converted = str(Path(folder) / "hh.jsonl")
        prepare(PrepareConfig(inputs=(data,), output=converted))
        loaded = RLDatasetLoader(converted, load_tokenizer(TOKENIZER), HH_MAX_TOKENS, val_share=0.0, seed=seed)
    pairs = [pair for pair in loaded.train if shares_prompt(pair)]
    if len(pairs) < count:
        raise UserError(f"{data}: expected at least {count} pairs with one prompt, found {len(pairs)}")
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return [pairs[i] for i in order]


def shares_prompt(pair: TokenizedPair) -> bool:
    """Whether everything before the scored answers is common to both chats."""
    return len(pair.chosen) == pair.chosen_scored and len(pair.rejected) == pair.rejected_scored


def pack_shared(pairs: Sequence[TokenizedPair]) -> PairBatch:
    """Ours: a prompt once, no padding."""
    return PairBatch.pack(pairs)


def pack_whole(pairs: Sequence[TokenizedPair]) -> PairBatch:
    """Both chats of each pair, packed without padding: sharing switched off."""
    return PairBatch.unshared(pairs, padded=False)


def pack_padded(pairs: Sequence[TokenizedPair]) -> PairBatch:
    """Both chats of each pair, padded to the longest of the batch; only scored rows meet the head."""
    return PairBatch.unshared(pairs, padded=True)


PACKS = {"shared": pack_shared, "whole": pack_whole, "padded": pack_padded}


def pairs_for_rows(pairs: Sequence[TokenizedPair], rows: int) -> int:
    """Pairs a micro-batch that have about `rows` packed rows or more, by the mean."""
    return -(-rows * len(pairs) // sum(pair.rows for pair in pairs))
