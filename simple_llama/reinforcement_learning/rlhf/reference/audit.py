"""Whether the reference's numbers are those of the model that a run starts from: pairs drawn anew.

Shapes: B pairs of a micro-batch, 2 sides (chosen, rejected).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.distributed import (
    Ranks,
    broadcast_object,
    fail_together,
    gather_objects,
    shared,
)
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.ops.machine import has_tiles
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.reference.kept_values import KeptValues
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import Logps, from_store
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from simple_llama.reinforcement_learning.rlhf.reference.shards import keys_of

# Nats a scored token by which honest sums may differ.
_A_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# Nats an answer: ten times the largest difference that 1,000 pairs of HH-RLHF showed between kinds of CPU. Measured by
# benchmarks/bench_rounding.py on models of 3 and 16 million weights: fp32 1.2e-4 (AVX2 against AVX-512), bf16 0.055
# (without and with bf16 units); another model showed 0.09 in bf16. On one machine, micro-batches and threads: 4e-6, 0.
_AN_ANSWER = {torch.float32: 1.2e-3, torch.bfloat16: 0.9}
# With AMX's tiles a row of a bf16 product rounds otherwise among other numbers of rows, so sums depend on what else is
# in the micro-batch: those of 24 pairs of SmolLM2-135M, alone and four together, by up to 1.1 nats an answer and 0.029
# a token (0.36 an answer on average). Some three times that is allowed there, however long the answer.
_A_TOKEN_IN_TILES = 0.1
_LAST_PLACES = 2.0**-20  # of a sum: some eight units in its last place, which summing in another order may move

_DRAWN, _FEWEST, _DRAWN_UNBOUND = 64, 16, 256  # pairs
_MOST_S = 10.0
MOST_NAMED = 8  # pairs in a message
REMEDY = (
    "The store does not belong to this model or machine: delete its folder under ref_cache_dir and run "
    "launch/precompute_ref.py again"
)


class Bound(NamedTuple):
    """The largest honest difference of two sums of the same weights: in other micro-batches, on another machine.

    The limit an answer was measured on CPUs and holds there: between CUDA devices, where none was, that a token alone.
    """

    dtype: torch.dtype
    device: str  # its type
    tiles: bool = False  # of AMX: whether it is a CPU that has them

    @classmethod
    def here(cls, dtype: torch.dtype, device: str) -> Bound:
        """That of this machine."""
        return cls(dtype, device, has_tiles())

    def of(self, ref_B2: torch.Tensor, counts_B2: torch.Tensor) -> torch.Tensor:
        """Nats (B, 2) for answers of such sums and so many scored tokens."""
        if self.tiles and self.device == "cpu" and self.dtype == torch.bfloat16:
            return _A_TOKEN_IN_TILES * counts_B2
        by_tokens_B2 = _A_TOKEN[self.dtype] * counts_B2
        if self.device != "cpu":
            return by_tokens_B2
        return torch.minimum(by_tokens_B2, (_LAST_PLACES * ref_B2.abs()).clamp(min=_AN_ANSWER[self.dtype]))

    def between_kernels(self) -> Bound:
        """That of sums whose rows were computed among others and by other kernels, with shared prefixes or without: in
        bf16 what tiles are allowed, on every device."""
        return self._replace(device="cpu", tiles=True) if self.dtype == torch.bfloat16 else self

    def exceeded(self, ours_B2: torch.Tensor, ref_B2: torch.Tensor, counts_B2: torch.Tensor) -> torch.Tensor:
        """(B, 2) bool: which sums lie further from the reference, or are no numbers."""
        return ~((ours_B2 - ref_B2).abs() <= self.of(ref_B2, counts_B2))


@dataclass(frozen=True)
class Auditor:
    """Recomputes pairs that nobody could foresee with a model that must be the reference."""

    pairs: PairSet  # all that a command will look up
    bound: Bound
    batch_size: int  # pairs that a rank may compute at once
    seed: int
    ranks: Ranks
    draw: int = _DRAWN

    def audit(
        self,
        logps: Logps,
        ref_logps: Logps,
        what: str,
        among: np.ndarray | None = None,
        remedy: str = REMEDY,
    ) -> None:
        """Draws, recomputes and compares (collective); the log tells how many, and how near they came.

        Each pair has the same chance. As many as can be computed in ten seconds, but never under sixteen. No global
        random numbers are used.

        Args:
            logps, ref_logps: of the model, and of the reference; every rank calls them as often.
            what: names the audit.
            among: positions to draw from; all where it is not given.
            remedy: what a person is told to do.

        Raises:
            UserError: on all ranks, with the pairs: the reference was made with another model, or by other numerics.
        """
        started = time.monotonic()
        drawn = self._draw(among)
        turn = max(1, min(self.batch_size, -(-_FEWEST // self.ranks.world_size))) * self.ranks.world_size
        worst, bad, done = 0.0, list[str](), 0
        while done < len(drawn):
            watchdog.beat(what)
            stopping.agree(self.ranks)
            hand = drawn[done : done + turn]
            mine = hand[self.ranks.rank :: self.ranks.world_size]
            furthest, found = self._compare(logps, ref_logps, mine or hand[:1])
            worst, bad, done = max(worst, furthest), bad + found, done + len(hand)
            spent = time.monotonic() - started
            goes_on = done < _FEWEST or spent * (done + turn) <= _MOST_S * done
            if not broadcast_object(goes_on, self.ranks, bool):  # by one clock
                break
        every = gather_objects([worst, bad], self.ranks, tuple[float, list[str]])
        worst, named = max(one[0] for one in every), list(dict.fromkeys(name for one in every for name in one[1]))
        if named:
            problem = (
                f"{what}: {len(named)} of {done} pairs drawn are further from the reference than rounding: "
                f"{', '.join(named[:MOST_NAMED])}. {remedy}"
            )
            raise shared(UserError(problem), self.ranks)
        seconds = time.monotonic() - started
        LOGGER.info(
            "%s: policy and reference differ by at most %.2g nats a token on %d of %d pairs, drawn anew (%.1f s)",
            *(what, worst, done, len(self.pairs) if among is None else len(among), seconds),
        )

    def finds_unbound(self, store: RefStore) -> bool:
        """Whether pairs have records in unbound shards alone: rank 0's word, since it draws them and binds them."""
        return broadcast_object(len(self._unbound(store)) > 0, self.ranks, bool)

    def _unbound(self, store: RefStore) -> np.ndarray:
        """Positions of the pairs that are entries of unbound shards alone."""
        return store.unbound(self.pairs.entries().keys[: len(self.pairs)])

    def take_over(self, store: RefStore, logps: Logps) -> None:
        """Audits the records that pairs have in unbound shards alone, with the store's model, and binds them
        (collective). Where the store cannot be written they stay as they are, and each command audits them."""
        unbound = self._unbound(store)
        wider = replace(self, draw=_DRAWN_UNBOUND)
        what = "audit of shards that no name binds to the reference"
        remedy = (
            f"Delete what is called other than shard-*.npy in {store.folder}, then run launch/precompute_ref.py again"
        )
        wider.audit(logps, from_store(store), what, unbound, remedy)
        self.bind(store)

    def bind(self, store: RefStore) -> None:
        """Binds the audited records of the pairs, and ends what a killed command left of that (collective)."""
        with watchdog.patience("binding the reference store"), fail_together(self.ranks):
            if not (self.ranks.is_main and store.has_unbound):
                return
            try:
                count = store.bind(self.pairs.entries().keys)
            except UserError as error:
                LOGGER.warning("%s: shards that no name binds to the reference stay (%s)", store.folder, error)
                return
            if count:
                LOGGER.info("%s: bound %d records to the reference, values as before", store.folder, count)

    def _draw(self, among: np.ndarray | None) -> list[int]:
        """Positions of pairs to compute, in random order; rank 0 draws."""
        if self.ranks.is_main:
            rng = np.random.default_rng([self.seed, int.from_bytes(os.urandom(8), "little")])
            count = len(self.pairs) if among is None else len(among)
            chosen = rng.choice(count, min(self.draw, count), replace=False)
            positions = (chosen if among is None else among[chosen]).tolist()
        else:
            positions = []
        return broadcast_object(positions, self.ranks, list[int])

    def _compare(self, logps: Logps, ref_logps: Logps, positions: Sequence[int]) -> tuple[float, list[str]]:
        """The largest difference a scored token (nats) of a micro-batch, and which pairs are beyond the bound."""
        batch = PairBatch.pack([self.pairs[i] for i in positions]).to(self.ranks.device)
        ref_BS = ref_logps(batch)[:, :4]  # what else a loss reads is of the policy alone
        ours_BS, counts_BS = logps(batch)[:, : ref_BS.shape[1]], batch.counts_of(ref_BS.shape[1])
        far_B = self.bound.exceeded(ours_BS, ref_BS, counts_BS).any(1).tolist()
        sums = zip(positions, far_B, ours_BS.tolist(), ref_BS.tolist(), strict=True)
        named = [told(self.pairs.origin(i), ours, ref) for i, far, ours, ref in sums if far]
        return float(((ours_BS - ref_BS).abs() / counts_BS).max()), named


