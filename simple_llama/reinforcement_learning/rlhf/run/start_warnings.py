"""What a person should know when a run starts: said by the run and, before it, by `--dry_run`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from simple_llama.pretraining.start_model import StartModel
from simple_llama.reinforcement_learning.rlhf.run.saves import SavesConfig, count_saves
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig

_STATE_BYTES = 12  # a trained weight: fp32, with AdamW's two moments


class SavedBytes(NamedTuple):
    """The room that the checkpoints of a run take."""

    ends: int  # saves at epochs' ends
    between: int  # saves at other steps
    exports: int  # that stay
    states: int  # that stay
    export: int  # bytes of one
    state: int  # bytes of one

    @property
    def most(self) -> int:
        """Bytes at most: what stays, and one more state while it is written."""
        return self.exports * self.export + (self.states + 1) * self.state


def saved_bytes(
    config: SavesConfig, epochs: int, steps_per_epoch: int, weights: int, trained: int, start: StartModel
) -> SavedBytes:
    """How often a run saves, what stays, and how large it is."""
    ends, between = count_saves(steps_per_epoch, epochs, config.save_interval)
    exports = ends + (min(between, config.keep_exports) if config.keep_exports else between)
    states = min(ends + between, config.keep_states)
    return SavedBytes(ends, between, exports, states, start.export_dtype.itemsize * weights, _STATE_BYTES * trained)


def start_warnings(config: ScheduleConfig, total_steps: int, saved: SavedBytes | None, ckpt_dir: str) -> list[str]:
    """Each in words.

    Args:
        saved: the room of all checkpoints; None for a run that goes on, some of whose are there.
    """
    found = []
    if config.warmup_iterations >= total_steps:
        found.append(
            f"warmup_iterations is {config.warmup_iterations}, but the run has {total_steps} steps: max_lr is never "
            "reached"
        )
    free = _free_bytes(ckpt_dir)
    if saved and saved.most > free:
        found.append(
            f"{ckpt_dir}: the checkpoints take up to {saved.most / 2**30:.3f} GiB, {free / 2**30:.3f} GiB are free: "
            "choose another ckpt_dir, or lower keep_states or keep_exports"
        )
    return found


def _free_bytes(folder: str) -> int:
    """Room on the disk where a folder is, or will be."""
    place = Path(folder).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    return shutil.disk_usage(there).free
