"""Evaluation: loss, accuracy and margin on the held-out pairs, every pair once, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from simple_llama.reinforcement_learning.rlhf.data.batch_plan import MicroBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch, TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import Logps, RefLogps
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums, pair_statistics


def evaluate(
    logps: Logps,
    loss_fn: PreferenceLoss,
    ref_logps: RefLogps,
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
        chosen = [pairs[i] for i in micro_batch or (0,)]  # an empty one still makes its forward call, for nothing
        batch = PairBatch.pack(chosen).to(device)
        logps_B2 = logps(batch)
        ref_B2 = ref_logps(chosen, batch)
        if not micro_batch:
            continue
        losses_B = loss_fn(logps_B2, ref_B2)
        sums.add(pair_statistics(losses_B, logps_B2, loss_fn.rewards(logps_B2, ref_B2)))
    means = sums.means()
    return {f"eval_{name}": value for name, value in means.items() if name not in ("tokens", "useful_flops")}
