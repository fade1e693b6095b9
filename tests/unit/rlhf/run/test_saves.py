"""Saves of whole runs on a tiny job: what they need of the start checkpoint, and what is left where one fails."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.pretraining import start_file
from simple_llama.pretraining.start_model import StartChanged
from simple_llama.pretraining.weights import load_weights, save_weights
from simple_llama.reinforcement_learning.rlhf.apply_dpo import run_steps, train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import newest_state
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from simple_llama.reinforcement_learning.rlhf.run.saves import count_saves
from simple_llama.reinforcement_learning.rlhf.run.training_run import TrainingRun
from tiny_job import TinyJob, make_job

# 4 steps without anything but training, saves after each of them
QUICK: dict[str, Any] = {"epochs": 2, "grad_accum_steps": 6, "eval_interval": 0, "n_samples": 0, "save_interval": 1}


def settings_of(job: TinyJob, **settings: Any) -> DPOConfig:
    """The job's settings, changed."""
    return DPOConfig(**{**job.settings, **QUICK, "reference": "online", **settings})


def run_job(job: TinyJob, ranks: Ranks, **settings: Any) -> Path:
    """Trains; gives the exported path."""
    config = settings_of(job, **settings)
    return train(config, load_inputs(config, ranks), ranks)


def exports(job: TinyJob, run: str = "tiny") -> list[str]:
    """The `.pth` files of a run."""
    return sorted(path.name for path in (job.folder / "checkpoints" / run).glob("*.pth"))


def overwrite(job: TinyJob, other: TinyJob) -> None:
    """Another model of the same shape in the same file, which is as long as before."""
    data = (other.folder / "start.pth").read_bytes()
    assert len(data) == (job.folder / "start.pth").stat().st_size
    with (job.folder / "start.pth").open("r+b") as file:
        file.write(data)


def cut(job: TinyJob, other: TinyJob) -> None:
    """Half of the file: reading on where it is mapped would end the process."""
    os.truncate(job.folder / "start.pth", (job.folder / "start.pth").stat().st_size // 2)


def replace(job: TinyJob, other: TinyJob) -> None:
    """A deeper model under the file's name."""
    shutil.copy(other.folder / "start.pth", job.folder / "copy.pth")
    (job.folder / "copy.pth").rename(job.folder / "start.pth")


def delete(job: TinyJob, other: TinyJob) -> None:
    (job.folder / "start.pth").unlink()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """Adapters of a model whose other weights are not trained."""
    return make_job(tmp_path_factory.mktemp("lora"), use_lora=True, lora_rank=4)


@pytest.fixture(scope="module")
def whole(lora: TinyJob, ranks: Ranks) -> str:
    """The name of a run of it that trains all weights, and that nobody disturbs."""
    run_job(lora, ranks, run_name="whole")
    return "whole"


@pytest.fixture(scope="module")
def adapters(lora: TinyJob, ranks: Ranks) -> str:
    """The same where the adapters alone are trained."""
    run_job(lora, ranks, run_name="adapters", trainable="lora")
    return "adapters"


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """The same with another layer."""
    return make_job(tmp_path_factory.mktemp("deeper"), use_lora=True, lora_rank=4, n_layers=3)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """The same shape with other weights."""
    job = make_job(tmp_path_factory.mktemp("other"), use_lora=True, lora_rank=4)
    path = job.folder / "start.pth"
    loaded = load_weights(path)
    save_weights(path, {name: tensor + 0.25 for name, tensor in loaded.state_dict.items()}, loaded.config, {})
    return job


def changed_in_training(
    job: TinyJob, ranks: Ranks, change: Callable[[TinyJob, TinyJob], None], by: TinyJob, **settings: Any
) -> TrainingRun:
    """Sets a run up, changes its start checkpoint, trains. The file is as before at the end."""
    config = settings_of(job, **settings)
    before = (job.folder / "start.pth").read_bytes()
    run = TrainingRun(config, load_inputs(config, ranks), ranks, config.run_name, lambda: None)
    try:
        change(job, by)
        run_steps(run)
    finally:
        run.writer.close()
        (job.folder / "start.pth").write_bytes(before)
    return run


@pytest.mark.parametrize("change", [replace, delete])
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_start_checkpoint_that_loses_its_name_is_still_the_runs(
    lora: TinyJob, deeper: TinyJob, ranks: Ranks, change: Callable[..., None], trainable: str
) -> None:
    """Another model under its path, or none: every export is whole, with the tensors that were there at the start."""
    name = f"{change.__name__}-{trainable}"
    run = changed_in_training(lora, ranks, change, deeper, run_name=name, trainable=trainable)
    run.finish(None, {}, 0.0)
    start = load_weights(lora.folder / "start.pth").state_dict
    exported = load_weights(run.saves.newest_path).state_dict
    assert exports(lora, name)[-1] == run.saves.newest_path.name and exported.keys() == start.keys()
    frozen = [key for key in start if trainable == "lora" and "_lora_layer." not in key]
    assert all(torch.equal(exported[key], start[key]) for key in frozen)
    assert any(not torch.equal(exported[key], start[key]) for key in start)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_where_all_is_trained_a_changed_start_checkpoint_is_not_needed(
    lora: TinyJob, whole: str, other: TinyJob, ranks: Ranks, change: Callable[..., None]
) -> None:
    """The exports are whole, and those of a run whose file nobody touched."""
    changed_in_training(lora, ranks, change, other, run_name=change.__name__).finish(None, {}, 0.0)
    assert exports(lora, change.__name__) == exports(lora, whole)
    expected = lora.weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in lora.weights(change.__name__).items())


