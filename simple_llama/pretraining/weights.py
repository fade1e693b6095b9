"""Weights files `{model_state_dict, config, metadata}`: load (running no code), check, build a model, save, digest.

python -m simple_llama.pretraining.weights FILE    describes a file and checks it (`describe`)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_path, listed, open_file, shown
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.archives import Place, read_archive
from simple_llama.pretraining.beside import read_ahead
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.pickles import OtherTensor

_EXPECTED = "expected a SimpleLLaMA checkpoint: a torch.save file with `model_state_dict` and `config`"
_ORIGIN = (
    "A checkpoint is a torch.save file (.pth) with `model_state_dict` and `config` (a pickled TrainingConfig), as "
    "SimpleLLaMA's SFT and benchmarks/start_model.py (`make demo-tiny`) write it. A run may also start from a Hugging "
    "Face folder (config.json, safetensors) or a .gguf file; names of models are not looked up"
)
_FOREIGN = {".safetensors": "safetensors", ".gguf": "GGUF"}  # files of other programs, by their ending
_DIGESTED = 1 << 22  # numbers at a time
_ADAPTERS = "lora_adapters"  # in the place of model_state_dict, where a file holds them alone
_WRAPPER_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and of data-parallel wrappers


@dataclass(frozen=True)
class LoadedModel:
    """A model's tensors on the CPU, or on disk: they may be read, or made, each time that one is asked for.

    Names and shapes are those of the architecture: whoever makes this has seen to it.
    """

    state_dict: Mapping[str, torch.Tensor]  # by our parameter names
    architecture: Architecture  # without dropout, which is a run's own
    path: Path


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds, on the CPU. The tensors may still be on disk: they are mapped, not read."""

    state_dict: dict[str, torch.Tensor]  # by upstream's parameter names
    config: TrainingConfig
    metadata: dict[str, Any]  # empty in upstream's own files
    path: Path

    @property
    def architecture(self) -> Architecture:
        """What the model is built by, without dropout, which is a run's own. UserError for impossible sizes."""
        config = copy(self.config)
        config.dropout = 0.0
        try:
            return Architecture.of(config, _vocab_size(self.state_dict))
        except UserError as error:
            raise UserError(f"{self.path}: config: {error}") from error


Loaded = LoadedModel | WeightsFile


def find_weights(path: str | os.PathLike[str]) -> Path:
    """`path` itself if it is a file; in a folder, its newest .pth. UserError when there is none, or another form."""
    path = Path(path)
    try:
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"{path}: expected a .pth file, or a folder with one, found nothing there. {_ORIGIN}")
            if path.suffix in _FOREIGN:
                raise UserError(f"{path}: expected a .pth file, found a {_FOREIGN[path.suffix]} file. {_ORIGIN}")
            return path
        files = {file: file.stat() for file in path.glob("*.pth") if not file.name.startswith(".")}
        others = {_FOREIGN[file.suffix] for file in path.iterdir() if file.suffix in _FOREIGN}
    except OSError as error:  # a broken link, a name that is too long
        raise UserError(f"{error.filename}: expected a .pth file, found: {error.strerror}") from error
    if not files:
        found = f"{' and '.join(sorted(others))} files" if others else "none"
        raise UserError(f"{path}: expected a folder with a .pth file, found {found}. {_ORIGIN}")
    return max(files, key=lambda file: (files[file].st_mtime_ns, _by_number(file.name)))


def load_weights(
    path: str | os.PathLike[str], file: BufferedReader | None = None, places: dict[int, Place] | None = None
) -> WeightsFile:
    """Reads a weights file. It can run no code: only tensors, plain values and TrainingConfig are unpickled.

    Args:
        file: `path` opened before; it stays open.
        places: as of `read_archive`.

    Raises UserError naming the file for anything that is no such checkpoint, before much memory is taken.
    """
    path = Path(path)
    try:
        with nullcontext(file) if file else open_file(path) as opened:
            found = read_archive(opened, places)
    except Exception as error:  # damaged files fail in many ways, all with the same answer
        reason = "it is damaged, or holds more than tensors, plain values and TrainingConfig"
        if isinstance(error, UserError | OSError):
            reason = str(error)
        raise UserError(
            f"{path}: {_EXPECTED}, found one that cannot be read ({type(error).__name__}: {reason})"
        ) from error
    if isinstance(found, dict) and _ADAPTERS in found and "model_state_dict" not in found:
        raise UserError(f"{path}: {_EXPECTED}, found {_about_adapters(found)}")
    if not isinstance(found, dict) or not {"model_state_dict", "config"} <= found.keys():
        keys = shown(sorted(map(str, found))) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{path}: {_EXPECTED}, found {keys}")
    config, metadata = found["config"], found.get("metadata", {})
    if not isinstance(config, TrainingConfig) or not isinstance(metadata, dict):
        raise UserError(f"{path}: {_EXPECTED}, found a config of {type(config).__name__}")
    return WeightsFile(_plain_state_dict(found["model_state_dict"], path), config, metadata, path)


