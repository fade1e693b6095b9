"""The preference loss of a run: which of `losses`, with which options, and what it needs."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.settings import Bounds, Settings
from simple_llama.reinforcement_learning.rlhf.objective.losses import (
    LD_ALPHA,
    LOSSES,
    NLL_WEIGHT,
    WEIGHTING,
    Loss,
    keywords,
)
from simple_llama.reinforcement_learning.rlhf.objective.scores import Asked, Scores

# Values of an option that ask for nothing, so that a loss without it need not refuse them: files of runs have them.
_ASKS_NOTHING = {
    "label_smoothing": 0.0,
    NLL_WEIGHT: 0.0,
    "f_divergence": "reverse_kl",
    LD_ALPHA: 1.0,
    WEIGHTING: "none",
}
BETA = Bounds(0, math.inf, above=True, below=True)
_TERM = re.compile(r"(\w+)(?::(.*))?")


@dataclass(frozen=True)
class LossConfig(Settings):
    """The options of all losses. One that is not given has the default of the loss, see "Losses" below."""

    # === Loss ===
    loss_type: Annotated[
        str,
        Doc("preference loss, by its name in the table of losses, or a weighted sum: sigmoid:0.8,bco_pair:0.2,sft:1"),
    ] = "sigmoid"
    beta: Annotated[
        float | None,
        BETA,
        Doc("strength of the pull towards the reference; of losses without one the scale of what they compare"),
    ] = None
    label_smoothing: Annotated[
        float | None,
        Bounds(0, 0.5, below=True),
        Doc("assumed share of swapped labels, in [0, 0.5); counts with sigmoid too, where TRL ignores it"),
    ] = None
    nll_weight: Annotated[
        float | None,
        Bounds(0, 1000),
        Doc("weight of the chosen answer's negative log-likelihood, mean over its tokens, beside the loss (RPO)"),
    ] = None
    f_divergence: Annotated[
        Literal["reverse_kl", "forward_kl", "js", "alpha"] | None,
        Doc("divergence from the reference, in losses of the log-ratio margin (f-DPO)"),
    ] = None
    f_alpha: Annotated[
        float | None,
        Bounds(0, 1, above=True, below=True),
        Doc("of f_divergence alpha: 0 is the reverse KL, 1 the forward KL; TRL's coefficient is 1 less this"),
    ] = None
    gamma: Annotated[
        float | None, Bounds(0, 1000), Doc("margin that simpo (nats a token, times beta) or slic asks for")
    ] = None
    discopop_tau: Annotated[
        float | None, Bounds(0, 1, above=True), Doc("how sharply discopop changes from one of its parts to the other")
    ] = None
    dpop_lambda: Annotated[
        float | None, Bounds(0, 10000), Doc("what dpop asks for a nat by which the chosen answer became less likely")
    ] = None
    length_penalty: Annotated[
        float | None, Bounds(0, 1000), Doc("alpha of rdpo: nats of margin for each token that an answer is longer")
    ] = None
    gap_scale: Annotated[
        float | None,
        Bounds(0, 1000, above=True),
        Doc("eta of rpo_gap: nats of margin for each unit of a pair's gap"),
    ] = None
    ld_alpha: Annotated[
        float | None,
        Bounds(0, 1),
        Doc(
            "how much log-probs count beyond the length that both answers have, of policy and reference (LD-DPO); a "
            "store keeps the reference's sums over that length beside the others"
        ),
    ] = None
    weighting: Annotated[
        Literal["none", "wpo"] | None,
        Doc("wpo: pairs count by how likely the policy is to write such answers itself, beside their own weights"),
    ] = None

    def check_rules(self) -> None:
        """UserError for a loss that does not exist, and for an option that the chosen loss does not have."""
        terms = self._terms
        for name in _OPTIONS:
            value = getattr(self, name)
            if value is None or any(name in term.values for term in terms):
                continue
            if name == "f_alpha" and any("f_divergence" in term.values for term in terms):
                raise UserError(f"f_alpha: expected f_divergence 'alpha' with it, found {shown(self.f_divergence)}")
            nothing = _ASKS_NOTHING.get(name)
            if value != nothing:
                words = "none" if nothing is None else f"{nothing:g}" if isinstance(nothing, float) else nothing
                raise UserError(
                    f"{name}: expected {words} with loss_type {self.loss_type!r}, which ignores it, found {value}; use "
                    f"one of {', '.join(_with_option(name))} or leave it out"
                )
        for name, nothing in ((LD_ALPHA, 1.0), (WEIGHTING, "none")):
            value = getattr(self, name)
            if value not in (None, nothing) and any(term.loss.couples for term in terms):
                raise UserError(
                    f"{name}: expected none beside a loss that couples the pairs of a step ({self.loss_type}), found "
                    f"{value}; leave it out"
                )
        for term in terms:
            for name in term.loss.positive:
                if term.values[name] == 0:
                    raise UserError(f"{name}: expected a number above 0 with loss_type {term.name!r}, found 0")

    def own_options(self) -> dict[str, Any]:
        """The options that the loss has, with what they are; None where the losses of a sum have several defaults."""
        found: dict[str, Any] = {}
        for term in self._terms:
            for name, value in term.values.items():
                found[name] = value if found.get(name, value) == value else None
        return found

    @property
    def _terms(self) -> tuple[_Term, ...]:
        """The losses that `loss_type` names, each with its options."""
        return _terms_of(self.loss_type, tuple((name, getattr(self, name)) for name in _OPTIONS))


_OPTIONS = tuple(field.name for field in fields(LossConfig) if field.name != "loss_type")
SomeConfig = TypeVar("SomeConfig", bound=LossConfig)


class _Term(NamedTuple):
    """A loss of a weighted sum, with its options."""

    name: str
    weight: float
    loss: Loss
    values: dict[str, Any]

    def __str__(self) -> str:
        options = ", ".join(f"{name} {value}" for name, value in self.values.items())
        weight = "" if self.weight == 1 else f"{self.weight:g} "
        return f"{weight}{self.name}" + (f" ({options})" if options else "")


def reads_reference(loss_type: str) -> bool:
    """Whether the loss of a run compares the policy with a reference; True for a name that is not known here."""
    try:
        return PreferenceLoss(loss_type).needs_reference
    except UserError:
        return True


def default_options(loss_type: str) -> dict[str, Any]:
    """The options that a run's loss has, with their defaults; none for a name that is not known here."""
    try:
        return PreferenceLoss(loss_type).own_options()
    except UserError:
        return {}