@pytest.mark.parametrize("change", [overwrite, cut])
def test_an_export_that_needs_a_changed_start_checkpoint_is_refused(
    lora: TinyJob,
    adapters: str,
    other: TinyJob,
    ranks: Ranks,
    change: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """LoRA: the run trains on with a word at each save, keeps its states, and does not end as done. With the file put
    back, --resume writes the newest export, and that of a run whose file nobody touched."""
    name = f"lora-{change.__name__}"
    run = changed_in_training(lora, ranks, change, other, run_name=name, trainable="lora")
    with pytest.raises(UserError, match=r"the start checkpoint changed during the run, so dpo_.* --resume writes the"):
        run.finish(None, {}, 0.0)
    said = [line for line in caplog.messages if "is not written: " in line and "put the checkpoint back" in line]
    assert len(said) == 4 and exports(lora, name) == []
    folder, logs = lora.folder / "checkpoints" / name, lora.folder / "runs" / name
    assert newest_state(folder).facts.step == 4 and not (logs / "finished.json").exists()
    path = run_job(lora, ranks, run_name=name, trainable="lora", resume=True)
    expected = lora.weights(adapters)
    assert exports(lora, name) == [path.name] == exports(lora, adapters)[-1:]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_weights(path).state_dict.items())
    assert json.loads((logs / "finished.json").read_text())["step"] == 4


def test_a_start_checkpoint_that_changes_before_a_model_is_built_is_refused(
    lora: TinyJob, other: TinyJob, ranks: Ranks
) -> None:
    """Digested, then overwritten: no other model's log-probs are stored under its name, and no policy is made of it."""
    config = settings_of(lora, run_name="early", reference="store")
    inputs = load_inputs(config, ranks)
    before = (lora.folder / "start.pth").read_bytes()
    overwrite(lora, other)
    try:
        with pytest.raises(StartChanged, match="tensor .* differs"):
            precompute(config, inputs, ranks)
        assert not (lora.folder / "ref_cache").exists()
        with pytest.raises(StartChanged, match="tensor .* differs"):
            TrainingRun(settings_of(lora, run_name="early"), inputs, ranks, "early", lambda: None)
    finally:
        (lora.folder / "start.pth").write_bytes(before)


