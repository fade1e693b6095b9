"""The reference pass: log-probs of the frozen model for every pair that the store lacks, shared out over the ranks."""

from __future__ import annotations

import time

from simple_llama.common import stopping, watchdog
from simple_llama.common.distributed import Ranks, broadcast_object, fail_together
from simple_llama.common.logging import LOGGER, progress
from simple_llama.reinforcement_learning.rlhf.batch_plan import sweep
from simple_llama.reinforcement_learning.rlhf.cost import peak_memory_gb
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.policy import compile_now, pair_logps
from simple_llama.reinforcement_learning.rlhf.reference import open_store


def precompute(config: DPOConfig, inputs: Inputs, ranks: Ranks) -> int:
    """Fills the store for all pairs of the data set (collective). Returns the number of pairs computed.

    A pass that was killed resumes: what it wrote is there, and only the missing pairs are computed. Raises Stopped on
    request, with all that was computed on disk.
    """
    stopping.begin()
    pairs = inputs.train_pairs + inputs.validation_pairs
    store = open_store(config.ref_cache_dir, inputs.reference, ranks)
    missing = broadcast_object(store.missing(pairs), ranks)  # one rank's word, or two ranks could share out differently
    LOGGER.info("reference store %s: %d of %d pairs are there", store.folder, len(pairs) - len(missing), len(pairs))
    if not missing:
        return 0
    with watchdog.patience("loading the reference model"):
        model = inputs.build_model(ranks.device)
        compile_now(model, pairs[0], ranks.device, backward=False)
    started = time.perf_counter()
    todo = [pairs[i] for i in missing]
    mine = sweep([pair.rows for pair in todo], config.batch_size, ranks.world_size)[ranks.rank]
    with fail_together(ranks), store.writer(every_pairs=config.ref_flush_pairs) as writer:
        for micro_batch in progress(mine, total=len(mine), desc="reference", ranks=ranks):
            chosen = [todo[i] for i in micro_batch]
            watchdog.beat("reference pass")
            if stopping.requested():
                break  # what is computed is written; a later pass computes the rest
            if not chosen:
                continue
            batch = PairBatch.pack(chosen).to(ranks.device)
            logps_B2 = pair_logps(model, batch)
            writer.add(chosen, logps_B2.cpu().numpy())
            watchdog.started()
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