def require_kept(kept: KeptValues, store: RefStore, content: str, bound: Bound, place: str) -> None:
    """Refuses to go on with other values than a state was trained with; a word where they are others by rounding.

    Args:
        content: the store's content digest of all pairs.
        place: names the state.
    """
    if kept.digest == content:
        return
    before, now = (np.array(sums) for sums in (kept.records["logps"], store.lookup(keys_of(kept.records))))
    counts_B2 = torch.from_numpy(np.array(kept.records["counts"]))
    far_B = bound.exceeded(torch.from_numpy(now), torch.from_numpy(before), counts_B2).any(1)
    furthest = float(np.abs(now - before).max())
    if far_B.any():
        raise UserError(
            f"{place}: cannot resume: {int(far_B.sum())} of {len(before)} log-probs of the reference that the state "
            f"keeps are not those in {store.folder} (up to {furthest:.3g} nats apart). The run was trained with other "
            "values: bring its store back, or start another run_name"
        )
    LOGGER.warning(
        "%s: the store's values are not those that the run was trained with, but as near as rounding: at most %.2g "
        "nats apart in %d pairs",
        *(place, furthest, len(before)),
    )


def told(origin: str, ours: Sequence[float], ref: Sequence[float], where: str = "stored") -> str:
    """A pair with its sums, and what they should be, for a message."""
    return f"{origin} (chosen {ours[0]:.6g}, {where} {ref[0]:.6g}; rejected {ours[1]:.6g}, {where} {ref[1]:.6g})"
