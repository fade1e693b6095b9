"""The comparison of both sides' numbers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.agreement import Computed, differences
from simple_llama.common.errors import UserError

ONE = Computed(torch.tensor([[-10.0, -20.0]]), torch.tensor(0.5), {"w": torch.tensor([3.0, 4.0])})


def test_differences_by_hand() -> None:
    """0.2 of 20; 0.1 of 0.4; (0, 0.5) of a gradient of norm 5."""
    other = Computed(torch.tensor([[-10.0, -20.2]]), torch.tensor(0.4), {"w": torch.tensor([3.0, 4.5])})
    found = differences(other, ONE)
    assert found["log-probs"] == pytest.approx(0.01, rel=1e-4)
    assert found["loss"] == pytest.approx(0.2, rel=1e-4)
    assert found["gradient of w"] == pytest.approx(0.1, rel=1e-4)
    assert set(differences(ONE, ONE).values()) == {0.0}


def test_a_missing_gradient_is_an_error() -> None:
    """A parameter without a gradient on one side must not go unseen."""
    with pytest.raises(UserError, match="'w'"):
        differences(ONE, ONE._replace(gradients={}))
