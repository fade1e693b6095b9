"""What preference losses read of B pairs, and what they make of it first: log-ratios, their divergences, means.

Shapes: B pairs; column 0 is chosen, column 1 rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Nats behind which an exponential goes on as its tangent: fp32 ends at 88, and ipo squares the value.
_EXPONENT_LIMIT = 30.0


@dataclass(frozen=True)
class Scores:
    """What losses read of B pairs; a field that the data or the mode does not give is None."""

    logps_B2: torch.Tensor  # log-prob sums of the policy over the scored tokens (nats, fp32)
    ref_B2: torch.Tensor | None = None  # the same of the frozen reference
    counts_B2: torch.Tensor | None = None  # scored tokens
    weights_B: torch.Tensor | None = None  # what each pair's loss is multiplied by; None: 1
    gaps_B: torch.Tensor | None = None  # reward of the chosen answer less that of the rejected one; NaN for none
    fronts_B2: torch.Tensor | None = None  # log-prob sums over as many first scored tokens as both answers have
    ref_fronts_B2: torch.Tensor | None = None  # the same of the frozen reference
    squares_B2: torch.Tensor | None = None  # sums over the scored tokens of log sum p^2 of the policy, no gradient
    groups_B: torch.Tensor | None = None  # int64: pairs of one record, which stand together, have one number

    @property
    def given(self) -> dict[str, torch.Tensor]:
        """The fields that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
        """Each field that is given, changed."""
        return Scores(**{name: change(value) for name, value in self.given.items()})

    def first(self, count: int) -> Scores:
        """Those of the first pairs."""
        return self.map(lambda value: value[:count])

    @classmethod
    def of_sums(
        cls,
        sums_BS: torch.Tensor,
        ref_BS: torch.Tensor,
        counts_B2: torch.Tensor,
        weights_B: torch.Tensor | None,
        gaps_B: torch.Tensor | None,
        groups_B: torch.Tensor | None = None,
    ) -> Scores:
        """Of sums whose columns stand as `Asked` has them, those of the reference without squares."""
        fronts_B2 = sums_BS[:, 2:4] if sums_BS.shape[1] > 2 else None
        ref_fronts_B2 = ref_BS[:, 2:4] if ref_BS.shape[1] > 2 else None
        squares_B2 = sums_BS[:, 4:6] if sums_BS.shape[1] > 4 else None
        columns = fronts_B2, ref_fronts_B2, squares_B2, groups_B
        return cls(sums_BS[:, :2], ref_BS[:, :2], counts_B2, weights_B, gaps_B, *columns)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Pairs of one or more parts, which have the same fields, one after the other."""
        return cls(**{name: torch.cat([part.given[name] for part in parts]) for name in parts[0].given})


class Asked(NamedTuple):
    """Which sums of a pair a loss reads beside those of chosen and rejected: columns (B, 2) behind theirs each."""

    fronts: bool = False  # over the common length
    squares: bool = False  # of log sum p^2; behind the fronts, which are then there whether they are asked for or not

    @property
    def columns(self) -> int:
        """How many sums a pair has."""
        return 6 if self.squares else 4 if self.fronts else 2


def log_ratios(scores: Scores) -> torch.Tensor:
    """log pi / pi_ref of each answer (B, 2)."""
    assert scores.ref_B2 is not None
    return scores.logps_B2 - scores.ref_B2


def token_means(sums_B2: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Sums over each answer as means over its scored tokens (B, 2)."""
    assert scores.counts_B2 is not None
    return sums_B2 / scores.counts_B2


def margin(values_B2: torch.Tensor) -> torch.Tensor:
    """Chosen less rejected (B,)."""
    return values_B2[:, 0] - values_B2[:, 1]


