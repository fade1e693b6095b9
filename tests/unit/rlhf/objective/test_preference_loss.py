"""The preference loss of a run: literal values, the facts of step 0, symmetries of a margin loss, options of a loss."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simple_llama.common.errors import UserError
from simple_llama.common.settings import _settings_from_dict
from simple_llama.reinforcement_learning.rlhf.objective import preference_loss
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES, Loss
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import LossConfig, PreferenceLoss, resolved
from simple_llama.reinforcement_learning.rlhf.objective.scores import Scores, log_ratios, margin

_GENERATOR = torch.Generator().manual_seed(0)
# which swapping the sides maps to the loss of the negated margin
OF_THE_MARGIN = ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "ipo_norm", "exo_pair", "discopop"]


def pairs(*rows: tuple[float, float]) -> torch.Tensor:
    """fp64 log-prob sums (B, 2), so that literals hold to the last digit."""
    return torch.tensor(rows, dtype=torch.float64)


def scores(logps_B2: torch.Tensor, ref_B2: torch.Tensor, *counts: tuple[int, int]) -> Scores:
    """Scores of answers of one token each, or of the lengths given, with gaps of 1."""
    gaps_B = torch.ones(len(logps_B2), dtype=torch.float64)
    counts_B2 = torch.tensor(counts or [(1, 1)] * len(logps_B2))
    return Scores(logps_B2, ref_B2, counts_B2, gaps_B=gaps_B, groups_B=torch.arange(len(logps_B2)))


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "expected"),
    [
        # margin d = (-10 - -11) - (-20 - -17) = 1 - -3 = 4, beta d = 2
        ("sigmoid", 0.0, 0.1269280110429725),  # ln(1 + e^-2)
        ("sigmoid", 0.1, 0.3269280110429725),  # 0.9 ln(1 + e^-2) + 0.1 ln(1 + e^2) = ln(1 + e^-2) + 0.1 * 2
        ("hinge", 0.0, 0.0),  # max(0, 1 - 2)
        ("ipo", 0.0, 9.0),  # (4 - 1 / (2 * 0.5))^2
        ("robust", 0.0, 0.1269280110429725),  # no smoothing: that of sigmoid
        ("robust", 0.1, -0.1230719889570275),  # (0.9 L - 0.1 (L + 2)) / 0.8 = L - 0.25 with L = ln(1 + e^-2)
        # means over 2 and 4 tokens: d = (-10 - -11) / 2 - (-20 - -17) / 4 = 0.5 + 0.75, beta d = 0.625
        ("sigmoid_norm", 0.0, 0.428700678277),  # ln(1 + e^-0.625)
        ("ipo_norm", 0.0, 0.0625),  # (1.25 - 1)^2
        # r_w = 1, r_l = -3, so beta r = 0.5 and -1.5
        ("exo_pair", 0.1, 0.0019422505),  # q ln(q / 0.9) + (1 - q) ln((1 - q) / 0.1) with q = sigmoid(2) = 0.8808
        ("nca_pair", 0.0, 1.0618221153),  # ln(1 + e^-.5) + (ln(1 + e^.5) + ln(1 + e^-1.5)) / 2
        ("bco_pair", 0.0, 0.6754902622),  # ln(1 + e^-.5) + ln(1 + e^-1.5)
        ("sppo_hard", 0.0, 4.0),  # (1 - 1)^2 + (-3 + 1)^2
        ("apo_zero", 0.0, 0.5599661926),  # 1 - 0.6224593 + 0.1824255
        ("apo_down", 0.0, 0.7416622532),  # 0.6224593 + 1 - 0.8807971
        ("discopop", 0.0, 0.1353352832),  # all of it e^-2: m = sigmoid(40)
        ("dpop", 0.0, 0.1269280110429725),  # the chosen answer became likelier: DPO
        # one pair alone: each smallest is also the largest
        ("aot", 0.0, 0.1269280110429725),
        ("aot_unpaired", 0.1, 0.3269280110429725),
        ("rdpo", 0.0, 0.1293331751),  # ln(1 + e^-(2 - 0.01 * 2))
        ("rpo_gap", 0.0, 0.0826077449),  # s ln(s / q) + (1 - s) ln((1 - s) / (1 - q)), s = sigmoid(1), q = sigmoid(2)
        ("sft", 0.0, 5.0),  # 10 / 2
        ("simpo", 0.0, 1.3132616875),  # means -5 and -5: ln(1 + e^1)
        ("orpo", 0.0, 5.3465735903),  # 5 + 0.5 ln 2
        ("cpo", 0.0, 5.0067153485),  # ln(1 + e^-5) + 5
        ("slic", 0.0, 0.5),  # max(0, 1 - 10) + 0.1 * 5
    ],
)
def test_value_by_hand(loss_type: Any, label_smoothing: float, expected: float) -> None:
    """Each loss at margin 4 and beta 0.5, other options as they are by default."""
    loss = PreferenceLoss(loss_type, 0.5 if "beta" in LOSSES[loss_type].defaults else None, label_smoothing)
    assert loss(scores(pairs((-10, -20)), pairs((-11, -17)), (2, 4))).item() == pytest.approx(expected, abs=1e-10)


def test_hinge_below_its_corner() -> None:
    """Margin -4, beta 0.5: 1 + 2 = 3."""
    assert PreferenceLoss("hinge", 0.5)(scores(pairs((-4, 0)), pairs((0, 0)))).item() == 3


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 2.0])
def test_step0_values(beta: float) -> None:
    """Policy == reference: ln 2 for the sigmoids with any smoothing and divergence, 1 for hinge and apo, ..."""
    assert PreferenceLoss("robust", beta, 0.3).at_start() == pytest.approx(math.log(2), abs=1e-15)
    assert PreferenceLoss("sigmoid_norm", beta).at_start() == pytest.approx(math.log(2), abs=1e-15)
    assert PreferenceLoss("sigmoid", beta, 0.0).at_start() == pytest.approx(math.log(2), abs=1e-15)
    assert PreferenceLoss("sigmoid", beta, 0.3).at_start() == pytest.approx(math.log(2), abs=1e-15)
    assert PreferenceLoss("hinge", beta, 0.0).at_start() == 1.0
    assert PreferenceLoss("ipo", beta, 0.0).at_start() == pytest.approx(1 / (4 * beta * beta), rel=1e-15)
    assert PreferenceLoss("ipo_norm", beta, 0.0).at_start() == pytest.approx(1 / (4 * beta * beta), rel=1e-15)
    assert PreferenceLoss("sppo_hard", beta, 0.0).at_start() == pytest.approx(0.5 / beta**2, rel=1e-15)
    assert PreferenceLoss("exo_pair", beta).at_start() == pytest.approx(2.761231, abs=5e-7)
    assert PreferenceLoss("discopop", beta).at_start() == pytest.approx(0.846574, abs=5e-7)
    for name, value in (("nca_pair", 2 * math.log(2)), ("bco_pair", 2 * math.log(2)), ("dpop", math.log(2))):
        assert PreferenceLoss(name, beta).at_start() == pytest.approx(value, rel=1e-15)
    assert PreferenceLoss("apo_zero", beta).at_start() == PreferenceLoss("apo_down", beta).at_start() == 1.0
    for divergence in ("forward_kl", "js", "alpha"):
        assert PreferenceLoss("sigmoid", beta, f_divergence=divergence).at_start() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "slope"),
    [
        ("sigmoid", 0.0, -0.25),  # -beta / 2
        ("sigmoid", 0.1, -0.2),  # -beta / 2 * (1 - 2 * 0.1)
        ("hinge", 0.0, -0.5),  # -beta
        ("ipo", 0.0, -2.0),  # -1 / beta
        ("robust", 0.1, -0.3125),  # -beta / 2 / (1 - 2 * 0.1): both terms pull the same way
        ("sigmoid_norm", 0.0, -0.25),  # that of sigmoid for answers of one token
    ],
)
def test_step0_gradient(loss_type: Any, label_smoothing: float, slope: float) -> None:
    """At margin 0 and beta 0.5 the chosen side is pulled up and the rejected down, although the rewards are 0."""
    logps = pairs((-12, -34)).requires_grad_()
    loss = PreferenceLoss(loss_type, 0.5, label_smoothing)
    loss(scores(logps, logps.detach())).sum().backward()
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, pairs((slope, -slope)))
    assert torch.equal(loss.rewards(scores(logps, logps)), torch.zeros_like(logps))


@pytest.mark.parametrize("loss_type", OF_THE_MARGIN)
@given(d=st.floats(-50, 50), shift=st.integers(-300, 300), beta=st.sampled_from([0.1, 0.5, 2.0]))
def test_margin_symmetries(loss_type: Any, d: float, shift: int, beta: float) -> None:
    """Swapping the sides gives the loss of the negated margin; a constant on both log-probs changes nothing (answers of
    one token, so that means are sums)."""
    loss = PreferenceLoss(loss_type, beta)
    value = loss(scores(pairs((d, 0)), pairs((0, 0))))
    swapped = loss(scores(pairs((0, d)), pairs((0, 0))))
    torch.testing.assert_close(swapped, loss(scores(pairs((-d, 0)), pairs((0, 0)))))
    torch.testing.assert_close(loss(scores(pairs((d + shift, shift)), pairs((0, 0)))), value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss(scores(pairs((d, 0)), pairs((shift, shift)))), value, rtol=1e-9, atol=1e-9)


def test_margin_is_difference_of_rewards() -> None:
    """rewards = 0.5 * (1, -3), so their difference is beta d = 2 and the sigmoid loss its -log sigmoid."""
    loss = PreferenceLoss("sigmoid", 0.5)
    rewards = loss.rewards(scores(pairs((-10, -20)), pairs((-11, -17))))
    assert rewards.tolist() == [[0.5, -1.5]]
    value = loss(scores(pairs((-10, -20)), pairs((-11, -17)))).item()
    assert value == pytest.approx(-math.log(1 / (1 + math.exp(-2))), abs=1e-15)


def test_smoothing_changes_the_sigmoid_loss() -> None:
    """Away from margin 0, smoothing must have an effect; at margin 4 it adds e * beta d (above), so 0.2 > 0.1."""
    values = [PreferenceLoss("sigmoid", 0.5, e)(scores(pairs((4, 0)), pairs((0, 0)))).item() for e in (0.0, 0.1, 0.2)]
    assert values[0] < values[1] < values[2]


def test_one_value_a_pair() -> None:
    """Pairs do not mix: two pairs together give what each gives alone."""
    loss = PreferenceLoss("sigmoid", 0.5)
    both = loss(scores(pairs((4, 0), (0, 4)), pairs((0, 0), (0, 0))))
    torch.testing.assert_close(both, torch.tensor([0.1269280110429725, 2.1269280110429725], dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("dpo", 0.5, 0.0), "loss_type: expected one of sigmoid, hinge, ipo, robust, sigmoid_norm, .*; found 'dpo'"),
        (("sigmoid", 0.0, 0.0), "beta: .* above 0, found 0.0"),
        (("sigmoid", -1.0, 0.0), "beta: .* found -1.0"),
        (("sigmoid", math.nan, 0.0), "beta: .* found nan"),
        (("sigmoid", math.inf, 0.0), "beta: .* found inf"),
        (("sigmoid", 0.5, 0.5), "label_smoothing: .* below 0.5, found 0.5"),
        (("sigmoid", 0.5, -0.1), "label_smoothing: .* found -0.1"),
        (("sigmoid", 0.5, math.nan), "label_smoothing: .* found nan"),
        (("ipo", 0.5, 0.1), "label_smoothing: expected 0 with loss_type 'ipo', which ignores it, found 0.1"),
        (("hinge", 0.5, 0.1), "label_smoothing: expected 0 with loss_type 'hinge'"),
        (("sigmoid_norm", 0.5, 0.1), "use one of sigmoid, robust, exo_pair, aot, aot_unpaired, cpo or leave it out"),
        (("exo_pair", 0.5, 0.0), "label_smoothing: expected a number above 0 with loss_type 'exo_pair', found 0"),
        (("slic", 0.5, None), "beta: expected none with loss_type 'slic', which ignores it, found 0.5; use one of sig"),
        (("sft", None, None, 0.5), "nll_weight: expected 0 with loss_type 'sft', which ignores it"),
        (("simpo", None, None, None, "js"), "f_divergence: expected reverse_kl with loss_type 'simpo'"),
        (("sigmoid", None, None, None, "js", 0.5), "f_alpha: expected f_divergence 'alpha' with it, found 'js'"),
        (("sigmoid:0", None, None), "loss_type: expected a finite weight above 0 behind sigmoid:, found 'sigmoid:0'"),
        (("sigmoid:inf,sft", None, None), "loss_type: expected a finite weight above 0 behind sigmoid:"),
        (("sigmoid:1,sft:x", None, None), "loss_type: expected a finite weight above 0 behind sft:, found 'sft:x'"),
        (("sft,sft", None, None), "loss_type: expected each loss once, found sft twice"),
        (("sigmoid,", None, None), "loss_type: expected one of .*; found ''"),
        (("sigmoid,sft", None, None, None, None, None, 1.0), "gamma: expected none with loss_type 'sigmoid,sft'"),
    ],
)
def test_bad_settings_are_refused(settings: tuple[Any, ...], named: str) -> None:
    """The message names the field, what was expected and what was found."""
    with pytest.raises(UserError, match=named):
        PreferenceLoss(*settings)


# === a loss is a function and a line ===


def test_robust_is_right_in_the_mean() -> None:
    """Of labels swapped with probability e, the mean of the loss is that of the true ones (arXiv:2403.00409, Lemma):
    (1 - e) l(d) + e l(-d) = -log sigmoid(beta d), here for e = 0.2 and three margins."""
    loss, plain = PreferenceLoss("robust", 0.5, 0.2), PreferenceLoss("sigmoid", 0.5)
    true, swapped = pairs((4, 0), (-1, 0), (0, 2)), pairs((0, 4), (0, -1), (2, 0))
    zeros = torch.zeros_like(true)
    mean = 0.8 * loss(scores(true, zeros)) + 0.2 * loss(scores(swapped, zeros))
    torch.testing.assert_close(mean, plain(scores(true, zeros)))


def test_normalised_sigmoid_does_not_see_length() -> None:
    """The same mean log-ratios over 3 and 5 tokens and over 30 and 50: one value; sums would differ tenfold."""
    loss, zeros = PreferenceLoss("sigmoid_norm", 2.0), pairs((0, 0))
    short = loss(scores(pairs((3, 10)), zeros, (3, 5)))
    assert short.item() == loss(scores(pairs((30, 100)), zeros, (30, 50))).item()
    assert short.item() == pytest.approx(math.log1p(math.exp(2.0)))  # d = 1 - 2


def test_settings_of_losses_are_their_signatures() -> None:
    """Each option of a loss is a field of LossConfig, unset by default, and each field but loss_type is an option of
    some loss; a loss has a default for each."""
    fields = {field.name: field for field in dataclasses.fields(LossConfig)}
    found = {name for loss in LOSSES.values() for name in loss.defaults}
    assert found == fields.keys() - {"loss_type"}
    assert {fields[name].default for name in found} == {None}
    assert all(value is not None and value == value for loss in LOSSES.values() for value in loss.defaults.values())
    hints = get_type_hints(LossConfig, include_extras=True)
    assert all(get_args(hints[name])[-1].documentation for name in fields)


@pytest.mark.parametrize("loss_type", [*LOSSES, "simpo:0.5,sft", "sigmoid:0.8,bco_pair:0.2,sft:1"])
def test_what_a_loss_reads_is_what_it_says(loss_type: Any) -> None:
    """With None in the place of all else it works, rewards too; without any one of its fields it does not. Only a loss
    that reads a reference needs one."""
    loss, whole = PreferenceLoss(loss_type), scores(pairs((-1, -2)), pairs((-3, -5)), (2, 3))
    names = [field.name for field in dataclasses.fields(Scores)]
    only: dict[str, Any] = {name: getattr(whole, name) if name in loss.reads else None for name in names}
    assert loss(Scores(**only)) == loss(whole)
    assert loss.rewards(Scores(**only)).shape == (1, 2)
    for name in loss.reads:
        with pytest.raises((AssertionError, AttributeError, TypeError)):
            loss(dataclasses.replace(whole, **{name: None}))
        with pytest.raises(UserError, match=f"loss_type '{loss_type}' reads {name}, which this run does not give"):
            loss.require(loss.reads - {name})
    loss.require(loss.reads)
    assert loss.needs_reference == (loss_type.split(":")[0] not in ("sft", "simpo", "orpo", "cpo", "slic"))


@pytest.mark.parametrize("loss_type", [name for name, loss in LOSSES.items() if not loss.couples])
def test_each_pair_has_its_own_loss(loss_type: Any) -> None:
    """The head asks for a few pairs at a time: a part of a batch, and another order, give the same losses."""
    logps, ref = -30 * torch.rand(2, 5, 2, dtype=torch.float64)
    counts, weights, gaps = torch.randint(1, 9, (5, 2)), *torch.rand(2, 5, dtype=torch.float64)
    loss, whole = PreferenceLoss(loss_type), Scores(logps, ref, counts, weights, gaps, groups_B=torch.arange(5))
    assert torch.equal(loss(whole.map(lambda part: part[1:3])), loss(whole)[1:3])
    assert torch.equal(loss(whole.map(lambda part: part.flip(0))), loss(whole).flip(0))


@pytest.mark.parametrize("loss_type", [*LOSSES, "sigmoid:0.8,bco_pair:0.2,sft:1"])
def test_a_weight_multiplies_the_loss_of_its_pair(loss_type: str) -> None:
    """Of each loss, its likelihood term too, and so its gradient; rewards stay. A weight of 1 changes no bit."""
    loss, whole = PreferenceLoss(loss_type), scores(pairs((-10, -20), (-3, -4)), pairs((-11, -17), (-2, -5)))
    weights = torch.tensor([0.5, 3.0])
    weighted = dataclasses.replace(whole, weights_B=weights)
    torch.testing.assert_close(loss(weighted), weights.double() * loss(whole), rtol=1e-15, atol=0)
    assert torch.equal(loss.rewards(weighted), loss.rewards(whole))
    assert torch.equal(loss(dataclasses.replace(whole, weights_B=torch.ones(2))), loss(whole))


def test_a_new_loss_is_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A squared margin put into the table: chosen by its name, with its own first value and default, and without
    smoothing."""

    def squared_loss(scores: Scores, *, beta: float = 0.5) -> torch.Tensor:
        return (1 - beta * margin(log_ratios(scores))) ** 2

    monkeypatch.setitem(preference_loss.LOSSES, "squared", Loss(squared_loss, ("logps_B2", "ref_B2")))
    loss = PreferenceLoss("squared")
    assert loss.at_start() == 1.0 and loss(scores(pairs((4, 0)), pairs((0, 0)))).item() == 1.0  # (1 - 0.5 * 4)^2
    with pytest.raises(UserError, match="label_smoothing: expected 0 with loss_type 'squared'"):
        PreferenceLoss("squared", 0.5, 0.1)


