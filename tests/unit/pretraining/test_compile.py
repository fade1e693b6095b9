"""Compiled decoder layers: the numbers of uncompiled ones, and one compilation for every number of rows."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from simple_llama.ops.attention import PackedLayout
from simple_llama.pretraining.architecture import LORA_TARGETS, Architecture, LoRA
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from tiny_hf import ARCHITECTURE
from tiny_job import MLA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs g++"),
]
SMALL: dict[str, Any] = {"n_embd": 32, "n_heads": 4, "n_layers": 2, "multiple_of": 16, "max_seq_len": 64}


def _shape(**changes: Any) -> Architecture:
    """The small model, changed."""
    return Architecture.of(TrainingConfig(**{**SMALL, **changes}), 50)


UPDATES = LoRA(2, 4.0, LORA_TARGETS)
GROUPED = replace(ARCHITECTURE, layers=1, qkv_bias=True, qk_norm=True, lora=UPDATES)  # two key heads of four, tied


def _pair(
    compiled_dtype: torch.dtype, architecture: Architecture | None = None
) -> tuple[LLaMaTransformer, LLaMaTransformer]:
    """The same model twice, the second one compiled."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = LLaMaTransformer(architecture or _shape()).to(compiled_dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):  # zero at the start, where an update is nothing
                torch.nn.init.normal_(parameter)
        models.append(model)
    models[1].compile_layers()
    return models[0], models[1]


def _hidden(model: LLaMaTransformer, prefix: int, branches: tuple[int, int]) -> torch.Tensor:
    """Hidden rows of one packed pair of that size."""
    layout = PackedLayout(((prefix, branches),))
    positions = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + rows) for rows in branches)])
    tokens = torch.arange(layout.rows) % 50
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of its own modules
        return model.hidden(tokens, positions, layout)


def _outcome(model: LLaMaTransformer) -> list[torch.Tensor]:
    """Hidden rows (of a tied head: logits), and the gradient of each parameter for one direction of them, in fp32."""
    hidden = _hidden(model, 9, (4, 6)).float()
    if model.architecture.tied_head:
        hidden = hidden @ model.head_weight.T
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return [hidden.detach(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("architecture", [_shape(**MLA), GROUPED], ids=["MLA", "tied, grouped, adapters"])
def test_values_and_gradients(architecture: Architecture):
    """fp32: within 1e-5 of each tensor's largest entry. A tied matrix has one gradient, of both of its ends."""
    for mine, other in zip(*map(_outcome, _pair(torch.float32, architecture)), strict=True):
        scale = float(mine.abs().max())
        torch.testing.assert_close(other / scale, mine / scale, atol=1e-5, rtol=0)


def test_bf16_is_as_near_to_fp32():
    """Fused arithmetic rounds less often: mean square error against fp32 is at most 1.1 times the other."""
    plain, compiled = _pair(torch.bfloat16)
    exact = LLaMaTransformer(plain.architecture)
    exact.load_state_dict(plain.state_dict())
    exact_tensors = _outcome(exact)
    errors = [
        sum(
            float((ours - truth).square().mean() / truth.square().mean())
            for ours, truth in zip(found, exact_tensors, strict=True)
        )
        for found in (_outcome(plain), _outcome(compiled))
    ]
    assert 0 < errors[1] <= 1.1 * errors[0]


def test_any_number_of_rows_without_recompiling():
    """Graphs are made by the first batch; other sizes, activation checkpointing and generation add none."""
    from torch._dynamo.utils import counters

    _, model = _pair(torch.float32)
    _hidden(model, 9, (4, 6)).sum().backward()
    graphs = counters["stats"]["unique_graphs"]
    for prefix, branches in ((5, (2, 3)), (1, (1, 1)), (30, (7, 2))):
        _hidden(model, prefix, branches).sum().backward()
    model.activation_checkpointing = True
    _hidden(model, 8, (3, 3)).sum().backward()
    cache = model.new_cache(8)
    for tokens in (torch.tensor([1, 2, 3]), torch.tensor([4])):
        model.decode(tokens, cache)
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_names_of_parameters_stay():
    """Checkpoints do not know whether a model was compiled."""
    plain, compiled = _pair(torch.float32)
    assert list(plain.state_dict()) == list(compiled.state_dict())
