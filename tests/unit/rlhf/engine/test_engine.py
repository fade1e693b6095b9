"""DeepSpeed on one rank alone."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine import engine
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine, dealt_model, decay_groups
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from tiny_hf import ARCHITECTURE, make_hf_job
from tiny_job import make_job


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
    here = engine.ds_config_here
    monkeypatch.setattr(engine, "ds_config_here", lambda *given: {**here(*given), "prescale_gradients": True})
    with pytest.raises(
        UserError, match=r"zero2_fp32\.json: DeepSpeed .*: AssertionError: pre-scale gradients is not yet"
    ):
        train(config, load_inputs(config, ranks), ranks)


# === What it is given ===


def test_what_decays_by_hand() -> None:
    """The matrices of the layers, and a head of its own. Embeddings do not, tied to the head or not, nor norms and
    biases. A weight that ZeRO-3 has dealt out counts by its whole shape."""
    biased = replace(ARCHITECTURE, layers=1, qkv_bias=True)
    tied, untied = (
        dict(LLaMaTransformer(replace(biased, tied_head=tied_head)).named_parameters()) for tied_head in (True, False)
    )
    parts = ("attention.qkv_linear", "attention.out", "ffwd.w1", "ffwd.w2", "ffwd.w3")
    matrices = {f"decoder_blocks.0.{part}.weight" for part in parts}

    def check(parameters: dict[str, torch.nn.Parameter], expected: set[str]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        groups = decay_groups(parameters, 0.1)
        found = [({names[id(each)] for each in group["params"]}, group["weight_decay"]) for group in groups]
        assert found == [(expected, 0.1), (parameters.keys() - expected, 0.0)]

    check(tied, matrices)
    check(untied, matrices | {"final_linear.weight"})
    for parameter in tied.values():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)  # pyright: ignore[reportAttributeAccessIssue]
    check(tied, matrices)


def test_a_load_holds_one_parameter_at_a_time() -> None:
    """When the next tensor is read, the one before is gone: the peak is what stays and one tensor."""
    before: list[weakref.ref[torch.Tensor]] = []

    def read() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name in "abc":
            assert [reference() for reference in before] == [None] * len(before)
            tensors = {"weight": torch.ones(2)}
            before.append(weakref.ref(tensors["weight"]))
            yield name, tensors
            del tensors

    given: list[str] = []
    fake: Any = SimpleNamespace(
        trainable={name: torch.zeros(2) for name in "abc"},
        _set=lambda parameter, key, value: given.append(key),
        round_to_computing_weights=lambda: None,
        optimizer=SimpleNamespace(optimizer=SimpleNamespace(state={})),
    )
    Engine.load_full_state(fake, read(), optimizer_steps=0)
    assert given == ["weight"] * 3


def test_zero_3_reads_one_part_of_the_model_at_a_time(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied, fp32, alone: the embeddings 300 x 32, two layers of 7,680 + 2 x 32, the last norm. What was read before a
    part has been dealt out by then, so that nothing is whole but the part."""
    path, job = tmp_path / "zero3.json", make_hf_job(tmp_path)
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    config = DPOConfig(**{**job.settings, "deepspeed_config": str(path)})  # type: ignore[arg-type]
    models, whole, sizes = [], [], []
    empty, fill = engine.empty_model, engine.fill

    def emptied(*given: Any) -> LLaMaTransformer:
        models.append(empty(*given))
        return models[0]

    def filled(part: torch.nn.Module, *given: Any) -> None:
        whole.append(sum(p.numel() for p in models[0].parameters() if not p.is_meta))
        fill(part, *given)
        sizes.append(sum(p.numel() for p in part.parameters()))

    monkeypatch.setattr(engine, "empty_model", emptied)
    monkeypatch.setattr(engine, "fill", filled)
    inputs = load_inputs(config, ranks)
    with inputs.start.reading() as start:
        model = dealt_model(start, inputs.dtype, config, ranks)
    assert whole == [0] * 4 and sorted(sizes) == [32, 7_744, 7_744, 9_600]
    dealt: dict[str, Any] = dict(model.named_parameters())
    assert not any(parameter.numel() for parameter in dealt.values())
    with inputs.start.reading() as start:
        assert dealt.keys() == set(start.state_dict)
        assert all(torch.equal(dealt[name].ds_tensor, start.state_dict[name].flatten()) for name in dealt)
