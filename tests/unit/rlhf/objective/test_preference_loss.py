"""Preference losses against literal values, the facts of step 0, and the symmetries of a margin loss."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.objective import losses, preference_loss
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES, Loss, Scores, _margin
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import LossConfig, PreferenceLoss, options

ZEROS_12 = torch.zeros(1, 2)
SMOOTHED = [name for name, loss in LOSSES.items() if "label_smoothing" in options(loss)]


def pairs(*rows: tuple[float, float]) -> torch.Tensor:
    """fp64 log-prob sums (B, 2), so that literals hold to the last digit."""
    return torch.tensor(rows, dtype=torch.float64)


def scores(logps_B2: torch.Tensor, ref_B2: torch.Tensor, *counts: tuple[int, int]) -> Scores:
    """Scores of answers of one token each, or of the lengths given."""
    return Scores(logps_B2, ref_B2, torch.tensor(counts or [(1, 1)] * len(logps_B2)))


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
    ],
)
def test_value_by_hand(loss_type: Any, label_smoothing: float, expected: float) -> None:
    """Each loss at margin 4 and beta 0.5."""
    loss = PreferenceLoss(loss_type, 0.5, label_smoothing)
    assert loss(scores(pairs((-10, -20)), pairs((-11, -17)), (2, 4))).item() == pytest.approx(expected, abs=1e-10)


def test_hinge_below_its_corner() -> None:
    """Margin -4, beta 0.5: 1 + 2 = 3."""
    assert PreferenceLoss("hinge", 0.5)(scores(pairs((-4, 0)), pairs((0, 0)))).item() == 3


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 2.0])
def test_step0_values(beta: float) -> None:
    """Policy == reference: ln 2 for the sigmoids with any smoothing, 1 for hinge, 1 / (4 beta^2) for ipo."""
    assert PreferenceLoss("robust", beta, 0.3).at_start() == pytest.approx(math.log(2), abs=1e-15)
    assert PreferenceLoss("sigmoid_norm", beta).at_start() == pytest.approx(math.log(2), abs=1e-15)
    assert PreferenceLoss("sigmoid", beta, 0.0).at_start() == pytest.approx(math.log(2), abs=1e-15)
    assert PreferenceLoss("sigmoid", beta, 0.3).at_start() == pytest.approx(math.log(2), abs=1e-15)
    assert PreferenceLoss("hinge", beta, 0.0).at_start() == 1.0
    assert PreferenceLoss("ipo", beta, 0.0).at_start() == pytest.approx(1 / (4 * beta * beta), rel=1e-15)


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


@pytest.mark.parametrize("loss_type", LOSSES)
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


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
def test_extreme_log_ratios_stay_finite(loss_type: Any, label_smoothing: float, log_ratio: float) -> None:
    """fp32 log-ratios of +-1000 on both sides (margin +-2000): finite loss and gradient."""
    if loss_type not in SMOOTHED:
        label_smoothing = 0.0
    logps = torch.tensor([[log_ratio, -log_ratio]], requires_grad=True)
    loss = PreferenceLoss(loss_type, 0.5, label_smoothing)(scores(logps, ZEROS_12))
    loss.sum().backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss).all()
    assert logps.grad is not None and torch.isfinite(logps.grad).all()
    if log_ratio < 0:
        assert loss.item() >= 900 and logps.grad[0, 0] <= -0.25  # a hopeless pair still pulls


def test_one_value_a_pair() -> None:
    """Pairs do not mix: two pairs together give what each gives alone."""
    loss = PreferenceLoss("sigmoid", 0.5)
    both = loss(scores(pairs((4, 0), (0, 4)), pairs((0, 0), (0, 0))))
    torch.testing.assert_close(both, torch.tensor([0.1269280110429725, 2.1269280110429725], dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("dpo", 0.5, 0.0), "loss_type: expected one of sigmoid, hinge, ipo, robust, sigmoid_norm; found 'dpo'"),
        (("sigmoid", 0.0, 0.0), "beta: .* above 0, found 0.0"),
        (("sigmoid", -1.0, 0.0), "beta: .* found -1.0"),
        (("sigmoid", math.nan, 0.0), "beta: .* found nan"),
        (("sigmoid", math.inf, 0.0), "beta: .* found inf"),
        (("sigmoid", 0.5, 0.5), "label_smoothing: .* below 0.5, found 0.5"),
        (("sigmoid", 0.5, -0.1), "label_smoothing: .* found -0.1"),
        (("sigmoid", 0.5, math.nan), "label_smoothing: .* found nan"),
        (("ipo", 0.5, 0.1), "label_smoothing: expected 0 with loss_type 'ipo', which ignores it, found 0.1"),
        (("hinge", 0.5, 0.1), "label_smoothing: expected 0 with loss_type 'hinge'"),
        (("sigmoid_norm", 0.5, 0.1), "use one of sigmoid, robust or leave it out"),
    ],
)
def test_bad_settings_are_refused(settings: tuple[Any, float, float], named: str) -> None:
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
    """Each option of a loss is a field of LossConfig with the same bounds, help and default, and each field but
    loss_type is an option of some loss; the names that loss_type may have are those of LOSSES."""
    fields = {field.name: field for field in dataclasses.fields(LossConfig)}
    hints, found = get_type_hints(LossConfig, include_extras=True), {"loss_type"}
    for loss in LOSSES.values():
        signature = inspect.signature(loss.function)
        assert [name for name in signature.parameters if name not in options(loss)] == ["scores"]
        for name in options(loss):
            assert get_type_hints(loss.function, include_extras=True)[name] == hints[name]
            assert signature.parameters[name].default in (fields[name].default, inspect.Parameter.empty)
            assert len(get_args(hints[name])) == 3, "a type, its bounds and its help"
            found.add(name)
    assert found == fields.keys()
    assert get_args(get_type_hints(LossConfig)["loss_type"]) == tuple(LOSSES)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_a_loss_reads_is_what_it_says(loss_type: Any) -> None:
    """With None in the place of all else it works; without any one of its fields it does not."""
    loss, whole = PreferenceLoss(loss_type), scores(pairs((-1, -2)), pairs((-3, -5)), (2, 3))
    names = [field.name for field in dataclasses.fields(Scores)]
    reads = LOSSES[loss_type].reads
    only: dict[str, Any] = {name: getattr(whole, name) if name in reads else None for name in names}
    assert loss(Scores(**only)) == loss(whole)
    for name in reads:
        with pytest.raises((AssertionError, TypeError)):
            loss(dataclasses.replace(whole, **{name: None}))
    loss.require(reads)
    with pytest.raises(UserError, match=f"loss_type '{loss_type}' reads {reads[-1]}, which this run does not give"):
        loss.require(reads[:-1])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_pair_has_its_own_loss(loss_type: Any) -> None:
    """The head asks for a few pairs at a time: a part of a batch, and another order, give the same losses."""
    logps, ref = -30 * torch.rand(2, 5, 2, dtype=torch.float64)
    counts = torch.randint(1, 9, (5, 2))
    loss = PreferenceLoss(loss_type)
    whole = loss(Scores(logps, ref, counts))
    assert torch.equal(loss(Scores(logps[1:3], ref[1:3], counts[1:3])), whole[1:3])
    assert torch.equal(loss(Scores(logps.flip(0), ref.flip(0), counts.flip(0))), whole.flip(0))


def test_a_new_loss_is_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A squared margin put into the table: chosen by its name, with its own first value, and without smoothing."""

    def squared_loss(scores: Scores, *, beta: losses.Beta) -> torch.Tensor:
        return (1 - beta * _margin(scores)) ** 2

    squared: Any = "squared"
    monkeypatch.setitem(preference_loss.LOSSES, squared, Loss(squared_loss, ("logps_B2", "ref_B2")))
    loss = PreferenceLoss(squared, 0.5)
    assert loss.at_start() == 1.0 and loss(scores(pairs((4, 0)), pairs((0, 0)))).item() == 1.0  # (1 - 0.5 * 4)^2
    monkeypatch.setitem(preference_loss.LOSSES, squared, Loss(squared_loss, ("logps_B2",)))
    assert loss.at_start() is None  # of a loss without a reference nothing can be said beforehand
    with pytest.raises(UserError, match="label_smoothing: expected 0 with loss_type 'squared'"):
        PreferenceLoss(squared, 0.5, 0.1)


def test_ipo_of_sums_beside_ipo_of_means() -> None:
    """What settings.md says of other trainers' ipo: with n = 4 tokens on both sides, theirs at beta 0.5 is ours at
    0.125, over 16. At d = 4: (4 / 4 - 1)^2 = 0 = (4 - 4)^2 / 16; at d = 8: (8 / 4 - 1)^2 = 1 = (8 - 4)^2 / 16."""
    for d, theirs in ((4.0, 0.0), (8.0, 1.0)):
        whole = scores(pairs((d - 2, -2)), pairs((-2, -2)), (4, 4))
        assert (d / 4 - 1 / (2 * 0.5)) ** 2 == theirs
        assert PreferenceLoss("ipo", beta=0.125)(whole).item() / 16 == theirs
