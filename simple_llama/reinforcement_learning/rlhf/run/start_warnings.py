"""What a person should know when a run starts: said by the run and, before it, by `--dry_run`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from simple_llama.interop.adapted_start import AdaptedStart
from simple_llama.pretraining.start_model import StartModel
from simple_llama.reinforcement_learning.rlhf.run.saves import count_saves
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig

_USUAL_WARMUP = 0.1  # of all steps
_STATE_BYTES = 12  # a trained weight: fp32, with AdamW's two moments


class _KeptConfig(Protocol):
    """What decides how often a run saves, and what stays."""

    @property
    def save_interval(self) -> int: ...
    @property
    def keep_exports(self) -> int: ...
    @property
    def keep_states(self) -> int: ...
    @property
    def eval_interval(self) -> int: ...
    @property
    def early_stop(self) -> int: ...


class SavedBytes(NamedTuple):
    """The room that the checkpoints of a run take."""

    ends: int  # saves at epochs' ends
    between: int  # saves at other steps
    exports: int  # that stay
    states: int  # that stay
    export: int  # bytes of one
    state: int  # bytes of one
    merged: int = 0  # bytes of the whole model at the end, where exports are adapters alone

    @property
    def most(self) -> int:
        """Bytes at most: what stays, and one more state while it is written."""
        return self.exports * self.export + (self.states + 1) * self.state + self.merged


def saved_bytes(
    config: _KeptConfig, total_steps: int, steps_per_epoch: int, weights: int, trained: int, start: StartModel
) -> SavedBytes:
    """How often a run saves at most, what stays, and how large it is."""
    evaluations = config.eval_interval if config.early_stop else 0  # any of them may be the best
    ends, between = count_saves(total_steps, steps_per_epoch, config.save_interval, evaluations)
    exports = ends + (min(between, config.keep_exports + 1) if config.keep_exports else between)
    states = min(ends + between, config.keep_states)
    export, merged = start.export_dtype.itemsize * weights, 0
    if isinstance(start, AdaptedStart):
        export = start.export_dtype.itemsize * (weights - trained)
        if start.as_adapters:
            export, merged = 4 * trained, export
    return SavedBytes(ends, between, exports, states, export, _STATE_BYTES * trained, merged)


def start_warnings(
    config: ScheduleConfig, total_steps: int, steps_per_epoch: int, saved: SavedBytes | None, ckpt_dir: str
) -> list[str]:
    """Each in words.

    Args:
        saved: the room of all checkpoints; None for a run that goes on, some of whose are there.
    """
    found = []
    if config.max_steps > config.epochs * steps_per_epoch:
        found.append(
            f"max_steps is {config.max_steps}, but {config.epochs} epochs have {total_steps} steps, with which the run "
            "ends: raise epochs for more"
        )
    if config.warmup_steps(total_steps) > total_steps:
        found.append(_endless_warmup(config, total_steps))
    free = _free_bytes(ckpt_dir)
    if saved and saved.most > free:
        found.append(
            f"{ckpt_dir}: the checkpoints take up to {saved.most / 2**30:.3f} GiB, {free / 2**30:.3f} GiB are free: "
            "choose another ckpt_dir, or lower keep_states or keep_exports"
        )
    return found


def expected_change(config: ScheduleConfig, total_steps: int, weights: Mapping[str, float]) -> str:
    """What the rates of a run come to, in words.

    Args:
        weights: see `weight_facts`.
    """
    largest, together = max(config.rates(total_steps)), sum(config.rates(total_steps))
    said = (
        f"expected change: {total_steps} steps of a rate of {largest:.2g} at most, {together:.2g} together, which is "
        "about what Adam can change a weight by"
    )
    median, bits = weights.get("weights/median", 0.0), weights.get("weights/bits", 0.0)
    if not (median and bits):
        return said
    apart = 2.0 ** (math.floor(math.log2(median)) - bits + 1)
    return (
        f"{said}: {together / median:.2g} of the median weight ({median:.2g}), where numbers of {bits:.0f} bits lie "
        f"{apart:.2g} apart"
    )


def _endless_warmup(config: ScheduleConfig, total_steps: int) -> str:
    """Of a warm-up that the run does not live to see end: what its rates come to, and what to set."""
    shorter = replace(config, warmup_iterations=None, warmup_ratio=_USUAL_WARMUP)
    return (
        f"warmup_iterations is {config.warmup_iterations}, but the run has {total_steps} steps: max_lr is never "
        f"reached, the largest rate is {max(config.rates(total_steps)):.2g} and not {config.max_lr:.2g}. All rates "
        f"together, about what Adam can change a weight by, are {sum(config.rates(total_steps)):.2g}; with "
        f"warmup_ratio {_USUAL_WARMUP:g} in its place they would be {sum(shorter.rates(total_steps)):.2g}"
    )


def _free_bytes(folder: str) -> int:
    """Room on the disk where a folder is, or will be."""
    place = Path(folder).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    return shutil.disk_usage(there).free
