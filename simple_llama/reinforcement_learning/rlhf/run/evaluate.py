"""Evaluation: loss, accuracy and margin on the held-out pairs, every pair once, shared out over the ranks.

Shapes: B pairs of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from typing_extensions import Doc

from simple_llama.common.settings import Bounds, CountOrNone, Settings
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import MicroBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch, TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyOutput, scores_of
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import Logps
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """When the policy is looked at, and by how many sample answers."""

    # === Evaluation ===
    eval_interval: Annotated[
        CountOrNone,
        Doc("optimizer steps between evaluations, beside those at the start and each epoch's end; 0: only these"),
    ] = 50
    n_samples: Annotated[
        int, Bounds(0, 64), Doc("validation prompts that are answered at each evaluation; 0: none")
    ] = 4
    sample_tokens: Annotated[int, Bounds(1, 65536)] = 64  # tokens of a sample answer, at most


def accuracy_interval(accuracy: float, pairs: int) -> tuple[float, float]:
    """Where the accuracy over all possible pairs lies with 95 % confidence (Wilson's score interval, 1927)."""
    z = 1.959964
    middle = accuracy + z * z / (2 * pairs)
    half = z * math.sqrt(accuracy * (1 - accuracy) / pairs + z * z / (4 * pairs * pairs))
    scale = 1 + z * z / pairs
    return (middle - half) / scale, (middle + half) / scale


def evaluate(
    logps: Logps,
    loss_fn: PreferenceLoss,
    ref_logps: Logps,
    pairs: Sequence[TokenizedPair],
    micro_batches: Iterable[MicroBatch],
    device: torch.device,
) -> dict[str, float]:
    """Means over all held-out pairs of all ranks, as `eval_loss`, `eval_rewards/accuracies`, ... (collective).

    Args:
        logps: gives the log-prob sums (B, 2) of a batch.
        pairs: all held-out pairs.
        micro_batches: this rank's share of them (`batch_plan.sweep`), as positions.
    """
    sums = MetricSums(device)
    for micro_batch in micro_batches:
        # an empty one still makes its forward call, for nothing
        batch = PairBatch.pack([pairs[i] for i in micro_batch or (0,)]).to(device)
        logps_B2 = logps(batch)
        scores = scores_of(logps_B2, ref_logps(batch), batch)
        if not micro_batch:
            continue
        losses_B = loss_fn(scores)
        sums.add(PolicyOutput(losses_B.sum(), losses_B, logps_B2, loss_fn.rewards(scores)), batch)
    means = sums.means()
    return {f"eval_{name}": value for name, value in means.items() if name not in ("tokens", "useful_flops")}
