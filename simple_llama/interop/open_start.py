"""Opens whatever a run may start from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from simple_llama.common.errors import UserError
from simple_llama.common.files import listed, read_json, shown
from simple_llama.interop.adapted_start import AdaptedStart, adapted, with_adapters
from simple_llama.interop.adapter_files import base_name, is_peft_folder
from simple_llama.interop.adapters import AdapterConfig
from simple_llama.interop.gguf_file import GGUFFile
from simple_llama.interop.hf_export import export_metadata
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.interop.safetensors_files import INDEX, WEIGHTS
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import find_weights, load_lora_adapters, load_weights

_HF_FILES = ("config.json", "adapter_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def open_start(path: str | os.PathLike[str], beside: bool = False) -> StartModel:
    """The model at `path`: a `.pth` or `.gguf`, or a Hugging Face folder; in a run's folder, its newest export.

    Adapters alone are one with the base that they name. UserError for none.

    Args:
        beside: digests the model in a thread while others do their work; whoever asks for the digest waits for it.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.exists() and not path.is_dir():
        return GGUFFile(path, beside)
    if path.suffix in (".safetensors", ".json") and path.is_file():
        raise UserError(
            f"{path}: expected the folder of a Hugging Face model, found a file; give its folder, with config.json "
            "and the weights"
        )
    _refuse_records(path)
    if (snapshots := path / "snapshots").is_dir():  # as huggingface_hub keeps what it downloads
        found = listed(sorted(f"snapshots/{each.name}" for each in snapshots.iterdir()))
        raise UserError(f"{path}: expected one version of a model, found the folder of all; give one of {found}")
    if folder := _hf_folder(path):
        return _over_its_base(folder, beside) if is_peft_folder(folder) else HFFolder(folder, beside)
    file = find_weights(path)
    return _over_its_base(file, beside) if load_lora_adapters(file) else StartFile(file, beside)


def _over_its_base(path: Path, beside: bool) -> AdaptedStart:
    """Adapters with the base that they name. UserError where that is not here."""
    name = base_name(path)
    there = [place for place in (Path(name), path.parent / name) if name and place.exists()]
    if not there or there[0].samefile(path):
        said = f"{shown(name)}, which is not here" if name else "not named"
        raise UserError(
            f"{path}: expected a whole model, or adapters that name one on this machine; found adapters whose base is "
            f"{said}: give the base as --model_path and these as --adapter_path, or write the base's path into "
            "base_model_name_or_path of their adapter_config.json"
        )
    return with_adapters(open_start(there[0], beside), path, path)


def open_start_of(settings: Mapping[str, Any], model_path: str | os.PathLike[str]) -> StartModel:
    """The model that a run with these settings starts from, adapters beside it. `model_path`: where it lies now."""
    names = {field.name for field in fields(AdapterConfig)}
    config = AdapterConfig(**{name: value for name, value in settings.items() if name in names})
    return adapted(open_start(model_path), config, str(settings.get("adapter_path", "")))


def start_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the model that `open_start` opens says of how it was made: of a run's export, which run, with which
    settings; nothing for a model that says nothing. UserError for a .pth that is none."""
    path = Path(path)
    _refuse_records(path)
    if folder := _hf_folder(path):
        return export_metadata(folder)
    if path.suffix == ".gguf" or not (path.is_dir() or path.suffix == ".pth"):
        return {}
    file = find_weights(path)
    adapters = load_lora_adapters(file)
    return adapters.metadata if adapters else load_weights(file).metadata


def _refuse_records(path: Path) -> None:
    """UserError for the folder of a run's curves and reports, which has the run's name, too."""
    if not (path / "metrics.jsonl").is_file() or not (path / "config.json").is_file():
        return
    found = read_json(path / "config.json")
    place = found.get("ckpt_dir") if isinstance(found, dict) else None
    folder = Path(place) / str(found.get("run_name")) if isinstance(place, str) else path
    if folder.resolve() != path.resolve():
        raise UserError(f"{path}: expected a model, found the records of a run, whose checkpoints are in {folder}")


def _hf_folder(path: Path) -> Path | None:
    """The Hugging Face folder that `path` is, or was meant to be, or the newest export in it, a run's folder.

    A `.pth` in it counts more than anything but weights as such a model has them: transformers' trainer leaves
    rng_state.pth beside those.
    """
    try:
        names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    except OSError:
        return None  # find_weights says why
    if not names.isdisjoint((WEIGHTS, INDEX)):
        return path
    kinds = {os.path.splitext(name)[1] for name in names}
    if ".pth" in kinds:
        return None
    exports = [path / name for name in names if not name.startswith(".") and export_metadata(path / name)]
    if exports:
        return max(exports, key=lambda folder: (folder.stat().st_mtime_ns, folder.name))
    return path if ".safetensors" in kinds or not names.isdisjoint(_HF_FILES) else None
