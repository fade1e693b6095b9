"""DeepSpeed on one rank alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
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
