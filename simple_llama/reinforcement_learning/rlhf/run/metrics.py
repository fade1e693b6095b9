"""The numbers of a run: collected on the device, and reduced over all ranks once an interval.

Names are the field's: loss, rewards/*, logps/*, grad_norm, learning_rate, epoch, perf/*; the same under eval_.
Shapes: B pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from simple_llama.cluster.distributed import all_reduce_sum
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyOutput

TOTALS = ("pairs", "tokens", "useful_flops")  # shown as sums; all others are means over the pairs
_SUMMED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
    *TOTALS,
)
_SATURATED = 0.99  # sigmoid of a reward margin whose pair hardly moves the weights any more


class MetricSums:
    """Sums over micro-batches of this rank; no host sync until `means`."""

    def __init__(self, device: torch.device, work: Callable[[PairBatch], float] | None = None):
        """Args: work: FLOPs that the result of a batch needs; none are counted without it."""
        self.sums = torch.zeros(len(_SUMMED), dtype=torch.float64, device=device)
        self.saturated = torch.zeros(1, dtype=torch.float64, device=device)  # pairs
        self.weights = torch.zeros(1, dtype=torch.float64, device=device)  # of the pairs
        self.shares = torch.zeros(1, dtype=torch.float64, device=device)  # what the pairs count for in a mean
        self.work = work

    def add(self, out: PolicyOutput, batch: PairBatch) -> None:
        """Adds what a forward pass gave for a batch, its packed tokens and its work."""
        self.sums += _pair_statistics(out)
        self.saturated += ((out.rewards_B2[:, 0] - out.rewards_B2[:, 1]).sigmoid() > _SATURATED).sum()
        self.weights += batch.weights_B.sum(dtype=torch.float64)
        self.shares += batch.shares
        if self.work is not None:
            self.sums[_SUMMED.index("tokens")] += len(batch.tokens_T)
            self.sums[_SUMMED.index("useful_flops")] += self.work(batch)

    def means(self) -> dict[str, float]:
        """Means over all pairs of all ranks (collective), and the TOTALS; the loss is what training has the mean of."""
        totals = dict(zip(_SUMMED, all_reduce_sum(self.sums).tolist(), strict=True))
        count = max(totals["pairs"], 1.0)
        means = {name: value if name in TOTALS else value / count for name, value in totals.items()}
        return {**means, "loss": totals["loss"] / self._total()}

    def _total(self) -> float:
        """What the pairs of all ranks count for in a mean (collective); 1 where there are none."""
        return all_reduce_sum(self.shares).item() or 1.0

    def saturated_share(self, pairs: float) -> float:
        """Share of `pairs`, those of all ranks, whose sigmoid(reward margin) is above 0.99 (collective).

        By itself: a longer sum over many ranks may be made in another order, and the others would change.
        """
        return all_reduce_sum(self.saturated).item() / max(pairs, 1.0)

    def mean_weight(self) -> float:
        """The mean weight of the pairs of all ranks (collective)."""
        return all_reduce_sum(self.weights).item() / self._total()

    def reset(self) -> None:
        """Starts a new interval."""
        self.sums.zero_()
        self.weights.zero_()
        self.shares.zero_()
        self.saturated.zero_()


def _pair_statistics(out: PolicyOutput) -> torch.Tensor:
    """Sums over the pairs of a batch, in the order of the metrics (fp64, on the device; tokens and FLOPs 0).

    A tie of the rewards counts one half in the accuracy: a policy that equals its reference scores 0.5.
    """
    margins_B = out.rewards_B2[:, 0] - out.rewards_B2[:, 1]
    right_B = _share_right(out.rewards_B2)
    columns = torch.stack(
        [
            out.losses_B.double(),
            out.rewards_B2[:, 0].double(),
            out.rewards_B2[:, 1].double(),
            right_B,
            margins_B.double(),
            out.logps_B2[:, 0].double(),
            out.logps_B2[:, 1].double(),
            _share_right(out.logps_B2),
            torch.ones_like(right_B),
            torch.zeros_like(right_B),
            torch.zeros_like(right_B),
        ]
    )
    return columns.sum(dim=1)


def _share_right(values_B2: torch.Tensor) -> torch.Tensor:
    """1 where the chosen answer has the larger value, 0 where the rejected one has, one half in a tie (fp64)."""
    chosen_B, rejected_B = values_B2[:, 0], values_B2[:, 1]
    return (chosen_B > rejected_B).double() + 0.5 * (chosen_B == rejected_B)
