"""The run directory: what is needed to read a run and to repeat it.

<log_dir>/<run>/  config.json  ds_config.json  environment.json  metrics.jsonl  samples.jsonl  train.log
                  events.out.tfevents.*  finished.json (at the end)
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, broadcast_object, fail_together
from simple_llama.cluster.lock import NAME as LOCK_NAME
from simple_llama.cluster.lock import FolderLock
from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write_json, shown
from simple_llama.common.paths import is_checkout, root_path
from simple_llama.common.settings import PathText, Settings
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import has_checkpoints, newest_run
from simple_llama.reinforcement_learning.rlhf.inputs import versions

_SEEN_TRIES = 10  # seconds until rank 0's lock must be seen by all
_LONGEST_NAME = 200  # bytes; a file system takes 255, and temp names are longer than the name


@dataclass(frozen=True)
class FolderConfig(Settings):
    """Where a run writes, and whether it goes on."""

    # === Run ===
    run_name: str = ""  # empty: the date and time; with --resume: the newest run
    log_dir: PathText = root_path("runs")  # TensorBoard curves and the run's records go to <log_dir>/<run_name>
    ckpt_dir: Annotated[PathText, Doc("checkpoints go to <ckpt_dir>/<run_name>")] = root_path(
        "simple_llama", "reinforcement_learning", "rlhf", "rlhf_checkpoints"
    )
    resume: bool = False  # continue the run `run_name` (or the newest) from its last state

    def check_rules(self) -> None:
        """UserError for a run's name that is no plain name of a folder."""
        name = self.run_name
        if "/" in name or name in (".", "..") or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
            raise UserError(
                f"run_name: expected a plain name without '/' of at most {_LONGEST_NAME} bytes, found {shown(name)}"
            )


def check_folders(config: FolderConfig, ref_cache_dir: str) -> None:
    """Raises UserError where a folder that a run writes to cannot be one: not after an epoch, when it is needed."""
    folders = {
        name: Path(folder) / config.run_name
        for name, folder in (("log_dir", config.log_dir), ("ckpt_dir", config.ckpt_dir))
    }
    for name, folder in {**folders, "ref_cache_dir": Path(ref_cache_dir)}.items():
        try:
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        except OSError as error:
            raise UserError(f"{name}: {folder}: cannot be a folder: {error.strerror}") from error
        if not there.is_dir():
            raise UserError(f"{name}: {there}: expected a folder, or nothing there yet; found something else")


def name_run(config: FolderConfig, ranks: Ranks) -> str:
    """The run's name, rank 0's word (collective): `run_name`, or the newest run to resume, or the date and time.

    Raises UserError when a run of that name has checkpoints and is not to be resumed.
    """
    name = ""
    with fail_together(ranks):
        if ranks.is_main:
            newest = newest_run(Path(config.ckpt_dir)) if config.resume and not config.run_name else ""
            name = config.run_name or newest or time.strftime("%Y%m%d-%H%M%S")
            folder = Path(config.ckpt_dir) / name
            if not config.resume and has_checkpoints(folder):
                raise UserError(
                    f"{folder}: a run of this name has checkpoints; pass --resume to continue it, or another --run_name"
                )
    return broadcast_object(name, ranks)


@contextlib.contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of a checkpoint folder while the body runs (collective). Gives a check for rank 0, which
    raises UserError where another run took the folder over meanwhile.

    Raises UserError when another run writes there, or when a rank does not see the folder of rank 0.
    """
    lock: FolderLock | None = None
    made: list[Path] = []
    with fail_together(ranks):
        if ranks.is_main:
            made = [path for path in (folder, folder.parent) if not path.exists()]  # none stays behind empty
            lock = FolderLock.take(folder)
            watchdog.before_end(lock.release)
    try:
        with fail_together(ranks):
            _wait_for_lock(folder)
        yield lock.check if lock else lambda: None
    finally:
        if lock:
            lock.release()
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()


def _wait_for_lock(folder: Path) -> None:
    """Returns when this host sees the lock of rank 0; UserError when it does not: the disk is not shared."""
    for _ in range(_SEEN_TRIES):
        if (folder / LOCK_NAME).exists():
            return
        time.sleep(1)  # network file systems show a new file late
    raise UserError(
        f"{folder}: rank 0's {LOCK_NAME} cannot be seen on this host; expected ckpt_dir on a disk that all hosts share"
    )


def mark_finished(folder: Path, step: int, weights: Path) -> None:
    """Writes finished.json: the whole run is done. A launcher's exit status 0 alone does not say so."""
    atomic_write_json(folder / "finished.json", {"step": step, "weights": str(weights)})


def unmark_finished(folder: Path) -> None:
    """Takes finished.json away, at the start of a run that goes on."""
    (folder / "finished.json").unlink(missing_ok=True)


def write_records(folder: Path, settings: dict[str, Any], ds_config: dict[str, Any]) -> None:
    """Writes config.json, ds_config.json and environment.json (versions and git revision, no variables)."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / "config.json", settings)
    atomic_write_json(folder / "ds_config.json", ds_config)
    atomic_write_json(folder / "environment.json", environment())


def environment() -> dict[str, Any]:
    """Versions of what computes, and the project's git revision where there is one."""
    return {"python": platform.python_version(), "machine": platform.platform(), **versions(), "git": _git_revision()}


def _git_revision() -> str | None:
    """`git describe` of the project's folder, with -dirty; None outside a checkout or without git."""
    if not is_checkout():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root_path(),
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
