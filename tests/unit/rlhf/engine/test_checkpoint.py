"""States on disk: only whole, undamaged ones of our format are used, and nothing outside their folder is read.

A state made here holds one parameter, `norm`, with weight [1, 2], first moment [3, 4] and second moment [5, 6].
"""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simple_llama.cluster.background import Background
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.files import file_digest
from simple_llama.reinforcement_learning.rlhf.engine import checkpoint
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import (
    SavedState,
    StateFacts,
    StateWeights,
    _check_state,
    _damage,
    _read_parameters,
    check_same_run,
    newest_state,
    write_state,
)
from simple_llama.reinforcement_learning.rlhf.engine.state_copy import StateCopy
from simple_llama.reinforcement_learning.rlhf.engine.state_folders import states

SHARD = "rank_00000.safetensors"


def parameter(first: float) -> dict[str, torch.Tensor]:
    """Weight and moments that count up from `first`."""
    values = torch.arange(first, first + 6).view(3, 2)
    return {"weight": values[0], "exp_avg": values[1], "exp_avg_sq": values[2]}


def write_shard(path: Path, **parameters: dict[str, torch.Tensor]) -> str:
    """Writes parameters as a save does; returns the file's digest."""
    named = {f"{name}|{kind}": tensor.clone() for name, state in parameters.items() for kind, tensor in state.items()}
    save_file(named, path)
    return file_digest(path)


def facts(step: int, **course: Any) -> StateFacts:
    """What a state says of a run."""
    return StateFacts(step, weights="dpo.pth", loss=0.5, unfinished=False, course=course)


def progress(step: int) -> dict[str, Any]:
    """The same in state.json, as older ones have it."""
    return {"step": step, "optimizer_steps": step, "loss": 0.5, "weights": "dpo.pth"}


def save(
    run: Path, of: StateFacts, ranks: Ranks, keep: int = 1, before: SavedState | None = None, **parameters: Any
) -> SavedState:
    """Saves `parameters` (default: `norm`, counting up from 1)."""
    engine = engine_of(**(parameters or {"norm": parameter(1.0)}))
    return written(write_state(run, StateCopy(engine, ranks), of, keep, ranks, before, lambda: None), ranks)


def written(stages: Any, ranks: Ranks) -> SavedState:
    """What such work gives at its end."""
    found, background = list[SavedState](), Background(ranks)

    def noted() -> Any:
        found.append((yield from stages))

    background.begin(noted())
    background.wait()
    return found[0]


def make_state(run: Path, step: int, **changes: Any) -> Path:
    """A complete state of a run; `changes` replace or add facts."""
    state = run / "state" / f"step_{step:08d}"
    state.mkdir(parents=True)
    files = {SHARD: write_shard(state / SHARD, norm=parameter(1.0))}
    found = {"format": 1, **progress(step), "files": files, **changes}
    (state / "state.json").write_text(json.dumps(found))
    return state


def saved_in(state: Path, *files: str) -> SavedState:
    """A state of these files, whose facts do not matter."""
    return SavedState(state, facts(7), dict.fromkeys(files, ""), 7)


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# === one state ===


def test_a_whole_state_has_no_problem_and_gives_its_facts(tmp_path: Path) -> None:
    """No problem; the facts are those of state.json."""
    problem, found = _check_state(make_state(tmp_path, 7))
    assert problem == "" and found["step"] == 7 and list(found["files"]) == [SHARD]


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    """A bit flipped, then the file gone; no facts are given of either."""
    state = make_state(tmp_path, 7)
    flip(state / SHARD)
    assert _check_state(state) == (f"{SHARD} is damaged (digest differs)", {})
    (state / SHARD).unlink()
    assert _check_state(state) == (f"{SHARD} is missing", {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["state.json", "No such file"]),
        ('{"format": 1, "fil', ["state.json", "line 1", "not JSON"]),
        ("", ["state.json", "not JSON"]),
        ("[1]", ["state.json: expected format 2 or 1"]),
        ('{"step": 7, "files": {}}', ["state.json: expected format 2 or 1"]),
        ('{"format": 3, "step": 7, "files": {}}', ["state.json: expected format 2 or 1"]),
        ('{"format": 2, "step": 7, "files": {}}', ["state.json is damaged (its digest differs)"]),
        ('{"format": "1", "step": 7, "files": {}}', ["state.json: expected format 2 or 1"]),
    ],
    ids=["absent", "cut", "empty", "list", "no format", "later format", "no digest", "text for a number"],
)
def test_a_state_json_that_is_absent_damaged_or_foreign_is_a_problem(
    tmp_path: Path, text: str | None, words: list[str]
) -> None:
    """Never an exception: the caller goes on with an older state."""
    state = make_state(tmp_path, 7)
    (state / "state.json").unlink()
    if text is not None:
        (state / "state.json").write_text(text)
    problem, found = _check_state(state)
    assert all(word in problem for word in words), problem
    assert found == {}


