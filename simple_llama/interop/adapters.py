"""Low-rank adapters beside a model's linear layers: their names and shapes, fresh ones, and the settings of a run.

Shapes: I inputs and O outputs of a linear layer, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import digest, json_bytes, shown
from simple_llama.common.settings import Bounds, CountOrNone, Settings
from simple_llama.interop.hf_names import our_shapes
from simple_llama.pretraining.architecture import ATTENTION_TARGETS, LORA_MARK, LORA_TARGETS, Architecture, LoRA
from simple_llama.pretraining.named_tensors import NamedTensors
from simple_llama.pretraining.weights import weights_digest


@dataclass(frozen=True)
class AdapterConfig(Settings):
    """Adapters that a run trains, while all other weights stay."""

    # === Adapters ===
    lora_rank: Annotated[
        CountOrNone,
        Doc("rank of fresh adapters beside linear layers, which alone are trained then (arXiv:2106.09685); 0: none"),
    ] = 0
    lora_alpha: Annotated[float, Bounds(0.0, 1e6, above=True), Doc("an update is scaled by lora_alpha / lora_rank")] = (
        32.0
    )
    lora_targets: str = ",".join(LORA_TARGETS)  # the layers of each decoder block that have one, commas between them
    lora_rslora: bool = False  # scale by lora_alpha / sqrt(lora_rank) instead (arXiv:2312.03732)
    lora_seed: CountOrNone = 0  # of the random half of fresh adapters; the other half is zero
    reference_without_adapters: Annotated[
        bool,
        Doc(
            "adapters that a start has are off in the reference; otherwise the reference is the model as it starts, "
            "with them"
        ),
    ] = False
    export: Annotated[
        Literal["model", "adapters"],
        Doc(
            "model: each export is the whole model, adapters merged; adapters: they alone, in peft's form or, of a "
            ".pth, in upstream's, and the whole model once at the end"
        ),
    ] = "model"

    def check_rules(self) -> None:
        """UserError for targets that no decoder block has, and for what changes nothing without fresh adapters."""
        found = [one.strip() for one in self.lora_targets.split(",")]
        if len(set(found)) < len(found) or not {*found} <= {*LORA_TARGETS}:
            raise UserError(
                f"lora_targets: expected some of {','.join(LORA_TARGETS)}, each once, found {shown(self.lora_targets)}"
            )
        for name in () if self.lora_rank else ("lora_alpha", "lora_targets", "lora_rslora", "lora_seed"):
            if getattr(self, name) != getattr(AdapterConfig, name):
                raise UserError(
                    f"{name}: expected lora_rank beside it, found none: it is of fresh adapters, without which it "
                    "changes nothing"
                )


@dataclass(frozen=True)
class Adapters:
    """Adapters for one model."""

    lora: LoRA
    tensors: Mapping[str, torch.Tensor]  # fp32, by our names; they may be made each time that one is asked for
    source: str = ""  # the file that they are from; nothing of fresh ones
    seed: int = 0  # of fresh ones

    @property
    def are_zero(self) -> bool:
        """Whether the model computes the same without them: one half of each is zero."""
        return not self.source or not any(
            bool(self.tensors[name].any()) for name in self.tensors if name.endswith("lora_b")
        )

    @property
    def digest(self) -> str:
        """Of all that decides what they add: values and scale."""
        return digest(json_bytes({"tensors": weights_digest(self.tensors), "scale": self.lora.scale})).hex()

    @property
    def about(self) -> dict[str, Any]:
        """What decides a run that trains them, as JSON values."""
        lora = self.lora
        start = {"digest": self.digest} if self.source else {"seed": self.seed}
        scaled = {"rank_stabilized": True} if lora.rank_stabilized else {}
        return {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), **scaled, **start}


def fresh_adapters(architecture: Architecture, config: AdapterConfig) -> Adapters:
    """Adapters that change nothing yet, for a model of this architecture without updates.

    Both halves start as peft's do: A uniform within 1 / sqrt(I), B zero. A tensor's values depend on the seed and its
    name alone, not on the machine or on other random numbers.
    """
    asked = [one.strip() for one in config.lora_targets.split(",")]
    targets = tuple(name for name in LORA_TARGETS if name in asked)
    lora = LoRA(config.lora_rank, config.lora_alpha, targets, config.lora_rslora)
    return Adapters(lora, _Fresh(adapter_shapes(architecture, lora), config.lora_seed), seed=config.lora_seed)


def adapter_shapes(architecture: Architecture, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that these updates add to a model of the architecture."""
    shapes = our_shapes(replace(architecture, lora=lora))
    return {name: shape for name, shape in shapes.items() if LORA_MARK in name}


def adapter_name(layer: int, target: str, half: str) -> str:
    """Our name of one half, "a" (I, R) or "b" (R, O), of an update."""
    room = "attention" if target in ATTENTION_TARGETS else "ffwd"
    return f"decoder_blocks.{layer}.{room}.{target}{LORA_MARK}lora_{half}"


class _Fresh(NamedTensors):
    """Tensors of fresh adapters, each made when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int):
        self._names = self._shapes = shapes
        self._seed = seed

    def _make(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("lora_b"):
            return torch.zeros(shape)
        number = int.from_bytes(digest(f"{self._seed} {name}".encode(), size=7), "little")
        bound = shape[0] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(number))
