"""Asks TRL's own trainers what their losses give of made-up pairs, and records how ours differ.

    python -m benchmarks.trl_losses

Where TRL 1.16 is installed (`make bench` has it). Its losses stand inside its trainers, which are made here without
their set-up: only what the loss reads is there. The record is benchmarks/trl_losses.json; docs/losses.md shows it.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.check_losses import SUM, VARIANTS, largest_error, random_scores, slopes
from simple_llama.common.files import atomic_write
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES, NLL_WEIGHT
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores

OUTCOMES = Path(__file__).with_name("trl_losses.json")
_VERSION = "1.16."
_PAIRS = 16
_AGREES = {torch.float64: 1e-10, torch.float32: 1e-4}
_NAMES = {"ipo_norm": "ipo"}  # ours: TRL's; all others are called the same
_DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}
_OTHER_TRAINERS = ("simpo", "orpo", "cpo")
_ABSENT = {"plackett_luce", "dpop", "rdpo", "rpo_gap", "slic"}
# What TRL's source says where it computes something else; the comparison must find that it does.
_KNOWN = {
    "ipo": "takes means over the tokens: our ipo_norm",
    "sigmoid": "ignores label_smoothing",
    "exo_pair": "makes log e in fp32",
}
_TOKENS = "one pair at a time; a micro-batch's likelihood is a mean over its tokens, ours over its pairs"
_UNWEIGHTED = "has no gradient with WPO's weights, which are multiplied in place"
_CERTAIN = "not finite where an answer is certain"
_COUPLED = "of all pairs at once; it couples a micro-batch of one rank, ours the step"
_NOTES = {
    "sft": _TOKENS,
    "cpo": _TOKENS,
    SUM: _TOKENS,
    "orpo": f"{_TOKENS}, and theirs is of the prompt's tokens too",
    "bco_pair": "no shift either",
    "aot": _COUPLED,
    "aot_unpaired": _COUPLED,
}


@dataclass(frozen=True)
class Outcome:
    """What the comparison of a loss showed."""

    words: str
    error: str  # largest difference of values and slopes where both compute the same; empty where they never do


def main() -> None:
    """Compares all losses, and records the outcomes."""
    version = importlib.metadata.version("trl")
    assert version.startswith(_VERSION), f"expected TRL {_VERSION}*, found {version}"
    found = {name: compare(name) for name in (*LOSSES, SUM)}
    for name, outcome in found.items():
        print(f"{name:32} {outcome.words} {outcome.error}")
    record = {name: asdict(outcome) for name, outcome in found.items()}
    atomic_write(OUTCOMES, (json.dumps(record, indent=2) + "\n").encode())


def compare(name: str) -> Outcome:
    """One loss, with every set of options that the tests have for it."""
    if name in _ABSENT:
        return Outcome("has none", "")
    worst, differs, not_finite = dict[torch.dtype, float](), list[float](), list[str]()
    unweighted = ""
    for loss in (one for one in VARIANTS if one.loss_type == name):
        if (loss.nll_weight and name != "cpo") or (loss.weighting == "wpo" and name in _OTHER_TRAINERS):
            continue  # TRL's DPO trainer has no such term, and its others no such weights
        # of alpha its table of dtypes lacks fp64, and orpo makes fp32 of what it is given
        dtype = torch.float32 if name == "orpo" or loss.f_divergence == "alpha" else torch.float64
        try:
            error = difference(loss, dtype)
        except RuntimeError as fault:
            if loss.weighting != "wpo" or "modified by an inplace operation" not in str(fault):
                raise
            unweighted = _UNWEIGHTED
            continue
        if error <= _AGREES[dtype]:
            worst[dtype] = max(worst.get(dtype, 0.0), error)
        else:
            differs.append(error)
        if not all(part.isfinite().all() for part in their_slopes(loss, _extremes())):
            not_finite.append(loss.own_options().get("f_divergence", ""))
    parts = ["agrees"] if worst else []
    parts += [unweighted] * bool(unweighted)
    if differs:
        ends = dict.fromkeys(f"{error:.0e}" for error in (min(differs), max(differs)))
        parts.append(f"{_KNOWN[name]} ({' to '.join(ends)})")
    if name in _NOTES:
        parts.append(_NOTES[name])
    if not_finite:
        kinds = ", ".join(dict.fromkeys(not_finite))
        parts.append(f"not finite at log-ratios of +-1000 ({kinds})" if kinds else _CERTAIN)
    units = {torch.float64: "", torch.float32: " in fp32"}
    return Outcome(
        "; ".join(parts), ", ".join(f"{worst[one]:.0e}{unit}" for one, unit in units.items() if one in worst)
    )


def _extremes() -> Scores:
    """Log-ratios of -1000, 0 and 1000 on each side, fp32, answers of ten tokens."""
    ratios = torch.cartesian_prod(*[torch.tensor([-1000.0, 0.0, 1000.0])] * 2)
    ref, counts = torch.full_like(ratios, -1000.0), torch.full(ratios.shape, 10)
    return Scores(ref + ratios, ref, counts, fronts_B2=ref + ratios, ref_fronts_B2=ref, squares_B2=-0.5 * counts)


def difference(loss: PreferenceLoss, dtype: torch.dtype) -> float:
    """The largest difference of values and slopes of random pairs, relative where they are above 1."""
    scores = replace(random_scores(_PAIRS), weights_B=None, gaps_B=None)
    sums = ("logps_B2", "ref_B2", "fronts_B2", "ref_fronts_B2", "squares_B2")
    scores = replace(scores, **{name: getattr(scores, name).to(dtype) for name in sums})
    ours, theirs = (
        (losses, _folded(gradient, scores)) for losses, gradient in (slopes(loss, scores), their_slopes(loss, scores))
    )
    if loss.couples:  # TRL gives the mean of all pairs alone
        ours = ours[0].mean().expand(_PAIRS), ours[1]
    return max(largest_error(one.double(), other.double()) for one, other in zip(theirs, ours, strict=True))


def _folded(gradient_B4: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Slopes of which those of an answer that ends at the common length are one: its two sums are the same."""
    assert scores.counts_B2 is not None
    ends_B2 = scores.counts_B2 == scores.counts_B2.amin(dim=1, keepdim=True)
    whole_B2, fronts_B2 = gradient_B4[:, :2], gradient_B4[:, 2:]
    return torch.cat([whole_B2 + fronts_B2 * ends_B2, fronts_B2 * ~ends_B2], dim=1)