# === options ===


def test_an_option_that_is_not_given_is_the_losss_own() -> None:
    """exo_pair smooths by 1e-3 and simpo has a beta of 2, unless they are told otherwise; the text of a run says what
    is taken, and so do its settings."""
    assert str(PreferenceLoss("simpo")) == "simpo (beta 2.0, gamma 1.0, nll_weight 0.0)"
    assert str(PreferenceLoss("sigmoid:0.8,sft", 0.1)) == (
        "0.8 sigmoid (beta 0.1, label_smoothing 0.0, f_divergence reverse_kl, nll_weight 0.0) + sft"
    )
    full = resolved(LossConfig("exo_pair", f_divergence="alpha"))
    assert (full.beta, full.label_smoothing, full.f_alpha, full.nll_weight, full.gamma) == (0.1, 1e-3, 0.5, 0.0, None)
    assert resolved(LossConfig("exo_pair")).f_alpha is None
    # two losses of a sum whose defaults differ keep them
    both = resolved(LossConfig("simpo,sigmoid"))
    loss = PreferenceLoss.of(both)
    assert both.beta is None and "beta 2.0" in str(loss) and "beta 0.5" in str(loss)
    assert (loss.scale, PreferenceLoss("sft").scale) == (2.0, 1.0)


@pytest.mark.parametrize("loss_type", [*LOSSES, "simpo,sigmoid", "sigmoid:0.8,bco_pair:0.2,sft:1"])
def test_settings_of_a_run_are_taken_back(loss_type: str) -> None:
    """What a run writes out, through JSON, is the same loss and is written out as it was; so is that of a run of
    before, which wrote a smoothing of 0 for each loss, and what does nothing does not have to be taken out of it when
    the loss becomes another one."""
    full = resolved(LossConfig(loss_type))
    back = _settings_from_dict(LossConfig, json.loads(json.dumps(dataclasses.asdict(full))), "config.json")
    assert back == full == resolved(back) and str(PreferenceLoss.of(back)) == str(PreferenceLoss(loss_type))
    for old in ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"):
        before = {"loss_type": old, "beta": 0.5, "label_smoothing": 0.0}
        found = resolved(_settings_from_dict(LossConfig, before, "config.json"))
        assert before.items() <= dataclasses.asdict(found).items()
    if loss_type in LOSSES and "beta" in LOSSES[loss_type].defaults and loss_type != "exo_pair":
        of_sigmoid = dataclasses.asdict(resolved(LossConfig("sigmoid")))
        assert PreferenceLoss(**{**of_sigmoid, "loss_type": loss_type}).beta == 0.5


