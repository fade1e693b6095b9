"""Runs of versions that could compile the decoder layers go on without."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.files import json_bytes
from simple_llama.pretraining.weights import load_weights
from simple_llama.reinforcement_learning.rlhf.apply_dpo import precompute_and_train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.run.saves import uncompiled
from tiny_job import TinyJob, make_job

# 4 steps, a save after each of them
SETTINGS = {
    "epochs": 2,
    "grad_accum_steps": 6,
    "eval_interval": 0,
    "n_samples": 0,
    "save_interval": 1,
    "keep_states": 4,
}


def run_job(config: DPOConfig, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The weights that a whole job ends with."""
    return load_weights(precompute_and_train(config, load_inputs(config, ranks), ranks)).state_dict


def as_if_compiled(job: TinyJob, step: int) -> None:
    """Leaves the state of `step` and the settings as a compiled run of an earlier version did."""
    checkpoints, log = job.folder / "checkpoints" / "tiny", job.folder / "runs" / "tiny"
    for state in (checkpoints / "state").iterdir():
        if state.name != f"step_{step:08d}":
            shutil.rmtree(state)
    for export in checkpoints.glob("*.pth"):
        export.unlink()
    (checkpoints / "latest").write_text(f"step_{step:08d}\n")
    path = checkpoints / "state" / f"step_{step:08d}" / "state.json"
    facts = json.loads(path.read_bytes())
    facts["reference"]["numerics"]["compiled"] = "True"
    path.write_bytes(json_bytes({**{key: facts[key] for key in facts if key != "digest"}, "format": 1}))
    for folder in (checkpoints, log):
        for settings in folder.glob("config.json"):
            settings.write_text(json.dumps({**json.loads(settings.read_text()), "compile": True}))


def words(caplog: pytest.LogCaptureFixture) -> str:
    """All warnings."""
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def test_a_run_that_was_compiled_resumes_uncompiled(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """From its state of step 2 of 4, with a word of its reference. It ends as one that was never compiled."""
    job = make_job(tmp_path)
    expected = run_job(DPOConfig(**{**job.settings, **SETTINGS}), ranks)
    as_if_compiled(job, 2)
    caplog.clear()
    places = [f"--{key}={job.settings[key]}" for key in ("ckpt_dir", "log_dir", "ref_cache_dir")]
    found = run_job(parse_config(["--resume", "--run_name", "tiny", *places]), ranks)
    assert "the run's layers were compiled; from here on they are not" in words(caplog)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_another_reference_is_still_another() -> None:
    """Only the mark goes; a course without one, or without a reference, stays as it is."""
    reference = {"weights": "a", "numerics": {"dtype": "float32", "compiled": "True"}}
    assert uncompiled({"seed": 1, "reference": reference}) == {
        "seed": 1,
        "reference": {"weights": "a", "numerics": {"dtype": "float32"}},
    }
    for course in ({"seed": 1}, {"reference": "online"}, {"reference": {"weights": "a"}}):
        assert uncompiled(course) == course


@pytest.mark.parametrize("flag", ["--compile", "--no-compile", "--no_compile"])
def test_the_switch_has_no_effect(tmp_path: Path, flag: str, caplog: pytest.LogCaptureFixture) -> None:
    """On a command line and in a file, with a word; a value of an unknown name is refused as ever."""
    path = tmp_path / "config.json"
    path.write_text('{"beta": 0.3, "compile": true}')
    assert parse_config(["--config", str(path), flag]) == parse_config(["--beta", "0.3"])
    assert f"{flag} has no effect" in words(caplog) and f"{path}: compile has no effect" in words(caplog)
    path.write_text('{"compiled": true}')
    with pytest.raises(UserError, match="unknown setting 'compiled'"):
        parse_config(["--config", str(path)])
