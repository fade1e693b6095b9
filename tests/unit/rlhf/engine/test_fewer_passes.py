"""ZeRO-2 with fewer passes over whole gradients, against DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine import engine
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import full_ds_config
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.engine.fewer_passes import block_norms, use_fewer_passes
from simple_llama.reinforcement_learning.rlhf.engine.state_copy import StateCopy
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.start_engine import _build_policy, _start_model
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


RUNS = [
    ("cpu", "zero2_bf16", {"grad_accum_steps": 1}),
    ("cuda", "zero2_bf16", {"grad_accum_steps": 4, "max_grad_norm": 1e6}),
    ("cuda", "zero2_bf16", {"grad_accum_steps": 4, "reduce_once": True}),
    ("cuda", "zero2_fp32", {"grad_accum_steps": 4, "max_grad_norm": 1e6}),
    ("cpu", "zero2_offload", {"grad_accum_steps": 2}),
]


@pytest.mark.parametrize(("device", "file", "changes"), RUNS)
def test_a_run_is_deepspeeds_own(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, device: str, file: str, changes: dict[str, Any]
) -> None:
    """Two groups of parameters, one or several micro-batches, a save in between, with the settings that a rank of this
    device is given, and with all that are in the file: without a clip, which reads the norm, or within it all weights
    bit for bit, and norms to 1e-6."""
    job, here = make_job(tmp_path), engine.ds_config_here
    ways = {
        "fewer": (use_fewer_passes, lambda config, world_size, _: here(config, world_size, device)),
        "own": (lambda *_: {}, lambda config, world_size, _: full_ds_config(config, world_size)),
    }
    for run, (way, given) in ways.items():
        monkeypatch.setattr(engine, "use_fewer_passes", way)
        monkeypatch.setattr(engine, "ds_config_here", given)
        settings = {**job.settings, "run_name": run, "reference": "online", "n_samples": 0, "epochs": 2}
        settings |= {"max_grad_norm": 0.0, "weight_decay": 0.1, **changes}
        settings |= {"batch_size": 8 // changes["grad_accum_steps"]}
        settings["deepspeed_config"] = str(ROOT / "ds_configs" / f"{file}.json")
        config = DPOConfig(**settings)  # type: ignore[arg-type]
        train(config, load_inputs(config, ranks), ranks)
    for name in ("loss", "rewards/margins"):
        assert job.curve(name, "fewer") == job.curve(name, "own"), name
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


# === One engine, step by step ===

REF_B2 = torch.zeros(2, 2)


class Calls(TorchDispatchMode):
    """Counts calls of torch that compute: on a GPU each is one kernel or, of many values, a few."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views_or_makes = func.is_view or "empty" in func.name() or func.namespace == "profiler"
        self.count += not views_or_makes
        return func(*args, **(kwargs or {}))


def calls(function: Callable[..., Any], *args: Any) -> int:
    """What it calls with these arguments."""
    with Calls() as counted:
        function(*args)
    return counted.count


def parts(folder: Path, ranks: Ranks, layers: int = 1, **changes: Any) -> tuple[DPOPolicy, Engine, PairBatch]:
    """A policy by itself, a second one under DeepSpeed in bf16 with a clip of 1, and two pairs."""
    job = make_job(folder / f"layers_{layers}", n_layers=layers)
    settings = {**job.settings, "deepspeed_config": str(ROOT / "ds_configs" / "zero2_bf16.json"), **changes}
    config = DPOConfig(**settings)  # type: ignore[arg-type]
    inputs = load_inputs(config, ranks)
    with inputs.start.reading() as start:
        plain, under = (
            _build_policy(config, _start_model(config, inputs, start, ranks), PreferenceLoss.of(config), start.path)
            for _ in range(2)
        )
        trained = Engine(under, start.state_dict, config, ranks)
    pairs = inputs.data.train
    return plain, trained, PairBatch.pack([pairs[0], pairs[1]])