def test_a_weighted_sum_is_the_sum() -> None:
    """MPO: 0.8 DPO + 0.2 BCO + SFT of each pair; rewards are those of the first."""
    whole = scores(pairs((-10, -20), (-3, -4)), pairs((-11, -17), (-2, -5)), (2, 4), (3, 1))
    mixed = PreferenceLoss("sigmoid:0.8,bco_pair:0.2,sft:1", 0.5)
    parts = [PreferenceLoss(name, beta)(whole) for name, beta in (("sigmoid", 0.5), ("bco_pair", 0.5), ("sft", None))]
    torch.testing.assert_close(mixed(whole), 0.8 * parts[0] + 0.2 * parts[1] + parts[2])
    assert torch.equal(mixed.rewards(whole), PreferenceLoss("sigmoid", 0.5).rewards(whole))


def test_the_likelihood_term() -> None:
    """RPO: DPO and 0.2 of the chosen answer's negative log-likelihood a token, 10 / 2 = 5. It depends on the pair, so
    no constant is foretold; from the reference's sums it is."""
    whole = scores(pairs((-10, -20)), pairs((-11, -17)), (2, 4))
    loss = PreferenceLoss("sigmoid", 0.5, nll_weight=0.2)
    assert loss(whole).item() == pytest.approx(0.1269280110429725 + 0.2 * 5)
    assert loss.at_start() is None and loss.reads == {"logps_B2", "ref_B2", "counts_B2"}
    sums, counts = torch.tensor([[-11.0, -17.0], [-4.0, -1.0]]), torch.tensor([[2, 4], [4, 1]])
    assert loss.foretold(sums, counts) == pytest.approx(math.log(2) + 0.2 * (5.5 + 1) / 2, abs=1e-15)
    longer = PreferenceLoss("rdpo", 0.5, length_penalty=0.5)
    assert longer.foretold(sums, counts) == pytest.approx((math.log1p(math.e) + math.log1p(math.exp(-1.5))) / 2)
    weights = torch.tensor([2.0, 1.0])  # of the two pairs' likelihoods of 5.5 and 1
    assert loss.foretold(sums, counts, weights) == pytest.approx((3 * math.log(2) + 0.2 * (2 * 5.5 + 1)) / 2, abs=1e-15)


