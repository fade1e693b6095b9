"""The run's name and its records: no run is overwritten, and no secret is written down."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.files import read_json
from simple_llama.common.settings import _settings_from_dict, with_absolute_paths
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.run import run_folder
from simple_llama.reinforcement_learning.rlhf.run.run_folder import (
    _git_revision,
    environment,
    folders_of,
    keep_settings,
    name_run,
    own_folders,
    say_settings,
    settings_to_resume,
    unmark_finished,
    write_records,
)


def config_of(folder: Path, **changes: Any) -> DPOConfig:
    """Settings whose checkpoints go below `folder`."""
    return DPOConfig(ckpt_dir=str(folder), **changes)


def finished_run(folder: Path, name: str, seconds: int) -> None:
    """A run that saved a state at a time."""
    (folder / name).mkdir()
    (folder / name / "latest").write_text("step_00000001\n")
    os.utime(folder / name / "latest", (seconds, seconds))


# === names ===


def test_a_run_with_checkpoints_is_not_overwritten(tmp_path: Path, ranks: Ranks) -> None:
    """The name is refused while its folder holds a checkpoint; with resume it is taken; an empty folder is no run,
    nor is one that a kill left in the middle of its first save."""
    finished_run(tmp_path, "a", 1000)
    expected = f"{tmp_path}/a: a run of this name has checkpoints; pass --resume to continue it, or another --run_name"
    with pytest.raises(UserError) as error:
        name_run(config_of(tmp_path, run_name="a"), ranks)
    assert str(error.value) == expected
    assert name_run(config_of(tmp_path, run_name="a", resume=True), ranks) == "a"
    (tmp_path / "empty").mkdir()
    assert name_run(config_of(tmp_path, run_name="empty"), ranks) == "empty"
    (tmp_path / "killed" / "state" / ".step_00000001.tmp").mkdir(parents=True)
    (tmp_path / "killed" / "dpo_1E_0.6931L_512MSQ.pth").touch()  # written before its state can be seen
    assert name_run(config_of(tmp_path, run_name="killed"), ranks) == "killed"
    assert name_run(config_of(tmp_path, run_name="new"), ranks) == "new"
    for path in ("weights/dpo_1E_0.6931L_512MSQ.pth", "state/state/step_00000001/state.json"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
        with pytest.raises(UserError, match="has checkpoints"):
            name_run(config_of(tmp_path, run_name=path.split("/")[0]), ranks)


def test_resume_without_a_name_takes_the_newest_run(tmp_path: Path, ranks: Ranks) -> None:
    """`b` saved last, then `a`; a name that is given wins; without any run there is an error."""
    with pytest.raises(UserError, match="expected a run to resume"):
        name_run(config_of(tmp_path / "none", resume=True), ranks)
    finished_run(tmp_path, "a", 2000)
    finished_run(tmp_path, "b", 3000)
    assert name_run(config_of(tmp_path, resume=True), ranks) == "b"
    os.utime(tmp_path / "a" / "latest", (4000, 4000))
    assert name_run(config_of(tmp_path, resume=True), ranks) == "a"
    assert name_run(config_of(tmp_path, run_name="b", resume=True), ranks) == "b"


def test_a_new_run_without_a_name_is_named_by_the_clock(tmp_path: Path, ranks: Ranks) -> None:
    """Date and time, even where other runs could be resumed; nothing is made yet."""
    finished_run(tmp_path, "a", 1000)
    assert re.fullmatch(r"20\d{6}-\d{6}", name_run(config_of(tmp_path), ranks))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# === whose a folder is ===


def started_run(folder: Path, name: str, **changes: Any) -> DPOConfig:
    """A run that has written its first records: checkpoints in `folder`/ckpt, records in `folder`/runs."""
    config = DPOConfig(ckpt_dir=str(folder / "ckpt"), log_dir=str(folder / "runs"), run_name=name, **changes)
    write_records(folder / "runs" / name, with_absolute_paths(config), {})
    (folder / "runs" / name / "metrics.jsonl").write_text('{"step": 1}\n')
    keep_settings(config, name, with_absolute_paths(config))
    return config


def saved_state(config: DPOConfig) -> None:
    """A sign of a checkpoint."""
    folders_of(config, config.run_name)[0].joinpath("latest").write_text("step_00000001\n")


def refused(config: DPOConfig, ranks: Ranks) -> str:
    """What a run of these settings is told; "" where it may write."""
    try:
        with own_folders(config, config.run_name, ranks):
            return ""
    except UserError as error:
        return str(error)


def test_records_of_another_checkpoint_folder_are_left_alone(tmp_path: Path, ranks: Ranks) -> None:
    """Same name and log_dir, other ckpt_dir: refused, new or resumed, before anything is written, and named. The run
    itself may start again before its first checkpoint, and go on after it."""
    config = started_run(tmp_path, "a")
    other = replace(config, ckpt_dir=str(tmp_path / "other"))
    for found in (other, replace(other, resume=True)):
        message = refused(found, ranks)
        assert f"{tmp_path}/runs/a: holds the records of the run whose checkpoints are in {tmp_path}/ckpt/a" in message
    assert not (tmp_path / "other").exists() and (tmp_path / "runs" / "a" / "metrics.jsonl").exists()
    assert refused(config, ranks) == ""
    saved_state(config)
    assert "has checkpoints" in refused(config, ranks) and refused(replace(config, resume=True), ranks) == ""


def test_a_log_folder_has_one_live_run(tmp_path: Path, ranks: Ranks) -> None:
    """While one run writes, another with the same log folder is refused by the lock, whatever its checkpoint folder.
    The locks go with the run; a folder for both is locked once, and a check finds a lock that was taken away."""
    config = config_of(tmp_path / "ckpt", log_dir=str(tmp_path / "runs"), run_name="a")
    with own_folders(config, "a", ranks) as check:
        message = refused(replace(config, ckpt_dir=str(tmp_path / "other")), ranks)
        assert f"{tmp_path}/runs/a is in use by a run on host" in message
        check()
        (tmp_path / "runs" / "a" / "lock").unlink()
        with pytest.raises(UserError, match="runs/a is no longer locked by this run"):
            check()
    assert list(tmp_path.iterdir()) == []
    with own_folders(replace(config, ckpt_dir=config.log_dir), "a", ranks) as check:
        check()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_moved_or_copied(tmp_path: Path, ranks: Ranks) -> None:
    """Both folders moved, or both copied, or the checkpoints alone moved: the run goes on. The checkpoints alone
    copied, so that two runs would write one log folder: refused."""
    saved_state(started_run(tmp_path / "old", "a"))
    shutil.copytree(tmp_path / "old", tmp_path / "copied")
    copied = config_of(tmp_path / "copied" / "ckpt", log_dir=str(tmp_path / "copied" / "runs"), run_name="a")
    assert refused(replace(copied, resume=True), ranks) == ""
    branch = config_of(tmp_path / "copied" / "ckpt", log_dir=str(tmp_path / "old" / "runs"), run_name="a", resume=True)
    assert "holds the records of the run whose checkpoints are in" in refused(branch, ranks)
    shutil.rmtree(tmp_path / "old" / "ckpt")
    assert refused(branch, ranks) == ""
    assert refused(replace(branch, log_dir=str(tmp_path / "none")), ranks) == ""


def test_records_of_an_earlier_version(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy beside the checkpoints, and relative paths: the run goes on from where it was started, and where the
    checkpoints or both folders were moved."""
    monkeypatch.chdir(tmp_path)
    config = DPOConfig(ckpt_dir="ckpt", log_dir="runs", run_name="a", resume=True)
    write_records(tmp_path / "runs" / "a", asdict(config), {})
    assert refused(config, ranks) == ""
    (tmp_path / "ckpt2" / "a").mkdir(parents=True)
    alone = DPOConfig(ckpt_dir="ckpt2", log_dir="runs", run_name="a", resume=True)
    assert "holds the records" in refused(alone, ranks)
    (tmp_path / "ckpt2" / "a" / "latest").write_text("step_00000001\n")
    assert refused(alone, ranks) == ""  # the checkpoints alone were moved
    (tmp_path / "runs").rename("moved")
    assert refused(config_of(tmp_path / "away", log_dir="moved", run_name="a", resume=True), ranks) == ""
    assert "holds the records" in refused(config_of(tmp_path / "away", log_dir="moved", run_name="a"), ranks)


