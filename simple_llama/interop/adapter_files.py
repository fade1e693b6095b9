"""Adapters on disk, in two forms: a folder as peft writes it, and upstream's file of `lora_adapters`.

    adapter_config.json  adapter_model.safetensors       peft's: of a Hugging Face model, or any that has such names
    {lora_adapters, config, metadata}                    upstream's, of torch.save: q, k, v, o of a SimpleLLaMA model

peft (https://github.com/huggingface/peft, tuners/lora): an update is scale * B A x, A (R, I) and B (O, R), where scale
is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. Here A is (I, R) and B (R, O).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from simple_llama.common.errors import UserError
from simple_llama.common.files import json_bytes, listed, read_json, shown
from simple_llama.interop.adapters import Adapters, adapter_name, adapter_shapes
from simple_llama.interop.hf_export import write_small_folder
from simple_llama.interop.hf_names import NameMap, adapted_module, adapter_rows, check_mappable
from simple_llama.interop.model_card import model_card
from simple_llama.interop.safetensors_files import SafetensorsFiles
from simple_llama.pretraining.architecture import ATTENTION_TARGETS, LORA_TARGETS, Architecture, LoRA
from simple_llama.pretraining.config import TrainingConfig, check_model_config
from simple_llama.pretraining.weights import LoraAdapters, load_lora_adapters, save_weights

_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the names in peft's files
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights", "bias"}
_HARMLESS = {  # keys that change nothing of a trained adapter's output
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "target_modules",
    "exclude_modules",
    "layers_pattern",
}
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base as it is
_MOST_RANK = 1 << 16


def is_peft_folder(path: Path) -> bool:
    """Whether a folder holds an adapter in peft's form."""
    return (path / _PEFT_CONFIG).is_file()


def base_name(path: Path) -> str:
    """What an adapter says its base is: a folder's own word, or the model that our run started from; "" where it says
    nothing."""
    if is_peft_folder(path):
        found = read_json(path / _PEFT_CONFIG)
        name = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    else:
        adapters = load_lora_adapters(path)
        settings = adapters.metadata.get("dpo_config") if adapters else None
        name = settings.get("model_path") if isinstance(settings, dict) else None
    return name if isinstance(name, str) else ""


def read_adapters(path: str | os.PathLike[str], architecture: Architecture, family: NameMap) -> Adapters:
    """The adapters at `path`, in either form, for a model of this architecture.

    Args:
        family: whose names and order of rows a folder has.

    Raises UserError for a file that is none, or that does not fit the model.
    """
    path = Path(path)
    if is_peft_folder(path):
        return _read_peft(path, architecture, family)
    found = load_lora_adapters(path) if path.is_file() else None
    if found is None:
        raise UserError(
            f"{path}: expected adapters: a folder with {_PEFT_CONFIG} and {_PEFT_WEIGHTS}, as peft writes it, or a "
            "file with lora_adapters, as SimpleLLaMA does; found neither"
        )
    return _from_upstream(path, found, architecture)