def test_a_gap_is_the_margin_that_is_asked_for() -> None:
    """The loss is 0 and flat where beta d = eta gap, which may be negative; at log-ratios of 0 it pulls by the gap:
    -beta (sigmoid(eta gap) - 1 / 2)."""
    loss = PreferenceLoss("rpo_gap", 0.5, gap_scale=2.0)
    logps = pairs((-8, -20), (-14, -20), (0, 0)).requires_grad_()
    ref, gaps = pairs((-11, -17), (-11, -21), (0, 0)), torch.tensor([1.5, -1.0, 0.75], dtype=torch.float64)
    losses = loss(Scores(logps, ref, gaps_B=gaps))  # d = 6, -4, 0: beta d = 3, -2, 0
    losses.sum().backward()
    assert losses[:2].abs().max() < 1e-15 and logps.grad is not None and logps.grad[:2].abs().max() < 1e-15
    slope = -0.5 * (1 / (1 + math.exp(-1.5)) - 0.5)
    assert logps.grad[2].tolist() == pytest.approx([slope, -slope])
    told = loss.foretold(pairs((-11, -17)), torch.ones(1, 2), gaps_B=gaps[2:])
    assert told == pytest.approx(losses[2].item()) and loss.at_start() is None


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_first_value_is_a_constant_where_it_says_so(loss_type: str) -> None:
    """With log-ratios of 0: the same for all sums and counts where `of_ratios` says so, and there alone."""
    loss, generator = PreferenceLoss(loss_type, nll_weight=0 if LOSSES[loss_type].nll_weight else None), _GENERATOR
    sums = -30 * torch.rand(20, 2, dtype=torch.float64, generator=generator)
    gaps = torch.rand(20, dtype=torch.float64, generator=generator)
    counts, groups = torch.randint(1, 9, (20, 2), generator=generator), torch.arange(20) // 3
    values = loss(Scores(sums, sums, counts, gaps_B=gaps, groups_B=groups))
    first = loss.at_start()
    assert (first is not None) == LOSSES[loss_type].of_ratios
    assert bool((values - (first or values[0])).abs().max() < 1e-12) == (first is not None)


