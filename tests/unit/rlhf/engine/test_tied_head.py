"""A tied head and grouped keys under DeepSpeed on two ranks (gloo): the numbers of a plain loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from plain_steps import Case, Plain, as_json, difference, plain_steps
from settings_steps import Steps
from simple_llama.cluster.distributed import Ranks, _own_cores
from simple_llama.pretraining.weights import LoadedModel, build_model
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from tiny_hf import TinyHFJob, make_hf_job
from tiny_job import free_port, run_ranks

STAGE, BF16 = "zero_optimization.stage", "bf16.enabled"
OFFLOAD_WEIGHTS = "zero_optimization.offload_param.device"
OFFLOAD = {"zero_optimization.offload_optimizer.device": "cpu", "zero_force_ds_cpu_optimizer": False}
PLAIN_SUMS: Case = {"data_types.grad_accum_dtype": "fp32", "communication_data_type": "fp32"}
CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "ZeRO-2": ({STAGE: 2, BF16: False}, {}),
    "ZeRO-3": ({STAGE: 3, BF16: False}, {}),
    "ZeRO-2, offload": ({STAGE: 2, BF16: False, **OFFLOAD}, {}),
    "ZeRO-3, offload": ({STAGE: 3, BF16: False, **OFFLOAD}, {}),
    "ZeRO-3, weights offloaded too": ({STAGE: 3, BF16: False, **OFFLOAD, OFFLOAD_WEIGHTS: "cpu"}, {}),
    "ZeRO-2, recomputing": ({STAGE: 2, BF16: False}, {"activation_checkpointing": True}),
    "ZeRO-2 in bf16": ({STAGE: 2, BF16: True}, {}),
    "ZeRO-3 in bf16": ({STAGE: 3, BF16: True}, {}),
    "ZeRO-2 in bf16, reduce_once": ({STAGE: 2, BF16: True}, {"reduce_once": True}),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyHFJob:
    return make_hf_job(tmp_path_factory.mktemp("tied"))


def settings(job: TinyHFJob) -> dict[str, object]:
    """Two groups of parameters (with and without decay), and on two ranks four micro-batches of one pair a step."""
    own = {"val_share": 0, "batch_size": 1, "grad_accum_steps": 2, "weight_decay": 0.1, "loss_type": "ipo"}
    return {**job.settings, **own}


@pytest.fixture(scope="module")
def found(job: TinyHFJob) -> dict[str, Steps]:
    """What two ranks computed, by case."""
    folder = job.folder / "checkpoints"
    folder.mkdir()
    rows = []
    for number, (name, (case, changes)) in enumerate(CASES.items()):
        path = job.folder / f"{number}.json"
        path.write_text(json.dumps(as_json({**PLAIN_SUMS, **case})))
        rows.append((name, str(path), changes, True))
    (folder / "cases.json").write_text(json.dumps(rows))
    run_ranks("tests/settings_steps.py", settings(job), world=2, port=free_port())
    return {name: Steps(**fields) for name, fields in torch.load(folder / "steps.pt").items()}


@pytest.fixture(scope="module")
def plain(job: TinyHFJob, ranks: Ranks) -> Iterator[dict[bool, Plain]]:
    """A plain loop in one process, in fp32 and (True) in bf16."""
    config = DPOConfig(**settings(job))  # type: ignore[arg-type]
    inputs, threads = load_inputs(config, ranks), torch.get_num_threads()
    assert inputs.architecture.tied_head and inputs.architecture.key_heads < inputs.architecture.heads
    torch.set_num_threads(max(1, len(_own_cores()) // 2))  # as many as a rank gets: sums rounded alike
    dtypes = (torch.float32, torch.bfloat16)
    yield {dtype == torch.bfloat16: plain_steps(config, replace(inputs, dtype=dtype)) for dtype in dtypes}
    torch.set_num_threads(threads)


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_a_plain_loop(name: str, found: dict[str, Steps], plain: dict[bool, Plain]) -> None:
    """Norms before the clip, moments and masters after each of two steps, to 1e-6 of their norm; the second step's
    computing weights are bf16 roundings of masters that may differ by that much. The tied matrix is one parameter: its
    master and moments are counted once in all of them. A step from a state that was loaded is the same to the bit."""
    is_bf16, steps = CASES[name][0][BF16], found[name]
    norms, states = plain[is_bf16]
    for n in range(2):
        bound = 1e-3 if is_bf16 and n else 1e-6
        assert steps.norms[n] == pytest.approx(norms[n], rel=bound)
        for kind, expected in states[n].items():
            assert difference(steps.states[n][kind], expected) <= (2 * bound if kind == "exp_avg_sq" else bound), kind
    assert steps.again == steps.norms[1]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2.5e-3)])
def test_the_gradient_is_the_sum_of_both_ends(job: TinyHFJob, ranks: Ranks, dtype: torch.dtype, bound: float) -> None:
    """Against an untied model with the same numbers, whose two gradients are added in fp32. In bf16 the two ends are
    rounded and so is their sum, each to 2^-9 of a number."""
    inputs = load_inputs(DPOConfig(**settings(job)), ranks)  # type: ignore[arg-type]
    with inputs.start.reading() as start:
        tied = build_model(start, dtype, "cpu")
        weights = dict(start.state_dict)
    untied_shape = replace(inputs.architecture, tied_head=False)
    weights["final_linear.weight"] = weights["embeddings.weight"].clone()
    untied = build_model(LoadedModel(weights, untied_shape, job.model), dtype, "cpu")
    batch = PairBatch.pack([inputs.data.train[i] for i in range(4)])
    for model in (tied, untied):
        DPOPolicy(model, PreferenceLoss.of(DPOConfig(loss_type="ipo")))(batch, torch.zeros(4, 2)).loss.backward()
    first, last, found = untied.embeddings.weight.grad, untied.head_weight.grad, tied.head_weight.grad
    assert first is not None and last is not None and found is not None
    assert first.any() and last.any() and tied.embeddings.weight is tied.head_weight
    assert difference(found.float(), first.float() + last.float()) <= bound
