"""The folders of states: what is deleted is what a run made, and what is in the way is gone round.

A state made here is a folder with a state.json and a shard of a few bytes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from simple_llama.common.errors import UserError
from simple_llama.interop.hf_export import RUN_FILE
from simple_llama.reinforcement_learning.rlhf.engine.state_folders import (
    begin_state,
    has_checkpoints,
    newest_run,
    prune,
    publish_state,
    states,
    step_of,
)

SHARD = "rank_00000.safetensors"


def make_state(run: Path, step: int, name: str = "") -> Path:
    """A state of a run, or something else under its state/ with the files of one."""
    state = run / "state" / (name or f"step_{step:08d}")
    state.mkdir(parents=True)
    for file in ("state.json", SHARD):
        (state / file).write_text("{}")
    return state


def save(run: Path, step: int) -> Path:
    """Writes a state as a save does; gives its place."""
    temp, final = begin_state(run, step)
    for file in ("state.json", SHARD):
        (temp / file).write_text("{}")
    publish_state(temp, final)
    return final


def below(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def named(run: Path) -> list[str]:
    """What is in state/."""
    return sorted(path.name for path in (run / "state").iterdir())


def test_prune_leaves_what_a_person_made(tmp_path: Path) -> None:
    """Of states 1 to 4 and 9, step 4 being the newest, 3 and 4 stay, though 9 has a higher name. A copy under another
    name, a link to a folder elsewhere, a plain file and a folder of other files, all named much like states, stay."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (1, 2, 3, 4, 9):
        make_state(run, step)
    make_state(run, 3, "step_3_best")
    make_state(run, 3, "step_00000003.bak")
    make_state(elsewhere, 5)
    (run / "state" / "step_00000005").symlink_to(elsewhere / "state" / "step_00000005")
    (run / "state" / "step_00000006").write_text("notes")
    (run / "state" / "step_00000000").mkdir()
    (run / "state" / "step_00000000" / "notes.txt").write_text("mine")
    before = below(elsewhere)
    prune(run, run / "state" / "step_00000004", keep=2)
    kept = ["step_00000003", "step_00000004"]
    mine = ["step_00000000", "step_00000003.bak", "step_00000005", "step_00000006", "step_3_best"]
    assert named(run) == sorted([*kept, *mine])
    assert below(elsewhere) == before and (run / "state" / "step_00000000" / "notes.txt").read_text() == "mine"
    assert below(run / "state" / "step_3_best") == [SHARD, "state.json"]