@pytest.mark.parametrize("name", ["../stranger", "../../stranger", "/{root}/stranger", "..", ""])
def test_a_file_name_that_points_elsewhere_finds_nothing(tmp_path: Path, name: str) -> None:
    """`stranger` lies beside and above the state with the digest that state.json asks for: it must not be found."""
    run = tmp_path / "run"
    state = make_state(run, 7)
    for folder in (state.parent, run, tmp_path):
        expected = write_shard(folder / "stranger", norm=parameter(100.0))
    name = name.replace("/{root}", str(tmp_path))
    (state / "state.json").write_text(json.dumps({"format": 1, **progress(7), "files": {name: expected}}))
    assert _check_state(state) == (f"{name} is missing", {})


def test_parameters_are_read_from_the_state_folder_only(tmp_path: Path) -> None:
    """A name "../norms" reads `norms` inside the folder (weight [1, 2]), not the one outside (weight [100, 101])."""
    state = make_state(tmp_path, 7)
    write_shard(state.parent / "norms", norm=parameter(100.0))
    write_shard(state / "norms", norm=parameter(1.0))
    [(_, tensors)] = _read_parameters(saved_in(state, "../norms"))
    assert tensors["weight"].tolist() == [1.0, 2.0]


# === newest_state ===


def test_the_highest_step_is_the_newest(tmp_path: Path) -> None:
    """By step, not by the order of writing; what is being written (.step_*.tmp) is no state."""
    for step in (20, 100, 3):
        make_state(tmp_path, step)
    (tmp_path / "state" / ".step_00000200.tmp").mkdir()
    assert [folder.name for folder in states(tmp_path)] == ["step_00000100", "step_00000020", "step_00000003"]
    saved = newest_state(tmp_path)
    assert saved.folder.name == "step_00000100" and saved.facts.step == 100


def test_damaged_states_are_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest has a flipped bit, the next no state.json, the third another format: the fourth is taken."""
    for step in (1, 2, 4):
        make_state(tmp_path, step)
    make_state(tmp_path, 3, format=99)
    make_state(tmp_path, 5)
    flip(tmp_path / "state" / "step_00000005" / SHARD)
    (tmp_path / "state" / "step_00000004" / "state.json").unlink()
    assert newest_state(tmp_path).facts.step == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert f"{tmp_path}/state/step_00000005 is not used: {SHARD} is damaged" in warnings[0]
    assert "step_00000004 is not used: cannot read" in warnings[1]
    assert "step_00000003 is not used: state.json: expected format 2 or 1" in warnings[2]


def test_no_complete_state_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    """A run whose only state is damaged, and a folder that is not there."""
    flip(make_state(tmp_path / "run", 1) / SHARD)
    for folder in (tmp_path / "run", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=re.escape(f"{folder}: expected a state to resume from (state/step_*)")):
            newest_state(folder)


# === parameters, saving ===


def test_parameters_come_whole_from_several_files(tmp_path: Path) -> None:
    """Two files: a and a.b (one name starts with the other), then norm; values as written, fp32."""
    state = make_state(tmp_path, 7)
    other = state / "rank_00001.safetensors"
    write_shard(other, **{"a.b": parameter(20.0), "a": parameter(10.0)})
    found = dict(_read_parameters(saved_in(state, SHARD, other.name)))
    assert sorted(found) == ["a", "a.b", "norm"]
    for name, first in (("norm", 1.0), ("a", 10.0), ("a.b", 20.0)):
        state_of = {kind: tensor.tolist() for kind, tensor in found[name].items()}
        assert state_of == {
            "weight": [first, first + 1],
            "exp_avg": [first + 2, first + 3],
            "exp_avg_sq": [first + 4, first + 5],
        }


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    """Text under the name of a shard."""
    state = make_state(tmp_path, 7)
    (state / SHARD).write_text("not a tensor")
    with pytest.raises(UserError, match=f"{SHARD}: expected a safetensors file, found"):
        list(_read_parameters(saved_in(state, SHARD)))


def engine_of(**parameters: dict[str, torch.Tensor]) -> Any:
    """What a save reads of an engine."""
    shapes = {name: tuple(tensors["weight"].shape) for name, tensors in parameters.items()}
    dealt = {"whole_here": list, "gathered_state": parameters.get, "make_room": lambda: None}
    return SimpleNamespace(trained_shapes=shapes, **dealt)


def test_what_a_save_writes_is_read_back(tmp_path: Path, ranks: Ranks) -> None:
    """Same values, `latest` names it, the weights are read from it, and of three states two are kept."""
    for step in (1, 2, 3):
        of = facts(step, beta=0.5)
        made = save(tmp_path, of, ranks, keep=2, norm=parameter(float(step)), head=parameter(50.0))
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    assert sorted(folder.name for folder in (tmp_path / "state").iterdir()) == ["step_00000002", "step_00000003"]
    saved = newest_state(tmp_path)
    assert saved.facts == facts(3, beta=0.5) and saved.optimizer_steps == 3
    found = dict(_read_parameters(saved))
    assert found["norm"]["weight"].tolist() == [3.0, 4.0] and found["head"]["exp_avg_sq"].tolist() == [54.0, 55.0]
    assert {name: weight.tolist() for name, weight in StateWeights(made).items()} == {
        "norm": [3.0, 4.0],
        "head": [50.0, 51.0],
    }


def test_state_json_is_what_it_was(tmp_path: Path, ranks: Ranks) -> None:
    """The names and their order are part of the format: older and newer programs read each other's states."""
    save(tmp_path, StateFacts(2, "", None, True, {"seed": 42, "data": "ab"}), ranks)
    found = json.loads((tmp_path / "state" / "step_00000002" / "state.json").read_text())
    own = ["format", "step", "optimizer_steps", "weights", "loss", "unfinished"]
    assert list(found) == [*own, "seed", "data", "files", "digest"]
    assert [found[name] for name in own] == [2, 2, 2, "", None, True]
    assert list(found["files"]) == [SHARD]


