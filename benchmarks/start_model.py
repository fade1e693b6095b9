"""Makes a small start model from the accepted answers of a preference file, so that the main job has one to align.

    python benchmarks/start_model.py --data PAIRS --out sft_checkpoints/start.pth --n_embd 512 --n_layers 8

Held-out prompts (the same split as DPOConfig's) are left out, so that evaluation on them stays honest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from simple_llama.cluster.console import set_up_log
from simple_llama.cluster.distributed import close_ranks, init_ranks, leave
from simple_llama.common.paths import root_path
from simple_llama.dataset.ascii_text import Spelling
from simple_llama.dataset.tokenizer import SPECIAL_IDS, load_tokenizer
from simple_llama.finetune.full_sft.sft import Chat, SFTConfig, finetune
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.speller import Speller


@dataclass(frozen=True)
class StartModel:
    """What to train on, how large, how long."""

    data: str  # preference pairs: a file or a folder
    out: str  # .pth to write
    tokenizer: str = root_path("simple_llama", "dataset", "bpe_8k.json")  # tokenizer JSON
    val_share: float = 0.05  # share of prompts left out
    seed: int = 42  # of the split
    n_embd: int = 128  # width
    n_layers: int = 2  # decoder blocks
    n_heads: int = 4  # attention heads
    max_seq_len: int = 512  # tokens
    steps: int = 40  # optimizer steps
    batch_size: int = 16  # chats a step
    max_lr: float = 2e-3  # peak learning rate


def make_start_model(wanted: StartModel) -> float:
    """Trains and saves the model; returns its last mean loss (nats a token)."""
    tokenizer = load_tokenizer(wanted.tokenizer)
    data = RLDatasetLoader(wanted.data, tokenizer, wanted.max_seq_len, val_share=wanted.val_share, seed=wanted.seed)
    speller = Speller(Spelling(tokenizer, SPECIAL_IDS["<UNK>"]))
    told = map(speller.spelled, data.conversations(data.train))
    chats = [Chat(said.system or "", said.users, said.chosen) for said in told]
    model_config = TrainingConfig(
        n_embd=wanted.n_embd, n_layers=wanted.n_layers, n_heads=wanted.n_heads, max_seq_len=wanted.max_seq_len
    )
    config = SFTConfig(steps=wanted.steps, batch_size=wanted.batch_size, max_lr=wanted.max_lr, seed=wanted.seed)
    return finetune(chats, tokenizer, model_config, config, Path(wanted.out))


if __name__ == "__main__":
    ranks = init_ranks()
    set_up_log(None, ranks)
    make_start_model(tyro.cli(StartModel, description=__doc__))
    close_ranks()
    leave(0)
