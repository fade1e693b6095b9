"""A model and a PairBatch make log-probs or a loss. The one forward of the reference pass, training and evaluation.

Shapes: B pairs (b of a chunk of the head), S sums of a pair, K parts of a pair that the head sums, P parts of all, C
sums of each, T packed rows, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.settings import Bounds, Settings
from simple_llama.ops import logprob
from simple_llama.pretraining.architecture import LORA_MARK
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.objective.coupling import Pull
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Asked, Scores


@dataclass(frozen=True)
class PolicyConfig(Settings):
    """How the policy's model computes and which of its weights learn."""

    # === Policy ===
    dropout: Annotated[
        float,
        Bounds(0.0, 0.9),
        Doc("of the policy while training; anything above 0 makes the step-0 loss differ from ln 2"),
    ] = 0.0
    trainable: Annotated[
        str,
        Doc(
            "what is trained: all (where a run has adapters, these alone); lora: the adapters of a checkpoint that has "
            "them; last:N: the last N decoder blocks and the norm behind them; no_embeddings: all but these"
        ),
    ] = "all"
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, about a third slower
    retired: ClassVar = {"compile": "layers are not compiled any more, which never paid"}

    def check_rules(self) -> None:
        """UserError for weights that no model has."""
        kind, _, count = self.trainable.partition(":")
        counted = kind == "last" and count.isascii() and count.isdigit() and int(count) > 0
        if not counted and self.trainable not in ("all", "lora", "no_embeddings"):
            raise UserError(
                f"trainable: expected all, lora, last:N (last:4, say) or no_embeddings, found {shown(self.trainable)}"
            )


def trained_names(model: LLaMaTransformer, trainable: str, source: object, adapters: bool = False) -> set[str]:
    """Names of the parameters that are to be trained.

    Args:
        source: the model's file, for messages.
        adapters: whether the run has adapters beside its start model, which alone are trained then.

    Raises UserError where the model has not what is asked for.
    """
    names = [name for name, _ in model.named_parameters()]
    architecture = model.architecture
    if adapters and trainable not in ("all", "lora"):
        raise UserError(f"trainable: expected all or lora with adapters, which alone are trained, found {trainable}")
    if adapters or trainable == "lora":
        found = {name for name in names if LORA_MARK in name}
        if not found:
            raise UserError(f"trainable: expected a checkpoint with LoRA for 'lora', found none in {source}")
        return found
    if trainable == "no_embeddings":
        if architecture.tied_head:
            raise UserError(
                f"trainable: expected a head of its own for no_embeddings, found one in {source} that is the "
                f"embeddings; last:{architecture.layers} trains all decoder blocks, and neither"
            )
        return {name for name in names if not name.startswith("embeddings.")}
    if trainable == "all":
        return set(names)
    count = int(trainable.partition(":")[2])
    if count > architecture.layers:
        raise UserError(f"trainable: expected at most last:{architecture.layers} of {source}, found {trainable}")
    last = tuple(f"decoder_blocks.{number}." for number in range(architecture.layers - count, architecture.layers))
    return {name for name in names if name.startswith((*last, "norm."))}


# Fields of Scores that `scores_of` fills in; gaps where the data has them, which `require_gaps` looks at.
GIVEN = (
    *("logps_B2", "ref_B2", "counts_B2", "weights_B", "gaps_B"),
    *("fronts_B2", "ref_fronts_B2", "squares_B2", "groups_B"),
)
_WHOLE = Asked()


def scores_of(sums_BS: torch.Tensor, ref_BS: torch.Tensor, batch: PairBatch, pairs: slice = slice(None)) -> Scores:
    """What a loss reads of some pairs of a batch, in training and evaluation alike; `sums_BS` is of these pairs."""
    facts = (facts_B[pairs] for facts_B in (batch.counts_B2, batch.weights_B, batch.gaps_B, batch.groups_B))
    return Scores.of_sums(sums_BS, ref_BS[pairs], *facts)


def require_gaps(loss_fn: PreferenceLoss, pairs: PairSet) -> None:
    """UserError where the loss reads gaps and pairs have none."""
    lacking = np.flatnonzero(np.isnan(pairs.gaps))
    if len(lacking) and "gaps_B" in loss_fn.reads:
        raise UserError(
            f"loss_type {loss_fn.loss_type!r} reads the reward gap of each pair: expected a number under 'gap' in "
            f"every record, found none in {len(lacking):,} of {len(pairs):,} (first: {pairs.origin(int(lacking[0]))})"
        )


def require_rankings(loss_fn: PreferenceLoss, pairs: PairSet, compared: str) -> None:
    """UserError where answers of one record are compared in a way that the loss cannot use."""
    if pairs.groups is None:
        return
    if loss_fn.asks.fronts:
        raise UserError(
            "ld_alpha: expected pairs of records of their own, found records with more than two answers: an answer has "
            "another common length with each other one; give --pairs best_worst, or leave ld_alpha out"
        )
    breaks = pairs.groups.breaks(pairs.units)
    if "groups_B" in loss_fn.reads and len(breaks):
        ranks = f"loss_type {loss_fn.loss_type!r} ranks the answers of a record: expected "
        if compared != "adjacent":
            raise UserError(f"{ranks}--pairs adjacent, each answer with the next one, found --pairs {compared}")
        raise UserError(
            f"{ranks}each answer with the next one, found one missing ({pairs.origin(int(breaks[0]))}): it was too "
            "long, or the pair stands in an earlier record too; remove the record, or one of both"
        )


