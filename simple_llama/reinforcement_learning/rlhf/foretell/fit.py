"""The settings of a dry run, and the largest micro-batch that a given memory holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.settings import Bounds, Settings


@dataclass(frozen=True)
class ForetellConfig(Settings):
    """What is said of a run before it starts."""

    # === Dry run ===
    dry_run: bool = False  # print what would be done, and end
    probe: Annotated[
        bool,
        Doc("with dry_run: measure passes of the largest micro-batch on the start weights, beside the arithmetic"),
    ] = False
    fit_gb: Annotated[
        float,
        Bounds(0.0, math.inf, below=True),
        Doc(
            "with dry_run: say the largest batch_size, or rows_per_micro_batch where it is set, whose rank takes at "
            "most so many GiB; 0: do not look for it"
        ),
    ] = 0.0

    def check_rules(self) -> None:
        """UserError for what has an effect in a dry run alone."""
        for name in ("probe", "fit_gb"):
            if getattr(self, name) and not self.dry_run:
                raise UserError(f"{name}: expected --dry_run beside it, found none, without which it changes nothing")


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, 0 where not even 1 does.

    `fits` holds up to a number and not beyond it: it is asked at 1, 2, 4, ... and then between two of these.
    """
    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, min(2 * high, most)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
