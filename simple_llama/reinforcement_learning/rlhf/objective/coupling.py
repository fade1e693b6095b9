"""What pairs of a step weigh in a loss that couples them all: their scores from all ranks, then a coefficient a side.

    loss of the step = sum of its pairs' losses, each a function of all their log-probs
    its gradient     = sum over pairs and sides of coefficient * d log-prob sum

So the coefficients are found first, from sums without gradient, and micro-batches go on one by one with a loss that is
linear in their log-probs: the head's three GEMMs serve it as they serve any other.

Shapes: B pairs of a micro-batch (b of a chunk of the head), N of this rank, M of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from simple_llama.cluster.distributed import all_reduce_sum, rows_of_all_ranks
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores


@dataclass(frozen=True)
class Pull:
    """What a coupled loss makes of pairs: a value, and a slope for each log-prob sum."""

    losses_B: torch.Tensor
    coefs_B2: torch.Tensor

    def losses(self, logps_b2: torch.Tensor, pairs: slice) -> torch.Tensor:
        """Losses (b,) of these pairs with the known values and, in `logps_b2`, the known slopes."""
        moved_b2 = logps_b2 - logps_b2.detach()  # zeros
        return self.losses_B[pairs] + (self.coefs_B2[pairs] * moved_b2).sum(dim=1)

    def split(self, sizes: Sequence[int]) -> list[Pull]:
        """That of micro-batches of these sizes."""
        parts = zip(self.losses_B.split(list(sizes)), self.coefs_B2.split(list(sizes)), strict=True)
        return [Pull(losses, coefs) for losses, coefs in parts]


def pull_of(loss_fn: PreferenceLoss, scores: Scores) -> Pull:
    """Losses of pairs, and what their sum changes by with each log-prob sum."""
    with torch.enable_grad():
        leaf_B2 = scores.logps_B2.detach().requires_grad_()
        losses_B = loss_fn(replace(scores, logps_B2=leaf_B2))
        (coefs_B2,) = torch.autograd.grad(losses_B.sum(), leaf_B2)
    return Pull(losses_B.detach(), coefs_B2)


def at_places(scores: Scores, places: Sequence[int], count: int) -> Scores:
    """The scores of `count` pairs of all ranks, of which this rank has those at `places` (collective). A rank without
    pairs gives the same fields, empty."""
    given = scores.given
    widths = [1 if value.dim() == 1 else value.shape[1] for value in given.values()]
    columns = [value.double().reshape(len(value), width) for value, width in zip(given.values(), widths, strict=True)]
    found = rows_of_all_ranks(torch.cat(columns, dim=1), places, count).split(widths, dim=1)
    whole = {
        name: part.reshape(count, *value.shape[1:]).to(value.dtype)
        for (name, value), part in zip(given.items(), found, strict=True)
    }
    return Scores(**whole)


def of_all_ranks(scores: Scores) -> tuple[Scores, slice]:
    """The pairs of all ranks, rank by rank, and which of them are this rank's (collective)."""
    rank = dist.get_rank()
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=scores.logps_B2.device)
    sizes[rank] = len(scores.logps_B2)
    every = all_reduce_sum(sizes).tolist()
    start = sum(every[:rank])
    mine = slice(start, start + every[rank])
    return at_places(scores, range(mine.start, mine.stop), sum(every)), mine
