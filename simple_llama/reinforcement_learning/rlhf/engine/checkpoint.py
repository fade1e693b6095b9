"""What a run leaves on disk: the state from which it resumes, and the weights in the form in which the model came.

    <ckpt_dir>/<run>/
        state/step_00000120/                           complete or absent: written beside, then renamed
            rank_00000.safetensors ...                 master weights and AdamW moments, by parameter name
            state.json                                 step, digests of the files and of itself, what the run depends on
        latest                                         name of the newest state, written when it is there
        dpo_{epoch}E_{loss}L_{max_seq_len}MSQ.pth      fp32 weights, TrainingConfig, metadata: written last; or
        dpo_{epoch}E_{loss}L_{max_seq_len}MSQ/         a Hugging Face folder of a model that came as one, or as GGUF

A parameter's state stands whole in one file, so a run may resume on another number of ranks, and nothing is a pickle.
A state names its export: where a kill or a full disk left it out, the run that resumes writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from simple_llama.cluster import watchdog
from simple_llama.cluster.background import Job, nothing
from simple_llama.cluster.distributed import Ranks, broadcast_object, fail_together, gather_objects
from simple_llama.common.errors import UserError
from simple_llama.common.files import (
    atomic_path,
    atomic_write,
    brief,
    digest,
    file_digest,
    json_bytes,
    read_json,
    shown,
    write_digested,
)
from simple_llama.common.logging import LOGGER
from simple_llama.pretraining.named_tensors import NamedTensors
from simple_llama.reinforcement_learning.rlhf.engine.engine import MOMENTS, Engine
from simple_llama.reinforcement_learning.rlhf.engine.state_copy import StateCopy
from simple_llama.reinforcement_learning.rlhf.engine.state_folders import (
    begin_state,
    delete_state,
    prune,
    publish_state,
    states,
    step_of,
)

_FORMAT, _WITHOUT_DIGEST = 2, 1  # of state.json, and of earlier ones; a reader refuses others
_MOST_SHOWN = 1000  # characters of a value that differs, in a message; fewer where several do


@dataclass(frozen=True)
class StateFacts:
    """What state.json says of a run beside the digests of its files."""

    step: int  # optimizer steps done
    weights: str  # name of the export; "" where none was
    loss: float | None  # the last held-out loss, or the last interval's where nothing is held out
    unfinished: bool  # whether an evaluation or a save is still due after `step`
    course: dict[str, Any]  # what a resumed run must share: settings, pairs a step, digests of data and reference
    reference_values: dict[str, Any] | None = None  # see `KeptValues`; none of an online reference and in older states
    best: dict[str, Any] | None = None  # see `Best`; none before an evaluation, and in older states

    def to_json(self) -> dict[str, Any]:
        """The entries of state.json, all on one level."""
        own = {"step": self.step, "optimizer_steps": self.step, "weights": self.weights, "loss": self.loss}
        values = {"reference_values": self.reference_values} if self.reference_values else {}
        values |= {"best": self.best} if self.best else {}
        return {**own, "unfinished": self.unfinished, **values, **self.course}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> StateFacts:
        """From a checked state.json; what is not ours by name belongs to the course. Older ones lack `unfinished`."""
        own = {"format", "digest", "files", "step", "optimizer_steps", "weights", "loss", "unfinished"}
        own |= {"reference_values", "best"}
        course = {key: value for key, value in found.items() if key not in own}
        unfinished, values = bool(found.get("unfinished", False)), found.get("reference_values")
        return cls(found["step"], found["weights"], found["loss"], unfinished, course, values, found.get("best"))


class SavedState(NamedTuple):
    """A complete state on disk."""

    folder: Path
    facts: StateFacts
    files: dict[str, str]  # digests of its shards by their names
    optimizer_steps: int  # AdamW's own count


def write_state(
    folder: Path,
    copy: StateCopy,
    facts: StateFacts,
    keep: int,
    ranks: Ranks,
    before: SavedState | None,
    check_lock: Callable[[], object],
    sums_stay: bool = False,
) -> Generator[Job, Future[Any], SavedState]:
    """Writes `folder`/state/step_N and prunes older states, all but `keep`: work for a `Background` (collective).

    An error on one rank is an error on all. Each parameter's state is held and written by one rank, in turn: the whole
    model is in no rank's memory, and `StateWeights` reads it from the disk. What is written is a copy of when this
    begins; a state gets its name when the shards of all ranks are on the disk.

    Args:
        before: the newest state that this run has saved or loaded. Where it is of the same step, its shards stay and
            the facts are made anew, so there is no moment without it.
        check_lock: raises where another run has taken over the folder; called on rank 0, in its thread.
        sums_stay: see `StateCopy.take`.
    """
    temp = None
    try:
        if before and before.facts.step == facts.step:
            saved = SavedState(before.folder, facts, before.files, facts.step)
        else:
            temp, place = _begin(folder, facts.step, ranks)
            copy.take(sums_stay)
            shard = temp / f"rank_{ranks.rank:05d}.safetensors"
            done = yield partial(_write_shard, shard, copy)
            with fail_together(ranks):
                written = shard.name, done.result()
            files = dict(gather_objects(written, ranks, tuple[str, str]))
            saved = SavedState(place, facts, files, facts.step)
        done = yield partial(_publish, folder, temp, saved, keep, check_lock) if ranks.is_main else nothing
        with fail_together(ranks):
            done.result()
    except UserError:
        if ranks.is_main and temp:
            delete_state(temp)  # on a full disk, the room that it takes is needed
        raise
    return saved


def _write_shard(path: Path, copy: StateCopy) -> str:
    """Writes a rank's share of a state; gives its digest."""
    with atomic_path(path) as part:
        return write_digested(part, copy.file_parts())


