"""A model with adapters as something that a run starts from (a StartModel): its base is another one."""

from __future__ import annotations

import contextlib
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import digest, json_bytes
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.interop.adapter_files import (
    check_upstream,
    read_adapters,
    write_peft,
    write_upstream,
)
from simple_llama.interop.adapters import AdapterConfig, Adapters, fresh_adapters
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.interop.hf_names import LLAMA, NameMap
from simple_llama.interop.own_checkpoints import MergedLoRA, check_mergeable
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.named_tensors import NamedTensors
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import Loaded, LoadedModel, empty_model, load_lora_adapters


class AdaptedStart:
    """A base and its adapters, which alone a run trains."""

    def __init__(self, base: StartModel, adapters: Adapters, path: Path | None = None):
        """Args: path: where it is found, if that is not where the base is.

        Raises UserError for a base with updates of its own, or one that adapters cannot be merged into.
        """
        if base.architecture.lora:
            raise UserError(
                f"{base.path}: expected a model without adapters of its own to put others beside, found such; "
                "launch/export.py merges them; --trainable lora goes on with them"
            )
        self.base, self.adapters = base, adapters
        self.path = path or base.path
        self.architecture: Architecture = replace(base.architecture, lora=adapters.lora)
        check_mergeable(self.architecture)
        empty_model(base.load())  # UserError where the base is not whole
        self.names: Sequence[str] = [*base.names, *adapters.tensors]
        self.without_in_reference = adapters.are_zero  # whether the reference is the base
        self.as_adapters = False  # whether `export` writes the adapters alone
        self.numerics: Mapping[str, str] = base.numerics
        self.slides, self.own_tokenizer = base.slides, base.own_tokenizer
        self.export_suffix, self.export_dtype = base.export_suffix, base.export_dtype
        self._digest = "" if adapters.are_zero else adapters.digest

    @property
    def digest(self) -> str:
        """The base's where the adapters change nothing, else of both."""
        if not self._digest:
            return self.base.digest
        return digest(json_bytes({"base": self.base.digest, "adapters": self._digest})).hex()

    @property
    def about(self) -> dict[str, Any]:
        """What a resumed run must share of the adapters."""
        without = {"reference": "without them"} if self.without_in_reference and not self.adapters.are_zero else {}
        return {**self.adapters.about, **without}

    def load(self) -> LoadedModel:
        """Base and adapters; see the base's."""
        return self._over(self.base.load())

    @contextlib.contextmanager
    def reading(self) -> Iterator[LoadedModel]:
        """Base and adapters while the body uses them; see the base's."""
        with self.base.reading() as loaded:
            yield self._over(loaded)

    def _over(self, loaded: Loaded) -> LoadedModel:
        return LoadedModel(_over(self.adapters.tensors, loaded.state_dict), self.architecture, self.path)

    def whole(self) -> AdaptedStart:
        """The same, whose exports are the merged model."""
        other = copy(self)
        other.as_adapters = False
        return other

    def merged(self, trained: Mapping[str, torch.Tensor]) -> MergedLoRA:
        """The whole model, the updates (the trained ones, if there are) in its weights. StartChanged."""
        tensors = self.base.load().state_dict
        return MergedLoRA(_over(trained or self.adapters.tensors, tensors), self.architecture)

    def export(
        self,
        path: Path,
        trained: Mapping[str, torch.Tensor],
        metadata: dict[str, Any],
        dtype: torch.dtype | None = None,
        tokenizer: OwnTokenizer | None = None,
    ) -> None:
        """Writes the merged model in the base's form, or with `as_adapters` the adapters alone. StartChanged."""
        if not self.as_adapters:
            merged = self.merged(trained)
            names = list(merged) if isinstance(self.base, StartFile) else merged.updated
            self.base.export(path, _Some(merged, names), metadata, dtype, tokenizer)
        elif isinstance(self.base, StartFile):
            write_upstream(path, trained, self.adapters.lora, self.base.config, metadata)
        else:
            lora, where = self.adapters.lora, str(self.base.path.absolute())
            write_peft(path, trained, lora, self.base.architecture, _family_of(self.base), where, metadata)

    def export_metadata(self, path: Path) -> dict[str, Any]:
        """What an export, of the merged model or of the adapters, says of itself; nothing for what is none."""
        found = self.base.export_metadata(path)
        if found or not isinstance(self.base, StartFile) or path.is_symlink() or not path.is_file():
            return found
        adapters = load_lora_adapters(path)
        return adapters.metadata if adapters else {}


class _Some(NamedTensors):
    """Some of a model's tensors, each made when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str]):
        self._tensors, self._names = tensors, dict.fromkeys(names)

    def _make(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def adapted(start: StartModel, config: AdapterConfig, adapter_path: str = "") -> StartModel:
    """A start with the adapters that the settings ask for: fresh, from files, its own, or none.

    UserError where they cannot stand beside it, or a setting has no effect.
    """
    if config.lora_rank and (adapter_path or isinstance(start, AdaptedStart)):
        where = adapter_path or start.path
        raise UserError(
            f"lora_rank: expected 0, since the adapters at {where} have a rank of their own, found {config.lora_rank}; "
            "leave it out to go on with them, or merge them first (launch/export.py)"
        )
    if adapter_path:
        start = with_adapters(start, adapter_path)
    elif config.lora_rank:
        start = AdaptedStart(start, fresh_adapters(start.architecture, config))
    if isinstance(start, AdaptedStart):
        start.without_in_reference |= config.reference_without_adapters
        start.as_adapters = config.export == "adapters"
        if start.as_adapters and isinstance(start.base, StartFile):
            check_upstream(start.adapters.lora)
        return start
    for name, default in (("reference_without_adapters", False), ("export", "model")):
        if (found := getattr(config, name)) != default:
            raise UserError(
                f"{name}: expected adapters beside it (lora_rank, adapter_path), found {found} without any; in the "
                "reference of a checkpoint that has LoRA itself they are on"
            )
    return start


def with_adapters(start: StartModel, adapter_path: str | os.PathLike[str], path: Path | None = None) -> AdaptedStart:
    """A start with the adapters of a file or folder. UserError where they are not for it."""
    if isinstance(start, AdaptedStart):
        raise UserError(f"adapter_path: expected a model without adapters, found {start.path}, which is some itself")
    return AdaptedStart(start, read_adapters(adapter_path, start.architecture, _family_of(start)), path)


def base_of(start: StartModel) -> StartModel:
    """A start without its adapters."""
    return start.base if isinstance(start, AdaptedStart) else start


def reference_of(start: StartModel) -> StartModel:
    """The model whose log-probs are the reference of a run from this start."""
    return start.base if isinstance(start, AdaptedStart) and start.without_in_reference else start


def _family_of(start: StartModel) -> NameMap:
    """Whose names adapters of a model have on disk."""
    return start.config.names if isinstance(start, HFFolder) else LLAMA


def _over(upper: Mapping[str, torch.Tensor], lower: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The tensors of both, each asked for when it is needed."""
    both: Any = (upper, lower)
    return ChainMap(*both)
