"""Every preference loss once more, written from its paper alone: complex numpy numbers, no stable forms.

For tests and for docs/losses.md. It imports nothing of what it checks. Gradients are complex steps: f(x + ih) has
h f'(x) as its imaginary part, without a difference that cancels (Squire and Trapp 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_STEP = 1e-30

# log pi (w, l), log pi_ref (w, l), scored tokens (w, l); where options need them, the gap, then the first four over the
# common length alone, then sums of log sum p^2 (w, l), then the number of the record
Sums = tuple[Any, ...]


def value_and_gradient(
    name: str, sums: Sums, options: Mapping[str, Any], weight: float = 1.0
) -> tuple[float, tuple[float, ...]]:
    """A loss of one pair, and its slopes by the policy's two log-prob sums, and by those over the common length where
    there are any; no numbers (NaN) where a formula overflows.

    Args:
        name: of `FORMULAS`, or a weighted sum of such names.
        options: of the loss, by the settings' names; `nll_weight` as well.
        weight: of the pair.
    """
    places = (0, 1, 7, 8) if len(sums) > 7 else (0, 1)
    with np.errstate(all="ignore"):
        value = weight * _value(name, _stepped(sums, None), options)
        slopes = [weight * _value(name, _stepped(sums, place), options).imag / _STEP for place in places]
    return float(value.real), tuple(map(float, slopes))


def _stepped(sums: Sums, place: int | None) -> Sums:
    """Sums as complex numbers, the one at `place` with a step."""
    return tuple(
        np.complex128(one) + 1j * _STEP * (i == place) if i in (0, 1, 7, 8) else one for i, one in enumerate(sums)
    )


def coupled_values_and_gradients(
    name: str, pairs: Sequence[Sums], options: Mapping[str, Any], weights: Sequence[float]
) -> tuple[list[float], list[tuple[float, float]]]:
    """The same of all pairs of a step at once: each pair's loss, and the slopes of the sum of all losses.

    Args:
        name: as for `value_and_gradient`, a loss of `COUPLED` among them.
        weights: of the pairs.
    """

    def losses(moved: int, side: int) -> Sequence[Any]:
        steps = [(_STEP * 1j * (i == moved and side == 0), _STEP * 1j * (i == moved and side == 1)) for i in places]
        taken = [(s[0] + one, s[1] + two, *s[2:]) for s, (one, two) in zip(pairs, steps, strict=True)]
        return [weight * one for weight, one in zip(weights, _values(name, taken, options), strict=True)]

    places = range(len(pairs))
    with np.errstate(all="ignore"):
        values = [float(one.real) for one in losses(-1, 0)]
        slopes = [tuple(float(sum(losses(i, side)).imag) / _STEP for side in (0, 1)) for i in places]
    return values, [(one, two) for one, two in slopes]


def _value(name: str, sums: Any, options: Mapping[str, Any]) -> Any:
    """A weighted sum of losses."""
    return _values(name, [sums], options)[0]


def _values(name: str, pairs: Sequence[Any], options: Mapping[str, Any]) -> Sequence[Any]:
    """That of each pair."""
    totals = [np.complex128(0)] * len(pairs)
    for part in name.split(","):
        loss, _, weight = part.partition(":")
        if loss in COUPLED:
            own = COUPLED[loss](pairs, options)
        else:
            own = [FORMULAS[loss](less_length(sums, options), options) for sums in pairs]
        likely = 0 if loss in ("sft", "orpo") else options.get("nll_weight", 0)
        totals = [
            total + float(weight or 1) * (one + likely * sft(sums, options)) * of_policy(sums, options)
            for total, one, sums in zip(totals, own, pairs, strict=True)
        ]
    return totals


def less_length(s: Any, o: Mapping[str, Any]) -> Any:
    """LD-DPO: what lies beyond the common length to the power of alpha, of policy and reference."""
    if o.get("ld_alpha", 1) == 1:
        return s
    beyond = (s[0] - s[7], s[1] - s[8], s[2] - s[9], s[3] - s[10])
    return (*(front + o["ld_alpha"] * rest for front, rest in zip(s[7:11], beyond, strict=True)), *s[4:])


def of_policy(s: Any, o: Mapping[str, Any]) -> Any:
    """WPO: geometric means of p / sum p^2 over each answer, which are no function of the weights."""
    if o.get("weighting", "none") == "none":
        return 1
    return np.exp((s[0].real - s[11]) / s[4]) * np.exp((s[1].real - s[12]) / s[5])


def log_sigmoid(x: Any) -> Any:
    """log(1 / (1 + e^-x))."""
    return np.log(1 / (1 + np.exp(-x)))


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


def positive(x: Any) -> Any:
    """max(0, x)."""
    return x if x.real > 0 else 0 * x


def derivatives_of_f(sums: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """f'(u) of the two answers, f-DPO (arXiv:2309.16240), Table 1, without constants that a difference takes away."""
    chosen, rejected, ref_chosen, ref_rejected, *_ = sums
    alpha = options.get("f_alpha", 0.5)
    f = {
        "reverse_kl": lambda u: np.log(u) + 1,
        "forward_kl": lambda u: -1 / u,
        "js": lambda u: np.log(2 * u / (1 + u)),
        "alpha": lambda u: (1 - u**-alpha) / alpha,
    }[options.get("f_divergence", "reverse_kl")]
    return f(np.exp(chosen - ref_chosen)), f(np.exp(rejected - ref_rejected))


