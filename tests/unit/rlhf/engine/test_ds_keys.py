"""Two ranks (gloo) under each key and value of a DeepSpeed file that is admitted: the numbers of a plain loop.

The cases are made from the table of admitted keys itself. One file for each ZeRO stage has every key at the first of
its values; every other value is one case more, and one has all of them at once. All train in turn in one pair of ranks.
"""

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
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.ds_keys import _ALLOWED, _Count
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from tiny_job import TinyJob, free_port, make_job, run_ranks

DTYPES = (torch.float32, torch.bfloat16)
CLIP = 0.5  # far below the norm of the first gradients, 631
ROUNDING = 2**-8  # a bf16 sum of two ranks' bf16 gradients: three roundings of 2^-9, which do not all point one way
STAGE, BF16, COMMUNICATION = "zero_optimization.stage", "bf16.enabled", "communication_data_type"
OFFLOADS = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")


def values(path: str) -> tuple[Any, ...]:
    """What is tried of a key: all its values, or of a range one inside the model's 32,000 weights, and its least.

    Of the bucket, which decides what is sent together, also the shipped size, in which they all have room.
    """
    allowed = _ALLOWED[path].values
    if not isinstance(allowed, _Count):
        return allowed
    return (2000, 5e7, allowed.low) if path.endswith("reduce_bucket_size") else (2000, allowed.low)


def cases() -> Iterator[tuple[str, Case]]:
    """All cases by name. fp32 is the first value here: what rounds to bf16 is a case beside it."""
    for stage in _ALLOWED[STAGE].values:
        read = [path for path, key in _ALLOWED.items() if key.stage in (0, stage) and path != STAGE]
        plain = [path for path in read if not path.startswith(OFFLOADS)]
        base = {path: values(path)[0] for path in plain} | {STAGE: stage, BF16: False}
        last = {path: values(path)[-1] for path in read} | {STAGE: stage, BF16: False, COMMUNICATION: "fp32"}
        yield f"ZeRO-{stage}", base
        yield f"ZeRO-{stage}, all others at once", last
        for path in plain:
            for value in values(path):
                if value != base[path]:
                    yield f"ZeRO-{stage}, {path}: {json.dumps(value)}", {**base, path: value}
        for section in OFFLOADS:
            offload = {path: values(path)[0] for path in read if path.startswith(section)}
            if offload:
                yield f"ZeRO-{stage}, {section}", base | offload
        if stage == 2:
            yield "reduce_once", {**base, "reduce_once": True}
            yield "reduce_once, all others at once", {**last, "reduce_once": True}


CASES = dict(cases())
RESUMED = {name for name in CASES if "once" in name or "offload" in name or ":" not in name}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    return make_job(tmp_path_factory.mktemp("settings"), n_layers=1)


def settings(job: TinyJob) -> dict[str, object]:
    """Two groups of parameters (with and without decay), and on two ranks four micro-batches of one pair a step."""
    own = {"val_share": 0, "batch_size": 1, "grad_accum_steps": 2, "weight_decay": 0.1, "max_grad_norm": CLIP}
    own |= {"loss_type": "ipo"}  # whose gradient does not vanish
    return {**job.settings, **own}


@pytest.fixture(scope="module")
def found(job: TinyJob) -> dict[str, Steps]:
    """What two ranks computed, by case."""
    folder = job.folder / "checkpoints"
    folder.mkdir()
    rows = []
    for number, (name, case) in enumerate(CASES.items()):
        path = job.folder / f"{number}.json"
        path.write_text(json.dumps(as_json(case)))
        rows.append((name, str(path), {"reduce_once": True} if "reduce_once" in case else {}, name in RESUMED))
    (folder / "cases.json").write_text(json.dumps(rows))
    run_ranks("tests/settings_steps.py", settings(job), world=2, port=free_port())
    return {name: Steps(**fields) for name, fields in torch.load(folder / "steps.pt").items()}


@pytest.fixture(scope="module")
def plain(job: TinyJob, ranks: Ranks) -> Iterator[dict[bool, Plain]]:
    """A plain loop in one process, in fp32 and (True) in bf16: no DeepSpeed, torch's clip and fused AdamW."""
    config = DPOConfig(**settings(job))  # type: ignore[arg-type]
    inputs, threads = load_inputs(config, ranks), torch.get_num_threads()
    torch.set_num_threads(max(1, len(_own_cores()) // 2))  # as many as a rank gets: sums rounded alike
    yield {dtype == torch.bfloat16: plain_steps(config, replace(inputs, dtype=dtype)) for dtype in DTYPES}
    torch.set_num_threads(threads)


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_a_plain_loop(name: str, found: dict[str, Steps], plain: dict[bool, Plain]) -> None:
    """Norms before the clip, AdamW's moments and the fp32 master weights after each of two steps: 1e-6 of their norm,
    as fp32 sums in another order differ. The second step's computing weights are bf16 roundings of masters that may
    differ by that much; gradients that are exchanged in bf16 are roundings themselves.

    Of the clip: the first moment is (1 - beta1) = 0.1 of a gradient that was clipped to a norm of 0.5.
    """
    case, steps, (norms, states) = CASES[name], found[name], plain[CASES[name][BF16]]
    for n in range(2):
        bound = ROUNDING if case[COMMUNICATION] == "bf16" else 1e-3 if case[BF16] and n else 1e-6
        assert steps.norms[n] == pytest.approx(norms[n], rel=bound)
        for kind, expected in states[n].items():
            assert difference(steps.states[n][kind], expected) <= (2 * bound if kind == "exp_avg_sq" else bound), kind
    assert steps.norms[0] > CLIP and float(steps.states[0]["exp_avg"].norm()) == pytest.approx(0.1 * CLIP, rel=1e-4)
    if name in RESUMED:
        assert steps.again == steps.norms[1]  # from the state after the first step, loaded


@pytest.mark.dist
def test_the_computing_weights_follow(found: dict[str, Steps]) -> None:
    """Log-probs of four pairs after the last step are those of ZeRO-2 with the first values, to fp32's noise."""
    for name, case in CASES.items():
        if not case[BF16] and case[COMMUNICATION] == "fp32":
            assert difference(found[name].logps, found["ZeRO-2"].logps) <= 1e-6, name


def test_every_key_and_value_is_tried() -> None:
    """Each pair of the table stands in a case; of a range at least two values."""
    tried = {(path, json.dumps(value)) for case in CASES.values() for path, value in case.items()}
    for path, key in _ALLOWED.items():
        if isinstance(key.values, _Count):
            assert len({value for name, value in tried if name == path}) >= 2, path
        else:
            assert {(path, json.dumps(value)) for value in key.values} <= tried | {(path, "1.0")}
