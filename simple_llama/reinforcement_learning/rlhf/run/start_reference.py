"""The reference of a run: where its log-probs come from, what states keep of them, and that they are its model's.

Shapes: N held-out pairs; (N, 2) chosen and rejected.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, fail_together
from simple_llama.common.logging import LOGGER
from simple_llama.ops.machine import release
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.engine import checkpoint
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, InputsConfig
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Asked
from simple_llama.reinforcement_learning.rlhf.reference import ref_source
from simple_llama.reinforcement_learning.rlhf.reference.audit import Auditor, Bound, require_kept
from simple_llama.reinforcement_learning.rlhf.reference.kept_values import KeptValues
from simple_llama.reinforcement_learning.rlhf.run.evaluate import HeldOut


def open_reference(
    config: ref_source.ReferenceConfig, inputs: Inputs, ranks: Ranks, needed: bool = True, fronts: bool = False
) -> ref_source.Reference:
    """Where reference log-probs come from (collective); where they are not `needed`, nothing is opened. `fronts`: also
    those over the common length."""
    if not needed:
        return ref_source.Reference(ref_source.without, "none")
    if config.reference == "online" and inputs.without_adapters:
        return ref_source.Reference(ref_source.without, "online")  # until `through_policy`
    if config.reference == "online":
        frozen = inputs.build_reference(ranks.device).requires_grad_(False)
        return ref_source.Reference(ref_source.from_model(frozen, fronts), "online", model=frozen, fronts=fronts)
    store = ref_source.open_store(config.ref_cache_dir, inputs.reference_id, ranks)
    with fail_together(ranks):
        content = store.content_digest(inputs.data.pairs.entries(fronts).keys)  # raises where pairs are missing
    return ref_source.Reference(ref_source.from_store(store, fronts), content, store, fronts=fronts)


def through_policy(
    reference: ref_source.Reference, engine: Engine, inputs: Inputs, ranks: Ranks
) -> ref_source.Reference:
    """The reference; an online one that is the policy without its adapters needs no model of its own."""
    online = reference.content == "online" and inputs.without_adapters
    return replace(reference, logps=engine.logps_without_adapters) if online else reference


def reference_values(
    reference: ref_source.Reference, pairs: PairSet, bound: Bound, saved: checkpoint.SavedState | None
) -> dict[str, Any] | None:
    """What the run's states keep of the reference's values: those that the run began with, and a digest of today's.

    UserError where the saved run was trained with others.
    """
    store, kept = reference.store, saved.facts.reference_values if saved else None
    if not store:
        return kept
    values = KeptValues.of(store, pairs.entries(reference.fronts).keys, reference.content)
    if saved and not kept:
        LOGGER.info("%s keeps no values of the reference: none are compared", saved.folder)
    elif saved:
        before = KeptValues.from_json(kept, str(saved.folder / "state.json"))
        require_kept(before, store, reference.content, bound, str(saved.folder))
        values = replace(values, records=before.records)
    return values.to_json()


def audit_reference(
    config: InputsConfig, reference: ref_source.Reference, logps: ref_source.Logps, inputs: Inputs, ranks: Ranks
) -> None:
    """Pairs drawn anew: the reference's numbers are those of its model, whose sums `logps` gives (collective)."""
    bound = Bound.here(inputs.dtype, ranks.device.type)
    auditor = Auditor(inputs.data.pairs, bound, config.batch_size, config.seed, ranks)
    if reference.store and auditor.finds_unbound(reference.store):
        auditor.take_over(reference.store, logps)
    elif reference.store:
        auditor.bind(reference.store)
    auditor.audit(logps, reference.logps, "step-0 audit")


def is_rounding(
    loss_fn: PreferenceLoss, found: HeldOut, pairs: PairSet, bound: Bound, loss: float, near: float
) -> bool:
    """Whether a held-out loss of step 0 is off because it multiplies what sums of the same weights may differ by, as
    dpop does: a nat moves it by more than one, no sum lies beyond the bound, and of these sums it is right."""
    if loss_fn.asks.fronts:
        return False
    ours_N2, ref_N2 = torch.from_numpy(found.logps_N2), torch.from_numpy(found.ref_N2)
    facts = (pairs.keys["counts"], pairs.weights, pairs.gaps, pairs.group_numbers)
    counts_N2, *others = (torch.from_numpy(np.array(fact)) for fact in facts)
    told = partial(loss_fn.foretold, ref_N2, counts_N2, *others, total=pairs.total)
    moved = [told(sums_BS=ref_N2 - side_2) - told() for side_2 in torch.eye(2)]
    honest = not bound.exceeded(ours_N2, ref_N2, counts_N2).any()
    return honest and max(map(abs, moved)) > 1 and abs(told(sums_BS=ours_N2) - loss) <= near


def audit_other(config: InputsConfig, reference: ref_source.Reference, inputs: Inputs, ranks: Ranks) -> None:
    """The same where the reference is not the start model (collective): its model is in memory for it, and no longer.

    To be called before the policy is made, so that there are never both.
    """
    if reference.store is None:
        return  # the model that would be asked is the reference
    with watchdog.patience("loading the reference model"):
        model = inputs.build_reference(ranks.device)
    LOGGER.info("the reference is %s, not the start model: the audit asks that one", inputs.reference.path)
    audit_reference(config, reference, partial(pair_logps, model, asked=Asked(reference.fronts)), inputs, ranks)
    del model
    release(ranks.device)