def _publish(folder: Path, temp: Path | None, saved: SavedState, keep: int, check_lock: Callable[[], object]) -> None:
    """Gives a state whose shards are written its facts and its name, and `latest` the name; prunes.

    Args: temp: where it was written; None: it has its name already.
    """
    home = temp or saved.folder
    for name in saved.files:
        if not (home / name).is_file():
            raise UserError(f"{home}: {name} of another rank is missing; ckpt_dir must be a shared disk")
    check_lock()
    atomic_write(home / "state.json", _described(saved.facts, saved.files))
    if temp:
        publish_state(temp, saved.folder)
    atomic_write(folder / "latest", f"{saved.folder.name}\n".encode())
    prune(folder, saved.folder, keep)


def _begin(folder: Path, step: int, ranks: Ranks) -> tuple[Path, Path]:
    """(where to write a state, its place when it is whole), rank 0's word (collective)."""
    names: list[str] = []
    with fail_together(ranks):
        if ranks.is_main:
            names = [path.name for path in begin_state(folder, step)]
    temp, place = broadcast_object(names, ranks)
    return folder / "state" / temp, folder / "state" / place


def _described(facts: StateFacts, files: dict[str, str]) -> bytes:
    """A state.json: the facts, the digests of the files, and the digest of all that."""
    found = {"format": _FORMAT, **facts.to_json(), "files": files}
    return json_bytes({**found, "digest": digest(json_bytes(found)).hex()})


def newest_state(folder: Path) -> SavedState:
    """The newest state whose files are all there and unchanged; damaged ones are named in a warning and passed over.

    Raises UserError when there is none.
    """
    for candidate in states(folder):
        try:
            return read_state(candidate)
        except UserError as error:
            LOGGER.warning("state %s is not used: %s", candidate, error)
    raise UserError(f"{folder}: expected a state to resume from (state/step_*), found no complete one")


def read_state(candidate: Path) -> SavedState:
    """A state whose files are all there and unchanged; UserError with what is wrong with another one."""
    problem, found = _check_state(candidate)
    if problem:
        raise UserError(problem)
    return SavedState(candidate, StateFacts.from_json(found), found["files"], int(found["optimizer_steps"]))


class StateWeights(NamedTensors):
    """The fp32 master weights of a checked state by name, on the CPU, each read when it is asked for.

    UserError where the state is gone by then.
    """

    def __init__(self, saved: SavedState):
        self._names = self._places = {
            parameter: saved.folder / file for file in saved.files for parameter in _parameters_in(saved.folder / file)
        }

    def _make(self, name: str) -> torch.Tensor:
        place = self._places[name]
        try:
            with safe_open(place, framework="pt") as file:
                return file.get_tensor(f"{name}|weight")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{place}: expected a whole state, found: {error}; a run that goes on deletes old states: export the "
                "newest again"
            ) from error


