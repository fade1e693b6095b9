"""DeepSpeed on one rank alone."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine import engine
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from tiny_job import ROOT, make_job


@pytest.mark.parametrize("file", ["zero2_bf16", "zero2_fp32"])
def test_alone_is_bit_for_bit_as_with_buckets(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The same six steps with what `without_communication` leaves out, on a CPU and a GPU: equal losses and weights."""
    job, original = make_job(tmp_path), engine.without_communication
    ways = {
        "alone": original,
        "no overlap": lambda settings, keep_buckets: original(settings, True),  # a GPU's way
        "buckets": lambda settings, keep_buckets: settings,
    }
    for run, way in ways.items():
        monkeypatch.setattr(engine, "without_communication", way)
        settings = {**job.settings, "run_name": run, "reference": "online", "n_samples": 0}
        settings["deepspeed_config"] = str(ROOT / "ds_configs" / f"{file}.json")
        config = DPOConfig(**settings)  # type: ignore[arg-type]
        train(config, load_inputs(config, ranks), ranks)
    buckets = job.weights("buckets")
    for run in ("alone", "no overlap"):
        for name in ("loss", "grad_norm", "rewards/margins"):
            assert job.curve(name, run) == job.curve(name, "buckets"), name
        assert all(torch.equal(tensor, buckets[name]) for name, tensor in job.weights(run).items())


@pytest.mark.parametrize("error", [AssertionError, KeyError, TypeError, RuntimeError, ValueError, OSError, Exception])
def test_whatever_deepspeed_raises_at_its_start_is_one_message(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The file and DeepSpeed's words, shortened; the error itself is the cause, which `--debug` shows."""
    settings = {**make_job(tmp_path).settings, "reference": "online"}
    config = DPOConfig(**settings)  # type: ignore[arg-type]

    def initialize(**given: object) -> None:
        raise error("words" * 20_000)

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    with pytest.raises(UserError) as raised:
        train(config, load_inputs(config, ranks), ranks)
    start = f"{settings['deepspeed_config']}: DeepSpeed does not start with these settings: {error.__name__}: "
    assert str(raised.value).startswith(start) and "wordswords" in str(raised.value)
    assert len(str(raised.value)) < 1500 and type(raised.value.__cause__) is error


def test_a_check_of_deepspeeds_own_is_one_message(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that reaches DeepSpeed all the same: its assertion, and the file."""
    config = DPOConfig(**{**make_job(tmp_path).settings, "reference": "online"})  # type: ignore[arg-type]
    full = engine.full_ds_config
    monkeypatch.setattr(engine, "full_ds_config", lambda *given: {**full(*given), "prescale_gradients": True})
    with pytest.raises(
        UserError, match=r"zero2_fp32\.json: DeepSpeed .*: AssertionError: pre-scale gradients is not yet"
    ):
        train(config, load_inputs(config, ranks), ranks)