def test_records_that_do_not_say_whose_they_are(tmp_path: Path, ranks: Ranks) -> None:
    """A new run does not drop them; a resumed one goes on with them."""
    config = started_run(tmp_path, "a")
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(tmp_path / "runs" / "a" / "config.json")
        assert "found records without it; move them away" in refused(config, ranks)
        assert refused(replace(config, resume=True), ranks) == ""


@pytest.mark.parametrize("name", ["log_dir", "ckpt_dir"])
def test_a_folder_that_cannot_be_made_is_a_message(tmp_path: Path, ranks: Ranks, name: str) -> None:
    """/proc takes no folders, from root neither."""
    config = replace(config_of(tmp_path / "ckpt", log_dir=str(tmp_path / "runs")), run_name="a", **{name: "/proc"})
    assert "cannot write /proc/a/lock: " in refused(config, ranks)
    assert list(tmp_path.iterdir()) == []


# === settings of a run that goes on ===


def test_a_run_goes_on_with_its_own_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the checkpoint folder's copy, whose log_dir counts; what is of one start stays out; what another version
    knew is left out with a word."""
    config = started_run(tmp_path, "a", beta=0.25, dry_run=True)
    path = tmp_path / "ckpt" / "a" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "timeout_s": 5}))
    asked = config_of(tmp_path / "ckpt", run_name="a", resume=True)
    settings, source = settings_to_resume(asked, DPOConfig)
    assert source == str(path) and settings["beta"] == 0.25 and settings["log_dir"] == config.log_dir
    assert not {"resume", "dry_run", "debug", "timeout_s"} & settings.keys()
    with caplog.at_level("INFO"):
        say_settings(asked)
    assert f"settings are those of {path}" in caplog.text and "have no effect: ['timeout_s']" in caplog.text


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    """Said before a model is read, with the runs that there are; the newest is asked for where there is none."""
    with pytest.raises(UserError, match="expected a run to resume"):
        say_settings(config_of(tmp_path, resume=True))
    for seconds, name in enumerate(("a", "b")):
        finished_run(tmp_path, name, 1000 + seconds)
    with pytest.raises(UserError, match=rf"/none: expected a state .* no run of that name; {tmp_path} has b, a$"):
        say_settings(config_of(tmp_path, run_name="none", resume=True))


def test_settings_of_earlier_versions_and_of_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a copy the log folder's count, and it is where they were found; without both a warning says so. A damaged
    copy is passed over for the other, and named where there is none."""
    config = started_run(tmp_path, "a", beta=0.25)
    saved_state(config)
    copy, first = (folder / "config.json" for folder in folders_of(config, "a"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    first = tmp_path / "moved" / "a" / "config.json"
    asked = replace(config, beta=0.5, resume=True, log_dir=str(tmp_path / "moved"))
    copy.write_text("{")
    for _ in range(2):
        settings, source = settings_to_resume(asked, DPOConfig)
        assert source == str(first) and settings["beta"] == 0.25 and settings["log_dir"] == asked.log_dir
        copy.unlink(missing_ok=True)
    first.unlink()
    later = {"ascii_text": False, "max_unknown": 1.0}  # such a run was started before these
    assert settings_to_resume(asked, DPOConfig) == ({**later, "run_name": "a"}, "")
    say_settings(asked)
    assert f"no config.json in {tmp_path}/ckpt/a or in {tmp_path}/moved/a" in caplog.text
    first.write_text("[1]")
    with pytest.raises(
        UserError, match=r"expected a JSON object of settings, found list; it has the settings to resume"
    ):
        settings_to_resume(asked, DPOConfig)


def test_paths_of_a_checkout_that_was_moved_are_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store lay in a folder that is gone and the default one is there; another path that leads nowhere stays."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    config = started_run(tmp_path, "a", ref_cache_dir=str(tmp_path / "gone"), model_path=str(tmp_path / "gone.pth"))
    (tmp_path / "store").mkdir()
    defaults = {"ref_cache_dir": str(tmp_path / "store"), "model_path": str(tmp_path / "none.pth")}
    monkeypatch.setattr(run_folder, "path_defaults", lambda kind: defaults)
    own, _ = settings_to_resume(replace(config, resume=True), DPOConfig)
    assert "ref_cache_dir" not in own and own["model_path"] == str(tmp_path / "gone.pth")
    assert f"ref_cache_dir: {tmp_path}/gone of the run's settings is no longer there; taken: {tmp_path}/store" in (
        caplog.text
    )


# === records ===


def test_a_mark_that_cannot_be_removed_is_a_message(tmp_path: Path) -> None:
    """A folder in its place."""
    (tmp_path / "finished.json").mkdir()
    with pytest.raises(UserError, match=r"cannot remove .*finished.json: "):
        unmark_finished(tmp_path)


def test_records_hold_what_repeats_the_run(tmp_path: Path) -> None:
    """The settings read back as the same config, the DeepSpeed dict as it was, versions and revision beside them."""
    config = DPOConfig(beta=0.125, run_name="r", max_lr=1e-5)
    folder = tmp_path / "runs" / "r"
    write_records(folder, asdict(config), {"zero_optimization": {"stage": 2}})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "ds_config.json", "environment.json"]
    assert _settings_from_dict(DPOConfig, read_json(folder / "config.json"), "config.json") == config
    assert json.loads((folder / "ds_config.json").read_text()) == {"zero_optimization": {"stage": 2}}
    assert json.loads((folder / "environment.json").read_text()) == environment()


def test_environment_names_versions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """These keys and no others; each is text, or null for what is not installed."""
    found = environment()
    assert list(found) == [
        "python",
        "machine",
        "torch",
        "deepspeed",
        "tokenizers",
        "numpy",
        "safetensors",
        "tensorboard",
        "simple-llama-dpo",
        "git",
    ]
    assert all(value is None or isinstance(value, str) for value in found.values())
    assert all(found[name] for name in ("python", "machine", "torch", "deepspeed"))


def test_no_environment_variable_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets under usual names: neither name nor value is in any file."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, f"hunter2-{name.lower()}")
    write_records(tmp_path, asdict(DPOConfig()), {"bf16": {"enabled": True}})
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"bf16" in written and b'"python"' in written
    for word in (b"hunter2", b"API_KEY", b"TOKEN", b"SECRET", b"PASSWORD"):
        assert word not in written


def test_git_revision_of_this_project_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A revision is one word; outside a checkout, and without git, there is none."""
    revision = _git_revision()
    assert revision is None or re.fullmatch(r"[\w.-]+", revision)
    with monkeypatch.context() as installed:
        installed.setattr(run_folder, "is_checkout", lambda: False)  # the working folder may be any other checkout
        assert _git_revision() is None
    monkeypatch.setattr(run_folder, "root_path", lambda: str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert _git_revision() is None

    def no_git(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert _git_revision() is None
