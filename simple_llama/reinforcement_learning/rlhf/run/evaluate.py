"""Evaluation: loss, accuracy and margin on the held-out pairs, every pair once, shared out over the ranks.

Shapes: B pairs of a micro-batch, N held-out pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from typing_extensions import Doc

from simple_llama.cluster.distributed import rows_of_all_ranks
from simple_llama.common.settings import Bounds, CountOrNone, Settings
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import MicroBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.objective.coupling import at_places
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyOutput, scores_of
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import Logps
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums
from simple_llama.reinforcement_learning.rlhf.run.statistics import correlation, preferred


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


@dataclass(frozen=True)
class PairSums:
    """Log-prob sums of pairs, of a policy and of its reference."""

    logps_N2: np.ndarray  # fp32 sums of chosen and rejected, nats
    ref_N2: np.ndarray  # fp32: the reference's
    counts_N2: np.ndarray  # int32 scored tokens

    @property
    def ratios_N2(self) -> np.ndarray:
        """fp64 (N, 2): log pi / pi_ref, nats an answer."""
        return self.logps_N2.astype(np.float64) - self.ref_N2

    @property
    def margins_N(self) -> np.ndarray:
        """fp64 (N,): log pi / pi_ref of the chosen answer less that of the rejected one, nats."""
        ratios_N2 = self.ratios_N2
        return ratios_N2[:, 0] - ratios_N2[:, 1]

    @property
    def length_gaps_N(self) -> np.ndarray:
        """int32 (N,): scored tokens of the chosen answer less those of the rejected one."""
        return self.counts_N2[:, 0] - self.counts_N2[:, 1]


@dataclass(frozen=True)
class HeldOut(PairSums):
    """What an evaluation found, the same on every rank: each held-out pair, in their order, and means by name."""

    losses_N: np.ndarray  # fp32
    rewards_N2: np.ndarray  # fp32 implicit rewards
    metrics: dict[str, float]


def evaluate(
    logps: Logps,
    loss_fn: PreferenceLoss,
    ref_logps: Logps,
    pairs: PairSet,
    micro_batches: Iterable[MicroBatch],
    device: torch.device,
) -> HeldOut:
    """All held-out pairs of all ranks, and their means as `eval_loss`, `eval_rewards/accuracies`, ... (collective).

    Args:
        logps: gives the log-prob sums (B, 2) of a batch.
        pairs: all held-out pairs.
        micro_batches: this rank's share of them (`batch_plan.sweep`), as positions.
    """
    sums = MetricSums(device)
    positions: list[int] = []
    found: list[torch.Tensor] = []  # (B, 9) of each micro-batch, on the device: no wait between two of them
    every: list[Scores] = []
    for micro_batch in micro_batches:
        # an empty one still makes its forward call, for nothing
        batch = PairBatch.pack([pairs[i] for i in micro_batch or (0,)]).to(device)
        sums_BS, ref_BS = logps(batch), ref_logps(batch)
        scores = scores_of(sums_BS, ref_BS, batch)
        logps_B2, ref_B2 = sums_BS[:, :2], ref_BS[:, :2]
        if loss_fn.couples:
            every.append(scores.first(len(micro_batch)))
        if not micro_batch:
            continue
        losses_B, rewards_B2 = loss_fn(scores), loss_fn.rewards(scores)
        sums.add(PolicyOutput(losses_B.sum(), losses_B, logps_B2, rewards_B2), batch)
        positions += micro_batch
        columns = (logps_B2, ref_B2, losses_B[:, None], rewards_B2, batch.counts_B2)
        found.append(torch.cat([column.double() for column in columns], dim=1))
    mine = torch.cat([torch.zeros(0, 9, dtype=torch.float64, device=device), *found])
    table_N9 = rows_of_all_ranks(mine, positions, len(pairs)).cpu().numpy()
    means = {name: value for name, value in sums.means().items() if name not in ("tokens", "useful_flops")}
    if loss_fn.couples:  # all held-out pairs, as a step couples all of its own
        losses_N = loss_fn(at_places(Scores.joined(every), positions, len(pairs)))
        table_N9[:, 4], means["loss"] = losses_N.cpu().numpy(), float(losses_N.double().sum() / pairs.total)
    return _held_out({f"eval_{name}": value for name, value in means.items()}, table_N9)


def of_sets(found: HeldOut, pairs: PairSet, sets: Mapping[str, slice]) -> dict[str, float]:
    """Means over named parts of the held-out pairs, as `eval_NAME/loss`, `eval_NAME/rewards/accuracies`, ...; a loss
    that couples pairs has coupled all held-out ones."""
    metrics: dict[str, float] = {}
    for name, place in sets.items():
        part = pairs[place]
        rewards_N2, logps_N2 = found.rewards_N2[place].astype(np.float64), found.logps_N2[place].astype(np.float64)
        means = {
            "loss": float(found.losses_N[place].sum(dtype=np.float64)) / part.total,
            "rewards/margins": float((rewards_N2[:, 0] - rewards_N2[:, 1]).mean()),
            "longer_is_chosen": part.longer_is_chosen,
            "pairs": float(len(part)),
        }
        for kind, values_N2 in (("rewards", rewards_N2), ("logps", logps_N2)):
            means[f"{kind}/accuracies"] = float(preferred(values_N2[:, 0] - values_N2[:, 1]).mean())
            for side, column in (("chosen", 0), ("rejected", 1)):
                means[f"{kind}/{side}"] = float(values_N2[:, column].mean())
        ratios_N2 = found.ratios_N2[place]
        if not np.isnan(ratios_N2).any():
            means["log_ratio/chosen"], means["log_ratio/rejected"] = map(float, ratios_N2.mean(axis=0))
        metrics |= {f"eval_{name}/{metric}": value for metric, value in means.items()}
    return metrics


def _held_out(metrics: dict[str, float], table_N9: np.ndarray) -> HeldOut:
    """The columns by their names, and the metrics that are of pairs, not of sums."""
    columns = (table_N9[:, :2], table_N9[:, 2:4], table_N9[:, 4], table_N9[:, 5:7])
    logps_N2, ref_N2, losses_N, rewards_N2 = (column.astype(np.float32) for column in columns)
    held_out = HeldOut(logps_N2, ref_N2, table_N9[:, 7:].astype(np.int32), losses_N, rewards_N2, metrics)
    if np.isnan(ref_N2).any():  # the loss reads no reference
        return held_out
    seen_N = held_out.counts_N2[:, 0] > 0  # every pair scores a token
    ratios_2 = (table_N9[seen_N, :2] - table_N9[seen_N, 2:4]).mean(axis=0) if seen_N.any() else (0.0, 0.0)
    metrics["eval_log_ratio/chosen"], metrics["eval_log_ratio/rejected"] = map(float, ratios_2)
    metrics["eval_margin_length_correlation"] = correlation(held_out.margins_N[seen_N], held_out.length_gaps_N[seen_N])
    return held_out
