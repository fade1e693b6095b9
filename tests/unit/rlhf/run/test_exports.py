"""The exports of a run: no two steps share a name, none replaces another, and what is deleted is the run's."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from simple_llama.interop import hf_export
from simple_llama.interop.hf_export import ExportForm, write_folder
from simple_llama.interop.hf_names import LLAMA
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import save_weights
from simple_llama.reinforcement_learning.rlhf.run.exports import (
    free_path,
    is_export,
    may_be_a_runs,
    prune_exports,
    weights_name,
)

CONFIG = TrainingConfig(n_embd=8, n_heads=2, n_layers=1, multiple_of=8, max_seq_len=16)
MODEL = LLaMaTransformer(Architecture.of(CONFIG, 11))
FILES = StartFile.__new__(StartFile)  # how exports are named and known does not depend on the file
FOLDERS = cast(StartModel, SimpleNamespace(export_suffix="", export_metadata=hf_export.export_metadata))


def export(path: Path, step: int, **metadata: Any) -> Path:
    """What a run writes after a step, but for its tensors."""
    of_run = {"run": path.parent.name, "file": path.name, "step": step, **metadata}
    kept = {key: value for key, value in of_run.items() if value is not None}
    save_weights(path, {"norm.weight": torch.ones(2)}, CONFIG, kept)
    return path


def folder_export(path: Path, step: int, **metadata: Any) -> Path:
    """The same of a model that came as a folder."""
    form = ExportForm(MODEL.architecture, LLAMA, {}, torch.bfloat16, {})
    write_folder(path, MODEL.state_dict(), form, {"run": path.parent.name, "file": path.name, "step": step, **metadata})
    return path


@pytest.mark.parametrize(
    ("step", "steps_per_epoch", "loss", "expected"),
    [
        (6, 3, 0.53123, "dpo_2E_0.5312L_512MSQ.pth"),
        (50, 100, 0.693147, "dpo_0.5E_0.6931L_512MSQ.pth"),
        (50, 100, None, "dpo_0.5E_512MSQ.pth"),
        (1, 3, 12.0, "dpo_0.3333E_12.0000L_512MSQ.pth"),
        (30, 3, 0.00004, "dpo_10E_0.0000L_512MSQ.pth"),
        (2211, 2211, None, "dpo_1E_512MSQ.pth"),
        (2210, 2211, None, "dpo_0.9995E_512MSQ.pth"),
        (22110, 2211, None, "dpo_10E_512MSQ.pth"),
        (22109, 2211, None, "dpo_9.9995E_512MSQ.pth"),  # 9.99955, which has 10 as its four digits
        (1000, 3000, 0.5, "dpo_0.3333E_0.5000L_512MSQ.pth"),
        (4000, 3000, 0.5, "dpo_1.3333E_0.5000L_512MSQ.pth"),  # the steps beside it are 1.3330 and 1.3337
    ],
)
def test_names_of_exported_weights(step: int, steps_per_epoch: int, loss: float | None, expected: str) -> None:
    """Whole epochs without a fraction, others with four digits, or as many as tell them from their neighbours."""
    assert weights_name(step, steps_per_epoch, loss, 512, ".pth") == expected


@pytest.mark.parametrize(("steps_per_epoch", "epochs"), [(1, 30), (3, 40), (999, 12), (2211, 12), (10_007, 2)])
def test_no_two_steps_share_a_name(steps_per_epoch: int, epochs: int) -> None:
    """All steps of a run, none of them with a loss, which would tell some apart by luck."""
    steps = range(1, steps_per_epoch * epochs + 1)
    assert len({weights_name(step, steps_per_epoch, None, 512, ".pth") for step in steps}) == len(steps)


def test_no_file_is_replaced_but_the_steps_own(tmp_path: Path) -> None:
    """Step 3's name is free, then its own, then another step's, a person's, or a link's: it tells the step."""
    name = "dpo_1E_0.5000L_16MSQ.pth"
    path = tmp_path / name
    assert free_path(tmp_path, name, 3, FILES) == path
    export(path, 3)
    assert is_export(path, 3, FILES) and free_path(tmp_path, name, 3, FILES) == path
    export(path, 3, file=None)  # by an earlier version
    assert free_path(tmp_path, name, 3, FILES) == path
    export(path, 2)
    assert (
        not is_export(path, 3, FILES) and free_path(tmp_path, name, 3, FILES).name == "dpo_1E_0.5000L_16MSQ_step3.pth"
    )
    path.write_text("a person's")
    assert free_path(tmp_path, name, 3, FILES).name == "dpo_1E_0.5000L_16MSQ_step3.pth"
    path.unlink()
    path.symlink_to("nowhere")
    (tmp_path / "dpo_1E_0.5000L_16MSQ_step3.pth").mkdir()
    assert free_path(tmp_path, name, 3, FILES).name == "dpo_1E_0.5000L_16MSQ_step3-2.pth"


def test_what_a_person_exports_is_no_runs(tmp_path: Path) -> None:
    """`launch/export.py` says that no run gave it its name; where a run might, it writes nothing."""
    name = "dpo_1E_0.5000L_16MSQ.pth"
    path = export(tmp_path / name, 3, file="")
    assert not is_export(path, 3, FILES) and free_path(tmp_path, name, 3, FILES) != path
    assert not may_be_a_runs(path)
    for there in ("state", "latest", "lock"):
        (tmp_path / there).touch()
        assert may_be_a_runs(path) and may_be_a_runs(tmp_path / "dpo_mine") and not may_be_a_runs(tmp_path / "mine")
        (tmp_path / there).unlink()


def test_keep_exports_deletes_the_runs_own_alone(tmp_path: Path) -> None:
    """4 steps an epoch, at step 9: of steps 1, 3, 5, 7 and 9 the newest two stay, and the epochs' ends 4 and 8. A copy,
    a renamed one, another run's, an earlier version's and a person's file of such a name stay, and step 11's of a
    course that was given up."""
    run = tmp_path / "run"
    for step in (1, 3, 4, 5, 7, 8, 9, 11):
        export(run / f"dpo_{step / 4:g}E_16MSQ.pth", step)
    mine = ["dpo_best.pth", "dpo_good.pth", "dpo_x.pth", "dpo_y.pth", "dpo_notes.pth", "dpo_link.pth", "sft.pth"]
    shutil.copy(run / "dpo_0.25E_16MSQ.pth", run / "dpo_best.pth")
    export(run / "dpo_x.pth", 1, run="other")
    export(run / "dpo_y.pth", 1, file=None)
    (run / "dpo_notes.pth").write_text("notes")
    (run / "dpo_link.pth").symlink_to("dpo_1.25E_16MSQ.pth")
    export(run / "sft.pth", 1)
    export(run / "dpo_0.2E_16MSQ.pth", 2).rename(run / "dpo_good.pth")
    before = {path.name for path in run.iterdir()}
    prune_exports(run, 0, 4, 9, FILES)
    assert {path.name for path in run.iterdir()} == before
    prune_exports(run, 2, 4, 9, FILES)
    kept = [f"dpo_{step / 4:g}E_16MSQ.pth" for step in (4, 7, 8, 9, 11)]
    assert {path.name for path in run.iterdir()} == {*kept, *mine}


def test_names_of_folders_have_no_ending(tmp_path: Path) -> None:
    """The dot of half an epoch is no ending. Where a person keeps something in an export, or it lost a file, its step
    goes beside it."""
    name = weights_name(50, 100, None, 16, "")
    assert name == "dpo_0.5E_16MSQ"
    path = folder_export(tmp_path / name, 50)
    assert is_export(path, 50, FOLDERS) and free_path(tmp_path, name, 50, FOLDERS) == path
    assert not is_export(path, 49, FOLDERS) and free_path(tmp_path, name, 49, FOLDERS).name == f"{name}_step49"
    (path / "notes.txt").write_text("mine")
    assert is_export(path, 50, FOLDERS) and free_path(tmp_path, name, 50, FOLDERS).name == f"{name}_step50"
    (path / "notes.txt").unlink()
    (path / "model.safetensors").unlink()
    assert not is_export(path, 50, FOLDERS) and free_path(tmp_path, name, 50, FOLDERS).name == f"{name}_step50"
    assert export(tmp_path / f"{name}.pth", 50).is_file() and not is_export(tmp_path / f"{name}.pth", 50, FOLDERS)


def test_keep_exports_deletes_the_runs_own_folders_alone(tmp_path: Path) -> None:
    """4 steps an epoch: of steps 1, 2, 3 and 5 the newest two stay, and the epoch's end 4. A renamed one, another
    run's, one with a note in it and a `.pth` of such a name stay."""
    run = tmp_path / "run"
    for step in (1, 2, 3, 4, 5):
        folder_export(run / f"dpo_{step / 4:g}E_16MSQ", step)
    (run / "dpo_0.5E_16MSQ" / "notes.txt").write_text("mine")
    shutil.copytree(run / "dpo_0.25E_16MSQ", run / "dpo_best")
    folder_export(run / "dpo_other", 1, run="other")
    export(run / "dpo_0.25E_16MSQ.pth", 1)
    prune_exports(run, 2, 4, 5, FOLDERS)
    mine = {"dpo_0.5E_16MSQ", "dpo_best", "dpo_other", "dpo_0.25E_16MSQ.pth"}
    assert {path.name for path in run.iterdir()} == {*(f"dpo_{step / 4:g}E_16MSQ" for step in (3, 4, 5)), *mine}
