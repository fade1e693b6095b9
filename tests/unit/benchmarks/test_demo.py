"""What a second demo keeps and what it replaces; where its model is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo
from simple_llama.cluster.lock import FolderLock
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that the demo ran; each writes the file behind its `--out=`."""
    commands = []

    def write(command: list[str]) -> None:
        commands.append(command[1])
        (out,) = [Path(argument.removeprefix("--out=")) for argument in command if argument.startswith("--out=")]
        out.write_text(f"model {len(commands)}")

    monkeypatch.setattr(demo, "run", write)
    return commands


def test_the_start_model_stays_while_its_files_are_the_same(tmp_path: Path, trained: list[str]) -> None:
    """Two demos train one start model; after a change of a file a third trains another, and the first is kept aside."""
    data, model = tmp_path / "pairs.json", tmp_path / "start.pth"
    data.write_text("[1]")
    demo.make_start(model, [data])
    demo.make_start(model, [data])
    assert (trained, model.read_text()) == (["benchmarks/start_model.py"], "model 1")
    data.write_text("[2]")
    demo.make_start(model, [data])
    assert (len(trained), model.read_text()) == (2, "model 2")
    (aside,) = tmp_path.glob("start-*.pth")
    assert aside.read_text() == "model 1"


def test_a_start_model_of_unknown_origin_is_kept_aside(tmp_path: Path, trained: list[str]) -> None:
    """A model that stands there without the demo's record may be anybody's."""
    data, model = tmp_path / "pairs.json", tmp_path / "start.pth"
    data.write_text("[1]")
    model.write_text("theirs")
    demo.make_start(model, [data])
    assert model.read_text() == "model 1"
    assert [path.read_text() for path in tmp_path.glob("start-*.pth")] == ["theirs"]


def test_clear_removes_the_demos_run_alone(tmp_path: Path) -> None:
    """Another run beside it stays."""
    for name in ("demo", "mine"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "runs" / name).mkdir(parents=True)
    demo.clear(tmp_path / "checkpoints" / "demo", tmp_path / "runs" / "demo")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "checkpoints",
        "checkpoints/mine",
        "runs",
        "runs/mine",
    ]


def test_clear_refuses_a_demo_that_still_trains(tmp_path: Path) -> None:
    """The lock of a live run, here of this process, keeps its folders."""
    lock = FolderLock.take(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="in use"):
        demo.clear(tmp_path / "checkpoints", tmp_path / "runs")
    assert (tmp_path / "checkpoints" / "lock").exists()
    lock.release()


# === The model ===


class Installed:
    """An installed package, as importlib.metadata finds it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def locate_file(self, name: str) -> Path:
        """Where a file of it lies."""
        return self.folder / name


def test_the_model_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in the package, where it is there and can be read; else nothing, and the small model runs."""
    file = tmp_path / demo.MODEL_FILE
    reader: list[Any] = [None]
    monkeypatch.setattr(demo, "distribution", lambda name: Installed(tmp_path))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: reader[0])
    assert demo.packaged_model() is None
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    assert demo.packaged_model() is None  # no package that reads it
    reader[0] = object()
    assert demo.packaged_model() == file
    monkeypatch.undo()
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package-anywhere")
    assert demo.packaged_model() is None


@pytest.mark.parametrize("config", [demo.REAL, demo.TINY], ids=["real", "tiny"])
def test_settings_are_ones_that_a_run_takes(config: dict[str, Any]) -> None:
    """No unknown name, all in bounds; both write below demo/ alone, under names of their own."""
    parsed = DPOConfig(**config)
    assert {Path(parsed.ckpt_dir).parent, Path(parsed.ref_cache_dir).parent, Path(parsed.log_dir).parent} == {
        demo.FOLDER
    }
    assert demo.REAL["run_name"] != demo.TINY["run_name"]
