"""The search for the largest batch, and the settings of a dry run."""

from __future__ import annotations

import pytest

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.foretell.fit import ForetellConfig, largest_that_fits


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100])
def test_the_largest_of_all_that_fit(most: int) -> None:
    """Against the search through all numbers, for every limit; it is asked about few, and never beyond `most`."""
    for limit in range(most + 3):
        asked: list[int] = []

        def fits(size: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(size)
            return size <= limit

        assert largest_that_fits(fits, most) == min(limit, most)
        assert len(asked) <= 2 * most.bit_length() + 1 and set(asked) <= set(range(1, most + 1))


def test_more_memory_never_holds_less() -> None:
    """Monotone, also for a size that jumps."""
    sizes = [1.0, 1.5, 1.6, 4.0, 4.1, 9.0]
    found = [largest_that_fits(lambda n, room=room: sizes[n - 1] <= room, 6) for room in (0.5, 1, 1.5, 2, 4, 5, 10)]
    assert found == [0, 1, 2, 3, 4, 5, 6]


def test_without_a_dry_run_both_are_refused() -> None:
    """They would change nothing."""
    assert ForetellConfig(dry_run=True, probe=True, fit_gb=24.0).fit_gb == 24
    with pytest.raises(UserError, match="probe: expected --dry_run beside it"):
        DPOConfig(probe=True)
    with pytest.raises(UserError, match="fit_gb: expected --dry_run beside it"):
        DPOConfig(fit_gb=24.0)
    with pytest.raises(UserError, match="fit_gb: expected a number of at least 0"):
        ForetellConfig(dry_run=True, fit_gb=-1.0)
