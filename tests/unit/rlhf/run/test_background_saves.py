"""Saves that are written while training goes on: they change nothing, lose nothing and end when they must.

A run of the tiny job has 4 steps here, of 6, 5, 6 and 5 micro-batches, and a save after each. `Disk` stands where
shards are written.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simple_llama.cluster import stopping
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.files import file_digest, write_digested
from simple_llama.reinforcement_learning.rlhf import apply_dpo
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine import checkpoint
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import newest_state
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.engine.state_copy import StateCopy
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.run import copy_room
from simple_llama.reinforcement_learning.rlhf.run.copy_room import CopyRoom
from simple_llama.reinforcement_learning.rlhf.run.saves import Saves
from simple_llama.reinforcement_learning.rlhf.run.step import NotFinite
from tiny_job import TinyJob, make_job

QUICK: dict[str, Any] = {"epochs": 2, "grad_accum_steps": 6, "eval_interval": 1, "n_samples": 0, "save_interval": 1}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> TinyJob:
    """With a run whose saves were waited for, by name `waited`."""
    job = make_job(tmp_path_factory.mktemp("background"))
    run_job(job, ranks, "waited", save_in_background=False)
    return job


def run_job(job: TinyJob, ranks: Ranks, name: str, **settings: Any) -> None:
    """Trains, all states kept."""
    more = {"reference": "online", "keep_states": 9, "run_name": name, **settings}
    config = DPOConfig(**{**job.settings, **QUICK, **more})
    train(config, load_inputs(config, ranks), ranks)


def states(job: TinyJob, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Masters and moments of all states of a run."""
    home = job.folder / "checkpoints" / name / "state"
    return {str(path.relative_to(home)): load_file(path) for path in sorted(home.glob("step_*/*.safetensors"))}


def newest_step(job: TinyJob, name: str) -> int:
    """Of a state that is whole."""
    return newest_state(job.folder / "checkpoints" / name).facts.step


def temps(job: TinyJob, name: str) -> list[str]:
    """What is half-written."""
    return [path.name for path in (job.folder / "checkpoints" / name).rglob(".*")]


class Disk:
    """Writes shards slowly: each when the main thread has begun as many micro-batches more as are asked for, or waits
    for it. Notes what happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, micro_batches: int = 0, seconds: float = 0.0, full_at: int = 0):
        self.micro_batches, self.seconds, self.full_at = micro_batches, seconds, full_at
        self.begun = self.writes = 0
        self.waiting = threading.Event()  # the main thread is, for a save
        self.said = list[str]()
        backward, wait = Engine.backward, Saves.wait

        def counted(engine: Engine, *args: Any) -> Any:
            self.begun += 1
            return backward(engine, *args)

        def noted(saves: Saves) -> None:
            self.waiting.set()
            wait(saves)
            self.waiting.clear()

        monkeypatch.setattr(Engine, "backward", counted)
        monkeypatch.setattr(Saves, "wait", noted)
        monkeypatch.setattr(checkpoint, "write_digested", self.write)

    def write(self, path: Path, chunks: Any) -> str:
        """In the place of `write_digested`."""
        self.writes += 1
        number, before, deadline = self.writes, self.begun, time.monotonic() + 30
        self.said.append(f"begin {number}")
        while self.begun < before + self.micro_batches and not self.waiting.is_set() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(self.seconds)
        if number == self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        digest = write_digested(path, chunks)
        self.said.append(f"end {number}, {self.begun - before} micro-batches later")
        return digest


def test_steps_go_on_beside_a_save_and_neither_changes_the_other(
    job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard is written when the next step's micro-batches and update are behind it and the next save waits, the
    last when the run waits: states, weights, metrics are those of saves that were waited for, bit for bit."""
    disk = Disk(monkeypatch, micro_batches=99)
    run_job(job, ranks, "beside")
    numbers = [f"{what} {number}" for number in range(1, 5) for what in ("begin", "end")]
    assert [said.split(",")[0] for said in disk.said] == numbers  # one at a time
    later = [said.split(", ")[1] for said in disk.said if "end" in said]
    assert later == [f"{count} micro-batches later" for count in (5, 6, 5, 0)]
    found, expected = states(job, "beside"), states(job, "waited")
    assert len(found) == 4 and found.keys() == expected.keys()
    for name, tensors in found.items():
        assert tensors.keys() == expected[name].keys()
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in tensors.items()), name
    weights = job.weights("waited")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in job.weights("beside").items())
    for metric in ("loss", "grad_norm", "eval_loss", "rewards/margins"):
        assert job.curve(metric, "beside") == job.curve(metric, "waited"), metric
    files = [sorted(p.name for p in (job.folder / "checkpoints" / run).iterdir()) for run in ("beside", "waited")]
    assert files[0] == files[1] and temps(job, "beside") == []
    best = [(job.folder / "runs" / run / "best.json").read_text().replace(run, "") for run in ("beside", "waited")]
    assert best[0] == best[1]


