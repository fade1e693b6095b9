"""The run directory: what is needed to read a run, to repeat it and to go on with it; and whose it is.

<log_dir>/<run>/   config.json  ds_config.json  environment.json  data.json  train.log
                   metrics.jsonl  samples.jsonl  held_out.npz  metrics.csv  trackers.json
                   warnings.jsonl  events.out.tfevents.*
                   best.json  report.html  report.json  finished.json (at the end)
                   lock (while a run writes here)
<ckpt_dir>/<run>/  config.json, the same: all hosts see it, and `--resume` begins with it  lock
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
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
from simple_llama.common.files import atomic_write_json, listed, read_json, shown
from simple_llama.common.logging import LOGGER
from simple_llama.common.paths import is_checkout, root_path
from simple_llama.common.settings import PathText, Settings, known_settings, path_defaults, path_marks, values_before
from simple_llama.reinforcement_learning.rlhf.engine.state_folders import has_checkpoints, newest_run
from simple_llama.reinforcement_learning.rlhf.inputs import versions

_SEEN_TRIES = 10  # seconds until rank 0's lock must be seen by all
_LONGEST_NAME = 200  # bytes; a file system takes 255, and temp names are longer than the name
_SETTINGS = "config.json"
BEST = "best.json"
_ONCE = {"resume", "dry_run", "probe", "fit_gb", "debug"}  # settings of one start, which a later one does not take over


@dataclass(frozen=True)
class FolderConfig(Settings):
    """Where a run writes, and whether it goes on."""

    # === Run ===
    run_name: str = ""  # empty: the date and time; with --resume: the newest run
    log_dir: PathText = root_path("runs")  # TensorBoard curves and the run's records go to <log_dir>/<run_name>
    ckpt_dir: Annotated[PathText, Doc("checkpoints go to <ckpt_dir>/<run_name>")] = root_path(
        "simple_llama", "reinforcement_learning", "rlhf", "rlhf_checkpoints"
    )
    resume: bool = False  # continue the run `run_name` (or the newest) from its last state, with its own settings

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
            _check_new(config, name)
    return broadcast_object(name, ranks, str)


def folders_of(config: FolderConfig, name: str) -> tuple[Path, Path]:
    """(checkpoint folder, log folder) of a run."""
    return Path(config.ckpt_dir) / name, Path(config.log_dir) / name


@contextlib.contextmanager
def own_folders(config: FolderConfig, name: str, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of all folders that a run writes while the body runs (collective). Gives a check for rank 0,
    which raises UserError where another run took one over meanwhile.

    Raises UserError when another run writes there or has written there, or when a rank does not see the checkpoint
    folder of rank 0. Not locked: the reference store, which is made for many writers.
    """
    ckpt_folder, log_folder = folders_of(config, name)
    distinct = {os.path.realpath(folder): folder for folder in (ckpt_folder, log_folder)}.values()
    with contextlib.ExitStack() as held:
        locks: list[FolderLock] = []
        with fail_together(ranks):
            if ranks.is_main:
                locks = [held.enter_context(_locked(folder)) for folder in distinct]
                _check_new(config, name)
                _check_owner(ckpt_folder, log_folder, config.resume)
        with fail_together(ranks):
            _wait_for_lock(ckpt_folder)

        def check() -> None:
            for lock in locks:
                lock.check()

        yield check


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[FolderLock]:
    """Locks a folder while the body runs; folders that were made for it do not stay behind empty."""
    made = [path for path in (folder, folder.parent) if not path.exists()]
    lock = FolderLock.take(folder)
    watchdog.before_end(lock.release)
    try:
        yield lock
    finally:
        lock.release()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _check_new(config: FolderConfig, name: str) -> None:
    """UserError where a run that is not to go on would write beside the checkpoints of an earlier one."""
    folder = Path(config.ckpt_dir) / name
    if not config.resume and has_checkpoints(folder):
        raise UserError(
            f"{folder}: a run of this name has checkpoints; pass --resume to continue it, or another --run_name"
        )


