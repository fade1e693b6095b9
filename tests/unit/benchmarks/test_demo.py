"""What a second demo keeps and what it replaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import demo
from simple_llama.cluster.lock import FolderLock
from simple_llama.common.errors import UserError


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