def _check_state(candidate: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with a state folder ("" when nothing is), and its facts. Nothing outside the folder is read."""
    try:
        for path in (candidate, candidate / "state.json"):
            if path.is_symlink():
                return f"{path.name} is a link, which leads out of the folder", {}
        facts = read_json(candidate / "state.json")
        problem = _damage(candidate / "state.json", facts) or _facts_problem(candidate, facts)
        for name, expected in facts["files"].items() if not problem else ():
            problem = problem or _file_problem(candidate, name, expected)
    except (UserError, OSError) as error:
        problem = str(error)
    return (problem, {}) if problem else ("", facts)


def _damage(path: Path, facts: Any) -> str:
    """Whether a state.json is not one, or not as it was written; "" when it is.

    Not a bit may differ: the text must be that which its content gives, and the digest in it that of all the rest.
    """
    if not isinstance(facts, dict) or facts.get("format") not in (_FORMAT, _WITHOUT_DIGEST):
        return f"state.json: expected format {_FORMAT} or {_WITHOUT_DIGEST}"
    if facts["format"] == _WITHOUT_DIGEST:
        return ""
    written = {key: value for key, value in facts.items() if key != "digest"}
    try:
        whole = json_bytes({**written, "digest": digest(json_bytes(written)).hex()})
    except ValueError:  # text that no file can hold
        whole = b""
    return "" if whole == path.read_bytes() else "state.json is damaged (its digest differs)"


def _facts_problem(candidate: Path, facts: dict[str, Any]) -> str:
    """What is wrong with the content of a state.json; "" when nothing is."""
    files, step, loss, weights = (facts.get(key) for key in ("files", "step", "loss", "weights"))
    if not isinstance(files, dict) or not files or step is None:
        return "state.json: expected a step and the digests of its files"
    if type(step) is not int or step < 0 or step_of(candidate) != step:
        return f"state.json: step: expected the number of {candidate.name}, found {shown(step)}"
    if type(facts.get("optimizer_steps")) is not int or not 0 <= facts["optimizer_steps"] <= step:
        return f"state.json: optimizer_steps: expected at most {step}, found {shown(facts.get('optimizer_steps'))}"
    if "loss" not in facts or not (loss is None or type(loss) in (int, float)):
        return f"state.json: loss: expected a number or null, found {shown(loss)}"
    if not isinstance(weights, str) or weights != Path(weights).name:
        return f"state.json: weights: expected a plain file name, found {shown(weights)}"
    return ""


def _file_problem(folder: Path, name: str, expected: Any) -> str:
    """What is wrong with one file of a state, named in its state.json; "" when nothing is."""
    path = folder / Path(name).name
    if not path.is_file():
        return f"{name} is missing"
    if name != path.name:
        return f"{name}: expected a plain file name"
    if path.is_symlink():
        return f"{name} is a link, which leads out of the folder"
    if file_digest(path) != expected:
        return f"{name} is damaged (digest differs)"
    for parameter, tensors in _read_tensors(path):
        watchdog.beat(f"checking {name}")
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        if tensors.keys() != {"weight", *MOMENTS} or len(shapes) != 1:
            return f"{name}: {shown(parameter)}: expected weight, {', '.join(MOMENTS)} of one shape"
        if any(tensor.dtype != torch.float32 or not tensor.isfinite().all() for tensor in tensors.values()):
            return f"{name}: {shown(parameter)}: expected finite fp32 numbers"
    return ""


def load_state(saved: SavedState, engine: Engine) -> None:
    """Sets master weights, moments and computing weights of `engine` from a checked state (every rank reads)."""
    engine.load_full_state(_read_parameters(saved), saved.optimizer_steps)


def _read_parameters(saved: SavedState) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(parameter name, {weight, exp_avg, exp_avg_sq}) of a state, one at a time, fp32 on the CPU."""
    for name in saved.files:
        watchdog.beat(f"loading {name}")
        yield from _read_tensors(saved.folder / Path(name).name)


def _parameters_in(path: Path) -> list[str]:
    """Names of the parameters in one file of a checked state."""
    with safe_open(path, framework="pt") as file:
        keys = sorted(file.keys())
    return list(dict.fromkeys(key.rpartition("|")[0] for key in keys))


def _read_tensors(path: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(parameter name, {kind: tensor}) of one file of a state. UserError when it is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key.rpartition("|") for key in sorted(file.keys())]
            for parameter, group in groupby(keys, key=lambda key: key[0]):
                yield parameter, {kind: file.get_tensor(f"{parameter}|{kind}") for _, _, kind in group}
    except SafetensorError as error:
        raise UserError(f"{path}: expected a safetensors file, found: {error}") from error


def check_same_run(
    saved: SavedState, course: dict[str, Any], total_steps: int, later: Mapping[str, Any] | None = None
) -> None:
    """Refuses to resume where the order of the data, the loss or the reference would differ from the saved run's.

    Args:
        later: what a state that lacks a key means by that, for settings that came after it was written.
    """
    before = {**(later or {}), **saved.facts.course}
    differing = [key for key, value in course.items() if before.get(key) != value]
    if differing:
        most = _MOST_SHOWN // len(differing)
        changes = (f"{key} was {brief(before.get(key), most)}, is now {brief(course[key], most)}" for key in differing)
        raise UserError(
            f"{saved.folder}: cannot resume: {'; '.join(changes)}; resume with the settings, data and model of the "
            "run, or start another run_name"
        )
    if saved.facts.step > total_steps:
        raise UserError(
            f"{saved.folder}: cannot resume: it is of step {saved.facts.step}, but the run has {total_steps} steps"
        )
