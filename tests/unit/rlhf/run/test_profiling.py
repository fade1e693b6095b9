"""`--profile_steps`: a trace of the steps asked for and of no other, refusals, and ends before the last step."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from simple_llama.cluster import stopping
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.run.training_run import TrainingRun
from tiny_job import TinyJob, make_job


@pytest.fixture
def job(tmp_path: Path) -> TinyJob:
    return make_job(tmp_path)


def run_job(job: TinyJob, ranks: Ranks, **settings: object) -> None:
    """Trains 6 steps, without samples."""
    config = DPOConfig(**{**job.settings, "reference": "online", "n_samples": 0, **settings})  # type: ignore
    train(config, load_inputs(config, ranks), ranks)


def profiler_is_on() -> bool:
    """Whether something is traced now."""
    return torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]


def traced_steps(path: Path) -> list[int]:
    """Numbers of the steps that stand in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {str(event["name"]) for event in events if event.get("cat") == "user_annotation"}
    assert any("mm" in str(event["name"]) for event in events if event.get("cat") == "cpu_op")
    return sorted(int(name.split("#")[1]) for name in names if re.fullmatch(r"ProfilerStep#\d+", name))


def test_the_steps_asked_for_are_traced(job: TinyJob, ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """Steps 2 and 3 of 6; the file has the rank in its name, the log says where it is; writing counts for no step."""
    run_job(job, ranks, profile_steps=(2, 3))
    [path] = (job.folder / "runs" / "tiny" / "profile").iterdir()
    assert path.name == "steps_2-3_rank_00000.pt.trace.json.gz"
    assert traced_steps(path) == [2, 3]
    assert f"profile of steps 2 to 3: {path}, one file a rank" in caplog.text
    assert json.loads((job.folder / "runs" / "tiny" / "config.json").read_text())["profile_steps"] == [2, 3]
    assert not profiler_is_on()


def test_no_profile_unless_asked_for(job: TinyJob, ranks: Ranks) -> None:
    run_job(job, ranks, epochs=1)
    assert not (job.folder / "runs" / "tiny" / "profile").exists()


def test_steps_beyond_the_run_are_refused(job: TinyJob, ranks: Ranks) -> None:
    """Before anything of the run is written."""
    with pytest.raises(UserError, match="steps from 1 to 6, which the run has, found 6 7"):
        run_job(job, ranks, profile_steps=(6, 7))
    assert not (job.folder / "runs").exists()


def test_a_stop_within_the_trace_drops_it(job: TinyJob, ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """Stopped after step 2 of a profile of steps 2 to 5: no file, no profiler left on. The resumed run traces what is
    left, steps 3 to 5, and says so; one that starts after them traces nothing and goes on."""
    original = TrainingRun.made

    def asked_to_stop(run: TrainingRun, step: int, grad_norm: float) -> None:
        original(run, step, grad_norm)
        if step == 2:
            stopping.request("SIGTERM")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "made", asked_to_stop)
        with pytest.raises(stopping.Stopped):
            run_job(job, ranks, profile_steps=(2, 5), eval_interval=0)
    stopping.install()
    stopping.uninstall()
    folder = job.folder / "runs" / "tiny" / "profile"
    assert not folder.exists() and not profiler_is_on()
    run_job(job, ranks, profile_steps=(2, 5), eval_interval=0, resume=True)
    assert "goes on after step 2; earlier ones are not traced" in caplog.text
    [path] = folder.iterdir()
    assert path.name.startswith("steps_3-5_") and traced_steps(path) == [3, 4, 5]
    path.unlink()
    run_job(job, ranks, profile_steps=(2, 5), resume=True)
    assert not list(folder.iterdir())


def test_a_profile_that_cannot_be_written_is_said(job: TinyJob, ranks: Ranks) -> None:
    """A file stands where the folder should be: the message names it, and the profiler is off afterwards."""
    place = job.folder / "runs" / "tiny" / "profile"
    place.parent.mkdir(parents=True)
    place.write_text("in the way")
    with pytest.raises(UserError, match="profile"):
        run_job(job, ranks, profile_steps=(1, 1))
    assert not profiler_is_on()