def write_peft(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    lora: LoRA,
    architecture: Architecture,
    family: NameMap,
    base: str,
    metadata: dict[str, Any],
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads, whole or not at all; an export there is replaced.

    Args:
        tensors: by our names, fp32.
        architecture: of the model without adapters.
        base: the model that they stand beside, where it lies.
        metadata: JSON values only; `export_metadata` gives them back.
    """
    check_mappable(architecture)
    theirs: dict[str, torch.Tensor] = {}
    for layer in range(architecture.layers):
        for target in lora.targets:
            a_IR, b_RO = (tensors[adapter_name(layer, target, half)].detach().float().cpu() for half in "ab")
            module = _PREFIX + adapted_module(layer, target, family)
            theirs[f"{module}.lora_A.weight"] = a_IR.T.contiguous()
            theirs[f"{module}.lora_B.weight"] = adapter_rows(target, b_RO.T, architecture, family).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": [adapted_module(0, target, family).rpartition(".")[2] for target in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    files = {
        _PEFT_CONFIG: json_bytes(config),
        _PEFT_WEIGHTS: save(theirs, metadata={"format": "pt"}),
        "README.md": model_card(path.name, metadata, "peft").encode(),
    }
    write_small_folder(path, files, metadata)


def check_upstream(lora: LoRA) -> None:
    """UserError for adapters that upstream's file cannot hold."""
    others = [name for name in lora.targets if name not in ATTENTION_TARGETS]
    if others:
        raise UserError(
            f"export: expected adapters of {', '.join(ATTENTION_TARGETS)} alone, which SimpleLLaMA's own files can "
            f"hold, found {', '.join(others)} too; leave them out of lora_targets, or take --export model"
        )


def write_upstream(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    lora: LoRA,
    config: TrainingConfig,
    metadata: dict[str, Any],
) -> None:
    """Writes upstream's file of adapters, whole or not at all. `config`: of the model that they stand beside."""
    check_upstream(lora)
    own, alpha = copy(config), lora.scale * lora.rank  # it has no other scale than alpha / rank
    own.use_lora, own.lora_rank = True, lora.rank
    own.lora_alpha = int(alpha) if alpha == int(alpha) else alpha  # pyright: ignore[reportAttributeAccessIssue]
    for name in ATTENTION_TARGETS:
        setattr(own, f"{name}_lora", name in lora.targets)
    save_weights(path, {name: tensors[name].detach().float() for name in tensors}, own, metadata, adapters=True)


def _read_peft(path: Path, architecture: Architecture, family: NameMap) -> Adapters:
    """A folder's adapters."""
    check_mappable(architecture)
    source = path / _PEFT_CONFIG
    found = read_json(source)
    try:
        lora = _lora_of(found)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if not (path / _PEFT_WEIGHTS).is_file():
        raise UserError(
            f"{path}: expected {_PEFT_WEIGHTS}, found none; pickles (adapter_model.bin) are not read: save the adapter "
            "again with a recent peft"
        )
    files = SafetensorsFiles([path / _PEFT_WEIGHTS])
    lora = LoRA(lora.rank, lora.alpha, _targets_in(files, family), lora.rank_stabilized)
    _check_fit(files, lora, architecture, family, path)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(architecture.layers):
        for target in lora.targets:
            module = _PREFIX + adapted_module(layer, target, family)
            tensors[adapter_name(layer, target, "a")] = files[f"{module}.lora_A.weight"].float().T.contiguous()
            rows_OR = adapter_rows(target, files[f"{module}.lora_B.weight"].float(), architecture, family, back=True)
            tensors[adapter_name(layer, target, "b")] = rows_OR.T.contiguous()
    return Adapters(lora, tensors, str(path))


def _lora_of(found: Any) -> LoRA:
    """What an adapter_config.json says, but for the targets. UserError for what might change the output unread."""
    kind = found.get("peft_type") if isinstance(found, dict) else None
    if not isinstance(found, dict) or kind != "LORA":
        raise UserError(f"expected a LoRA adapter of peft, found one of type {shown(kind)}")
    if found.get("bias", "none") != "none":
        raise UserError(f"bias: expected none, found {shown(found['bias'])}: trained biases are not read")
    if found.get("init_lora_weights", True) not in _KEEPS_BASE:
        raise UserError(
            f"init_lora_weights: expected true, found {shown(found['init_lora_weights'])}, which changes the base; "
            "convert the adapter to plain LoRA when it is saved (peft: path_initial_model_for_weight_conversion)"
        )
    unread = [
        key for key, value in found.items() if key not in _READ | _HARMLESS and value not in (None, False, {}, [])
    ]
    if unread:
        raise UserError(f"expected a plain LoRA adapter, found {listed(unread)} set, which is not read")
    rank, alpha, stabilized = found.get("r"), found.get("lora_alpha"), found.get("use_rslora", False)
    if type(rank) is not int or not 0 < rank <= _MOST_RANK:
        raise UserError(f"r: expected a whole number from 1 to {_MOST_RANK}, found {shown(rank)}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e30:
        raise UserError(f"lora_alpha: expected a positive number, found {shown(alpha)}")
    if type(stabilized) is not bool:
        raise UserError(f"use_rslora: expected true or false, found {shown(stabilized)}")
    return LoRA(rank, alpha, (), stabilized)


def _targets_in(files: SafetensorsFiles, family: NameMap) -> tuple[str, ...]:
    """Which layers of the first block have an update."""
    there = {name.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for name in files}
    return tuple(target for target in LORA_TARGETS if adapted_module(0, target, family) in there)


def _check_fit(files: SafetensorsFiles, lora: LoRA, architecture: Architecture, family: NameMap, path: Path) -> None:
    """UserError where the tensors are not those that these updates of the model have."""
    ours = adapter_shapes(architecture, lora)
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(architecture.layers):
        for target in lora.targets:
            module = _PREFIX + adapted_module(layer, target, family)
            for half, name in (("a", "lora_A"), ("b", "lora_B")):
                first, second = ours[adapter_name(layer, target, half)]
                expected[f"{module}.{name}.weight"] = (second, first)
    found = {name: files.shape(name) for name in files}
    _raise_misfits(found, expected, path)


def _from_upstream(path: Path, found: LoraAdapters, architecture: Architecture) -> Adapters:
    """What a file of upstream's holds, for a model of this architecture."""
    try:
        check_model_config(found.config)
    except UserError as error:
        raise UserError(f"{path}: config: {error}") from error
    targets = tuple(name for name in ATTENTION_TARGETS if getattr(found.config, f"{name}_lora"))
    lora = LoRA(found.config.lora_rank, found.config.lora_alpha, targets)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    _raise_misfits(shapes, adapter_shapes(architecture, lora), path)
    return Adapters(lora, {name: tensor.float() for name, tensor in found.tensors.items()}, str(path))


def _raise_misfits(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """UserError naming the tensors that are missing, too many or of other shapes."""
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing {listed(missing)}")
    if surplus := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {listed(surplus)}")
    misfits = [name for name in expected if name in found and found[name] != expected[name]]
    if misfits:
        problems.append(
            f"wrong shapes: {listed([f'{name} {found[name]} instead of {expected[name]}' for name in misfits])}"
        )
    if problems or not expected:
        said = "; ".join(problems) or "none"
        raise UserError(
            f"{path}: expected adapters of the model that it is to stand beside (model_path), with the same updates in "
            f"each of its layers, found {said}"
        )
