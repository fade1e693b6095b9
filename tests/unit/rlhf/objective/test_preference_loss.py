"""Preference losses against literal values, the facts of step 0, and the symmetries of a margin loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss, step0_loss

ZEROS_12 = torch.zeros(1, 2)


def pairs(*rows: tuple[float, float]) -> torch.Tensor:
    """fp64 log-prob sums (B, 2), so that literals hold to the last digit."""
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "expected"),
    [
        # margin d = (-10 - -11) - (-20 - -17) = 1 - -3 = 4, beta d = 2
        ("sigmoid", 0.0, 0.1269280110429725),  # ln(1 + e^-2)
        ("sigmoid", 0.1, 0.3269280110429725),  # 0.9 ln(1 + e^-2) + 0.1 ln(1 + e^2) = ln(1 + e^-2) + 0.1 * 2
        ("hinge", 0.0, 0.0),  # max(0, 1 - 2)
        ("ipo", 0.0, 9.0),  # (4 - 1 / (2 * 0.5))^2
    ],
)
def test_value_by_hand(loss_type: str, label_smoothing: float, expected: float) -> None:
    """Each loss at margin 4 and beta 0.5."""
    loss = PreferenceLoss(loss_type, 0.5, label_smoothing)
    assert loss(pairs((-10, -20)), pairs((-11, -17))).item() == pytest.approx(expected, abs=1e-15)


def test_hinge_below_its_corner() -> None:
    """Margin -4, beta 0.5: 1 + 2 = 3."""
    assert PreferenceLoss("hinge", 0.5)(pairs((-4, 0)), pairs((0, 0))).item() == 3


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 2.0])
def test_step0_values(beta: float) -> None:
    """Policy == reference: ln 2 for sigmoid with any smoothing, 1 for hinge, 1 / (4 beta^2) for ipo."""
    assert step0_loss("sigmoid", beta, 0.0) == pytest.approx(math.log(2), abs=1e-15)
    assert step0_loss("sigmoid", beta, 0.3) == pytest.approx(math.log(2), abs=1e-15)
    assert step0_loss("hinge", beta, 0.0) == 1.0
    assert step0_loss("ipo", beta, 0.0) == pytest.approx(1 / (4 * beta * beta), rel=1e-15)


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "slope"),
    [
        ("sigmoid", 0.0, -0.25),  # -beta / 2
        ("sigmoid", 0.1, -0.2),  # -beta / 2 * (1 - 2 * 0.1)
        ("hinge", 0.0, -0.5),  # -beta
        ("ipo", 0.0, -2.0),  # -1 / beta
    ],
)
def test_step0_gradient(loss_type: str, label_smoothing: float, slope: float) -> None:
    """At margin 0 and beta 0.5 the chosen side is pulled up and the rejected down, although the rewards are 0."""
    logps = pairs((-12, -34)).requires_grad_()
    loss = PreferenceLoss(loss_type, 0.5, label_smoothing)
    loss(logps, logps.detach()).sum().backward()
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, pairs((slope, -slope)))
    assert torch.equal(loss.rewards(logps, logps), torch.zeros_like(logps))


@pytest.mark.parametrize("loss_type", LOSSES)
@given(margin=st.floats(-50, 50), shift=st.integers(-300, 300), beta=st.sampled_from([0.1, 0.5, 2.0]))
def test_margin_symmetries(loss_type: str, margin: float, shift: int, beta: float) -> None:
    """Swapping the sides gives the loss of the negated margin; a constant on both log-probs changes nothing."""
    loss = PreferenceLoss(loss_type, beta)
    value = loss(pairs((margin, 0)), pairs((0, 0)))
    swapped = loss(pairs((0, margin)), pairs((0, 0)))
    torch.testing.assert_close(swapped, LOSSES[loss_type](torch.tensor([-margin], dtype=torch.float64), beta=beta))
    torch.testing.assert_close(loss(pairs((margin + shift, shift)), pairs((0, 0))), value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss(pairs((margin, 0)), pairs((shift, shift))), value, rtol=1e-9, atol=1e-9)


def test_margin_is_difference_of_rewards() -> None:
    """rewards = 0.5 * (1, -3), so their difference is beta d = 2 and the sigmoid loss its -log sigmoid."""
    loss = PreferenceLoss("sigmoid", 0.5)
    rewards = loss.rewards(pairs((-10, -20)), pairs((-11, -17)))
    assert rewards.tolist() == [[0.5, -1.5]]
    value = loss(pairs((-10, -20)), pairs((-11, -17))).item()
    assert value == pytest.approx(-math.log(1 / (1 + math.exp(-2))), abs=1e-15)


def test_smoothing_changes_the_sigmoid_loss() -> None:
    """Away from margin 0, smoothing must have an effect; at margin 4 it adds e * beta d (above), so 0.2 > 0.1."""
    values = [PreferenceLoss("sigmoid", 0.5, e)(pairs((4, 0)), pairs((0, 0))).item() for e in (0.0, 0.1, 0.2)]
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
def test_extreme_log_ratios_stay_finite(loss_type: str, label_smoothing: float, log_ratio: float) -> None:
    """fp32 log-ratios of +-1000 on both sides (margin +-2000): finite loss and gradient."""
    if label_smoothing and loss_type != "sigmoid":
        label_smoothing = 0.0
    logps = torch.tensor([[log_ratio, -log_ratio]], requires_grad=True)
    loss = PreferenceLoss(loss_type, 0.5, label_smoothing)(logps, ZEROS_12)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss).all()
    assert logps.grad is not None and torch.isfinite(logps.grad).all()
    if log_ratio < 0:
        assert loss.item() >= 900 and logps.grad[0, 0] <= -0.25  # a hopeless pair still pulls


def test_one_value_a_pair() -> None:
    """Pairs do not mix: two pairs together give what each gives alone."""
    loss = PreferenceLoss("sigmoid", 0.5)
    both = loss(pairs((4, 0), (0, 4)), pairs((0, 0), (0, 0)))
    torch.testing.assert_close(both, torch.tensor([0.1269280110429725, 2.1269280110429725], dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("dpo", 0.5, 0.0), "loss_type: expected one of sigmoid, hinge, ipo; found 'dpo'"),
        (("sigmoid", 0.0, 0.0), "beta: .* above 0, found 0.0"),
        (("sigmoid", -1.0, 0.0), "beta: .* found -1.0"),
        (("sigmoid", math.nan, 0.0), "beta: .* found nan"),
        (("sigmoid", math.inf, 0.0), "beta: .* found inf"),
        (("sigmoid", 0.5, 0.5), "label_smoothing: .* below 0.5, found 0.5"),
        (("sigmoid", 0.5, -0.1), "label_smoothing: .* found -0.1"),
        (("sigmoid", 0.5, math.nan), "label_smoothing: .* found nan"),
        (("ipo", 0.5, 0.1), "label_smoothing: expected 0 with loss_type 'ipo', which ignores it, found 0.1"),
        (("hinge", 0.5, 0.1), "label_smoothing: expected 0 with loss_type 'hinge'"),
    ],
)
def test_bad_settings_are_refused(settings: tuple[str, float, float], named: str) -> None:
    """The message names the field, what was expected and what was found."""
    with pytest.raises(UserError, match=named):
        PreferenceLoss(*settings)
