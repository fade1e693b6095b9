"""The exports of a run: how they are named, which ones are its own, and how many stay.

    dpo_{epoch}E_{loss}L_{max_seq_len}MSQ.pth    dpo_{epoch}E_{max_seq_len}MSQ.pth, where no loss was measured

Of a model that came as a folder they are folders, whose names have no ending. No two steps of a run share a name, and
nothing is replaced but an export of the same step.
"""

from __future__ import annotations

import contextlib
import os
from itertools import count
from pathlib import Path

from simple_llama.cluster.lock import NAME as LOCK_NAME
from simple_llama.interop.hf_export import delete_export, holds_export_alone
from simple_llama.pretraining.start_model import StartModel

_LEAST_DIGITS = 4  # of an epoch


def weights_name(step: int, steps_per_epoch: int, loss: float | None, max_seq_len: int, suffix: str) -> str:
    """Name of the weights after `step` steps: dpo_2E_0.5312L_2048MSQ.pth.

    Args:
        loss: measured after that step; None where none was.
    """
    measured = "" if loss is None else f"{loss:.4f}L_"
    return f"dpo_{_epoch(step, steps_per_epoch)}E_{measured}{max_seq_len}MSQ{suffix}"


def free_path(folder: Path, name: str, step: int, start: StartModel) -> Path:
    """Where the export of a step goes: to `name`, unless something else has it; then to a name that tells the step."""
    stem = name.removesuffix(start.export_suffix)
    for number in count():
        more = "" if number == 0 else f"_step{step}" if number == 1 else f"_step{step}-{number}"
        path = folder / f"{stem}{more}{start.export_suffix}"
        if not os.path.lexists(path) or (is_export(path, step, start) and _is_alone(path)):
            return path
    raise AssertionError


def may_be_a_runs(path: Path) -> bool:
    """Whether a run might take what a person puts there for its own: a name of an export, in the folder of a run."""
    return path.name.startswith("dpo_") and any(
        os.path.lexists(path.parent / name) for name in ("state", "latest", LOCK_NAME)
    )


def is_export(path: Path, step: int, start: StartModel) -> bool:
    """Whether something is the whole export of a step, under the name that it was given."""
    found = start.export_metadata(path)
    return found.get("step") == step and found.get("file", path.name) == path.name  # earlier versions' lack `file`


def prune_exports(
    folder: Path, keep: int, steps_per_epoch: int, done: int, start: StartModel, spared: str = ""
) -> None:
    """Deletes exports of this run up to step `done` that end no epoch, but for the newest `keep` and the one that is
    `spared`; 0: deletes none.

    What was copied, renamed or put there by a person, or by an earlier version, is not looked upon as the run's; nor is
    a folder that a person keeps something in.
    """
    if not keep:
        return
    steps: dict[Path, int] = {}
    for path in folder.glob(f"dpo_*{start.export_suffix}"):
        found = start.export_metadata(path)
        step = found.get("step")
        own = found.get("run") == folder.name and found.get("file") == path.name
        if own and type(step) is int and step <= done and step % steps_per_epoch:
            steps[path] = step
    for path in sorted(steps, key=lambda path: steps[path], reverse=True)[keep:]:
        if path.name == spared:
            continue
        if path.is_dir():
            delete_export(path)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def _epoch(step: int, steps_per_epoch: int) -> str:
    """The epoch with the fewest digits, from four on, that tell the step from the one before and the one after.

    So no two steps have the same text: rounding keeps their order, and a text of more digits that ended in zeros would
    have told its step with fewer.
    """
    for digits in count(_LEAST_DIGITS):
        text, *others = (f"{number / steps_per_epoch:.{digits}g}" for number in (step, step - 1, step + 1))
        if text not in others:
            return text
    raise AssertionError


def _is_alone(path: Path) -> bool:
    """Whether an export may be replaced: a person keeps nothing in its folder."""
    return not path.is_dir() or holds_export_alone(path)
