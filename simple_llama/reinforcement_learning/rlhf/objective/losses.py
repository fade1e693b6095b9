"""The table of preference losses: a name's function, what it reads, and what it implies as rewards.

A loss takes `Scores` and its own options as keywords, with its own defaults, and gives each pair's loss from the scores
of that pair alone: the head asks it for a few pairs at a time. One that `couples` is given all pairs of the optimizer
step at once. To add one: write the function in `ratio_losses.py`, where it reads no reference in `reference_free.py`,
where it couples in `coupled_losses.py`, and name it in `LOSSES`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from simple_llama.reinforcement_learning.rlhf.objective import coupled_losses, ratio_losses, reference_free
from simple_llama.reinforcement_learning.rlhf.objective.scores import (
    Scores,
    implicit_rewards,
    length_rewards,
    mean_policy_rewards,
    policy_rewards,
    policy_weights,
    without_length,
)

NLL_WEIGHT = "nll_weight"  # an option of each loss that is no likelihood itself
LD_ALPHA = "ld_alpha"  # of each that reads a reference and takes each pair alone
WEIGHTING = "weighting"  # of each that couples no pairs


class Loss(NamedTuple):
    """A loss, which fields of `Scores` it reads, and what belongs to it."""

    function: Callable[..., torch.Tensor]  # (scores, *, its options) -> losses_B
    reads: tuple[str, ...]
    rewards: Callable[..., torch.Tensor] = implicit_rewards  # (scores, *, some of its options) -> (B, 2)
    nll_weight: float | None = 0.0  # default weight of the chosen answer's likelihood beside it; None: has it itself
    of_ratios: bool = True  # whether log-ratios of 0 give one value, whatever the sums and counts are
    positive: tuple[str, ...] = ()  # options that must not be 0
    couples: bool = False  # whether a pair's loss depends on the other pairs of the step

    @property
    def defaults(self) -> dict[str, Any]:
        """A loss's own options with their defaults: its keyword-only parameters, the likelihood's weight, what counts
        beyond the common length, and how pairs are weighted."""
        found = {**keywords(self.function), **({} if self.nll_weight is None else {NLL_WEIGHT: self.nll_weight})}
        if self.couples:
            return found
        has_length = "ref_B2" in self.reads and "groups_B" not in self.reads
        return {**found, **({LD_ALPHA: 1.0} if has_length else {}), WEIGHTING: "none"}

    def losses(self, scores: Scores, values: Mapping[str, Any]) -> torch.Tensor:
        """Loss (B,) of each pair. Args: values: of its options; the default of one that is missing."""
        own = {name: values[name] for name in keywords(self.function) if name in values}
        losses_B = self.function(self.compared(scores, values), **own)
        if values.get(NLL_WEIGHT):
            losses_B = losses_B + values[NLL_WEIGHT] * reference_free.sft_loss(scores)
        return policy_weights(scores) * losses_B if values.get(WEIGHTING) == "wpo" else losses_B

    def compared(self, scores: Scores, values: Mapping[str, Any]) -> Scores:
        """The scores that answers are compared by."""
        return without_length(scores, values[LD_ALPHA]) if values.get(LD_ALPHA, 1.0) != 1 else scores

    def fields_read(self, values: Mapping[str, Any]) -> set[str]:
        """Names of the fields of `Scores` that it reads with these options."""
        found = {*self.reads, *(("logps_B2", "counts_B2") if values.get(NLL_WEIGHT) else ())}
        if values.get(LD_ALPHA, 1.0) != 1:
            found |= {"fronts_B2", "ref_fronts_B2"}
        return found | ({"counts_B2", "squares_B2"} if values.get(WEIGHTING) == "wpo" else set())


@functools.cache
def keywords(function: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """A function's keyword-only parameters with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


_RATIOS = ("logps_B2", "ref_B2")
_MEANS = (*_RATIOS, "counts_B2")
_POLICY = ("logps_B2", "counts_B2")

LOSSES = {
    "sigmoid": Loss(ratio_losses.sigmoid_loss, _RATIOS),
    "hinge": Loss(ratio_losses.hinge_loss, _RATIOS),
    "ipo": Loss(ratio_losses.ipo_loss, _RATIOS),
    "robust": Loss(ratio_losses.robust_loss, _RATIOS),
    "sigmoid_norm": Loss(ratio_losses.sigmoid_norm_loss, _MEANS),
    "ipo_norm": Loss(ratio_losses.ipo_norm_loss, _MEANS),
    "exo_pair": Loss(ratio_losses.exo_pair_loss, _RATIOS, positive=("label_smoothing",)),
    "nca_pair": Loss(ratio_losses.nca_pair_loss, _RATIOS),
    "bco_pair": Loss(ratio_losses.bco_pair_loss, _RATIOS),
    "sppo_hard": Loss(ratio_losses.sppo_hard_loss, _RATIOS),
    "apo_zero": Loss(ratio_losses.apo_zero_loss, _RATIOS),
    "apo_down": Loss(ratio_losses.apo_down_loss, _RATIOS),
    "discopop": Loss(ratio_losses.discopop_loss, _RATIOS),
    "dpop": Loss(ratio_losses.dpop_loss, _RATIOS),
    "rdpo": Loss(ratio_losses.rdpo_loss, _MEANS, length_rewards, of_ratios=False),
    "rpo_gap": Loss(ratio_losses.rpo_gap_loss, (*_RATIOS, "gaps_B"), of_ratios=False),
    "plackett_luce": Loss(ratio_losses.plackett_luce_loss, (*_RATIOS, "groups_B"), of_ratios=False),
    "aot": Loss(coupled_losses.aot_loss, _RATIOS, couples=True),
    "aot_unpaired": Loss(coupled_losses.aot_unpaired_loss, _RATIOS, couples=True),
    "sft": Loss(reference_free.sft_loss, _POLICY, mean_policy_rewards, nll_weight=None, of_ratios=False),
    "simpo": Loss(reference_free.simpo_loss, _POLICY, mean_policy_rewards, of_ratios=False),
    "orpo": Loss(reference_free.orpo_loss, _POLICY, mean_policy_rewards, nll_weight=None, of_ratios=False),
    "cpo": Loss(reference_free.cpo_loss, ("logps_B2",), policy_rewards, nll_weight=1.0, of_ratios=False),
    "slic": Loss(reference_free.slic_loss, ("logps_B2",), policy_rewards, nll_weight=0.1, of_ratios=False),
}
