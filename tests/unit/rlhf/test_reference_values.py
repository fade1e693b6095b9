"""Whole runs on a tiny job whose reference store holds what it should not: the start, the first step, the resume."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.files import file_digest
from simple_llama.pretraining.weights import load_weights, save_weights
from simple_llama.reinforcement_learning.rlhf.apply_dpo import run_steps, train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import newest_state
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, load_inputs
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from simple_llama.reinforcement_learning.rlhf.reference.audit import Auditor
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from simple_llama.reinforcement_learning.rlhf.run.training_run import TrainingRun
from tiny_job import TinyJob, make_job

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> TinyJob:
    """The tiny job with its store and a run of one epoch, saved at its end."""
    job = make_job(tmp_path_factory.mktemp("trained"))
    config = settings_of(job)
    inputs = load_inputs(config, ranks)
    precompute(config, inputs, ranks)
    train(config, inputs, ranks)
    return job


@pytest.fixture
def job(trained: TinyJob, tmp_path: Path) -> TinyJob:
    """A copy of it."""
    shutil.copytree(trained.folder, tmp_path / "job")
    return TinyJob(tmp_path / "job")


def settings_of(job: TinyJob, **changes: Any) -> DPOConfig:
    return DPOConfig(**{**job.settings, "epochs": 1, "n_samples": 0, **changes})


def store_of(job: TinyJob) -> RefStore:
    """The job's store."""
    (folder,) = (job.folder / "ref_cache").iterdir()
    store = RefStore(folder)
    store.load()
    return store


def rewrite(job: TinyJob, change: Change) -> RefStore:
    """Gives the store other sums (24, 2), as a pass that writes them would: every name fits."""
    store = store_of(job)
    records = store._records.copy()
    records["logps"] = change(records["logps"])
    for path in store.folder.glob("*.npy"):
        path.unlink()
    store._write(records)
    return store


def unbind(job: TinyJob) -> None:
    """Gives the shards the names that an earlier version gave."""
    for path in store_of(job).folder.glob("shard-*.npy"):
        path.rename(path.with_name(f"{file_digest(path)}.npy"))


def inputs_of(job: TinyJob, ranks: Ranks, **changes: Any) -> tuple[DPOConfig, Inputs]:
    config = settings_of(job, **changes)
    return config, load_inputs(config, ranks)


def begin(config: DPOConfig, inputs: Inputs, ranks: Ranks, name: str) -> TrainingRun:
    """A run that is set up; it writes no curves."""
    run = TrainingRun(config, inputs, ranks, name, lambda: None)
    run.writer.close()
    return run


# === a new start ===


def other_model(job: TinyJob, ranks: Ranks) -> RefStore:
    """The store, for the same pairs, of a model whose weights are 1 % larger."""
    start = load_weights(job.folder / "start.pth")
    larger = {name: 1.01 * tensor for name, tensor in start.state_dict.items()}
    save_weights(job.folder / "larger.pth", larger, start.config, {})
    changes = {"model_path": str(job.folder / "larger.pth"), "ref_cache_dir": str(job.folder / "other")}
    config, inputs = inputs_of(job, ranks, **changes)
    precompute(config, inputs, ranks)
    (folder,) = (job.folder / "other").iterdir()
    return RefStore(folder)


def test_a_shard_of_another_model_is_not_trained_on(job: TinyJob, ranks: Ranks) -> None:
    """Put in the place of the model's own: under its own name the pairs are missing, under the name that an earlier
    version gave its bytes the pass refuses it."""
    (shard,) = other_model(job, ranks).folder.glob("*.npy")
    (own,) = (path for path in store_of(job).folder.glob("*.npy"))
    own.unlink()
    shutil.copy(shard, own.with_name(shard.name))
    config, inputs = inputs_of(job, ranks, run_name="new")
    with pytest.raises(UserError, match="24 of 24 pairs have no reference log-probs"):
        train(config, inputs, ranks)
    shutil.copy(shard, own.with_name(f"{file_digest(shard)}.npy"))
    for command in (precompute, train):
        with pytest.raises(UserError, match="no name binds to the reference: [0-9]+ of 24 pairs drawn are further"):
            command(config, inputs, ranks)
    assert not (job.folder / "checkpoints" / "new" / "latest").exists()


