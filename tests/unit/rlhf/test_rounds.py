"""Several runs over one reference: rounds that start from the last round's model, and sweeps over one store."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.pretraining.weights import load_weights
from simple_llama.reinforcement_learning.rlhf.apply_dpo import precompute_and_train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.dry_run import describe
from simple_llama.reinforcement_learning.rlhf.export import ExportConfig, export_model
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from tiny_hf import make_hf_job
from tiny_job import TinyJob, make_job

QUICK: dict[str, Any] = {"epochs": 1, "eval_interval": 0, "n_samples": 0}


def run_job(job: TinyJob, ranks: Ranks, **settings: Any) -> Path:
    """The pass and the training; gives the last exported path."""
    config = DPOConfig(**{**job.settings, **QUICK, **settings})
    return precompute_and_train(config, load_inputs(config, ranks), ranks)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def first(job: TinyJob, ranks: Ranks) -> Path:
    """What the first round made."""
    return run_job(job, ranks, run_name="first")


def told(job: TinyJob, run: str) -> dict[str, Any]:
    """What a run says at step 0."""
    return {name: value for line in job.lines(run) if line["step"] == 0 for name, value in line.items()}


def test_two_rounds(job: TinyJob, first: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """The last round's model against itself begins at ln 2. Against the first round's start no pass is made, for that
    store is there, and it begins where both stores say: margins and loss of the held-out pairs, by hand."""
    caplog.set_level(logging.INFO, LOGGER.name)
    run_job(job, ranks, run_name="itself", model_path=str(first))
    assert told(job, "itself")["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    caplog.clear()
    start = str(job.folder / "start.pth")
    config = DPOConfig(
        **{**job.settings, **QUICK, "n_samples": 2, "run_name": "back", "model_path": str(first)}, reference_path=start
    )
    inputs = load_inputs(config, ranks)
    assert "so nothing says what it is at the start" in describe(config, inputs, ranks)
    second = precompute_and_train(config, inputs, ranks)
    assert "24 of 24 pairs are there" in caplog.text and "reference pass: computed" not in caplog.text
    assert "start.pth, not the start model: the audit asks that one" in caplog.text
    assert "step-0 audit: policy and reference differ by at most" in caplog.text and "expected 0.69" not in caplog.text
    names = [load_inputs(replace(config, model_path=path, reference_path=""), ranks) for path in (start, str(first))]
    keys = inputs.data.validation.keys
    ref_N2, own_N2 = (RefStore.open(config.ref_cache_dir, one.reference_id).lookup(keys).astype(float) for one in names)
    margins_N = 0.5 * ((own_N2 - ref_N2) @ [1, -1])
    assert told(job, "back")["eval_rewards/margins"] == pytest.approx(margins_N.mean(), abs=1e-4) and margins_N.any()
    assert told(job, "back")["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins_N)).mean(), abs=1e-5)
    assert told(job, "back")["samples/kl"] > 1e-6 > abs(np.log(2) - told(job, "first")["eval_loss"])
    about, settings = load_weights(second).metadata, json.loads((job.folder / "runs/back/config.json").read_text())
    assert (about["start"], about["reference"]["weights"]) == (inputs.start.digest, names[0].start.digest)
    assert settings["reference_path"] == start
    export_model(ExportConfig(str(second.parent), str(job.folder / "state.pth")))  # of the start, not of the reference


def test_another_reference_in_memory_equals_its_store(job: TinyJob, first: Path, ranks: Ranks) -> None:
    """The same losses and weights; the run goes on with its own start alone."""
    asked = {"model_path": str(first), "reference_path": str(job.folder / "start.pth")}
    run_job(job, ranks, run_name="store", **asked)
    run_job(job, ranks, run_name="online", reference="online", **asked)
    assert job.curve("loss", "online") == pytest.approx(job.curve("loss", "store"), abs=1e-6)
    for name, tensor in job.weights("online").items():
        torch.testing.assert_close(tensor, job.weights("store")[name], atol=2e-6, rtol=0)
    run_job(job, ranks, run_name="store", resume=True, **asked)
    with pytest.raises(UserError, match="cannot resume: start was"):
        run_job(job, ranks, run_name="store", resume=True, **{**asked, "model_path": asked["reference_path"]})
    with pytest.raises(UserError, match="cannot resume: reference was"):
        run_job(job, ranks, run_name="store", resume=True, model_path=str(first))


def test_the_audit_asks_the_model_that_the_store_is_of(
    job: TinyJob, first: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of the reference whose numbers are off is found before a step, and no record is written."""
    look_up = RefStore.lookup
    monkeypatch.setattr(RefStore, "lookup", lambda *args: look_up(*args) - np.float32(0.1))
    with pytest.raises(UserError, match="step-0 audit: 24 of 24 pairs drawn"):
        run_job(job, ranks, model_path=str(first), reference_path=str(job.folder / "start.pth"))
    assert not (job.folder / "runs" / "tiny").exists()


def test_a_reference_must_have_the_starts_tokens(job: TinyJob, ranks: Ranks, tmp_path: Path) -> None:
    """Another tokenizer, too few tokens, or too short a memory; the start itself is no other reference."""
    other = make_hf_job(tmp_path / "hf")
    short = make_job(tmp_path / "short", max_seq_len=16, n_layers=1)
    config = DPOConfig(**{**job.settings, **QUICK})
    same = load_inputs(replace(config, reference_path=str(job.folder / "start.pth")), ranks)
    assert same.other_reference is None and same.reference_id == load_inputs(config, ranks).reference_id
    with pytest.raises(UserError, match="reference_path: .*expected the tokenizer of the start model"):
        load_inputs(replace(config, reference_path=str(other.settings["model_path"])), ranks)
    with pytest.raises(UserError, match="reference_path: expected a model of at least 512 tokens"):
        load_inputs(replace(config, reference_path=str(short.folder / "start.pth")), ranks)


def test_a_sweep_of_six_settings_makes_one_reference_pass(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """Betas, losses, rates and files over one store: the log has one pass, and five times that all pairs are there."""
    job = make_job(tmp_path)
    caplog.set_level(logging.INFO, LOGGER.name)
    fewer = job.folder / "fewer.jsonl"
    fewer.write_text("".join((job.folder / "pairs.jsonl").read_text().splitlines(keepends=True)[4:20]))
    sweep: tuple[dict[str, Any], ...] = (
        {},
        {"beta": 0.1},
        {"loss_type": "ipo", "beta": 0.2},
        {"loss_type": "hinge", "max_lr": 2e-3, "schedule": "linear"},
        {"rlhf_dataset_path": str(fewer)},
        {"rlhf_dataset_path": str(fewer), "seed": 1, "warmup_iterations": None, "warmup_ratio": 0.1},
    )
    for number, settings in enumerate(sweep):
        run_job(job, ranks, run_name=f"sweep-{number}", max_steps=1, **settings)
    passes = [line for line in caplog.messages if "reference pass: computed" in line]
    there = [line for line in caplog.messages if "pairs are there" in line]
    assert len(passes) == 1 and "computed 24 pairs" in passes[0]
    assert [line.split(": ")[-1] for line in there] == [
        "0 of 24 pairs are there",
        *["24 of 24 pairs are there"] * 3,
        *["16 of 16 pairs are there"] * 2,
    ]
    assert len(list((job.folder / "ref_cache").iterdir())) == 1
