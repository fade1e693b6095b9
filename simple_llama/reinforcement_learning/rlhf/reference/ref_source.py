"""Where the reference's log-probs come from: the store on disk, or the frozen model in memory (the simple baseline).

Both are a function `logps(batch)`; another source (adapters switched off, say) is one more. B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from typing_extensions import Doc

from simple_llama.cluster.distributed import Ranks, fail_together
from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.common.settings import Count, PathText, Settings
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch, TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore

Logps = Callable[[PairBatch], torch.Tensor]  # -> (B, 2) fp32: log-prob sums, on the batch's device

_AUDIT_PAIRS = 8
# Largest honest difference a scored token (nats): the same weights in another micro-batch round differently.
_AUDIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class ReferenceConfig(Settings):
    """Where the reference is kept."""

    # === Reference ===
    reference: Annotated[
        Literal["store", "online"], Doc("online keeps the frozen model in memory (the baseline of the store)")
    ] = "store"
    ref_cache_dir: PathText = root_path("ref_cache")  # reference log-probs, shared by all runs
    ref_flush_pairs: Count = 512  # pairs per shard of the reference store; a killed pass loses at most these per rank


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


def from_store(store: RefStore) -> Logps:
    """Looks the pairs of a batch up by their digests; no model in memory."""

    def look_up(batch: PairBatch) -> torch.Tensor:
        return torch.from_numpy(store.lookup(batch.keys)).to(batch.tokens_T.device, non_blocking=True)

    return look_up


def from_model(frozen: LLaMaTransformer) -> Logps:
    """Computes the reference with a frozen model that stays in memory."""
    return lambda batch: pair_logps(frozen, batch)


def audit(
    logps: Logps, ref_logps: Logps, pairs: Sequence[TokenizedPair], dtype: torch.dtype, device: torch.device
) -> float:
    """Recomputes a few pairs with the untrained policy and compares them with the reference's numbers.

    Returns the largest difference a scored token (nats). Raises UserError when it is beyond rounding: the reference
    was computed with another model, or by other numerics. Same work on every rank.
    """
    sample = [pairs[i] for i in range(0, len(pairs), max(1, len(pairs) // _AUDIT_PAIRS))[:_AUDIT_PAIRS]]
    batch = PairBatch.pack(sample).to(device)
    difference_B2 = (logps(batch) - ref_logps(batch)).abs() / batch.counts_B2
    worst = float(difference_B2.max())
    allowed = _AUDIT_TOLERANCE[dtype]
    if not worst <= allowed:
        raise UserError(
            f"step-0 audit: the policy and the stored reference differ by {worst:.3g} nats a token on {len(sample)} "
            f"pairs, expected at most {allowed:g}. The store does not belong to this model or machine: delete its "
            "folder under ref_cache_dir and run launch/precompute_ref.py again"
        )
    return worst
