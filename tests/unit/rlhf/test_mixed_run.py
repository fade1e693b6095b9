"""Whole runs on several data files with shares, and on validation files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf import dry_run
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.assess.evaluate_config import _with_data_asked
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import DataConfig
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from tiny_job import TinyJob, make_job, write_pairs

FEW: dict[str, Any] = {"epochs": 1, "grad_accum_steps": 2, "eval_interval": 0, "n_samples": 0}


@pytest.fixture
def job(tmp_path: Path) -> TinyJob:
    """24 pairs in pairs.jsonl, 20 others in more.jsonl."""
    job = make_job(tmp_path)
    write_pairs(tmp_path / "more.jsonl", range(24, 44))
    return job


def run(job: TinyJob, ranks: Ranks, **settings: Any) -> Path:
    """A run of the job; its newest export."""
    config = DPOConfig(**{**job.settings, **FEW, **settings})
    inputs = load_inputs(config, ranks)
    precompute(config, inputs, ranks)
    return train(config, inputs, ranks)


def test_an_epoch_counts_the_copies_and_the_store_does_not(
    job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All that counts an epoch agrees: the log, data.json, the dry run, the curves; a store has an entry a pair. A run
    that resumes in the middle ends with the same weights, in another working folder too. With another share it is
    refused: other data."""
    monkeypatch.chdir(job.folder)
    paths = "pairs.jsonl:2,more.jsonl:0.5"
    config = DPOConfig(**{**job.settings, **FEW, "rlhf_dataset_path": paths})  # type: ignore[arg-type]
    inputs = load_inputs(config, ranks)
    trained, distinct = len(inputs.data.train), len(inputs.data.pairs)
    assert trained > distinct and f"{trained} pairs = " in dry_run.describe(config, inputs, ranks)
    run(job, ranks, rlhf_dataset_path=paths, save_interval=3)
    (store,) = (job.folder / "ref_cache").iterdir()
    assert sum(len(np.load(path)) for path in store.glob("*.npy")) == distinct
    steps = -(-trained // 4)
    assert f"{trained} pairs, {len(inputs.data.validation)} held out, {steps} steps" in caplog.text
    assert job.lines()[-1]["step"] == steps and job.curve("epoch")[-1] == 1
    facts = json.loads((job.folder / "runs" / "tiny" / "data.json").read_text())
    assert facts["pairs"] == trained and "pairs.jsonl 2 times" in facts["report"]
    weights = job.weights()
    for state in (job.folder / "checkpoints" / "tiny" / "state").iterdir():
        if int(state.name.removeprefix("step_")) == steps:
            shutil.rmtree(state)
    (job.folder / "elsewhere").mkdir()
    monkeypatch.chdir(job.folder / "elsewhere")
    config = parse_config(["--resume", "--run_name=tiny", f"--ckpt_dir={job.folder}/checkpoints"])
    assert config.rlhf_dataset_path == f"{job.folder}/pairs.jsonl:2,{job.folder}/more.jsonl:0.5"
    train(config, load_inputs(config, ranks), ranks)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in job.weights().items())
    monkeypatch.chdir(job.folder)
    for other in ("pairs.jsonl:2,more.jsonl:0.25", "pairs.jsonl:3,more.jsonl:0.5", "pairs.jsonl,more.jsonl:0.5"):
        with pytest.raises(UserError, match="cannot resume: "):
            run(job, ranks, rlhf_dataset_path=other, save_interval=3, resume=True)


def test_each_named_validation_set_has_its_curves(
    job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two sets of 12 and 8 pairs: what is said of all held-out pairs is the mean of both by their sizes, at each
    evaluation, in metrics.jsonl, on TensorBoard, in the log and the report; the best checkpoint is chosen by all. A
    run that resumes holds out the same, and is refused with other files."""
    monkeypatch.chdir(job.folder)
    rows = (job.folder / "more.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "safe.jsonl").write_text("".join(rows[:12]))
    (job.folder / "help.jsonl").write_text("".join(rows[12:]))
    settings = {"val_share": None, "validation_path": "safe=safe.jsonl,help=help.jsonl", "eval_interval": 3}
    config = DPOConfig(**{**job.settings, **FEW, **settings})  # type: ignore[arg-type]
    assert "24 pairs train, 20 are held out by files" in dry_run.describe(config, load_inputs(config, ranks), ranks)
    run(job, ranks, **settings)
    lines = [line for line in job.lines() if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    every = (*(f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")), "loss")
    every += ("logps/accuracies", "logps/chosen", "logps/rejected", "log_ratio/chosen", "longer_is_chosen")
    for line in lines:
        assert (line["eval_pairs"], line["eval_safe/pairs"], line["eval_help/pairs"]) == (20, 12, 8)
        for name in every:
            mean = (12 * line[f"eval_safe/{name}"] + 8 * line[f"eval_help/{name}"]) / 20
            assert mean == pytest.approx(line[f"eval_{name}"], rel=1e-5, abs=1e-6), name
    assert lines[-1]["eval_safe/loss"] != lines[-1]["eval_help/loss"]
    assert "evaluation at step 6, safe  loss" in caplog.text
    folder = job.folder / "runs" / "tiny"
    assert json.loads((folder / "data.json").read_text())["validation_sets"] == {"safe": 12, "help": 8}
    assert json.loads((folder / "config.json").read_text())["val_share"] == 0
    assert "safe: accuracy" in (folder / "report.html").read_text()
    assert json.loads((folder / "best.json").read_text())["value"] == lines[-1]["eval_loss"]
    again = parse_config(["--resume", "--run_name=tiny", f"--ckpt_dir={job.folder}/checkpoints"])
    assert again.validation_path == f"safe={job.folder}/safe.jsonl,help={job.folder}/help.jsonl"
    train(again, load_inputs(again, ranks), ranks)
    (job.folder / "help.jsonl").write_text("".join(rows[13:]))
    with pytest.raises(UserError, match="cannot resume: data"):
        train(again, load_inputs(again, ranks), ranks)


def test_an_evaluation_knows_what_a_run_held_out(job: TinyJob) -> None:
    """The settings of the run stand below the command line; other data, or another way to hold out, takes the run's
    away."""
    own = {"rlhf_dataset_path": "a.jsonl:2,b.jsonl", "validation_path": "v.jsonl", "val_share": 0.0}

    def left(**asked: Any) -> set[str]:
        return set(_with_data_asked(own, DataConfig(**asked)))

    assert left() == left(rlhf_dataset_path="b.jsonl,a.jsonl") == set(own)
    assert left(rlhf_dataset_path="other.jsonl") == left(val_share=0.1) == {"rlhf_dataset_path", "val_share"}
    assert left(validation_path="w.jsonl") == {"rlhf_dataset_path", "validation_path"}
