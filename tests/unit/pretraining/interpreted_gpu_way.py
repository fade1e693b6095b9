"""Checks of the model as a GPU computes it, on the CPU, for a process with TRITON_INTERPRET=1.

`test_gpu_way.py` runs this file in such a process; by itself pytest does not collect it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_way import Launches, gpu_way
from kept_bytes import kept_bytes
from simple_llama.ops.attention import PackedLayout
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.layers import adapters_off
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.foretell import memory
from simple_llama.reinforcement_learning.rlhf.foretell.memory import TrainedModel
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize

LAYOUT = PackedLayout(((3, (2, 2)), (2, (1, 2, 1))))
SHAPE = {"n_embd": 32, "n_heads": 4, "multiple_of": 8, "max_seq_len": 64, "tokens_per_update": 64, "batch_size": 1}
MLA = {"use_mla": True, "kv_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
LORA = {f"{name}_lora": True for name in "qkvo"} | {"lora_rank": 2, "lora_alpha": 4}
WIDTH, HIDDEN = 32, 88


def make(dtype: torch.dtype, layers: int = 2, **changes: Any) -> LLaMaTransformer:
    """A model whose every part matters."""
    torch.manual_seed(0)
    config = TrainingConfig(**{**SHAPE, "n_layers": layers, **changes})  # type: ignore[arg-type]
    model = LLaMaTransformer(Architecture.of(config, 50))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, mean=float(parameter.dim() == 1))
    return model.to(dtype)


def hidden(model: LLaMaTransformer) -> torch.Tensor:
    """Of a packed stream of pairs, and of a prompt with three answers."""
    rows = torch.arange(LAYOUT.rows)
    return model.hidden(rows % 50, rows, LAYOUT)


def run(model: LLaMaTransformer, kernels: bool) -> list[torch.Tensor]:
    """Hidden rows and the gradient of each parameter."""
    with gpu_way(kernels):
        out = hidden(model)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        return [out, *torch.autograd.grad(out, [p for p in model.parameters() if p is not model.head_weight], grad)]


@pytest.mark.parametrize("changes", [{}, MLA, LORA, {"checkpointing": True}], ids=["mha", "mla", "lora", "recompute"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_the_whole_model_is_its_plain_twin(changes: dict[str, Any], dtype: torch.dtype, limit: float) -> None:
    """Rows and all gradients, by norm, to the rounding of the dtype."""
    shape = {name: value for name, value in changes.items() if name != "checkpointing"}
    model = make(dtype, **shape)
    plain = run(model, kernels=False)
    model.activation_checkpointing = bool(changes.get("checkpointing"))
    for fast, slow in zip(run(model, kernels=True), plain, strict=True):
        assert fast.dtype == slow.dtype
        assert (fast - slow).norm() <= limit * slow.norm()


def test_adapters_off_is_the_model_without_them() -> None:
    """Bit for bit, by the kernels: the reference of a run with adapters is its own start."""
    with_them, without = make(torch.bfloat16, **LORA), make(torch.bfloat16)
    plain = dict(with_them.named_parameters())
    without.load_state_dict({name: plain[name] for name, _ in without.named_parameters()})
    with gpu_way(), adapters_off(with_them), torch.no_grad():
        assert torch.equal(hidden(with_them), hidden(without))


def test_rows_do_not_depend_on_gradients() -> None:
    """What the reference pass computes is what training does, bit for bit."""
    model = make(torch.bfloat16)
    with gpu_way():
        trained = hidden(model)
        with torch.no_grad():
            assert torch.equal(hidden(model), trained)


def of_a_layer(kernels: bool) -> tuple[int, int]:
    """Launches of a layer, forward and backward: those of three layers less those of two."""
    found = []
    for layers in (2, 3):
        model = make(torch.bfloat16, layers)
        with gpu_way(kernels):
            with Launches() as forward:
                out = hidden(model)
            with Launches() as backward:
                out.sum().backward()
        found.append((forward.sum, backward.sum))
    return found[1][0] - found[0][0], found[1][1] - found[0][1]


def test_launches_of_a_layer() -> None:
    """Forward: 5 products, 2 norms with their additions, queries and keys turned, keys and values gathered, flash,
    SwiGLU. Backward: 10 products; 3 of flash; SwiGLU, 2 norms, and their 2 sums, which are rounded; 3 values made
    again; gradients of keys and values, of the turned ones, put side by side; those of w1 and w3 added."""
    assert of_a_layer(kernels=True) == (5 + 2 + 2 + 2 + 1 + 1, 10 + 3 + 1 + 2 + 2 + 2 + 3 + 2 + 2 + 1 + 1)
    forward, backward = of_a_layer(kernels=False)
    assert forward > 30 and backward > 60  # torch's own operators


def test_what_a_layer_keeps() -> None:
    """A row: the stream before both norms, queries, attention's output, gate and up; a key: itself and its value. As
    the dry run counts them."""
    found, counted = [], []
    batch = SimpleNamespace(tokens_T=torch.arange(LAYOUT.rows), layout=LAYOUT)
    for layers in (2, 3):
        model = make(torch.bfloat16, layers)
        with gpu_way():
            found.append(kept_bytes(lambda: hidden(model), but=model.parameters()))  # noqa: B023
        trained = TrainedModel(ModelSize(8000, 1600, 400), 10_000, model.architecture, torch.bfloat16)
        counted.append(memory._activations(trained, memory.Engine("cuda", 1, 2), batch))  # type: ignore[arg-type]
    plan = LAYOUT.varlen_plan(torch.device("cpu")).keys
    assert plan is not None
    of_rows = LAYOUT.rows * (2 * WIDTH + WIDTH + WIDTH + 2 * HIDDEN)
    of_layer = 2 * (of_rows + 2 * len(plan.rows_S) * WIDTH)
    assert found[1] - found[0] == of_layer == counted[1] - counted[0]


def test_what_a_layer_without_shared_prefixes_keeps() -> None:
    """Values stay where the matrix of queries, keys and values put them."""
    found, layout = [], PackedLayout.causal([5, 3])
    batch = SimpleNamespace(tokens_T=torch.arange(8), layout=layout)
    for layers in (2, 3):
        model = make(torch.bfloat16, layers)
        with gpu_way():
            found.append(kept_bytes(lambda: model.hidden(batch.tokens_T, batch.tokens_T, layout), model.parameters()))  # noqa: B023
    trained = TrainedModel(ModelSize(8000, 1600, 400), 10_000, model.architecture, torch.bfloat16)
    of_attention = memory._attention(trained, memory.Engine("cuda", 1, 2), batch)  # type: ignore[arg-type]
    assert found[1] - found[0] == 2 * (8 * (2 * WIDTH + 2 * HIDDEN) + of_attention)