def counted(folder: Path, ranks: Ranks, layers: int) -> tuple[int, list[int], int]:
    """Parameters; the calls that DeepSpeed adds to a micro-batch, to a step's first and to its last one; those of a
    step's end."""
    plain, trained, batch = parts(folder, ranks, layers)
    trained.backward(batch, REF_B2, 1.0, True)
    trained.step(1e-3)  # the first step makes what stays
    with Calls() as by_itself:
        plain(batch, REF_B2, None, 1.0).loss.backward()
    added = [calls(trained.backward, batch, REF_B2, 1.0, last) - by_itself.count for last in (False, True)]
    return len(trained.trainable), added, calls(trained.step, 1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_deepspeed_adds_to_a_step(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """With the settings of a rank of this device: a call a parameter and micro-batch and 2 beside, and 44 at a step's
    end, however many parameters there are."""
    here = engine.ds_config_here
    monkeypatch.setattr(engine, "ds_config_here", lambda config, world, _: here(config, world, device))
    found = [counted(tmp_path, ranks, layers) for layers in (1, 3)]
    assert all(max(added) <= parameters + 2 for parameters, added, _ in found)
    assert found[0][-1] == found[1][-1] <= 44


def test_what_it_would_add(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own way, with all that is set: 3 calls a parameter and micro-batch, for its copy into a bucket, the
    sum and its copy back; 13 at a step's end, for the largest and the smallest value, and 2 for the norm in fp64."""
    monkeypatch.setattr(engine, "ds_config_here", lambda config, world, _: full_ds_config(config, world))
    monkeypatch.setattr(engine, "use_fewer_passes", lambda *_: {})
    few, many = (counted(tmp_path, ranks, layers) for layers in (1, 3))
    more = many[0] - few[0]
    assert [b - a for a, b in zip(few[1], many[1], strict=True)] == [3 * more] * 2
    assert many[2] - few[2] == 15 * more


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path: Path, ranks: Ranks) -> None:
    """One value of one parameter, of either kind: the norm says so, and the next step is as if there had been none."""
    _, trained, batch = parts(tmp_path, ranks)
    for bad in (torch.inf, torch.nan):
        trained.backward(batch, REF_B2, 1.0, True)
        trained.optimizer.averaged_gradients[0].flat_partition[7] = bad
        before = [flat.detach().clone() for flat in trained._flats]
        assert trained.step(1e-3) == torch.inf
        assert all(torch.equal(flat, was) for flat, was in zip(trained._flats, before, strict=True))
    trained.backward(batch, REF_B2, 1.0, True)
    assert 0 < trained.step(1e-3) < torch.inf
    assert not any(torch.equal(flat, was) for flat, was in zip(trained._flats, before, strict=True))


def test_a_parameter_without_gradient_has_none_of_the_last_step(tmp_path: Path, ranks: Ranks) -> None:
    """Its place still has the last step's sum when the norm is asked for; the other places have this step's."""
    _, trained, batch = parts(tmp_path, ranks)
    trained.backward(batch, REF_B2, 1.0, True)
    sums = trained.optimizer.averaged_gradients[0].flat_partition.clone()
    trained.step(0.0)
    name, left_out = next(iter(trained.trainable.items()))
    left_out.requires_grad_(False)
    trained.backward(batch, REF_B2, 1.0, True)
    found = trained.optimizer.averaged_gradients[0].flat_partition
    norm = float(trained.optimizer.scaled_global_norm())
    size = left_out.numel()
    assert name == "embeddings.weight" and not found[:size].any() and sums[:size].any()
    assert torch.equal(found[size:], sums[size:]) and norm == pytest.approx(float(sums[size:].norm()), rel=1e-6)


@pytest.mark.parametrize(("norm", "factor"), [(0.5, 1.0), (0.999999, 1.0), (1.0, 1 / 1.000001), (4.0, 1 / 4.000001)])
def test_the_clip_is_deepspeeds(tmp_path: Path, ranks: Ranks, norm: float, factor: float) -> None:
    """max_grad_norm 1: min(1, 1 / (norm + 1e-6)), and no pass over the gradient where that is 1."""
    _, trained, _ = parts(tmp_path, ranks)
    gradient = torch.full((3,), 2.0)
    count = calls(trained.optimizer.unscale_and_clip_grads, [gradient], torch.tensor(norm))
    assert gradient.tolist() == pytest.approx([2.0 * factor] * 3, rel=1e-7)
    assert (gradient.tolist() == [2.0] * 3) == (factor == 1.0) == (count <= 3)
