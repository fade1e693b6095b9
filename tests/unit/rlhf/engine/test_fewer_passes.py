"""ZeRO-2 with fewer passes over whole gradients, against DeepSpeed's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine import engine
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.engine.fewer_passes import block_norms, use_fewer_passes
from simple_llama.reinforcement_learning.rlhf.engine.state_copy import StateCopy
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from tiny_job import ROOT, make_job


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3_000_001])
def test_the_norm_is_that_of_fp64(size: int) -> None:
    """To 1e-7, of values of many magnitudes: one fp32 sum of three million squares loses more."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, size)
    assert float(block_norms(values).norm()) == pytest.approx(float(values.double().norm()), rel=1e-7)


def test_the_norm_of_no_number_is_none() -> None:
    """One in three million values says so."""
    for bad in (torch.inf, torch.nan):
        values = torch.zeros(3_000_000)
        values[1_234_567] = bad
        assert not block_norms(values).norm().isfinite()


@pytest.mark.parametrize(("file", "accum"), [("zero2_bf16", 1), ("zero2_bf16", 4), ("zero2_offload", 2)])
def test_a_run_is_deepspeeds_own(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, file: str, accum: int
) -> None:
    """Two groups of parameters, one or several micro-batches, a save in between: without a clip, which reads the norm,
    all weights bit for bit, and norms to 1e-6."""
    job = make_job(tmp_path)
    for run, way in {"fewer": use_fewer_passes, "own": lambda *_, **__: {}}.items():
        monkeypatch.setattr(engine, "use_fewer_passes", way)
        settings = {**job.settings, "run_name": run, "reference": "online", "n_samples": 0, "epochs": 2}
        settings |= {"batch_size": 8 // accum, "grad_accum_steps": accum, "max_grad_norm": 0.0, "weight_decay": 0.1}
        settings["deepspeed_config"] = str(ROOT / "ds_configs" / f"{file}.json")
        config = DPOConfig(**settings)  # type: ignore[arg-type]
        train(config, load_inputs(config, ranks), ranks)
    assert job.curve("loss", "fewer") == job.curve("loss", "own")
    assert job.curve("grad_norm", "fewer") == pytest.approx(job.curve("grad_norm", "own"), rel=1e-6)
    own = job.weights("own")
    assert all(torch.equal(tensor, own[name]) for name, tensor in job.weights("fewer").items())


def test_sums_stay_where_they_are_until_a_state_is_taken(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor for the steps of a run: none while a state is taken whose save is waited for, and it stays beside
    other saves."""
    places: list[int] = []
    kept: list[tuple[bool, int, int]] = []
    take, step = StateCopy.take, Engine.step

    def watched_step(self: Engine, rate: float) -> float:
        (sums,) = self.optimizer.averaged_gradients.values()
        places.append(sums.flat_partition.data_ptr())
        return step(self, rate)

    def watched_take(self: StateCopy, sums_stay: bool) -> None:
        before = len(self._engine.kept_sums)
        take(self, sums_stay)
        kept.append((sums_stay, before, len(self._engine.kept_sums)))

    monkeypatch.setattr(Engine, "step", watched_step)
    monkeypatch.setattr(StateCopy, "take", watched_take)
    job = make_job(tmp_path)
    settings = {**job.settings, "deepspeed_config": str(ROOT / "ds_configs" / "zero2_bf16.json"), "n_samples": 0}
    for beside in (False, True):
        more = {"reference": "online", "save_in_background": beside, "run_name": f"beside{beside}"}
        config = DPOConfig(**{**settings, **more})  # type: ignore[arg-type]
        train(config, load_inputs(config, ranks), ranks)
    assert len(places) == 12 and len(set(places[:3])) == 1  # an epoch has three steps, and a save behind it
    assert len(set(places[6:])) == 1
    assert kept == [(False, 1, 0)] * 2 + [(True, 1, 1)] * 2
