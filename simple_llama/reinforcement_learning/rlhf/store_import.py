"""`launch/store.py import`: log-prob sums that another program put beside its pairs, into a reference's store.

A data set with `ref_chosen_logps` and `ref_rejected_logps` does not say which model made them, and a run takes no
notice of them. Here a person says so: the model at `model_path`, in the dtype of the settings, over the tokens that TRL
scores (see `store_export`). That is not believed but audited: pairs drawn anew are computed, and sums that are further
off than rounding are refused. What the store has already keeps its values. N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, fail_together
from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.logging import LOGGER
from simple_llama.dataset.json_records import read_records
from simple_llama.reinforcement_learning.rlhf.command import run_any
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps
from simple_llama.reinforcement_learning.rlhf.reference.audit import Auditor, Bound
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import open_store
from simple_llama.reinforcement_learning.rlhf.reference.shards import checked_records, merged
from simple_llama.reinforcement_learning.rlhf.reference.tables import Loaded
from simple_llama.reinforcement_learning.rlhf.run.run_folder import check_folders
from simple_llama.reinforcement_learning.rlhf.store_export import COLUMNS, pairs_for_trl

_REMEDY = (
    "They were made by another model, in another dtype or over other tokens than TRL 1.16 scores: give the model that "
    "made them, or leave them out and let the pass compute. Nothing was stored"
)


def run_import(words: Sequence[str], description: str | None) -> None:
    """The whole command, on any number of ranks. Ends the process, non-zero on any error."""
    run_any(_import, partial(parse_config, words, description))


def _import(config: DPOConfig, ranks: Ranks) -> None:
    """Reads, audits, stores (collective)."""
    with fail_together(ranks):
        check_folders(config, config.ref_cache_dir)
    inputs = load_inputs(config, ranks)
    with fail_together(ranks):
        if inputs.data.pairs.groups is not None:
            raise UserError("rlhf_dataset_path: expected records of two answers, found some with more")
        pairs = pairs_for_trl(inputs).pairs
        sums_N2 = _columns(pairs)
        table = Loaded(merged([checked_records(pairs.keys, sums_N2)]))

    def given(batch: PairBatch) -> torch.Tensor:
        """The columns of a batch's pairs."""
        rows, _ = table.rows_of(batch.keys)
        return torch.from_numpy(np.array(table.records["logps"][rows])).to(batch.tokens_T.device)

    with watchdog.patience("loading the reference model"):
        model = inputs.build_reference(ranks.device)
    bound = Bound.here(inputs.dtype, ranks.device.type)
    auditor = Auditor(pairs, bound, config.batch_size, config.seed, ranks)
    auditor.audit(partial(pair_logps, model), given, "audit of the columns", remedy=_REMEDY)
    store = open_store(config.ref_cache_dir, inputs.reference_id, ranks)
    with fail_together(ranks):
        if ranks.is_main:
            fresh = store.missing(pairs.keys)
            store.add(pairs.keys[fresh], sums_N2[fresh])
            LOGGER.info(
                "%s: %d of %d pairs were missing, and have their columns now", store.folder, len(fresh), len(pairs)
            )


def _columns(pairs: PairSet) -> np.ndarray:
    """What stands beside each pair (N, 2) fp32. UserError naming a record without it."""
    sums_N2 = np.empty((len(pairs), 2), np.float32)
    for number, file in enumerate(pairs.files):
        places = np.flatnonzero(pairs.places["file"] == number)
        at = dict(zip(pairs.places["record"][places].tolist(), places.tolist(), strict=True))
        for record in read_records(file):
            if record.number in at:
                values = [record.fields.get(name) for name in COLUMNS]
                if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values):
                    raise UserError(
                        f"{record.origin}: expected numbers under {' and '.join(COLUMNS)}, found {shown(values)}"
                    )
                sums_N2[at[record.number]] = values
    return sums_N2
