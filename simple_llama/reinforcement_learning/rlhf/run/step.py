"""One optimizer step: forward and backward of every micro-batch, then the clip and AdamW. All that training computes.

    gradient of the mean loss over the step's pairs = sum over micro-batches of weight * d (sum of their losses)

Shapes: B pairs of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import torch

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import all_reduce_sum
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan, Step
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.objective.coupling import Pull, of_all_ranks, pull_of
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyOutput, scores_of
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores
from simple_llama.reinforcement_learning.rlhf.reference.first_step import FirstStep
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import Logps
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums


class NotFinite(UserError):
    """The loss or the gradient is no longer a finite number."""

    def __init__(self, message: str, losses: Sequence[torch.Tensor] | None = None):
        """Args: losses: (B,) of each of this rank's micro-batches, where it is the loss; None for a gradient."""
        super().__init__(message)
        self.losses = losses


class Learner(Protocol):
    """What a step drives: the engine, or the plain loop that benches compare it with."""

    @property
    def loss_fn(self) -> PreferenceLoss: ...

    def logps(self, batch: PairBatch) -> torch.Tensor:
        """Log-prob sums (B, 2) with the current weights, without gradient."""
        ...

    def backward(
        self, batch: PairBatch, ref_logps_B2: torch.Tensor, weight: float, last: bool, pull: Pull | None = None
    ) -> PolicyOutput:
        """Adds `weight` times the gradient of the batch's summed loss; `last` of the step. `pull` of a coupled loss."""
        ...

    def step(self, rate: float) -> float:
        """Clips, updates the weights, forgets the gradient; gives its norm before the clip."""
        ...


class Portion(NamedTuple):
    """A micro-batch of one rank, as it enters a step."""

    batch: PairBatch
    weight: float  # of each pair's loss; 0 for one that is computed for company's sake
    last: bool  # of the step
    pull: Pull | None = None  # of its pairs, where the loss couples those of the step


def portions(step: Step, rank: int, pairs: PairSet) -> Iterator[Portion]:
    """This rank's micro-batches of a step of the plan, packed one by one.

    ZeRO divides by the number of ranks when it reduces, so a weight of ranks / pairs makes the step's gradient that of
    the mean over all pairs; where records count alike, ranks / records.
    """
    total = pairs.select([i for mine in step for micro_batch in mine for i in micro_batch]).total
    for place, micro_batch in enumerate(step[rank]):
        # Where a short step's pairs do not go round, a rank computes any pair, with weight 0.
        batch = PairBatch.pack([pairs[i] for i in micro_batch or step[0][0]])
        yield Portion(batch, len(step) / total if micro_batch else 0.0, place == len(step[rank]) - 1)


class PackedAhead:
    """A rank's micro-batches, step after step. The first one of the step behind it in the epoch is packed at the end of
    each, while a GPU still computes, which would stand still for it otherwise."""

    def __init__(self, plan: BatchPlan, rank: int, pairs: PairSet, device: torch.device):
        self._plan, self._rank, self._pairs, self._device = plan, rank, pairs, device
        self._ahead: dict[int, Iterator[Portion]] = {}

    def of(self, index: int) -> Iterator[Portion]:
        """Those of step `index` (from 0)."""
        yield from self._ahead.pop(index, None) or self._portions(index)
        if (index + 1) % self._plan.steps_per_epoch:  # another epoch's shuffle would take the place of this one's
            coming = self._portions(index + 1)
            first = next(coming)
            first.batch.layout.to(self._device)  # its index tensors are made and on their way
            self._ahead = {index + 1: chain([first], coming)}

    def _portions(self, index: int) -> Iterator[Portion]:
        return portions(self._plan.step(index), self._rank, self._pairs)


def optimizer_step(
    learner: Learner,
    parts: Iterable[Portion],
    ref_logps: Logps,
    rate: float,
    sums: MetricSums,
    device: torch.device,
    first: FirstStep | None = None,
) -> float:
    """A whole step at learning rate `rate` (collective); gives the gradient's norm before the clip.

    Raises NotFinite on all ranks: for a loss before the weights change, for a gradient after. Where it is the run's
    first one, as `first` says, UserError for what is not as foretold, before the weights change.
    """
    losses = accumulate(learner, parts, ref_logps, sums, device, first)
    if not _all_finite(losses, device):
        raise NotFinite("the loss is not finite", losses)
    if first:
        first.judge()
    norm = learner.step(rate)
    if not (math.isfinite(norm) and norm >= 0):
        raise NotFinite(f"the gradient norm is {norm}")
    return norm


def accumulate(
    learner: Learner,
    parts: Iterable[Portion],
    ref_logps: Logps,
    sums: MetricSums,
    device: torch.device,
    first: FirstStep | None = None,
) -> list[torch.Tensor]:
    """Forward and backward of this rank's micro-batches; gives the losses (B,) of those that count."""
    losses = []
    if learner.loss_fn.couples:
        parts = _coupled(learner, parts, ref_logps, device)
    for on_host, weight, last, pull in parts:
        batch = on_host.to(device)
        ref_B2 = ref_logps(batch)
        out = learner.backward(batch, ref_B2, weight, last, pull)
        if weight:
            sums.add(out, batch)
            if first:
                first.see(out, ref_B2, weight)
            losses.append(out.losses_B)
    return losses


def _coupled(learner: Learner, parts: Iterable[Portion], ref_logps: Logps, device: torch.device) -> Iterator[Portion]:
    """The same micro-batches with what a coupled loss makes of their pairs (collective): a pass without gradient over
    all of them, before the first is given."""
    kept, scores = list[Portion](), list[Scores]()
    for part in parts:
        batch = part.batch.to(device)
        found = scores_of(learner.logps(batch), ref_logps(batch), batch)
        scores.append(found if part.weight else found.first(0))
        kept.append(part)
    everybody, mine = of_all_ranks(Scores.joined(scores))
    pull = pull_of(learner.loss_fn, everybody)
    own = Pull(pull.losses_B[mine], pull.coefs_B2[mine])
    for part, its in zip(kept, own.split([len(one.logps_B2) for one in scores]), strict=True):
        watchdog.beat("second pass over the pairs of a step")
        if not part.weight:  # for company: any loss
            size = len(part.batch)
            its = Pull(torch.zeros(size, device=device), torch.zeros(size, 2, device=device))
        yield part._replace(pull=its)


def _all_finite(losses: Sequence[torch.Tensor], device: torch.device) -> bool:
    """Whether the losses of all ranks are: one reduction and one host read a step (collective)."""
    mine = [loss_B.sum() for loss_B in losses] or [torch.zeros((), device=device)]
    return math.isfinite(all_reduce_sum(torch.stack(mine).sum()).item())