def resolved(config: SomeConfig) -> SomeConfig:
    """The same settings with the defaults of their loss written out."""
    own = config.own_options()
    return replace(config, **{name: value for name, value in own.items() if getattr(config, name) is None})


@dataclass(frozen=True)
class PreferenceLoss(LossConfig):
    """A loss with its options. Raises UserError for a value out of bounds, or an option that the loss would ignore."""

    @classmethod
    def of(cls, config: LossConfig) -> PreferenceLoss:
        """The loss that `config` describes."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(LossConfig)})

    def __call__(self, scores: Scores) -> torch.Tensor:
        """Loss (B,) of each pair, times its weight where it has one: a mean over them is by pairs, not by the sum of
        their weights."""
        first, *others = self._terms
        losses_B = _weighted(first, scores)
        for term in others:
            losses_B = losses_B + _weighted(term, scores)
        return losses_B if scores.weights_B is None else scores.weights_B * losses_B

    def __str__(self) -> str:
        return " + ".join(map(str, self._terms))

    def rewards(self, scores: Scores) -> torch.Tensor:
        """Rewards (B, 2) that the loss, the first one of a sum, implies; see docs/losses.md."""
        _, _, loss, values = self._terms[0]
        scores = loss.compared(scores, values)
        return loss.rewards(scores, **{name: values[name] for name in keywords(loss.rewards) if name in values})

    @property
    def scale(self) -> float:
        """What its rewards are divided by to have nats: beta of its first loss, 1 where that has none."""
        return float(self._terms[0].values.get("beta", 1.0))

    @property
    def reads(self) -> set[str]:
        """Names of the fields of `Scores` that it reads."""
        return set().union(*(term.loss.fields_read(term.values) for term in self._terms))

    @property
    def asks(self) -> Asked:
        """Which sums it reads beside those of whole answers."""
        reads = self.reads
        return Asked("fronts_B2" in reads, "squares_B2" in reads)

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the policy with a reference."""
        return "ref_B2" in self.reads

    @property
    def couples(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the optimizer step: then it is to be called for all of
        them at once."""
        return any(term.loss.couples for term in self._terms)

    def require(self, given: Collection[str]) -> None:
        """UserError where the loss reads a field of `Scores` that is not `given`."""
        for name in sorted(self.reads):
            if name not in given:
                raise UserError(f"loss_type {self.loss_type!r} reads {name}, which this run does not give")

    def at_start(self) -> float | None:
        """The loss of any pair of weight 1 while the policy is the reference (log-ratios 0): what the first step must
        show.

        None for a loss that reads more than log-ratios, whose first value depends on the pair: see `foretold`.
        """
        if any(term.values.get(NLL_WEIGHT) or not term.loss.of_ratios for term in self._terms):
            return None
        if self.asks.squares:
            return None
        equal_12 = torch.full((1, 2), -1.0, dtype=torch.float64)
        one_12 = torch.ones(1, 2, dtype=torch.int64)
        return self(Scores(equal_12, equal_12, one_12, fronts_B2=equal_12, ref_fronts_B2=equal_12)).item()

    def foretold(
        self,
        ref_BS: torch.Tensor,
        counts_B2: torch.Tensor,
        weights_B: torch.Tensor | None = None,
        gaps_B: torch.Tensor | None = None,
        groups_B: torch.Tensor | None = None,
        total: float | None = None,
        sums_BS: torch.Tensor | None = None,
    ) -> float:
        """The mean loss, in fp64, of pairs with these sums of the reference (B, 2), those over the common length behind
        them where they are read, scored tokens, weights, gaps and groups, while the reference is the policy, or the
        policy's sums are `sums_BS`; `total`: what they count for together, if not each as one."""
        ref_BS = ref_BS.double()
        sums_BS = ref_BS if sums_BS is None else sums_BS.double()
        losses_B = self(Scores.of_sums(sums_BS, ref_BS, counts_B2, weights_B, gaps_B, groups_B))
        return losses_B.sum().item() / (len(losses_B) if total is None else total)


@functools.cache
def _terms_of(loss_type: str, options: tuple[tuple[str, Any], ...]) -> tuple[_Term, ...]:
    """The losses that `loss_type` names, each with its options. UserError for a name or weight that is none."""
    terms: list[_Term] = []
    for part in loss_type.split(","):
        found = _TERM.fullmatch(part.strip())
        name, weight = (found[1], _number(found[2])) if found else (part, 1.0)
        if name not in LOSSES:
            raise UserError(f"loss_type: expected one of {', '.join(LOSSES)}; found {shown(name)}")
        if not 0 < weight < math.inf:
            raise UserError(f"loss_type: expected a finite weight above 0 behind {name}:, found {shown(part)}")
        if any(term.name == name for term in terms):
            raise UserError(f"loss_type: expected each loss once, found {name} twice in {shown(loss_type)}")
        terms.append(_Term(name, weight, LOSSES[name], _values(LOSSES[name], dict(options))))
    return tuple(terms)


def _weighted(term: _Term, scores: Scores) -> torch.Tensor:
    """A term's losses (B,), times its weight."""
    losses_B = term.loss.losses(scores, term.values)
    return losses_B if term.weight == 1 else term.weight * losses_B


def _number(text: str | None) -> float:
    """A weight; NaN for what is no number, 1 where none is given."""
    try:
        return 1.0 if text is None else float(text)
    except ValueError:
        return math.nan


def _values(loss: Loss, given: Mapping[str, Any]) -> dict[str, Any]:
    """A loss's options: as given, else its defaults; f_alpha, ld_alpha and weighting only where they count."""
    values = {name: default if given[name] is None else given[name] for name, default in loss.defaults.items()}
    if values.get("f_divergence") != "alpha":
        values.pop("f_alpha", None)
    return {
        name: value for name, value in values.items() if (name, value) not in ((LD_ALPHA, 1.0), (WEIGHTING, "none"))
    }


def _with_option(name: str) -> list[str]:
    """The losses that have an option."""
    return [loss_type for loss_type, loss in LOSSES.items() if name in loss.defaults]
