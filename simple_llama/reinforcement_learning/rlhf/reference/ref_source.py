"""Where the reference's log-probs come from: the store on disk, or the frozen model in memory (the simple baseline).

Both are a function `logps(batch)`; another source (adapters switched off, say) is one more. B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from typing_extensions import Doc

from simple_llama.cluster.distributed import Ranks, fail_together
from simple_llama.common.settings import Count
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.scores import Asked
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import CacheConfig, RefStore

# -> (B, 2) fp32: log-prob sums, on the batch's device; behind them what else a loss reads, see `policy.pair_logps`
Logps = Callable[[PairBatch], torch.Tensor]


@dataclass(frozen=True)
class StoreConfig(CacheConfig):
    """How they are written."""

    ref_flush_pairs: Count = 512  # pairs per shard of the reference store; a killed pass loses at most these per rank


@dataclass(frozen=True)
class ReferenceConfig(StoreConfig):
    """Where the reference's log-probs come from."""

    # === Reference ===
    reference: Annotated[
        Literal["store", "online"], Doc("online keeps the frozen model in memory (the baseline of the store)")
    ] = "store"


@dataclass(frozen=True)
class Reference:
    """A run's reference."""

    logps: Logps
    content: str  # digest of all that will be looked up; "none" where there is no reference
    store: RefStore | None = None  # where it comes from one
    model: LLaMaTransformer | None = None  # where it stays in memory
    fronts: bool = False  # whether `logps` has those over the common length too


def open_store(cache_dir: str, reference: dict, ranks: Ranks) -> RefStore:
    """Opens the store of `reference` on every rank (collective), rank 0 first: it is the one that reports damage.

    A store that is not there is made with the first shard: a command that only looks for log-probs leaves nothing.
    """
    store = None
    for main_turn in (True, False):
        with fail_together(ranks):
            if ranks.is_main == main_turn:
                store = RefStore.open(cache_dir, reference, make=False)
    assert store is not None
    return store


def missing_pairs(store: RefStore, pairs: PairSet, fronts: bool) -> np.ndarray:
    """Positions of the pairs without a record, in order, of equal ones only the first; with `fronts` also of those
    without one of their sums over the common length. Of answers of one record: all pairs that lack one."""
    entries = pairs.entries(fronts)
    if len(entries.by_answer):
        return np.unique(entries.owners[~store.has(entries.keys)])
    return np.unique(entries.owners[store.missing(entries.keys)])


def from_store(store: RefStore, fronts: bool = False) -> Logps:
    """Looks the pairs of a batch up by their digests; no model in memory. `fronts`: also those up to the common
    length, (B, 4)."""

    def look_up(batch: PairBatch) -> torch.Tensor:
        entries = batch.entries(fronts)
        found = torch.from_numpy(entries.sums(store.lookup(entries.keys)))
        return found.to(batch.tokens_T.device, non_blocking=True)

    return look_up


def without(batch: PairBatch) -> torch.Tensor:
    """For a loss that reads no reference: no numbers (NaN), so that a loss which read them after all would end the
    run."""
    return torch.full((len(batch), 2), math.nan, device=batch.tokens_T.device)


def from_model(frozen: LLaMaTransformer, fronts: bool = False) -> Logps:
    """Computes the reference with a frozen model that stays in memory."""
    return lambda batch: pair_logps(frozen, batch, Asked(fronts))