def test_training_alone_binds_a_store_of_before(job: TinyJob, ranks: Ranks) -> None:
    """As the reference pass does: same records, new names, and the same curve as with the store of today."""
    before, curve = store_of(job)._records.tobytes(), job.curve("loss")
    unbind(job)
    assert store_of(job).has_unbound
    config, inputs = inputs_of(job, ranks, run_name="new")
    train(config, inputs, ranks)
    assert store_of(job)._records.tobytes() == before and not store_of(job).has_unbound
    assert job.curve("loss", "new") == curve


def test_one_wrong_pair_is_found_in_the_first_step(job: TinyJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit may pass over it, the first step does not: named, and before the weights change."""
    config, inputs = inputs_of(job, ranks, run_name="new")
    run = begin(config, inputs, ranks, "new")
    bad = run.plan.step(0)[0][2][1]  # in the third of four micro-batches
    key = run.pairs.keys[bad].tobytes()

    def change(logps_B2: np.ndarray) -> np.ndarray:
        return logps_B2 - np.float32(0.01) * (store_keys == key)[:, None]

    records = store_of(job)._records
    store_keys = np.array([record.tobytes()[:24] for record in records])
    rewrite(job, change)
    monkeypatch.setattr(Auditor, "audit", lambda *args, **kwargs: None)
    run = TrainingRun(config, inputs, ranks, "new", lambda: None)
    weights = [parameter.clone() for parameter in run.engine.model.parameters()]
    with pytest.raises(UserError, match=f"step 1: 1 pairs .*: {run.pairs.origin(bad)} .chosen"):
        run_steps(run)
    run.writer.close()
    assert all(map(torch.equal, weights, run.engine.model.parameters()))


def test_only_the_first_step_without_dropout_is_compared(job: TinyJob, ranks: Ranks) -> None:
    """With dropout its log-probs are compared with nothing: neither with the reference nor with chats alone."""
    config, inputs = inputs_of(job, ranks, run_name="new")
    run = begin(config, inputs, ranks, "new")
    first = run.first_step(0)
    assert first and first.at_reference and first.anew and not run.first_step(1)
    run.config = replace(config, dropout=0.1)
    first = run.first_step(0)
    assert first and not first.at_reference and not first.anew


# === a resume ===


def resume(job: TinyJob, ranks: Ranks, **changes: Any) -> Path:
    config, inputs = inputs_of(job, ranks, resume=True, **changes)
    return train(config, inputs, ranks)


def test_a_resume_with_another_model_s_values_is_refused(job: TinyJob, ranks: Ranks) -> None:
    """They have the right names, and no policy is there that could tell: the values that the state keeps do."""
    rewrite(job, lambda logps_B2: logps_B2 - np.float32(0.3))
    with pytest.raises(UserError, match=r"step_00000003: cannot resume: 24 of 24 log-probs .*0\.3 nats apart"):
        resume(job, ranks)


def test_a_resume_with_values_that_differ_by_rounding_goes_on(
    job: TinyJob, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """One unit in the last place. The next state keeps the first values, so no drift adds up, and today's digest."""
    rewrite(job, lambda logps_B2: np.nextafter(logps_B2, np.float32(-1e9)))
    before = store_values(job)
    assert before and set(before) == {"digest", "records"}
    config, inputs = inputs_of(job, ranks, resume=True)
    run = begin(config, inputs, ranks, "tiny")
    assert "as near as rounding" in caplog.text
    after = run.saves.reference_values
    assert after and after["records"] == before["records"] and after["digest"] != before["digest"]
    caplog.clear()
    store = rewrite(job, lambda logps_B2: np.nextafter(logps_B2, np.float32(0)))
    assert store.content_digest(inputs.data.pairs.keys) == before["digest"]
    begin(config, inputs, ranks, "tiny")
    assert "rounding" not in caplog.text


def test_a_state_without_values_is_taken_up_with_a_word(
    job: TinyJob, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """As an earlier version's, or that of a run with its reference in memory: nothing is compared, a line says so."""
    config, inputs = inputs_of(job, ranks, resume=True, reference="online", run_name="tiny")
    online = begin(config, inputs, ranks, "tiny").saves
    assert online.reference_values == store_values(job)  # those of the state that it took up stay for a later run
    config, inputs = inputs_of(job, ranks, reference="online", run_name="memory")
    train(config, inputs, ranks)
    assert store_values(job, "memory") is None
    with caplog.at_level(logging.INFO):
        resume(job, ranks, run_name="memory")
    assert caplog.text.count("keeps no values of the reference: none are compared") == 1


def store_values(job: TinyJob, run: str = "tiny") -> dict[str, str] | None:
    """What the state of a run keeps."""
    return newest_state(job.folder / "checkpoints" / run).facts.reference_values