def test_every_bit_of_state_json_counts(tmp_path: Path, ranks: Ranks) -> None:
    """Each bit is flipped in turn: the digest of the rest, or the text that the content gives, is another one then. An
    exponent's e is written E by one bit, a line break is not any other white space by one."""
    course = {"max_lr": 5e-07, "data": "ab\n", "reference": {"dtype": "float32"}, "none": None, "yes": True}
    path = save(tmp_path, StateFacts(2, "dpo_1E.pth", 0.5, False, course), ranks).folder / "state.json"
    whole = path.read_bytes()
    assert b"5e-07" in whole and _check_state(path.parent)[0] == ""
    memory = SimpleNamespace(read_bytes=lambda: bytes(flipped))
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = json.loads(flipped.decode())
        except ValueError:
            continue  # no JSON, or no text: refused before
        assert _damage(memory, found), flipped.decode()  # pyright: ignore[reportArgumentType]


def test_a_flipped_state_json_is_passed_over(tmp_path: Path, ranks: Ranks) -> None:
    """`optimizer_steps` 3 reads 2 by one bit, which made a resumed run's AdamW steps others than they were."""
    for step in (1, 3):
        save(tmp_path, facts(step), ranks, keep=2)
    path = tmp_path / "state" / "step_00000003" / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"optimizer_steps": 3', b'"optimizer_steps": 2'))
    assert newest_state(tmp_path).facts.step == 1
    assert _check_state(path.parent)[0] == "state.json is damaged (its digest differs)"


def test_text_that_no_file_holds_is_damage(tmp_path: Path) -> None:
    """Half a character, written as JSON lets it be: found, and no traceback."""
    state = make_state(tmp_path, 7, format=2, seed="\ud800")
    assert _check_state(state)[0] == "state.json is damaged (its digest differs)"


def test_a_state_that_is_there_is_completed_not_written_anew(tmp_path: Path, ranks: Ranks) -> None:
    """Saved when stopped, without its `.pth`; after the evaluation that was due, its facts change and no tensor."""
    saved = save(tmp_path, StateFacts(2, "", None, True, {}), ranks)
    shard = saved.folder / SHARD
    before = shard.stat().st_ino, shard.read_bytes()
    again = save(tmp_path, facts(2), ranks, before=saved)
    assert (shard.stat().st_ino, shard.read_bytes()) == before and StateWeights(again)["norm"].tolist() == [1.0, 2.0]
    assert newest_state(tmp_path) == again and again.facts == facts(2)


