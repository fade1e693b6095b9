"""A model and a PairBatch make log-probs or a loss. The one forward of the reference pass, training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from simple_llama.ops import logprob
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch, TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss


class PolicyOutput(NamedTuple):
    """What a training forward gives; all fp32."""

    loss: torch.Tensor  # scalar: sum of the pairs' losses, differentiable
    losses_B: torch.Tensor  # detached
    logps_B2: torch.Tensor  # detached sums of chosen and rejected


class DPOPolicy(nn.Module):
    """The module that DeepSpeed wraps: forward is packed pairs and reference log-probs in, summed loss out."""

    def __init__(self, model: LLaMaTransformer, loss_fn: PreferenceLoss):
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: PairBatch, ref_logps_B2: torch.Tensor) -> PolicyOutput:
        """Sum over the batch's pairs of the preference loss, by the three-GEMM head.

        Args:
            batch: B packed pairs on the model's device.
            ref_logps_B2: fp32 log-prob sums of the frozen reference, (chosen, rejected).
        """
        hidden_ND = scored_hidden(self.model, batch)
        weight_VD = self.model.final_linear.weight
        loss, logps_B2 = logprob.pair_loss(
            hidden_ND,
            weight_VD,
            batch.targets_N,
            batch.counts,
            lambda logps_b2, pairs: self.loss_fn(logps_b2, ref_logps_B2[pairs]),
        )
        with torch.no_grad():
            losses_B = self.loss_fn(logps_B2, ref_logps_B2)
        return PolicyOutput(loss, losses_B, logps_B2)


def scored_hidden(model: LLaMaTransformer, batch: PairBatch) -> torch.Tensor:
    """Hidden rows (N, D) after the last norm that predict the batch's scored tokens, pair after pair."""
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.layout)
    return hidden_TD.index_select(0, batch.rows_N)


@torch.no_grad()
def pair_logps(model: LLaMaTransformer, batch: PairBatch) -> torch.Tensor:
    """Log-prob sums (B, 2) of the chosen and rejected answers, fp32, without gradient and without dropout."""
    with evaluating(model):
        hidden_ND = scored_hidden(model, batch)
        return logprob.pair_logps(hidden_ND, model.final_linear.weight, batch.targets_N, batch.counts)


def compile_now(model: LLaMaTransformer, pair: TokenizedPair, device: torch.device, backward: bool) -> None:
    """Makes a compiled model's graphs, those with gradient on demand; changes no gradient. Nothing for other models.

    To be called while the watch over stillness is patient: it may take a minute.
    """
    if not model.compiled:
        return
    batch = PairBatch.pack([pair]).to(device)
    with torch.no_grad(), evaluating(model):
        model.hidden(batch.tokens_T, batch.positions_T, batch.layout)
    if backward:
        hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.layout)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad(hidden_TD.float().sum(), trained, allow_unused=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within; the training flag as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