def _check_owner(ckpt_folder: Path, log_folder: Path, resume: bool) -> None:
    """UserError where the log folder holds another run's records, which this one would drop or mix with its own.

    Its config.json says whose they are: the run's with those checkpoints. A run that was killed before its first
    checkpoint may so start again. Where both folders were moved, or copied, the copies of config.json are the same.
    """
    found = _settings_in(log_folder)
    if found is None:
        if not resume and any((log_folder / name).exists() for name in ("metrics.jsonl", "samples.jsonl")):
            raise UserError(
                f"{log_folder}: expected no records, or a {_SETTINGS} that says whose they are, found records without "
                "it; move them away, or choose another --log_dir or --run_name"
            )
        return
    owner = _folder_in(found, "ckpt_dir")
    if _same(owner, ckpt_folder):
        return
    moved = not _same(_folder_in(found, "log_dir"), log_folder)
    copy = _settings_in(ckpt_folder)
    same = copy == found and (moved or not has_checkpoints(owner))
    only_here = has_checkpoints(ckpt_folder) and not has_checkpoints(owner)
    earlier = copy is None and resume and (moved or only_here)  # checkpoints of a version that made no copy
    if not (same or earlier):
        raise UserError(
            f"{log_folder}: holds the records of the run whose checkpoints are in {owner}, not in {ckpt_folder}; "
            "choose another --log_dir or --run_name, move the records away, or give the --ckpt_dir of that run"
        )


def _settings_in(folder: Path) -> dict[str, Any] | None:
    """The settings that a run left in a folder; None where there are none that can be read."""
    with contextlib.suppress(UserError):
        found = read_json(folder / _SETTINGS)
        return found if isinstance(found, dict) else None
    return None