def test_an_older_state_that_is_completed_has_todays_format(tmp_path: Path, ranks: Ranks) -> None:
    """Loaded without a digest of its facts, it is written with one."""
    make_state(tmp_path, 2)
    save(tmp_path, facts(2), ranks, before=newest_state(tmp_path))
    assert json.loads((tmp_path / "state" / "step_00000002" / "state.json").read_text())["format"] == 2
    assert newest_state(tmp_path).facts == facts(2)


def test_a_damaged_state_of_the_same_step_is_written_anew(tmp_path: Path, ranks: Ranks) -> None:
    """Resumed from the one before, a run comes to its step again: what lies there was not this run's."""
    save(tmp_path, facts(2), ranks)
    flip(tmp_path / "state" / "step_00000002" / SHARD)
    save(tmp_path, facts(2), ranks)
    assert newest_state(tmp_path).facts.step == 2


def test_another_run_that_took_the_folder_over_keeps_its_states(tmp_path: Path, ranks: Ranks) -> None:
    """The lock is looked at before the state gets its name: nothing of this save is left, the other's stays."""
    save(tmp_path, facts(1), ranks)

    def taken() -> None:
        raise UserError("taken over")

    copy = StateCopy(engine_of(norm=parameter(1.0)), ranks)
    with pytest.raises(UserError, match="taken over"):
        written(write_state(tmp_path, copy, facts(2), 1, ranks, None, taken), ranks)
    assert newest_state(tmp_path).facts.step == 1 and (tmp_path / "latest").read_text() == "step_00000001\n"
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_00000001"]


def test_a_disk_that_is_full_for_a_shard_is_a_user_error(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it is written when the disk says so: nothing of the state stays, and its room is free."""

    def full(path: Path, chunks: object) -> str:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "write_digested", full)
    with pytest.raises(
        UserError, match=r"cannot write .*rank_00000.safetensors: .*No space left on device.*free space"
    ):
        save(tmp_path, facts(1), ranks)
    assert list((tmp_path / "state").iterdir()) == []


# === names and settings ===


def test_another_setting_is_refused_with_both_values(tmp_path: Path) -> None:
    """The same course passes, also beside more; a changed and an unknown one are named with what was and what is."""
    saved = SavedState(tmp_path, facts(3, beta=0.5, reference={"weights": "ab"}), {}, 3)
    check_same_run(saved, {"beta": 0.5, "reference": {"weights": "ab"}}, 3)
    advice = "; resume with the settings, data and model of the run, or start another run_name"
    with pytest.raises(UserError) as error:
        check_same_run(saved, {"beta": 0.1}, 3)
    assert str(error.value) == f"{tmp_path}: cannot resume: beta was 0.5, is now 0.1{advice}"
    with pytest.raises(UserError) as error:
        check_same_run(saved, {"reference": {"weights": "cd"}}, 3)
    assert 'reference was {"weights": "ab"}, is now {"weights": "cd"};' in str(error.value)
    with pytest.raises(UserError, match="seed was null, is now 1;"):
        check_same_run(saved, {"seed": 1}, 3)
    with pytest.raises(UserError) as error:
        check_same_run(saved, {"beta": 0.1, "reference": {"weights": "x" * 5000}, "seed": 1}, 3)
    assert "beta was 0.5, is now 0.1; reference was {" in str(error.value) and "; seed was null" in str(error.value)
    assert len(str(error.value)) < 1500  # all that differ at once, in a message that can be read
    check_same_run(saved, {"tau": 0.1}, 3, later={"tau": 0.1})  # a setting that came after the state was written
    with pytest.raises(UserError, match="tau was 0.1, is now 0.2;"):
        check_same_run(saved, {"tau": 0.2}, 3, later={"tau": 0.1})
    with pytest.raises(UserError, match="it is of step 3, but the run has 2 steps"):
        check_same_run(saved, {}, 2)


@pytest.mark.parametrize("files", [None, [], {}, [SHARD]])
def test_a_state_without_its_files_is_no_state(tmp_path: Path, files: Any) -> None:
    """state.json that names no file, or names them otherwise: passed over, not trusted and not a traceback."""
    problem, found = _check_state(make_state(tmp_path, 7, files=files))
    assert problem == "state.json: expected a step and the digests of its files" and found == {}