def margin(sums: Any, options: Mapping[str, Any]) -> Any:
    """d, of sums."""
    chosen, rejected = derivatives_of_f(sums, options)
    return chosen - rejected


def ratios(sums: Any) -> tuple[Any, Any]:
    """log pi / pi_ref of both answers."""
    return sums[0] - sums[2], sums[1] - sums[3]


def mean_margin(sums: Any, options: Mapping[str, Any]) -> Any:
    """d of means over the tokens; the divergences without their constants would not cancel here."""
    one = np.float64(1)
    constant = derivatives_of_f((one, one, one, one, 1, 1), options)[0]
    chosen, rejected = derivatives_of_f(sums, options)
    return (chosen - constant) / sums[4] - (rejected - constant) / sums[5]


def dpo(s: Any, o: Mapping[str, Any]) -> Any:
    """DPO, Eq. 7, with Mitchell's smoothing."""
    e, x = o["label_smoothing"], o["beta"] * margin(s, o)
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def robust(s: Any, o: Mapping[str, Any]) -> Any:
    """rDPO: the unbiased estimate of DPO's loss under flips."""
    e, x = o["label_smoothing"], o["beta"] * margin(s, o)
    return ((1 - e) * -log_sigmoid(x) - e * -log_sigmoid(-x)) / (1 - 2 * e)


def exo_pair(s: Any, o: Mapping[str, Any]) -> Any:
    """EXO-pref: KL(softmax of the pair || smoothed labels)."""
    e, x = o["label_smoothing"], o["beta"] * margin(s, o)
    q_w, q_l = np.exp(x) / (np.exp(x) + 1), 1 / (np.exp(x) + 1)
    return q_w * np.log(q_w / (1 - e)) + q_l * np.log(q_l / e)


def discopop(s: Any, o: Mapping[str, Any]) -> Any:
    """Log-ratio modulated loss."""
    x = o["beta"] * margin(s, o)
    modulation = sigmoid(x / o["discopop_tau"])
    return (1 - modulation) * -log_sigmoid(x) + modulation * np.exp(-x)


def nca_pair(s: Any, o: Mapping[str, Any]) -> Any:
    """NCA with K = 2 and rewards 1, 0."""
    r_w, r_l = (o["beta"] * ratio for ratio in ratios(s))
    return -(log_sigmoid(r_w) + log_sigmoid(-r_w) / 2 + log_sigmoid(-r_l) / 2)


def bco_pair(s: Any, o: Mapping[str, Any]) -> Any:
    """BCO, its shift 0."""
    r_w, r_l = (o["beta"] * ratio for ratio in ratios(s))
    return -log_sigmoid(r_w) - log_sigmoid(-r_l)


def sppo_hard(s: Any, o: Mapping[str, Any]) -> Any:
    """SPPO: squared distance of log-ratios to +- 1 / (2 beta)."""
    r_w, r_l = ratios(s)
    return (r_w - 1 / (2 * o["beta"])) ** 2 + (r_l + 1 / (2 * o["beta"])) ** 2


def apo_zero(s: Any, o: Mapping[str, Any]) -> Any:
    """APO-zero."""
    r_w, r_l = (o["beta"] * ratio for ratio in ratios(s))
    return -sigmoid(r_w) + sigmoid(r_l) + 1


def apo_down(s: Any, o: Mapping[str, Any]) -> Any:
    """APO-down."""
    r_w, r_l = (o["beta"] * ratio for ratio in ratios(s))
    return sigmoid(r_w) - sigmoid(r_w - r_l) + 1


def dpop(s: Any, o: Mapping[str, Any]) -> Any:
    """DPO-Positive."""
    chosen, _, ref_chosen, *_ = s
    penalty = positive(ref_chosen - chosen)
    r_w, r_l = ratios(s)
    return -log_sigmoid(o["beta"] * (r_w - r_l - o["dpop_lambda"] * penalty))