def test_saves_can_be_waited_for(job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_in_background` off: no micro-batch while a shard is written, however slowly."""
    disk = Disk(monkeypatch, seconds=0.1)
    run_job(job, ranks, "off", save_in_background=False)
    assert [said for said in disk.said if "end" in said] == [f"end {n}, 0 micro-batches later" for n in range(1, 5)]


def test_a_disk_that_is_full_for_a_save_ends_the_run(
    job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread of step 2's save, two micro-batches into step 3: its message before that step is made, nothing of
    the save left, step 1 whole."""
    disk = Disk(monkeypatch, micro_batches=2, full_at=2)
    with pytest.raises(UserError, match=r"cannot write .*rank_00000.safetensors: No space left on device; free space"):
        run_job(job, ranks, "full")
    assert newest_step(job, "full") == 1 and temps(job, "full") == []
    assert 6 + 5 + 2 <= disk.begun < 6 + 5 + 6


def run_and_stop(job: TinyJob, ranks: Ranks, name: str, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is asked to stop when its second shard is begun, and does."""

    def ask(path: Path, chunks: Any) -> str:
        if disk.writes == 1:
            stopping.request("SIGTERM")
        return disk.write(path, chunks)

    monkeypatch.setattr(checkpoint, "write_digested", ask)
    try:
        with pytest.raises(stopping.Stopped):
            run_job(job, ranks, name)
    finally:
        stopping.install()
        stopping.uninstall()


def test_a_request_to_stop_lets_a_save_end(job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for when step 2's shard is begun, which takes 0.3 s: it gets its name and its export, and of step 3, where
    that is done by then, a state is saved too."""
    disk = Disk(monkeypatch, seconds=0.3)
    run_and_stop(job, ranks, "stopped", disk, monkeypatch)
    steps = {name.split("/")[0] for name in states(job, "stopped")}
    assert {"step_00000001", "step_00000002"} <= steps and temps(job, "stopped") == []
    exported = {p.name for p in (job.folder / "checkpoints" / "stopped").glob("*.pth")}
    assert exported == {newest_state_of(job, "stopped", step) for step in (1, 2)}


def test_a_request_to_stop_outlives_a_save_that_fails(
    job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked for while step 2's shard is written, for which there is no room 0.3 s later: that is said, the run ends as
    one that was asked to, and the last whole step is saved."""
    disk = Disk(monkeypatch, seconds=0.3, full_at=2)
    run_and_stop(job, ranks, "outlived", disk, monkeypatch)
    assert disk.writes == 3 and newest_step(job, "outlived") >= 2 and temps(job, "outlived") == []
    assert "a save under way failed: UserError: cannot write" in caplog.text


def newest_state_of(job: TinyJob, name: str, step: int) -> str:
    """The export that the state of a step names."""
    folder = job.folder / "checkpoints" / name / "state" / f"step_{step:08d}"
    return checkpoint.read_state(folder).facts.weights


@pytest.mark.parametrize("error", [NotFinite("the loss is not finite"), UserError("no"), RuntimeError("a bug")])
def test_an_error_of_the_run_lets_a_save_end(
    job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Step 3 fails while step 2 is being written, for 0.3 s: step 2 is where to go on from, and is said to be."""
    Disk(monkeypatch, seconds=0.3)
    step, name = apply_dpo.optimizer_step, type(error).__name__
    steps = list[int]()

    def fail(*args: Any) -> float:
        steps.append(1)
        if len(steps) == 3:
            raise error
        return step(*args)

    monkeypatch.setattr(apply_dpo, "optimizer_step", fail)
    with pytest.raises(type(error)) as raised:
        run_job(job, ranks, name)
    assert newest_step(job, name) == 2 and temps(job, name) == []
    assert isinstance(error, NotFinite) == ("last good checkpoint" in str(raised.value))
    assert not isinstance(error, NotFinite) or "step_00000002" in str(raised.value)


def test_where_the_copy_does_not_fit_saves_are_waited_for(
    job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is free: said once, then each save is waited for, and all are there."""
    monkeypatch.setattr(copy_room, "free_host_bytes", lambda: 0)
    disk = Disk(monkeypatch, seconds=0.05)
    run_job(job, ranks, "tight")
    said = [line for line in caplog.messages if "saves in the background need" in line]
    assert len(said) == 1 and said[0].endswith("training leaves 0.000 GiB: each save is waited for")
    assert [line for line in disk.said if "end" in line] == [f"end {n}, 0 micro-batches later" for n in range(1, 5)]
    assert newest_step(job, "tight") == 4


def test_the_room_of_a_host_by_hand() -> None:
    """Two ranks of 2 GiB and 0.5 more that training takes: 5 of 5 GiB fit, of 4.5 there are 3.5 for copies."""
    room = CopyRoom("h", 2, 4 << 30, 1 << 30, 5 << 30)
    assert room.refusal == "" and room._replace(free=None).refusal == ""
    said = room._replace(free=9 << 29).refusal
    assert said.startswith("host h: saves in the background need 4.000 GiB") and "training leaves 3.500 GiB" in said


def test_a_shard_is_a_safetensors_file_of_the_copy(tmp_path: Path, ranks: Ranks) -> None:
    """Two parameters, one a matrix that is dealt out: read back by the library; the digest on the way is that of the
    file; and what is changed after the copy is not in it."""
    values = {name: torch.randn(shape) for name, shape in {"a": (3, 5), "b": (7,)}.items()}

    def state_of(name: str) -> dict[str, torch.Tensor]:
        return {"weight": values[name], "exp_avg": values[name] * 2, "exp_avg_sq": values[name] * 3}

    shapes = {name: tuple(value.shape) for name, value in values.items()}
    there: dict[str, Any] = {"whole_here": lambda: ["b"], "state_here": state_of, "gathered_state": state_of}
    engine: Any = SimpleNamespace(trained_shapes=shapes, **there)
    copy = StateCopy(engine, ranks)
    copy.take(sums_stay=True)
    before = {name: value.clone() for name, value in values.items()}
    for value in values.values():
        value.zero_()
    path = tmp_path / "shard"
    assert write_digested(path, copy.file_parts()) == file_digest(path)
    found = load_file(path)
    assert len(found) == 6 and copy.size == 3 * 22 * 4 and copy.is_there
    for name, value in before.items():
        for factor, kind in enumerate(("weight", "exp_avg", "exp_avg_sq"), 1):
            assert torch.equal(found[f"{name}|{kind}"], value * factor)
