"""Adapters under DeepSpeed on two ranks (gloo): the numbers of a plain loop, and no master for anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from plain_steps import Case, as_json, difference, plain_steps
from settings_steps import Steps
from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from tiny_hf import TinyHFJob, make_hf_job
from tiny_job import free_port, run_ranks

STAGE, BF16 = "zero_optimization.stage", "bf16.enabled"
CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "ZeRO-2": ({STAGE: 2, BF16: False}, {}),
    "ZeRO-3": ({STAGE: 3, BF16: False}, {}),
    "ZeRO-2, recomputing": ({STAGE: 2, BF16: False}, {"activation_checkpointing": True}),
}
ADAPTERS = 2 * 1856  # numbers in those of rank 4 of two layers: by hand in test_adapters.py


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyHFJob:
    return make_hf_job(tmp_path_factory.mktemp("lora"))


def settings(job: TinyHFJob) -> dict[str, Any]:
    """On two ranks four micro-batches of one pair a step."""
    own = {"val_share": 0, "batch_size": 1, "grad_accum_steps": 2, "loss_type": "ipo", "lora_rank": 4}
    return {**job.settings, **own, "trainable": "lora"}


@pytest.fixture(scope="module")
def found(job: TinyHFJob) -> dict[str, Steps]:
    """What two ranks computed, by case."""
    folder = job.folder / "checkpoints"
    folder.mkdir()
    rows = []
    for number, (name, (case, changes)) in enumerate(CASES.items()):
        path = job.folder / f"{number}.json"
        path.write_text(json.dumps(as_json(case)))
        rows.append((name, str(path), changes, True))
    (folder / "cases.json").write_text(json.dumps(rows))
    run_ranks("tests/settings_steps.py", settings(job), world=2, port=free_port())
    return {name: Steps(**fields) for name, fields in torch.load(folder / "steps.pt").items()}


@pytest.mark.dist
def test_two_ranks_train_adapters_as_a_plain_loop_does(job: TinyHFJob, ranks: Ranks, found: dict[str, Steps]) -> None:
    """fp32: norms before the clip, masters and moments after each of two steps, to 1e-5 of their norm. A step from a
    state that was loaded is the same to the bit."""
    config = DPOConfig(**settings(job))
    norms, states = plain_steps(config, load_inputs(config, ranks))
    for name, steps in found.items():
        for n in range(2):
            assert steps.norms[n] == pytest.approx(norms[n], rel=1e-5), name
            for kind, expected in states[n].items():
                assert len(expected) == len(steps.states[n][kind]) == ADAPTERS
                assert difference(steps.states[n][kind], expected) <= 1e-5, (name, kind)
        assert steps.again == steps.norms[1]