def test_a_state_with_a_persons_file_loses_its_own_files_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Notes and a link in a state that is no longer needed: they stay, with a word, and what the link leads to too."""
    old, new = make_state(tmp_path, 1), make_state(tmp_path, 2)
    (old / "notes.txt").write_text("mine")
    (tmp_path / "precious").write_text("mine")
    (old / "rank_00001.safetensors").symlink_to(tmp_path / "precious")
    prune(tmp_path, new, keep=1)
    assert below(old) == ["notes.txt", "rank_00001.safetensors"] and (tmp_path / "precious").exists()
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{old}: its state is deleted; the folder stays, for no run made notes.txt, rank_00001")
    prune(tmp_path, new, keep=1)
    assert len(caplog.records) == 1 and below(old) == ["notes.txt", "rank_00001.safetensors"]


def test_behind_a_link_nothing_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`state` itself leads to another run's: neither its states nor the one that it is writing go, and a step that it
    has is not replaced."""
    other, run = tmp_path / "other", tmp_path / "run"
    for step in (1, 2, 3):
        make_state(other, step)
    make_state(other, 4, ".step_00000004.tmp")
    run.mkdir()
    (run / "state").symlink_to(other / "state")
    final = save(run, 3)
    prune(run, final, keep=1)
    assert final.name == "step_00000003-2"
    found = [".step_00000004.tmp", "step_00000001", "step_00000002", "step_00000003", "step_00000003-2"]
    assert named(other) == found
    assert "is a link: states that are no longer needed stay" in caplog.text


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_has_the_place_of_a_state_is_gone_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A person's thing named step_00000003, and one named as its temp folder: the save goes on beside it, with a word;
    the state is found, is newer than step 2 and counts as one of step 3; saved again, it replaces itself."""
    for name in ("step_00000003", ".step_00000003.tmp"):
        path = tmp_path / "state" / name
        path.parent.mkdir(exist_ok=True)
        if kind == "file":
            path.write_text("mine")
        elif kind == "link":
            path.symlink_to(tmp_path)
        else:
            path.mkdir()
            (path / "notes.txt").write_text("mine")
    save(tmp_path, 2)
    for _ in range(2):
        final = save(tmp_path, 3)
        assert final.name == "step_00000003-2" and step_of(final) == 3 and below(final) == [SHARD, "state.json"]
    assert "no run made what is there; the state goes to step_00000003-2" in caplog.text
    prune(tmp_path, final, keep=2)
    assert [state.name for state in states(tmp_path)] == ["step_00000003-2", "step_00000003", "step_00000002"]
    assert os.path.lexists(tmp_path / "state" / ".step_00000003.tmp") and has_checkpoints(tmp_path)


def test_a_state_of_ours_makes_way_for_the_same_step(tmp_path: Path) -> None:
    """Damaged, or left empty by a kill in its deletion."""
    (make_state(tmp_path, 1) / SHARD).write_text("damaged")
    (tmp_path / "state" / "step_00000002").mkdir()
    assert [save(tmp_path, step).name for step in (1, 2)] == ["step_00000001", "step_00000002"]
    assert (tmp_path / "state" / "step_00000001" / SHARD).read_text() == "{}"


def test_the_next_save_deletes_what_killed_ones_left(tmp_path: Path) -> None:
    """Half an exported file, half a `latest` and half a state of another step; a person's files much like them stay."""
    for name in (".step_00000001.tmp", ".step_1.tmp"):
        make_state(tmp_path, 1, name)
    (tmp_path / "state" / ".step_00000001.tmp" / f".{SHARD}.7.ab.tmp").write_bytes(b"half")
    mine = [".dpo_mine.tmp", ".latest.tmp", ".mine.tmp", "lock"]
    for name in (".dpo_1E_0.6931L_512MSQ.pth.7.ab.tmp", ".latest.7.ab.tmp", *mine):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".latest.8.ab.tmp").symlink_to(tmp_path / "lock")
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, ".latest.8.ab.tmp", "state"])
    assert named(tmp_path) == [".step_1.tmp", "step_00000002"]


def test_a_plain_file_is_no_checkpoint(tmp_path: Path) -> None:
    """A run may start beside a file, or a copy of a state; not beside a state, nor a link to one."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "step_00000001").write_text("notes")
    make_state(tmp_path, 1, "step_1_best")
    assert not has_checkpoints(tmp_path)
    (tmp_path / "state" / "step_00000002").symlink_to(tmp_path / "state" / "step_1_best")
    assert has_checkpoints(tmp_path)


def test_newest_run_is_the_one_that_saved_last(tmp_path: Path) -> None:
    """`b` saved before `a`; `c` never did; without any there is an error that names the folder."""
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: expected a run to resume (<run>/latest), found none")):
        newest_run(tmp_path)
    for name, seconds in (("a", 2000), ("b", 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest").write_text("step_00000001\n")
        os.utime(tmp_path / name / "latest", (seconds, seconds))
    (tmp_path / "c").mkdir()
    assert newest_run(tmp_path) == "a"
    os.utime(make_state(tmp_path / "killed", 1), (3000, 3000))  # before it wrote `latest`
    assert newest_run(tmp_path) == "killed"


def test_half_written_exports_go_and_whole_ones_are_checkpoints(tmp_path: Path) -> None:
    """A killed process's folder, of which it wrote a part, goes with the next save, unless a person keeps something in
    it; a whole one is a checkpoint as a `.pth` is, a folder of other origin is none."""
    run = tmp_path / "run"
    facts = '{"format": 1, "files": ["config.json", "model.safetensors"], "metadata": {}}'
    for name in (".dpo_1E_16MSQ.7.0a.tmp", ".dpo_2E_16MSQ.7.0a.tmp", "dpo_mine"):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text("{}")
    assert not has_checkpoints(run)
    for name in (".dpo_1E_16MSQ.7.0a.tmp", ".dpo_2E_16MSQ.7.0a.tmp"):
        (run / name / RUN_FILE).write_text(facts)
    (run / ".dpo_2E_16MSQ.7.0a.tmp" / "notes.txt").write_text("mine")
    save(run, 1)
    assert sorted(path.name for path in run.iterdir()) == [".dpo_2E_16MSQ.7.0a.tmp", "dpo_mine", "state"]
    other = tmp_path / "other"
    (other / "dpo_1E_16MSQ").mkdir(parents=True)
    (other / "dpo_1E_16MSQ" / RUN_FILE).write_text(facts)
    assert has_checkpoints(other)
