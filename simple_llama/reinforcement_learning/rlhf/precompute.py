"""The reference pass: log-probs of the frozen model for every pair that the store lacks, shared out over the ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import torch

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.console import progress
from simple_llama.cluster.distributed import Ranks, broadcast_positions, fail_together
from simple_llama.common.logging import LOGGER
from simple_llama.ops.machine import peak_memory_gb
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import sweep_of
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_key import Entries
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, settle_models
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import LossConfig, PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Asked
from simple_llama.reinforcement_learning.rlhf.reference.audit import Auditor, Bound
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import missing_pairs, open_store


class PassConfig(Protocol):
    """What the pass reads of a command's settings."""

    @property
    def ref_cache_dir(self) -> str: ...
    @property
    def ref_flush_pairs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def rows_per_micro_batch(self) -> int: ...
    @property
    def seed(self) -> int: ...


def precompute(config: PassConfig, inputs: Inputs, ranks: Ranks, pairs: PairSet | None = None) -> int:
    """Fills the store for all pairs of the data set, or `pairs` of it (collective). Returns the number of pairs
    computed.

    Where the settings have a loss that reads sums over the common length of both answers, these come from the same
    forward pass. A pass that was killed resumes: what it wrote is there, and only the missing pairs are computed.
    Raises Stopped on request, with all that was computed on disk.
    """
    fronts = isinstance(config, LossConfig) and PreferenceLoss.of(config).asks.fronts
    stopping.begin()
    pairs = inputs.data.pairs if pairs is None else pairs
    settle_models(inputs, ranks)
    store = open_store(config.ref_cache_dir, inputs.reference_id, ranks)
    # one rank's word, or two ranks could share out differently
    missing = broadcast_positions(missing_pairs(store, pairs, fronts), len(pairs), ranks)
    there, too = len(pairs) - len(missing), " with their sums over the common length (ld_alpha)" if fronts else ""
    LOGGER.info("reference store %s: %d of %d pairs are there%s", store.folder, there, len(pairs), too)
    auditor = Auditor(pairs, Bound.here(inputs.dtype, ranks.device.type), config.batch_size, config.seed, ranks)
    unbound = auditor.finds_unbound(store)
    if not len(missing) and not unbound:
        auditor.bind(store)
        return 0
    with watchdog.patience("loading the reference model"):
        model = inputs.build_reference(ranks.device)
    if unbound:
        auditor.take_over(store, partial(pair_logps, model))
    if not len(missing):
        return 0
    started = time.perf_counter()
    todo = pairs.select(missing)
    several = fronts or todo.groups is not None  # entries of a pair
    mine = sweep_of(todo, config.batch_size, ranks.world_size, config.rows_per_micro_batch)[ranks.rank]

    def batches() -> Iterator[PairBatch]:
        for micro_batch in progress(mine, total=len(mine), desc="reference", ranks=ranks):
            watchdog.beat("reference pass")
            if stopping.requested():
                return  # what is computed is written; a later pass computes the rest
            if micro_batch:
                yield PairBatch.pack([todo[i] for i in micro_batch])

    with fail_together(ranks), store.writer(every_pairs=config.ref_flush_pairs) as writer:
        for keys, logps_B2 in computed(model, batches(), ranks.device, fronts):
            fresh = store.missing(keys) if several else slice(None)  # records that are there keep their values
            writer.add(keys[fresh], logps_B2[fresh])
            watchdog.started()
    if ranks.is_main:
        store.note_model(os.path.abspath(inputs.reference.path))
    stopping.agree(ranks, at_once=True)
    seconds = time.perf_counter() - started
    LOGGER.info(
        "reference pass: computed %d pairs in %.1f s (%.2f pairs/s, %d ranks, %.2f GiB peak)",
        len(missing),
        seconds,
        len(missing) / seconds,
        ranks.world_size,
        peak_memory_gb(ranks.device),
    )
    return len(missing)


def computed(
    model: LLaMaTransformer, batches: Iterable[PairBatch], device: torch.device, fronts: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The keys (M,) and log-prob sums (M, 2), fp32, of the entries of each batch, in the same order: one a pair; with
    `fronts` behind them those over the common lengths, under the keys of pairs that end there.

    A GPU is given the next micro-batch before the host waits for the sums of the last one, so it never waits for work.
    """
    waiting: tuple[Entries, torch.Tensor, torch.cuda.Event | None] | None = None
    for batch in batches:
        sums_BS = pair_logps(model, batch.to(device), Asked(fronts))
        sums, arrived = _to_host(sums_BS)
        if waiting:
            yield _waited_for(*waiting)
        waiting = batch.entries(fronts), sums, arrived
    if waiting:
        yield _waited_for(*waiting)


def _to_host(sums_B2: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on the host that is whole when the event has come; no event where it is there already."""
    if sums_B2.device.type != "cuda":
        return sums_B2, None
    host_B2 = torch.empty(sums_B2.shape, dtype=sums_B2.dtype, pin_memory=True)
    host_B2.copy_(sums_B2, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host_B2, arrived


def _waited_for(
    entries: Entries, sums_BS: torch.Tensor, arrived: torch.cuda.Event | None
) -> tuple[np.ndarray, np.ndarray]:
    """The entries' keys and sums, once these are there."""
    if arrived:
        arrived.synchronize()
    return entries.keys, entries.spread(sums_BS.numpy())
