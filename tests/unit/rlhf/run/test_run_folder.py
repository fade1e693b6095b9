"""The run's name and its records: no run is overwritten, and no secret is written down."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.files import read_json
from simple_llama.common.settings import _settings_from_dict
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.run import run_folder
from simple_llama.reinforcement_learning.rlhf.run.run_folder import (
    _git_revision,
    environment,
    name_run,
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


# === records ===


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
