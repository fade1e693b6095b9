"""A short supervised fine-tuning from scratch: makes the small start model of the demo and the measurements.

Not a pretraining: it sees only the chats it is given, and learns their last answers.
Shapes: T packed rows, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.finetune.format_llm_prompt import encode_chat
from simple_llama.ops import logprob
from simple_llama.ops.attention import PackedLayout
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import save_weights


class Chat(NamedTuple):
    """One conversation; as many answers as user messages."""

    system: str
    users: Sequence[str]
    assistants: Sequence[str]


@dataclass(frozen=True)
class SFTConfig:
    """Settings of the fine-tuning."""

    steps: int = 300  # optimizer steps
    batch_size: int = 16  # chats a step
    max_lr: float = 2e-3  # after a warm-up of a tenth of the steps; then a cosine to a tenth of it
    weight_decay: float = 0.1  # AdamW
    max_grad_norm: float = 1.0  # clip of the global gradient norm
    seed: int = 0  # of the weights and the shuffle


def finetune(
    chats: Sequence[Chat], tokenizer: Tokenizer, model_config: TrainingConfig, config: SFTConfig, path: Path
) -> float:
    """Trains a new model on `chats` in fp32 on the CPU or the GPU there is, and saves it to `path`.

    Chats longer than the model's max_seq_len are left out and counted. Returns the mean loss (nats a token) of the
    last tenth of the steps.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = Architecture.of(model_config, tokenizer.get_vocab_size())
    encoded = [encode_chat(tokenizer, *chat) for chat in chats]
    usable = [(np.asarray(ids), scored) for ids, scored in encoded if len(ids) <= architecture.max_seq_len]
    LOGGER.info("SFT: kept %d of %d chats (%d too long)", len(usable), len(encoded), len(encoded) - len(usable))
    if not usable:
        raise UserError(f"SFT: expected chats of at most max_seq_len {architecture.max_seq_len} tokens, found none")
    torch.manual_seed(config.seed)
    model = LLaMaTransformer(architecture).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.max_lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    order = np.random.default_rng(config.seed)
    losses, started = [], time.perf_counter()
    for step in range(config.steps):
        drawn = order.choice(len(usable), size=min(config.batch_size, len(usable)), replace=False)
        for group in optimizer.param_groups:
            group["lr"] = config.max_lr * _rate(step, config.steps)
        loss = _answer_loss(model, [usable[i] for i in drawn], device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % max(config.steps // 10, 1) == 0:
            LOGGER.info(
                "SFT step %d/%d  loss %.4f  %.0f s", step + 1, config.steps, losses[-1], time.perf_counter() - started
            )
    save_weights(path, model.state_dict(), model_config, {"kind": "sft", "steps": config.steps})
    return float(torch.stack(losses[-max(config.steps // 10, 1) :]).mean())


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over a tenth of the steps, then a cosine to 0.1."""
    warmup = max(steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


def _answer_loss(
    model: LLaMaTransformer, chats: Sequence[tuple[np.ndarray, int]], device: torch.device
) -> torch.Tensor:
    """Mean negative log-prob (nats) of the scored tokens, each chat's last `scored` ones, packed without padding."""

    def stack(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    tokens_T = stack([ids[:-1] for ids, _ in chats])
    positions_T = stack([np.arange(len(ids) - 1) for ids, _ in chats])
    layout = PackedLayout.causal([len(ids) - 1 for ids, _ in chats]).to(device)
    ends = np.cumsum([len(ids) - 1 for ids, _ in chats])
    rows_N = stack([np.arange(end - scored, end) for end, (_, scored) in zip(ends, chats, strict=True)])
    targets_N = stack([ids[-scored:] for ids, scored in chats])
    hidden_ND = model.hidden(tokens_T, positions_T, layout).index_select(0, rows_N)
    return -logprob.token_logps(hidden_ND, model.head_weight, targets_N).mean()