def smoothed_loss(x_B: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x) (B,): of labels of which a share e is assumed to be swapped."""
    if label_smoothing == 0:
        return -F.logsigmoid(x_B)
    return -(1 - label_smoothing) * F.logsigmoid(x_B) - label_smoothing * F.logsigmoid(-x_B)


def without_length(scores: Scores, alpha: float) -> Scores:
    """Scores whose log-probs count alpha times beyond the common length, those of policy and reference alike: LD-DPO,
    arXiv:2409.06411.

    The common length is that of the answer with fewer scored tokens: with alpha 0 a longer answer is compared by as
    many tokens as the other one has, with 1 this is DPO. An option of each loss that reads a reference; rewards are of
    these scores too, and a likelihood term counts whole answers. The reference's sums up to the common length are
    entries of their own in the store, named as pairs that end there; the pass makes them where ld_alpha asks for them.
    The same in TRL (1.16), whose ld_alpha it is; other codes have the policy's alone.
    """
    assert scores.ref_B2 is not None and scores.fronts_B2 is not None and scores.ref_fronts_B2 is not None
    logps_B2 = scores.fronts_B2 + alpha * (scores.logps_B2 - scores.fronts_B2)
    ref_B2 = scores.ref_fronts_B2 + alpha * (scores.ref_B2 - scores.ref_fronts_B2)
    return replace(scores, logps_B2=logps_B2, ref_B2=ref_B2)


def policy_weights(scores: Scores) -> torch.Tensor:
    """w_w w_l with w = exp(mean over an answer's scored tokens of log p - log sum p^2): how near a pair's answers are
    to what the policy would write itself (B,), without gradient: WPO, Eq. 2, arXiv:2406.11827.

    sum p^2, over the vocabulary, is the p that a token which the policy samples has on average, so such an answer has
    about 1. `weighting wpo` multiplies each pair's loss, likelihood term included, beside the weight of its record; the
    first loss then depends on the policy, and no store has it. The same in TRL (1.16), use_weighting.
    """
    assert scores.squares_B2 is not None
    return token_means(scores.logps_B2.detach() - scores.squares_B2, scores).sum(dim=1).exp()


def divergence_scores(scores: Scores, f_divergence: str, f_alpha: float) -> torch.Tensor:
    """f'(u) (B, 2) of u = pi / pi_ref, 0 at u = 1: what f-DPO puts in place of log u, arXiv:2309.16240, Table 1.

        reverse_kl  log u               forward_kl  1 - 1 / u
        js          log(2 u / (1 + u))  alpha       (1 - u^-a) / a, a in (0, 1)

    alpha lies between the two KLs, which are its limits a -> 0 and a -> 1. The same in TRL (1.16), whose
    f_alpha_divergence_coef is 1 - a. 1 / u and u^-a overflow where the policy has lost an answer: e^x goes on as its
    tangent behind x = 30 nats, so that losses and gradients stay finite and still pull. TRL has no bound for forward
    KL, and one for alpha behind which nothing pulls.
    """
    ratios_B2 = log_ratios(scores)
    if f_divergence == "reverse_kl":
        return ratios_B2
    if f_divergence == "forward_kl":
        return -_bounded_expm1(-ratios_B2)
    if f_divergence == "js":
        return math.log(2) + F.logsigmoid(ratios_B2)
    assert f_divergence == "alpha", f_divergence
    return -_bounded_expm1(-f_alpha * ratios_B2) / f_alpha


def divergence_margin(scores: Scores, f_divergence: str, f_alpha: float) -> torch.Tensor:
    """`divergence_scores` of the chosen answer less that of the rejected one (B,)."""
    return margin(divergence_scores(scores, f_divergence, f_alpha))


def _bounded_expm1(x: torch.Tensor) -> torch.Tensor:
    """e^x - 1, and behind _EXPONENT_LIMIT the tangent of that."""
    beyond = F.relu(x - _EXPONENT_LIMIT)  # no slope at the limit itself, where the clamp below has one
    return torch.expm1(x.clamp(max=_EXPONENT_LIMIT)) + math.exp(_EXPONENT_LIMIT) * beyond


# === Rewards: what a loss implies that an answer is worth (B, 2), in `rewards/*` of the curves ===


def implicit_rewards(
    scores: Scores, *, beta: float, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> torch.Tensor:
    """beta * log(pi / pi_ref), Sec. 4 of arXiv:2305.18290; beta * f'(pi / pi_ref) with another divergence."""
    return beta * divergence_scores(scores, f_divergence, f_alpha)


def length_rewards(scores: Scores, *, beta: float, length_penalty: float) -> torch.Tensor:
    """beta * log(pi / pi_ref) + alpha * scored tokens: the reward whose optimum under a length penalty is pi."""
    ratios_B2 = log_ratios(scores)
    assert scores.counts_B2 is not None
    return beta * ratios_B2 + length_penalty * scores.counts_B2.to(ratios_B2.dtype)


def policy_rewards(scores: Scores, *, beta: float = 1.0) -> torch.Tensor:
    """beta * log pi of the whole answer."""
    return beta * scores.logps_B2


def mean_policy_rewards(scores: Scores, *, beta: float = 1.0) -> torch.Tensor:
    """beta * log pi of the answer's mean token."""
    return beta * token_means(scores.logps_B2, scores)
