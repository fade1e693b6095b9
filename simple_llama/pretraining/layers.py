"""The small layers of the transformer. Rows are (T, D): T packed rows, D width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from simple_llama.ops.elementwise import add_norm, rms_norm, swiglu
from simple_llama.ops.linear import Linear, linear
from simple_llama.ops.remade import remade
from simple_llama.pretraining.architecture import Architecture, LoRA


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the fraction in fp32 and rounded before the weight (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Rows of any leading shape."""
        return rms_norm(x_TD, self.weight, self.eps)

    def again(self, x_TD: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        """What gives this norm of the same rows once more; None where its weight is dealt out by then (ZeRO-3)."""
        if self.weight.shape != x_TD.shape[-1:]:
            return None
        return partial(rms_norm, x_TD.detach(), self.weight.detach(), self.eps)


class AddNorm(RMSNorm):
    """RMSNorm of a stream behind the addition of an update to it."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_TD: torch.Tensor, update_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + update, or x where there is none yet, and its norm."""
        if update_TD is None:
            return x_TD, rms_norm(x_TD, self.weight, self.eps)
        return add_norm(x_TD, update_TD, self.weight, self.eps)


class TiedEmbedding(nn.Embedding):
    """One table for both ends of the model: token ids to rows, and rows to logits.

    Both by a call, since partitioned weights (ZeRO-3) are gathered when their module is called.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) to rows (T, D); rows (T, D) to logits (T, V)."""
        return linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class LoRAInjection(nn.Module):
    """scale * (x @ lora_a) @ lora_b, zero at the start because lora_b is (arXiv:2106.09685).

    `on` (set it by `adapters_off`) tells whether it counts.
    """

    def __init__(self, inputs: int, outputs: int, lora: LoRA):
        super().__init__()
        self.scale, self.on = lora.scale, True
        self.lora_a = nn.Parameter(torch.randn(inputs, lora.rank))
        self.lora_b = nn.Parameter(torch.zeros(lora.rank, outputs))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Rows (T, inputs) to rows (T, outputs)."""
        return linear(self.scale * linear(x_TD, self.lora_a.T), self.lora_b.T)


def add_lora(layer: nn.Module, lora: LoRA | None, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Gives `layer` a `{name}_lora_layer` for each of its linear layers, (inputs, outputs) by name, that has one."""
    for name, (inputs, outputs) in sizes.items():
        if lora and name in lora.targets:
            setattr(layer, f"{name}_lora_layer", LoRAInjection(inputs, outputs, lora))


def plus_lora(layer: nn.Module, name: str, projected: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    """`projected` plus the low-rank update of x, where the layer has one under this name."""
    update: LoRAInjection | None = getattr(layer, f"{name}_lora_layer", None)
    return projected if update is None or not update.on else projected + update(x_TD).view(projected.shape)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its low-rank updates within."""
    updates = [module for module in model.modules() if isinstance(module, LoRAInjection)]
    try:
        for update in updates:
            update.on = False
        yield
    finally:
        for update in updates:
            update.on = True


class FeedForward(nn.Module):
    """SwiGLU, w2(silu(w1 x) * w3 x) (arXiv:2002.05202)."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        width, hidden, bias = architecture.width, architecture.hidden_width, architecture.ffwd_bias
        self.w1 = Linear(width, hidden, bias)
        self.w2 = Linear(hidden, width, bias)
        self.w3 = Linear(width, hidden, bias)
        self.dropout = nn.Dropout(architecture.dropout)
        add_lora(self, architecture.lora, {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)})

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Rows (T, D) to rows (T, D)."""
        gate, up = plus_lora(self, "w1", self.w1(x_TD), x_TD), plus_lora(self, "w3", self.w3(x_TD), x_TD)
        hidden = swiglu(gate, up)
        with remade(hidden, partial(swiglu, gate.detach(), up.detach())):
            return self.dropout(plus_lora(self, "w2", self.w2(hidden), hidden))
