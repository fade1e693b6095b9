"""Whole runs on several data files with shares."""

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