class LoraAdapters(NamedTuple):
    """What upstream's file of LoRA adapters holds."""

    tensors: dict[str, torch.Tensor]  # by upstream's parameter names
    config: TrainingConfig
    metadata: dict[str, Any]  # empty in upstream's own files


def load_lora_adapters(path: str | os.PathLike[str]) -> LoraAdapters | None:
    """What a file of LoRA adapters alone holds, as upstream's lora_ft_script.py saves them; None for any other file.

    UserError for one that is not sound. It can run no code, as `load_weights`.
    """
    try:
        with open_file(path) as file:
            found = read_archive(file)
    except Exception:  # noqa: BLE001 - whatever it is, `load_weights` says what is wrong with it
        return None
    if not isinstance(found, dict) or _ADAPTERS not in found or "model_state_dict" in found:
        return None
    config, metadata = found.get("config"), found.get("metadata", {})
    if not isinstance(config, TrainingConfig) or not isinstance(metadata, dict):
        raise UserError(f"{path}: expected LoRA adapters with a config, found a config of {type(config).__name__}")
    tensors = _plain_state_dict(found[_ADAPTERS], path)
    return LoraAdapters({name: tensor.clone() for name, tensor in tensors.items()}, config, metadata)


def build_model(
    loaded: Loaded,
    dtype: torch.dtype,
    device: torch.device | str,
    dropout: float = 0.0,
    unread: Collection[str] = (),
) -> LLaMaTransformer:
    """The loaded model, with its own copy of the weights in `dtype` on `device`. Draws no random numbers.

    Args: unread: as of `fill`.

    Raises UserError as `check_weights` does.
    """
    model = empty_model(loaded, dropout)
    fill(model, "", loaded, dtype, device, unread)
    return model


def fill(
    part: nn.Module,
    prefix: str,
    loaded: Loaded,
    dtype: torch.dtype,
    device: torch.device | str,
    unread: Collection[str] = (),
) -> None:
    """Gives a part of an empty model, or all of it, its own copy of its weights in `dtype` on `device`.

    Args:
        prefix: what the names of its weights begin with in the whole model.
        unread: names in the whole model of weights that are 0 for now: whoever sets them checks them.

    Raises UserError for weights that are not finite.
    """
    empty = {prefix + name: tensor.shape for name, tensor in part.state_dict().items()}
    tensors = {name: torch.zeros(empty[name], dtype=dtype, device=device) for name in empty if name in unread}
    for name, tensor in read_ahead(loaded.state_dict, [name for name in empty if name not in unread]):
        tensors[name] = tensor.detach().to(device, dtype, copy=True)
        del tensor
    check_finite(loaded.path, dtype, {name: tensor for name, tensor in tensors.items() if name not in unread})
    part.load_state_dict({name.removeprefix(prefix): tensors[name] for name in empty}, strict=True, assign=True)


def check_weights(loaded: Loaded, dtype: torch.dtype) -> None:
    """Raises UserError when tensors are missing, unexpected, of another shape than the config says, or not finite in
    `dtype`. Holds one converted tensor at a time."""
    empty_model(loaded)
    for name in loaded.state_dict:
        check_finite(loaded.path, dtype, {name: loaded.state_dict[name].detach().to(dtype)})


def save_weights(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    config: TrainingConfig,
    metadata: dict[str, Any],
    adapters: bool = False,
) -> None:
    """Writes a weights file that upstream's inference script loads, whole or not at all.

    Args:
        metadata: JSON values only (TypeError otherwise), so that `load_weights` reads them back.
        adapters: as a file of LoRA adapters alone, which `load_lora_adapters` reads.
    """
    json.dumps(metadata)
    tensors = {name: _compact(tensor) for name, tensor in state_dict.items()}
    key = _ADAPTERS if adapters else "model_state_dict"
    checkpoint = {key: _plain_state_dict(tensors, path), "config": config, "metadata": metadata}
    try:
        # an open file: of a path, torch would write the name into the archive, here a temporary one
        with atomic_path(path) as temp, temp.open("wb") as file:
            _save(checkpoint, file)
    except RuntimeError as error:
        raise UserError(f"cannot write {path}: {error}; free space or choose another place") from error


def weights_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Hex digest of names, dtypes, shapes and values: independent of the order of the dict and of any file."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in read_ahead(state_dict, sorted(state_dict)):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in tensor.detach().flatten().split(_DIGESTED):  # no fp32 copy of a whole tensor
            state.update(piece.to("cpu", torch.float32).contiguous().numpy().data)
        del tensor, piece
    return state.hexdigest()


