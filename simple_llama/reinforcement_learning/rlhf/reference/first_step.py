"""Whether a run's first optimizer step computes what is known of it beforehand; if not, the run ends unchanged.

    sums     those of the reference, where the policy is it; of eight pairs those that the model makes of each chat
             alone and padded, so that a fault in packing or sharing cannot cancel
    losses   what the loss gives in fp64 of these sums and of what the data set says of the pairs
    weights  the step's loss, as its gradient is weighted, is the mean over its pairs

So the loss of step 1 is foretold: to rounding, and to what the bound lets the sums differ.

Shapes: N pairs of this rank's part of the step, K of those computed anew, B of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, all_reduce_sum, gather_objects, shared
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.objective.coupling import of_all_ranks
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyOutput
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores
from simple_llama.reinforcement_learning.rlhf.reference.audit import MOST_NAMED, REMEDY, Bound, told
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import Logps
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore

_ANEW = 8  # pairs of the step whose sums are made anew, over all ranks
_TOLERANCE = 1e-4  # of losses, fp32 whatever the model computes in; relative where they are above 1
_OURS = "No weights were changed. This is a fault of the program, or of the machine: report it with the run's folder"
_OFF_REFERENCE = (
    "step 1: {count} pairs are further from the reference than rounding, while the policy is the reference: {names}. "
    "No weights were changed. " + REMEDY
)
_OFF_ALONE = (
    "step 1: the log-probs of {count} pairs are not those that the model gives of each chat alone and padded: {names}. "
    + _OURS
)
_OFF_LOSS = "step 1: the loss of {count} pairs is not what it must be with their log-probs: {names}. " + _OURS


class FirstStep:
    """Compares a run's first optimizer step with what is known of it. Nothing waits for the device until `judge`."""

    def __init__(
        self,
        pairs: PairSet,
        micro_batches: Sequence[Sequence[int]],
        loss_fn: PreferenceLoss,
        bound: Bound,
        ranks: Ranks,
        at_reference: bool = False,
        store: RefStore | None = None,
    ):
        """
        Args:
            micro_batches: those of this rank that count, as positions, in the order in which they will come.
            at_reference: whether the policy is the reference: sums and losses are then those of the reference.
            store: has the reference's sums; without it they are those that the step has.
        """
        self.pairs, self.loss_fn, self.bound, self.ranks = pairs, loss_fn, bound, ranks
        self.mine = [i for micro_batch in micro_batches for i in micro_batch]
        self.at_reference, self.store = at_reference, store
        self.anew: dict[int, torch.Tensor] | None = None  # (2,) by place in `mine`
        self.seen: list[tuple[PolicyOutput, torch.Tensor, float]] = []

    def compute_anew(self, logps: Logps) -> None:
        """Makes sums of some pairs without packing (collective): before the step, whose weights they are of."""
        share = -(-_ANEW // self.ranks.world_size)
        spread = sorted({turn * len(self.mine) // share for turn in range(share)}) if self.mine else []
        self.anew = {}
        for turn in range(share):  # as many calls on each rank; with partitioned weights a call is a collective
            watchdog.beat("step 1, chats alone")
            place = spread[turn] if turn < len(spread) else None
            pair = self.pairs[0 if place is None else self.mine[place]]
            sums_12 = logps(PairBatch.unshared([pair], padded=True).to(self.ranks.device))
            if place is not None:
                self.anew[place] = sums_12[0]

    def see(self, out: PolicyOutput, ref_B2: torch.Tensor, weight: float) -> None:
        """Takes what the next micro-batch gave, and the weight of each of its pairs' losses."""
        self.seen.append((out, ref_B2, weight))

    def judge(self) -> None:
        """Raises UserError on all ranks where something is not as foretold (collective)."""
        asked = self.loss_fn.asks
        sums = [out.logps_B2 if out.sums_BS is None else out.sums_BS for out, _, _ in self.seen]
        sums_NS = _joined(sums, asked.columns)
        ref_NS = _joined([ref_BS for _, ref_BS, _ in self.seen], 4 if asked.fronts else 2)
        if self.store:
            entries = self.pairs.select(self.mine).entries(asked.fronts)
            ref_NS = torch.from_numpy(entries.sums(self.store.lookup(entries.keys)))
        if self.at_reference:
            self._compare_sums(dict(enumerate(ref_NS)), sums_NS, self.bound, "stored", _OFF_REFERENCE)
        if self.anew is not None:
            self._compare_sums(self.anew, sums_NS, self.bound.between_kernels(), "alone", _OFF_ALONE)
        self._compare_losses(sums_NS, ref_NS)

    def _compare_sums(
        self, right: dict[int, torch.Tensor], sums_NS: torch.Tensor, bound: Bound, where: str, problem: str
    ) -> None:
        """Refuses log-prob sums that lie further from the `right` ones, by place, than the bound."""
        places, width = list(right), 4 if self.loss_fn.asks.fronts else 2
        right_KW = _joined([right[place][None, :width] for place in places], width)
        ours_KW, counts_K2 = sums_NS[places, :width], self._counts()[places]
        common_K2 = counts_K2.amin(dim=1, keepdim=True).expand(-1, 2)
        counts_KW = torch.cat([counts_K2, common_K2], dim=1)[:, :width]
        far = bound.exceeded(ours_KW, right_KW, counts_KW).any(1).tolist()
        both = zip(places, far, ours_KW.tolist(), right_KW.tolist(), strict=True)
        self._refuse([told(self._origin(place), ours, ref, where) for place, bad, ours, ref in both if bad], problem)

    def _compare_losses(self, sums_NS: torch.Tensor, ref_NS: torch.Tensor) -> None:
        """Refuses losses that are not what the loss gives of the sums, and weights by which they make no mean."""
        losses_N = _joined([out.losses_B for out, _, _ in self.seen]).double()
        expected_N = self._losses(sums_NS, ref_NS)
        far = (~((losses_N - expected_N).abs() <= _TOLERANCE * expected_N.abs().clamp(min=1))).tolist()
        values = zip(far, losses_N.tolist(), expected_N.tolist(), strict=True)
        self._refuse(
            [
                f"{self._origin(place)} ({found:.6g}, expected {expected:.6g})"
                for place, (bad, found, expected) in enumerate(values)
                if bad
            ],
            _OFF_LOSS,
        )
        places, foretold_K = self._foretold(ref_NS)
        found_K = losses_N[places]
        weighted = sum(weight * float(out.losses_B.double().sum()) for out, _, weight in self.seen)
        mine = [
            weighted,
            float(expected_N.sum()),
            self.pairs.select(self.mine).total,
            float(foretold_K.sum()),
            float(found_K.sum()),
            self.pairs.select([self.mine[place] for place in places]).total,
            len(places),
        ]
        loss, expected, total, foretold, found, of_known, known = all_reduce_sum(
            torch.tensor(mine, dtype=torch.float64, device=self.ranks.device)
        ).tolist()
        loss, expected = loss / self.ranks.world_size, expected / (total or 1)
        if not abs(loss - expected) <= _TOLERANCE * max(abs(expected), 1):
            problem = (
                f"step 1: the weighted loss is {loss:.6g}, expected {expected:.6g}, the mean of its pairs. {_OURS}"
            )
            raise shared(UserError(problem), self.ranks)
        if known:
            by = "the reference's sums" if self._foretells_all else "sums of each chat alone"
            numbers = found / of_known, known, foretold / of_known
            LOGGER.info("step 1: loss %.6f on %d pairs, foretold %.6f by %s", *numbers, by)

    def _foretold(self, ref_NS: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Places of the pairs whose losses were known beforehand, and these."""
        if self._foretells_all:
            return list(range(len(self.mine))), self._losses(ref_NS, ref_NS)
        places = [] if self.loss_fn.couples or "groups_B" in self.loss_fn.reads else list(self.anew or ())
        sums_NS = torch.zeros(len(self.mine), self.loss_fn.asks.columns)
        for place in places:
            sums_NS[place] = (self.anew or {})[place].cpu()
        return places, self._losses(sums_NS, ref_NS)[places]

    @property
    def _foretells_all(self) -> bool:
        """Whether the reference's sums tell every loss: not where the policy weighs pairs by its own."""
        return self.at_reference and not self.loss_fn.asks.squares

    def _losses(self, sums_NS: torch.Tensor, ref_NS: torch.Tensor) -> torch.Tensor:
        """What the loss gives in fp64 of this rank's pairs (collective if it couples them); their facts come from the
        data set, not from a batch."""
        facts = (torch.from_numpy(np.array(part[self.mine])).double() for part in (self.pairs.weights, self.pairs.gaps))
        groups_N = torch.from_numpy(self.pairs.group_numbers[self.mine])
        sums_NS, ref_NS = sums_NS.double(), ref_NS.double()
        weights_N, gaps_N = facts
        scores = Scores.of_sums(sums_NS, ref_NS, self._counts(), weights_N, gaps_N, groups_N)
        if not self.loss_fn.couples:
            return self.loss_fn(scores)
        everybody, mine = of_all_ranks(scores.map(lambda value: value.to(self.ranks.device)))
        return self.loss_fn(everybody)[mine].cpu()

    def _counts(self) -> torch.Tensor:
        """Scored tokens (N, 2)."""
        return torch.from_numpy(self.pairs.keys["counts"][self.mine].astype("int64"))

    def _origin(self, place: int) -> str:
        return self.pairs.origin(self.mine[place])

    def _refuse(self, found: list[str], problem: str) -> None:
        """UserError on all ranks where one has found something (collective). `problem` has places for the number and
        the names."""
        every = gather_objects([len(found), found[:MOST_NAMED]], self.ranks, tuple[int, list[str]])
        if count := sum(one[0] for one in every):
            names = [name for _, some in every for name in some]
            words = problem.replace("{count}", str(count)).replace("{names}", ", ".join(names[:MOST_NAMED]))
            raise shared(UserError(words), self.ranks)


def _joined(parts: Sequence[torch.Tensor], *columns: int) -> torch.Tensor:
    """Rows of all parts on the host."""
    return torch.cat([part.cpu() for part in parts]) if parts else torch.zeros(0, *columns)
