"""The folders of a run's states: where the next one goes, which there are, and which of them are deleted.

    <ckpt_dir>/<run>/state/step_00000120/     a state; step_00000120-2 where that name is taken by what no run made
                           .step_00000121.tmp  one that is being written

Deleted is what a run made, by its name and kind: real folders of such names, and in them the files of a state. A copy
under another name, a link, a file in a folder's place are a person's: neither deleted nor followed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

from simple_llama.common.errors import UserError
from simple_llama.common.files import publish_folder
from simple_llama.common.logging import LOGGER
from simple_llama.interop.hf_export import RUN_FILE, delete_aside

_STATE = re.compile(r"step_(\d{8,})(?:-(\d+))?")
_TEMP_STATE = re.compile(r"\.step_\d{8,}(?:-\d+)?\.tmp")
_TEMP = r"\.\d+\.[0-9a-f]+\.tmp"  # what `atomic_path` puts behind a name
_TEMP_FILE = re.compile(rf"\.(?:latest|dpo_.*\.pth){_TEMP}")
_TEMP_EXPORT = re.compile(rf"\.dpo_.*{_TEMP}")  # a folder
_FILE = r"(?:state\.json|rank_\d{5,}\.safetensors)"
_OWN_FILE = re.compile(rf"{_FILE}|\.{_FILE}{_TEMP}")


def states(folder: Path) -> list[Path]:
    """What is named like a state of the run in `folder`, newest (highest step) first: links and plain files too."""
    found = [path for path in (folder / "state").glob("step_*") if _STATE.fullmatch(path.name)]
    return sorted(found, key=_order, reverse=True)


def step_of(state: Path) -> int:
    """The step in a state's name; -1 for another name."""
    match = _STATE.fullmatch(state.name)
    return int(match[1]) if match else -1


def begin_state(folder: Path, step: int) -> tuple[Path, Path]:
    """(folder to write the state of a step to, made here; the place that it gets by `publish_state`).

    Deletes before what killed saves left: the run's folder is locked, so nobody is writing it any more.
    """
    home = folder / "state"
    _delete_temps(folder)
    temp = _first_free(home, f".step_{step:08d}%s.tmp", lambda path: False)
    final = _first_free(home, f"step_{step:08d}%s", lambda path: _is_own(path) and not home.is_symlink())
    if _order(final)[1]:
        LOGGER.warning("%s: no run made what is there; the state goes to %s", home / f"step_{step:08d}", final.name)
    try:
        temp.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {temp}: {error.strerror or error}; choose another ckpt_dir") from error
    return temp, final


def publish_state(temp: Path, final: Path) -> None:
    """Gives a state its place; one of ours that is there goes. UserError if it fails."""
    if _is_own(final):
        delete_state(final)
    publish_folder(temp, final)


def prune(folder: Path, newest: Path, keep: int) -> None:
    """Deletes states but the `keep` up to `newest`; later ones are damaged, or of a course that was given up."""
    if (folder / "state").is_symlink():
        LOGGER.warning("%s is a link: states that are no longer needed stay, for others may use them", folder / "state")
        return
    there = [state for state in states(folder) if state.is_dir() and not state.is_symlink()]
    whole = (state for state in there if (state / "state.json").is_file() and _order(state) <= _order(newest))
    kept = {newest, *(state for state, _ in zip(whole, range(keep), strict=False))}
    for state in there:
        if state not in kept:
            delete_state(state)


def delete_state(state: Path) -> None:
    """Deletes the files of a state, then its folder, unless a person keeps something in it. Never an error."""
    with contextlib.suppress(OSError):
        if not state.is_dir() or state.is_symlink():
            return
        own = [path for path in state.iterdir() if _is_own_file(path)]
        for path in sorted(own, reverse=True):  # state.json first: what is left after a kill is no state
            path.unlink()
        others = sorted(path.name for path in state.iterdir())
        if not others:
            state.rmdir()
        elif own:
            LOGGER.warning("%s: its state is deleted; the folder stays, for no run made %s", state, ", ".join(others))


def has_checkpoints(folder: Path) -> bool:
    """Whether a run's folder holds something that starting anew would overwrite.

    A `.pth` beside nothing but an unfinished state is none: a kill in the first save of an earlier version left it.
    """
    if (folder / "latest").exists() or any(state.is_dir() for state in states(folder)):
        return True
    if any(folder.glob(f"dpo_*/{RUN_FILE}")):
        return True
    return any(folder.glob("dpo_*.pth")) and not any((folder / "state").glob(".step_*.tmp"))


def newest_run(ckpt_dir: Path) -> str:
    """Name of the run under `ckpt_dir` that saved a state last. Raises UserError when there is none."""
    saved = {path: path.parent.name for path in ckpt_dir.glob("*/latest")}
    saved |= {  # killed before its `latest`
        path: path.parent.parent.name for path in ckpt_dir.glob("*/state/step_*") if _STATE.fullmatch(path.name)
    }
    if not saved:
        raise UserError(f"{ckpt_dir}: expected a run to resume (<run>/latest), found none")
    return saved[max(saved, key=lambda path: path.lstat().st_mtime)]  # a link may be broken


def _order(state: Path) -> tuple[int, int]:
    """Step, and which of its names; 0 is the first."""
    match = _STATE.fullmatch(state.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _first_free(home: Path, name: str, usable: Callable[[Path], bool]) -> Path:
    """The first of the names, `%s` being nothing, -2, -3, ..., under which nothing is, or what is `usable`."""
    for number in count(1):
        path = home / (name % (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(path) or usable(path):
            return path
    raise AssertionError


def _is_own(state: Path) -> bool:
    """Whether a real folder holds nothing but files of a state."""
    try:
        return state.is_dir() and not state.is_symlink() and all(map(_is_own_file, state.iterdir()))
    except OSError:  # not ours to read
        return False


def _is_own_file(path: Path) -> bool:
    """Whether a file of a state, or of one being written, has such a name and kind."""
    return bool(_OWN_FILE.fullmatch(path.name)) and path.is_file() and not path.is_symlink()


def _delete_temps(folder: Path) -> None:
    """Deletes what killed saves left half-written."""
    for path in folder.glob(".*.tmp"):
        if _TEMP_FILE.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()
        elif _TEMP_EXPORT.fullmatch(path.name):
            delete_aside(path)
    if not (folder / "state").is_symlink():
        for path in (folder / "state").glob(".step_*.tmp"):
            if _TEMP_STATE.fullmatch(path.name):
                delete_state(path)