def _folder_in(settings: dict[str, Any], name: str) -> Path:
    """The folder of the run that these settings name; a relative path counts from here."""
    return Path(str(settings.get(name, ""))) / str(settings.get("run_name", ""))


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same place."""
    try:
        return os.path.realpath(one) == os.path.realpath(other)
    except ValueError:  # NUL in a path of a damaged file
        return False


def _wait_for_lock(folder: Path) -> None:
    """Returns when this host sees the lock of rank 0; UserError when it does not: the disk is not shared."""
    for _ in range(_SEEN_TRIES):
        if (folder / LOCK_NAME).exists():
            return
        time.sleep(1)  # network file systems show a new file late
    raise UserError(
        f"{folder}: rank 0's {LOCK_NAME} cannot be seen on this host; expected ckpt_dir on a disk that all hosts share"
    )


def settings_to_resume(config: FolderConfig, kind: type[Settings]) -> tuple[dict[str, Any], str]:
    """Settings that the run to resume was started with, the base of a command's, and the file that has them.

    Of the checkpoint folder, which all hosts share; earlier versions kept them in the log folder alone. What is no
    setting of `kind` any more is left out, as `say_settings` says; a setting that came later stands as it was before
    (`values_before`). Without a file these and the run's name alone, and ""; nothing where there is no run.
    """
    try:
        name = config.run_name or newest_run(Path(config.ckpt_dir))
    except UserError:  # `name_run` says so, where a run is to go on
        return {}, ""
    folders = folders_of(config, name)
    found, path = _kept_settings(folders)
    own = {key: value for key, value in known_settings(kind, found)[0].items() if key not in _ONCE}
    if path is None:  # checkpoints without settings beside them: of earlier versions
        return {**(values_before(kind) if has_checkpoints(folders[0]) else {}), "run_name": name}, ""
    own = {**values_before(kind), **without_moved(kind, own), "run_name": name, "ckpt_dir": config.ckpt_dir}
    if path.parent == Path(config.log_dir) / name:
        own["log_dir"] = config.log_dir
    return own, str(path)


def without_moved(kind: type[Settings], own: dict[str, Any]) -> dict[str, Any]:
    """Settings without the paths that lead nowhere any more while their defaults do: the checkout was moved."""
    marks = path_marks(kind)
    moved = {
        name: default
        for name, default in path_defaults(kind).items()
        if name in own and not marks[name].leads_somewhere(own[name]) and os.path.exists(default)
    }
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for name, default in moved.items():
            LOGGER.warning("%s: %s of the run's settings is no longer there; taken: %s", name, own[name], default)
    return {name: value for name, value in own.items() if name not in moved}


def say_settings(config: FolderConfig) -> None:
    """Where the settings of a resumed run come from. UserError where there is no such run: before a model is read."""
    if not config.run_name:
        newest_run(Path(config.ckpt_dir))
        return
    folders = folders_of(config, config.run_name)
    found, path = _kept_settings(folders)
    if path is not None:
        LOGGER.info("settings are those of %s; --config and flags go before them", path)
        if unknown := known_settings(type(config), found)[1]:
            LOGGER.warning("%s: unknown settings of another version have no effect: %s", path, shown(unknown))
    elif has_checkpoints(folders[0]):
        LOGGER.warning(
            "no %s in %s or in %s: settings that are not on the command line are the defaults, not the run's, and "
            "those of later versions as they were before",
            _SETTINGS,
            *folders,
        )
    else:
        raise UserError(
            f"{folders[0]}: expected a state to resume from, found no run of that name{_named_runs(config)}"
        )


def _named_runs(config: FolderConfig) -> str:
    """The runs that there are, the newest first."""
    found = [path for path in Path(config.ckpt_dir).glob("*") if has_checkpoints(path)]
    names = [path.name for path in sorted(found, key=lambda path: -path.lstat().st_mtime)]
    return f"; {config.ckpt_dir} has {listed(names)}" if names else f"; {config.ckpt_dir} has none"


def _kept_settings(folders: tuple[Path, ...]) -> tuple[dict[str, Any], Path | None]:
    """Settings in the first of the folders that has them, and their file; ({}, None) where none has.

    UserError where all that are there are damaged.
    """
    problem = ""
    for path in (folder / _SETTINGS for folder in folders):
        if not os.path.lexists(path):
            continue
        try:
            found = read_json(path)
            if isinstance(found, dict):
                return found, path
            problem = problem or f"{path}: expected a JSON object of settings, found {type(found).__name__}"
        except UserError as error:
            problem = problem or str(error)
    if problem:
        raise UserError(f"{problem}; it has the settings to resume with: mend it, or remove it and give them as flags")
    return {}, None


def mark_finished(
    folder: Path, step: int, why: str, weights: Path, report: Path | None, metrics: dict[str, float], seconds: float
) -> None:
    """Writes finished.json: the whole run is done. A launcher's exit status 0 alone does not say so.

    Args:
        why: what ended it after `step` steps.
        report: the run's page; None where none could be made. metrics: the final ones, by name.
        seconds: of this start of the run.
    """
    found = {"step": step, "ended": why, "weights": str(weights), "report": str(report) if report else None}
    atomic_write_json(folder / "finished.json", {**found, "metrics": metrics, "seconds": round(seconds, 3)})


def unmark_finished(folder: Path) -> None:
    """Takes finished.json away, at the start of a run, and best.json, which a run that goes on writes again."""
    for path in (folder / "finished.json", folder / BEST):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror or error}; choose another log_dir") from error


def write_records(folder: Path, settings: dict[str, Any], ds_config: dict[str, Any]) -> None:
    """Writes config.json, ds_config.json and environment.json (versions and git revision, no variables)."""
    atomic_write_json(folder / _SETTINGS, settings)
    atomic_write_json(folder / "ds_config.json", ds_config)
    atomic_write_json(folder / "environment.json", environment())


def keep_settings(config: FolderConfig, name: str, settings: dict[str, Any]) -> None:
    """Brings config.json in both folders of a run to these settings."""
    settings = json.loads(json.dumps(settings))  # as they will be read
    for folder in reversed(folders_of(config, name)):  # records say whose they are before they are looked for
        if _settings_in(folder) != settings:
            atomic_write_json(folder / _SETTINGS, settings)


@functools.cache
def environment() -> dict[str, Any]:
    """Versions of what computes, and the project's git revision where there is one: those at the first call, which are
    nearer to the code that runs than what a checkout has later."""
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