def their_slopes(loss: PreferenceLoss, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (B,) and slopes (B, 4), as `slopes`, of TRL, a pair at a time: a micro-batch's mean over tokens is of that
    pair then. Of a loss that couples pairs all at once, their mean as the loss of each."""
    assert scores.fronts_B2 is not None
    if loss.couples:
        leaves = [part.clone().requires_grad_() for part in (scores.logps_B2, scores.fronts_B2)]
        value = _dpo(loss, loss.own_options(), replace(scores, logps_B2=leaves[0], fronts_B2=leaves[1]))
        gradient = torch.autograd.grad(value * len(leaves[0]), leaves, allow_unused=True, materialize_grads=True)
        return value.detach().expand(len(leaves[0])), torch.cat(gradient, dim=1)
    losses, gradients = [], []
    for place in range(len(scores.logps_B2)):
        leaves = [part[place : place + 1].clone().requires_grad_() for part in (scores.logps_B2, scores.fronts_B2)]
        value = _loss(loss, _pair(scores, place, *leaves))
        gradient = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        losses.append(value.detach())
        gradients.append(torch.cat(gradient, dim=1)[0])
    return torch.stack(losses), torch.stack(gradients)


def _pair(scores: Scores, place: int, logps_12: torch.Tensor, fronts_12: torch.Tensor) -> Scores:
    """One of the pairs, with other sums of the policy in their places."""
    given = {name: part[place : place + 1] for name, part in vars(scores).items() if part is not None}
    return Scores(**{**given, "logps_B2": logps_12, "fronts_B2": fronts_12})


def _loss(loss: PreferenceLoss, pair: Scores) -> torch.Tensor:
    """The loss of a pair by the trainer that has it."""
    name, options = loss.loss_type, loss.own_options()
    assert pair.counts_B2 is not None
    if name in ("simpo", "cpo"):
        return _cpo(name, options, pair.logps_B2[0], pair.counts_B2[0])
    if name == "orpo":
        return _orpo(options, pair.logps_B2[0], pair.counts_B2[0])
    return _dpo(loss, options, pair)


def _tokens(sums: torch.Tensor, fronts: torch.Tensor, counts_B2: torch.Tensor) -> torch.Tensor:
    """Log-probs of tokens (2 B, longest answer), chosen answers before rejected ones, that add up to these sums: equal
    within the common length, and behind it."""
    counts, common = counts_B2.T.flatten(), counts_B2.amin(dim=1).repeat(2)
    place = torch.arange(int(counts.max()))
    beyond = (sums - fronts) / (counts - common).clamp(min=1)
    found = torch.where(place < common[:, None], (fronts / common)[:, None], beyond[:, None])
    return found * (place < counts[:, None])


def _dpo(loss: PreferenceLoss, options: dict[str, Any], pairs: Scores) -> torch.Tensor:
    """`DPOTrainer._compute_loss` of pairs, with a model that gives tokens of such sums."""
    from trl import DPOTrainer  # pyright: ignore[reportMissingImports]

    ref_B2, counts_B2 = pairs.ref_B2, pairs.counts_B2
    assert ref_B2 is not None and counts_B2 is not None
    assert pairs.fronts_B2 is not None and pairs.ref_fronts_B2 is not None and pairs.squares_B2 is not None
    if (alpha := options.get("ld_alpha")) is not None:
        ref_B2 = pairs.ref_fronts_B2 + alpha * (ref_B2 - pairs.ref_fronts_B2)  # as its own pass would give
    terms = [part.partition(":") for part in loss.loss_type.split(",")]
    trainer: Any = object.__new__(DPOTrainer)
    divergence = options.get("f_divergence") or "reverse_kl"
    vars(trainer).update(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=_same, gather_for_metrics=_same),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau")),
        loss_types=[_NAMES.get(name, name) for name, _, _ in terms],
        loss_weights=[float(weight or 1) for _, _, weight in terms],
        beta=options.get("beta") or 1.0,
        label_smoothing=options.get("label_smoothing") or 0.0,
        f_divergence_type=_DIVERGENCES.get(divergence, divergence),
        f_alpha_divergence_coef=1 - (options.get("f_alpha") or 0.5),
        use_weighting=options.get("weighting") == "wpo",
        ld_alpha=alpha,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    counts, longest = counts_B2.T.flatten(), int(counts_B2.max())
    mask = (torch.arange(longest) < counts[:, None]).long()
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask], dim=1)  # one token of a prompt
    outputs = SimpleNamespace(
        log_probs=_tokens(pairs.logps_B2.T.flatten(), pairs.fronts_B2.T.flatten(), counts_B2),
        entropy=torch.zeros(mask.shape),
        mean_logits=torch.zeros(mask.shape),
        is_top1=mask.bool(),
        log_sum_sq_probs=(pairs.squares_B2.T.flatten() / counts)[:, None] * mask,
    )
    inputs = {
        "input_ids": torch.zeros_like(whole),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
        "ref_chosen_logps": ref_B2[:, 0],
        "ref_rejected_logps": ref_B2[:, 1],
    }

    class Model:
        training = True

        def __call__(self, **_: Any) -> Any:
            return outputs

    return trainer._compute_loss(Model(), inputs, return_outputs=False)


def _cpo(name: str, options: dict[str, Any], sums_2: torch.Tensor, counts_2: torch.Tensor) -> torch.Tensor:
    """`CPOTrainer.cpo_loss`, and the likelihood as its `get_batch_loss_metrics` adds it."""
    from trl.experimental.cpo import CPOTrainer  # pyright: ignore[reportMissingImports]

    trainer: Any = object.__new__(CPOTrainer)
    vars(trainer).update(
        beta=options["beta"],
        loss_type="simpo" if name == "simpo" else "sigmoid",
        simpo_gamma=options.get("gamma"),
        label_smoothing=options.get("label_smoothing", 0.0),
        alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    means_2 = sums_2 / counts_2
    values_2 = means_2 if name == "simpo" else sums_2
    losses, _, _ = trainer.cpo_loss(values_2[:1], values_2[1:])
    return losses.mean() - options[NLL_WEIGHT] * means_2[0]


def _orpo(options: dict[str, Any], sums_2: torch.Tensor, counts_2: torch.Tensor) -> torch.Tensor:
    """`ORPOTrainer.odds_ratio_loss`, and the likelihood as its `get_batch_loss_metrics` adds it, of an empty prompt."""
    from trl.experimental.orpo import ORPOTrainer  # pyright: ignore[reportMissingImports]

    trainer: Any = object.__new__(ORPOTrainer)
    vars(trainer).update(beta=options["beta"], accelerator=SimpleNamespace(device=torch.device("cpu")))
    means_2 = sums_2 / counts_2
    losses, *_ = trainer.odds_ratio_loss(means_2[:1], means_2[1:])
    return -means_2[0] - losses.mean()


def _same(value: Any) -> Any:
    """What a gather over one process gives."""
    return value


if __name__ == "__main__":
    main()