def test_a_failed_export_loses_no_training(
    lora: TinyJob, whole: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the second `.pth`: the state of step 2 is there. Resumed, the run writes that file first, and ends
    with the files and weights of one that had room."""
    write, written = start_file.save_weights, []

    def fill(path: Path, *rest: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise UserError(f"cannot write {path}: No space left on device")
        write(path, *rest)

    monkeypatch.setattr(start_file, "save_weights", fill)
    with pytest.raises(UserError, match="No space left"):
        run_job(lora, ranks)
    folder = lora.folder / "checkpoints" / "tiny"
    state = newest_state(folder)
    assert state.facts.step == 2 and (folder / "latest").read_text() == "step_00000002\n"
    assert exports(lora) == [written[0].name] and state.facts.weights == written[1].name
    run_job(lora, ranks, resume=True)
    assert [path.name[:6] for path in written[2:]] == ["dpo_1E", "dpo_1.", "dpo_2E"] and written[2] == written[1]
    assert exports(lora) == exports(lora, whole)
    for name in exports(lora):
        found, expected = (load_weights(lora.folder / "checkpoints" / run / name) for run in ("tiny", whole))
        assert all(torch.equal(tensor, expected.state_dict[key]) for key, tensor in found.state_dict.items())
        same = ("step", "epochs", "loss", "reference")
        assert [found.metadata[key] for key in same] == [expected.metadata[key] for key in same]


def test_names_tell_a_loss_where_one_was_measured(lora: TinyJob, whole: str) -> None:
    """Held-out loss at epochs' ends, steps 2 and 4; the saves of steps 1 and 3 have none, in name and metadata."""
    names = exports(lora, whole)
    assert [name.split("L_")[0][:6] for name in names] == ["dpo_0.", "dpo_1.", "dpo_1E", "dpo_2E"]
    assert names[:2] == ["dpo_0.5E_512MSQ.pth", "dpo_1.5E_512MSQ.pth"] and all("L_512MSQ" in name for name in names[2:])
    folder = lora.folder / "checkpoints" / whole
    losses = [load_weights(folder / name).metadata["loss"] for name in names]
    assert losses[:2] == [None, None] and names[2] == f"dpo_1E_{losses[2]:.4f}L_512MSQ.pth"


def test_keep_exports_keeps_the_newest_and_the_ends_of_epochs(
    lora: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 epochs of 2 steps, one of those between is kept: step 3's beside 2's and 4's; a copy of step 1's stays too."""
    config = settings_of(lora, run_name="few", keep_exports=1)
    run = TrainingRun(config, load_inputs(config, ranks), ranks, "few", lambda: None)
    save, folder = run.saves.save, lora.folder / "checkpoints" / "few"

    def save_and_copy(*args: Any) -> None:
        save(*args)
        if args[0].done == 1:
            run.saves.wait()
            shutil.copy(folder / "dpo_0.5E_512MSQ.pth", folder / "dpo_mine.pth")

    monkeypatch.setattr(run.saves, "save", save_and_copy)
    run_steps(run)
    run.writer.close()
    assert [load_weights(folder / name).metadata["step"] for name in exports(lora, "few")] == [3, 2, 4, 1]


def test_a_file_in_the_place_of_a_state_or_an_export_is_gone_round(lora: TinyJob, ranks: Ranks) -> None:
    """A person's notes where step 2's state would lie, and where step 1's `.pth` would: the run goes on beside them."""
    folder = lora.folder / "checkpoints" / "notes"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "step_00000002").write_text("mine")
    (folder / "dpo_0.5E_512MSQ.pth").write_text("mine")
    config = settings_of(lora, run_name="notes", epochs=1)
    run = TrainingRun(config, load_inputs(config, ranks), ranks, "notes", lambda: None)
    run_steps(run)
    run.writer.close()
    assert (folder / "state" / "step_00000002").read_text() == "mine"
    assert (folder / "dpo_0.5E_512MSQ.pth").read_text() == "mine"
    assert newest_state(folder).folder.name == "step_00000002-2"
    assert load_weights(folder / "dpo_0.5E_512MSQ_step1.pth").metadata["step"] == 1


@pytest.mark.parametrize(
    ("steps_per_epoch", "steps", "interval", "expected"),
    [
        (3, 6, 0, (2, 0)),
        (3, 6, 1, (2, 4)),
        (3, 6, 2, (2, 2)),
        (4, 12, 6, (3, 1)),
        (4, 12, 100, (3, 0)),
        (3, 4, 2, (2, 1)),
        (3, 5, 2, (2, 2)),
        (3, 2, 0, (1, 0)),
    ],
)
def test_saves_are_counted(steps_per_epoch: int, steps: int, interval: int, expected: tuple[int, int]) -> None:
    """Every 2 of 6 steps: 2, 4 and 6, of which 6 ends an epoch; every 6 of 12: 6 and 12, of which 12 ends one. A run
    of 4 steps, the epoch has 3, ends at 3 and 4: one save is between, at 2; one of 5 steps has 2 and 4 between."""
    assert count_saves(steps, steps_per_epoch, interval) == expected