# === rewards ===


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("ipo", [0.5, -1.5]),  # 0.5 * (1, -3)
        ("sppo_hard", [0.5, -1.5]),
        ("rdpo", [0.52, -1.46]),  # and 0.01 a token
        ("sft", [-5.0, -5.0]),  # log pi a token
        ("simpo", [-2.5, -2.5]),
        ("orpo", [-2.5, -2.5]),
        ("cpo", [-5.0, -10.0]),
        ("slic", [-10.0, -20.0]),
    ],
)
def test_rewards_by_hand(loss_type: str, expected: list[float]) -> None:
    """What each paper has as the reward, at beta 0.5."""
    loss = PreferenceLoss(loss_type, 0.5 if "beta" in LOSSES[loss_type].defaults else None)
    rewards = loss.rewards(scores(pairs((-10, -20)), pairs((-11, -17)), (2, 4)))
    torch.testing.assert_close(rewards, pairs((expected[0], expected[1])))


def test_rewards_of_another_divergence() -> None:
    """beta f'(u): with the forward KL 1 - 1 / u, for u = e and e^-3; 0 at the start with each."""
    loss = PreferenceLoss("sigmoid", 0.5, f_divergence="forward_kl")
    rewards = loss.rewards(scores(pairs((-10, -20)), pairs((-11, -17))))
    torch.testing.assert_close(rewards, pairs((0.5 * (1 - math.exp(-1)), 0.5 * (1 - math.exp(3)))))
    for name in ("forward_kl", "js", "alpha"):
        at_start = PreferenceLoss("sigmoid", f_divergence=name).rewards(scores(pairs((-1, -2)), pairs((-1, -2))))
        assert at_start.abs().max() < 1e-15


def test_ipo_of_sums_beside_ipo_of_means() -> None:
    """What settings.md says of other trainers' ipo: with n = 4 tokens on both sides, theirs at beta 0.5 is ours at
    0.125, over 16. At d = 4: (4 / 4 - 1)^2 = 0 = (4 - 4)^2 / 16; at d = 8: (8 / 4 - 1)^2 = 1 = (8 - 4)^2 / 16."""
    for d, theirs in ((4.0, 0.0), (8.0, 1.0)):
        whole = scores(pairs((d - 2, -2)), pairs((-2, -2)), (4, 4))
        assert (d / 4 - 1 / (2 * 0.5)) ** 2 == theirs
        assert PreferenceLoss("ipo", beta=0.125)(whole).item() / 16 == theirs