def _save(checkpoint: dict[str, Any], file: BufferedWriter) -> None:
    """torch.save; OSError for what the disk said, where torch says only what it then found."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _by_number(name: str) -> list[Any]:
    """A key that sorts names by the numbers in them: sft_9E before sft_10E."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [float(part) if at % 2 else part for at, part in enumerate(parts)] + [name]


def _about_adapters(found: dict[Any, Any]) -> str:
    """What upstream's file of LoRA adapters holds, and which file it needs."""
    tensors, config = found[_ADAPTERS], found.get("config")
    count = f"{len(tensors)} tensors" if isinstance(tensors, Mapping) else "none that can be read"
    said, base = "", ""
    if isinstance(config, TrainingConfig):
        targets = ", ".join(name for name in "qkvo" if getattr(config, f"{name}_lora") is True) or "none"
        said = f", rank {shown(config.lora_rank)}, alpha {shown(config.lora_alpha)}, of the projections {targets}"
        sizes = ("n_embd", "n_layers", "n_heads", "use_mla")
        base = f" with {', '.join(f'{name} {shown(getattr(config, name))}' for name in sizes)}"
    return (
        f"LoRA adapters alone ({count}{said}). Their base is the SFT or pretraining .pth that they were trained on, a "
        f"checkpoint{base}, which holds all other weights: give that as --model_path and this as --adapter_path"
    )


def _vocab_size(state_dict: Mapping[str, torch.Tensor]) -> int:
    """Tokens that the model knows; 0 without embeddings. The config does not hold it."""
    embeddings = state_dict.get("embeddings.weight")
    return 0 if embeddings is None or embeddings.dim() != 2 else embeddings.shape[0]


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, copied if it is a view: torch.save would write the whole buffer behind a view."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _plain_state_dict(state_dict: Any, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The state dict under upstream's names: prefixes of wrappers taken off."""
    if not isinstance(state_dict, Mapping):
        raise UserError(f"{path}: {_EXPECTED}, found a model_state_dict of {type(state_dict).__name__}")
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, OtherTensor):
            raise UserError(f"{path}: {_EXPECTED}, found {shown(name)} in it that is no dense tensor")
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise UserError(f"{path}: {_EXPECTED}, found {shown(name)} in it that is no tensor of real numbers")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {_EXPECTED}, found {shown(name)} in it that is no dense tensor")
        while name.startswith(_WRAPPER_PREFIXES):
            name = name.split(".", 1)[1]
        if name in plain:
            raise UserError(f"{path}: {_EXPECTED}, found {listed([name])} twice, with and without a wrapper's prefix")
        plain[name] = tensor
    return plain


def empty_model(loaded: Loaded, dropout: float = 0.0) -> LLaMaTransformer:
    """The model of this architecture, without values; UserError where the tensors do not fit it."""
    architecture = replace(loaded.architecture, dropout=dropout)
    with torch.device("meta"), _Undrawn():
        model = LLaMaTransformer(architecture)
    if isinstance(loaded, WeightsFile):
        _check_fit(model, loaded)
    return model


class _Undrawn(TorchFunctionMode):
    """No layer draws numbers: of a tensor without values torch would import its compiler for that, a second or more."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leaves what functions of torch.nn.init are given as it is."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def check_finite(path: Path, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor]) -> None:
    """UserError naming the tensors, of that file and in that dtype, that hold inf or nan. Waits for a device once."""
    if not tensors:
        return
    # both ends of a tensor are nan where a number in it is; isfinite() would take three times the tensor's memory
    finite = torch.stack([torch.stack(tensor.aminmax()).isfinite().all() for tensor in tensors.values()]).tolist()
    if not all(finite):
        broken = [name for name, good in zip(tensors, finite, strict=True) if not good]
        raise UserError(f"{path}: expected finite weights in {dtype}, found inf or nan in {listed(broken)}")


def _check_fit(model: LLaMaTransformer, loaded: WeightsFile) -> None:
    """UserError naming the tensors that do not fit the model that the file's own config describes."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in loaded.state_dict.items()}
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {listed(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {listed(unexpected)}")
    misfits = [name for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
    if shapes := [f"{name} {found[name]} instead of {expected[name]}" for name in misfits]:
        problems.append(f"wrong shapes: {listed(shapes)}")
    if problems:
        raise UserError(f"{loaded.path}: expected the tensors that its config describes, found " + "; ".join(problems))


if __name__ == "__main__":
    from simple_llama.pretraining.describe import main

    sys.exit(main(sys.argv[1:]))