def rdpo(s: Any, o: Mapping[str, Any]) -> Any:
    """R-DPO."""
    r_w, r_l = ratios(s)
    alpha = o["length_penalty"]
    return -log_sigmoid(o["beta"] * r_w - o["beta"] * r_l + (alpha * s[4] - alpha * s[5]))


def rpo_gap(s: Any, o: Mapping[str, Any]) -> Any:
    """Reward-aware preference optimisation: KL of two Bernoulli distributions, that of the rewards first."""
    r_w, r_l = ratios(s)
    a, b = o["beta"] * r_w - o["beta"] * r_l, o["gap_scale"] * s[6]
    return sigmoid(b) * np.log(sigmoid(b) / sigmoid(a)) + sigmoid(-b) * np.log(sigmoid(-b) / sigmoid(-a))


def sft(s: Any, o: Mapping[str, Any]) -> Any:
    """Mean negative log-likelihood of a chosen token."""
    return -s[0] / s[4]


def simpo(s: Any, o: Mapping[str, Any]) -> Any:
    """SimPO."""
    return -log_sigmoid(o["beta"] / s[4] * s[0] - o["beta"] / s[5] * s[1] - o["gamma"])


def orpo(s: Any, o: Mapping[str, Any]) -> Any:
    """ORPO."""
    p_w, p_l = np.exp(s[0] / s[4]), np.exp(s[1] / s[5])
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return sft(s, o) - o["beta"] * log_sigmoid(np.log(odds_ratio))


def cpo(s: Any, o: Mapping[str, Any]) -> Any:
    """CPO's preference term."""
    e, x = o["label_smoothing"], o["beta"] * s[0] - o["beta"] * s[1]
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def _by_quantiles(better: Sequence[Any], worse: Sequence[Any], o: Mapping[str, Any]) -> Sequence[Any]:
    """AOT: the smallest of the one beside the smallest of the other, and so on; each in the place of the better one."""
    e, losses = o["label_smoothing"], [np.complex128(0)] * len(better)
    ladder = sorted(worse, key=lambda x: x.real)
    for step, place in enumerate(sorted(range(len(better)), key=lambda i: better[i].real)):
        x = o["beta"] * (better[place] - ladder[step])
        losses[place] = -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)
    return losses


def aot(pairs: Sequence[Any], o: Mapping[str, Any]) -> Sequence[Any]:
    """Paired AOT: margins of the policy over those of the reference."""
    return _by_quantiles([s[0] - s[1] for s in pairs], [np.complex128(s[2] - s[3]) for s in pairs], o)


def aot_unpaired(pairs: Sequence[Any], o: Mapping[str, Any]) -> Sequence[Any]:
    """Unpaired AOT: rewards of chosen answers over those of rejected ones."""
    return _by_quantiles([ratios(s)[0] for s in pairs], [ratios(s)[1] for s in pairs], o)


def plackett_luce(pairs: Sequence[Any], o: Mapping[str, Any]) -> Sequence[Any]:
    """Of a record's pairs (k, k + 1), best answer first: -log(e^r_k / sum over j >= k of e^r_j), r times beta."""
    losses = []
    for place, s in enumerate(pairs):
        rest = [one for one in pairs[place + 1 :] if len(s) > 13 and one[13] == s[13]]
        best = np.exp(o["beta"] * ratios(s)[0])
        others = [np.exp(o["beta"] * ratios(one)[0]) for one in rest]
        last = np.exp(o["beta"] * ratios(rest[-1] if rest else s)[1])
        losses.append(-np.log(best / (best + sum(others) + last)))
    return losses


# of all pairs of a step, or of all those of a record
COUPLED: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], Sequence[Any]]] = {
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "plackett_luce": plackett_luce,
}
FORMULAS: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "sigmoid": dpo,
    "hinge": lambda s, o: positive(1 - o["beta"] * margin(s, o)),
    "ipo": lambda s, o: (margin(s, o) - 1 / (2 * o["beta"])) ** 2,
    "robust": robust,
    "sigmoid_norm": lambda s, o: -log_sigmoid(o["beta"] * mean_margin(s, o)),
    "ipo_norm": lambda s, o: (mean_margin(s, o) - 1 / (2 * o["beta"])) ** 2,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "dpop": dpop,
    "rdpo": rdpo,
    "rpo_gap": rpo_gap,
    "sft": sft,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "slic": lambda s, o: positive(o["gamma"] - s[0] + s[1]),
}
