"""The start of a run: what is read of the model and how often, what the engine then has, what is refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.pretraining import start_file
from simple_llama.pretraining.held_file import HeldFile
from simple_llama.pretraining.start_model import StartChanged
from simple_llama.pretraining.weights import load_weights, save_weights, weights_digest
from simple_llama.reinforcement_learning.rlhf import dry_run, inputs
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from simple_llama.reinforcement_learning.rlhf.run import training_run
from simple_llama.reinforcement_learning.rlhf.run.start_engine import Started, start_engine
from tiny_job import ROOT, TinyJob, make_job


def settings_of(job: TinyJob, stage: str = "zero2_bf16", **changes: object) -> DPOConfig:
    """One step, nothing sampled."""
    given = {"deepspeed_config": str(ROOT / "ds_configs" / f"{stage}.json"), "n_samples": 0, "max_steps": 1, **changes}
    return DPOConfig(**{**job.settings, **given})  # type: ignore[arg-type]


def spoil(job: TinyJob, name: str, value: float) -> None:
    """Puts a number into a tensor of the start model."""
    found = load_weights(job.folder / "start.pth")
    tensors = {key: tensor.clone() for key, tensor in found.state_dict.items()}
    tensors[name].flatten()[5] = value
    save_weights(job.folder / "start.pth", tensors, found.config, {})


@pytest.mark.parametrize("trainable", ["all", "last:1"])
@pytest.mark.parametrize("stage", ["zero2_bf16", "zero2_fp32", "zero3_bf16"])
def test_the_engine_has_the_files_numbers(tmp_path: Path, ranks: Ranks, stage: str, trainable: str) -> None:
    """Bit for bit: masters in fp32, computing weights rounded once, whether they are trained or not."""
    job = make_job(tmp_path)
    config = settings_of(job, stage, trainable=trainable)
    found = load_inputs(config, ranks)
    engine = start_engine(config, found, PreferenceLoss.of(config), ranks).engine
    expected = load_weights(job.folder / "start.pth").state_dict
    assert len(engine.trainable) == (len(expected) if trainable == "all" else 8)
    for name, parameter in engine.model.named_parameters():
        with engine.gathered([parameter]) if engine.partitioned else torch.no_grad():
            assert torch.equal(parameter.detach(), expected[name].to(found.dtype)), name
    for name in engine.trainable:
        assert torch.equal(engine.gathered_state(name)["weight"], expected[name]), name


def test_a_run_reads_and_digests_the_model_once_and_reads_it_once_more(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is filled before. Of 4 bytes a weight: once for the digest, once for the masters, of which the
    computing weights are made; nothing when the run ends, since all is trained. The ranks compare the digest then."""
    job = make_job(tmp_path)
    config = settings_of(job, reference="store")
    precompute(config, load_inputs(config, ranks), ranks)
    read, digested, sizes = HeldFile.read_into, [], []

    def counted(self: HeldFile, memory: memoryview, start: int) -> None:
        sizes.append(len(memory))
        read(self, memory, start)

    def noted(tensors: Mapping[str, torch.Tensor]) -> str:
        digested.append(sum(tensor.nbytes for tensor in load_weights(job.folder / "start.pth").state_dict.values()))
        return weights_digest(tensors)

    monkeypatch.setattr(HeldFile, "read_into", counted)
    monkeypatch.setattr(start_file, "weights_digest", noted)
    found = load_inputs(config, ranks, settled=False)
    compared, compare = [], inputs.require_same

    def same(what: str, value: object, ranks: Ranks) -> None:
        compared.append(what)
        compare(what, value, ranks)

    monkeypatch.setattr(inputs, "require_same", same)
    train(config, found, ranks)
    [once] = digested
    assert sum(sizes) == 2 * once and compared == ["start model (digest)", "reference model (digests)"]


@pytest.mark.parametrize("name", ["norm.weight", "decoder_blocks.0.attention.out.weight"])
@pytest.mark.parametrize(
    ("value", "stage"), [(math.nan, "zero2_bf16"), (3.4e38, "zero2_bf16"), (math.inf, "zero3_bf16")]
)
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, ranks: Ranks, name: str, value: float, stage: str
) -> None:
    """In the computing dtype: 3.4e38 is more than bf16 has. With one of them trained and the other not; no reference's
    model is made, which would find it, too."""
    job = make_job(tmp_path)
    spoil(job, name, value)
    config = settings_of(job, stage, trainable="last:1", loss_type="simpo")
    with pytest.raises(UserError, match=f"start.pth: expected finite weights in torch.bfloat16, .* {name}"):
        train(config, load_inputs(config, ranks), ranks)
    assert not (job.folder / "runs").exists()
    with pytest.raises(UserError, match=f"start.pth: expected finite weights in torch.bfloat16, .* {name}"):
        dry_run.describe(config, load_inputs(config, ranks), ranks)


def test_a_model_that_changes_under_its_digest_trains_nothing(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masters are read, then another model's bytes stand in the file, then it is digested: refused, by a run that
    has not looked for a reference under that digest."""
    job, other = make_job(tmp_path / "job"), make_job(tmp_path / "other")
    spoil(other, "norm.weight", 3.0)
    go = threading.Event()

    def later(tensors: Mapping[str, torch.Tensor]) -> str:
        assert go.wait(60)
        return weights_digest(tensors)

    def started(*given: Any) -> Started:
        found = start_engine(*given)
        with (job.folder / "start.pth").open("r+b") as file:
            file.write((other.folder / "start.pth").read_bytes())
        go.set()
        return found

    monkeypatch.setattr(start_file, "weights_digest", later)
    monkeypatch.setattr(training_run, "start_engine", started)
    config = settings_of(job, reference="store")
    with pytest.raises(StartChanged, match="tensor 'norm.weight' differs"):
        train(config, load_inputs(config, ranks, settled=False), ranks)
    assert go.is_set() and not (job.folder / "runs").exists() and not (job.folder / "ref_cache").exists()


def test_shapes_are_compared_before_an_engine_is_made(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks whose models have other shapes would be ended by exchanging tensors of them; the digest is later."""
    job, compared = make_job(tmp_path), dict[str, object]()
    monkeypatch.setattr(inputs, "require_same", lambda what, value, _ranks: compared.update({what: value}))
    load_inputs(DPOConfig(**{**job.settings, "reference": "online"}), ranks, settled=False)  # type: ignore[arg-type]
    shape = compared["start model (architecture)"]
    assert isinstance(shape, dict) and shape["width"] == "32" and "start model (digest)" not in compared