class PolicyOutput(NamedTuple):
    """What a training forward gives; all fp32, and detached but for the loss."""

    loss: torch.Tensor  # scalar: sum of the pairs' losses times the factor that was given, differentiable
    losses_B: torch.Tensor  # without the factor
    logps_B2: torch.Tensor  # log-prob sums of chosen and rejected
    rewards_B2: torch.Tensor  # implicit rewards of chosen and rejected
    sums_BS: torch.Tensor | None = None  # all sums that the loss reads, as `pair_logps`


class DPOPolicy(nn.Module):
    """The module that DeepSpeed wraps: forward is packed pairs and reference log-probs in, summed loss out."""

    def __init__(self, model: LLaMaTransformer, loss_fn: PreferenceLoss):
        """UserError where the loss reads what no batch gives."""
        super().__init__()
        loss_fn.require(GIVEN)
        self.model = model
        self.loss_fn = loss_fn

    def forward(
        self, batch: PairBatch, ref_logps_B2: torch.Tensor, pull: Pull | None = None, factor: float = 1.0
    ) -> PolicyOutput:
        """Sum over the batch's pairs of the preference loss, times a factor, by the three-GEMM head.

        Args:
            batch: B packed pairs on the model's device.
            ref_logps_B2: fp32 log-prob sums of the frozen reference, (chosen, rejected), behind them those over the
                common length where the loss reads these; no numbers without a reference.
            pull: of these pairs, where the loss couples those of the whole step.
            factor: of the sum, and so of the gradient.
        """
        assert pull or not (self.loss_fn.couples and torch.is_grad_enabled())
        asked = self.loss_fn.asks

        def loss_of(parts_pC: torch.Tensor, segments: slice) -> torch.Tensor:
            pairs = slice(batch.edges[segments.start], batch.edges[segments.stop])
            sums_bS = _sums(parts_pC, asked, batch, segments)
            if pull:
                return pull.losses(sums_bS, pairs)
            return self.loss_fn(scores_of(sums_bS, ref_logps_B2, batch, pairs))

        hidden_ND = _scored_hidden(self.model, batch)
        weight_VD, counts = self.model.head_weight, _part_counts(batch, asked)
        loss, losses_B, parts_PC = logprob.part_loss(
            hidden_ND, weight_VD, batch.targets_N, counts, loss_of, squares=asked.squares, factor=factor
        )
        sums_BS = _sums(parts_PC, asked, batch)
        with torch.no_grad():
            rewards_B2 = self.loss_fn.rewards(scores_of(sums_BS, ref_logps_B2, batch))
        return PolicyOutput(loss, losses_B, sums_BS[:, :2], rewards_B2, sums_BS)


def _scored_hidden(model: LLaMaTransformer, batch: PairBatch) -> torch.Tensor:
    """Hidden rows (N, D) after the last norm that predict the batch's scored tokens, pair after pair."""
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.layout)
    return hidden_TD.index_select(0, batch.rows_N)


def _part_counts(batch: PairBatch, asked: Asked) -> logprob.Counts:
    """Scored tokens of what the head sums: of the answers of each segment, of a pair's with their fronts apart."""
    if not asked.fronts:
        return batch.answer_counts
    assert not batch.shares_segments, "an answer that several pairs share has several fronts"
    return batch.part_counts


def _sums(parts_PC: torch.Tensor, asked: Asked, batch: PairBatch, segments: slice = slice(None)) -> torch.Tensor:
    """Sums of whole answers of the pairs of some segments, and behind them what else is asked for (B, S), from those of
    answers, or of their fronts and rests, with those of squares behind them."""
    if batch.shares_segments:
        start, stop, _ = segments.indices(len(batch.answer_counts))
        before = sum(map(len, batch.answer_counts[:start]))
        answers_B2 = batch.answers_B2[batch.edges[start] : batch.edges[stop]] - before
        parts_BK = parts_PC[answers_B2].transpose(1, 2).flatten(1)
    else:
        parts_BK = logprob.by_pairs(parts_PC, 4 if asked.fronts else 2)
    if asked == _WHOLE:
        return parts_BK
    if asked.fronts:
        whole_BK, fronts_B2 = parts_BK[:, 0::2] + parts_BK[:, 1::2], parts_BK[:, 0:4:2]
    else:
        whole_BK, fronts_B2 = parts_BK, parts_BK[:, :2]
    return torch.cat([whole_BK[:, :2], fronts_B2, whole_BK[:, 2:]], dim=1)


@torch.no_grad()
def pair_logps(model: LLaMaTransformer, batch: PairBatch, asked: Asked = _WHOLE) -> torch.Tensor:
    """Log-prob sums (B, S) of the chosen and rejected answers, and behind them what else is asked for, fp32, without
    gradient and without dropout."""
    with evaluating(model):
        hidden_ND = _scored_hidden(model, batch)
        counts = _part_counts(batch, asked)
        parts_PC = logprob.part_logps(hidden_ND, model.head_weight, batch.targets_N, counts, squares=asked.squares)
        return _sums(parts_PC, asked, batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within; the training flag as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
