"""Writes a model as a Hugging Face folder, whole or not at all, and tells such folders from all others.

    config.json  model.safetensors  tokenizer.json ...  README.md       what transformers reads, and people
    model-00001-of-00003.safetensors ...  model.safetensors.index.json  the weights, above 5 GB
    simple_llama_run.json                                               its run and its files' names: written first

Tensors go to the disk one at a time: beside those of the caller, one and its rounded copy are in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_folder, json_bytes, read_json
from simple_llama.interop.hf_names import NameMap, check_mappable, our_shapes, shapes_in, to_theirs
from simple_llama.interop.hf_tokenizer import PLAIN_CLASS
from simple_llama.interop.model_card import model_card
from simple_llama.interop.safetensors_files import file_head
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.named_tensors import NamedTensors

RUN_FILE = "simple_llama_run.json"
_FORMAT = 1  # of RUN_FILE; a reader refuses others
_MOST_SHARD_BYTES = 5 * 10**9  # of tensors in a file, as the Hub asks; one tensor may be larger
_CARD, _CONFIG, _INDEX = "README.md", "config.json", "model.safetensors.index.json"
_TOKENIZER, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


class _Tensor(NamedTuple):
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


_Tensors = dict[str, _Tensor]


@dataclass(frozen=True)
class ExportForm:
    """What a folder holds beside the values of its tensors."""

    architecture: Architecture
    names: NameMap
    config: Mapping[str, Any]  # config.json
    dtype: torch.dtype  # of the tensors
    files: Mapping[str, bytes]  # others by name: tokenizer, chat template, generation settings
    dtypes: Mapping[str, torch.dtype] = field(
        default_factory=dict
    )  # of tensors that have another, by the family's name

    def of_tensors(self) -> dict[str, _Tensor]:
        """All tensors by the family's names, in the order in which they are written."""
        shapes = shapes_in(self.architecture, self.names)
        return {name: _Tensor(shape, self.dtypes.get(name, self.dtype)) for name, shape in shapes.items()}


class TrainedOver(NamedTensors):
    """The trained tensors, and those of a start where a name is not among them."""

    def __init__(self, trained: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]):
        self._names, self.trained, self.start = start, trained, start

    def _make(self, name: str) -> torch.Tensor:
        return self.trained[name] if name in self.trained else self.start[name]


def write_folder(
    path: Path,
    state_dict: Mapping[str, torch.Tensor],
    form: ExportForm,
    metadata: dict[str, Any],
    most_shard_bytes: int = _MOST_SHARD_BYTES,
) -> None:
    """Writes the model, whole or not at all. An export that lies at `path` is replaced, and nothing else is.

    Args:
        state_dict: by our names; each tensor is asked for once, so it may be read then.
        metadata: JSON values only (TypeError otherwise); `export_metadata` gives them back.

    Raises UserError for a tensor that is not finite in the dtype, an architecture without such names, or a full disk;
    where this or reading a tensor fails, nothing stays.
    """
    check_mappable(form.architecture)
    shards = _shards(form.of_tensors(), most_shard_bytes)
    named = {_shard_name(number, len(shards)): shard for number, shard in enumerate(shards, 1)}
    files = {**form.files, **_readable_by_older(form.files)}
    texts = {_CONFIG: json_bytes(form.config), **files, _CARD: model_card(path.name, metadata).encode()}
    if len(shards) > 1:
        texts[_INDEX] = _index(named)
    about = {"format": _FORMAT, "files": sorted({*texts, *named}), "metadata": metadata}
    with atomic_folder(path, _making_room(path)) as temp:
        (temp / RUN_FILE).write_bytes(json_bytes(about))
        for name, data in texts.items():
            (temp / name).write_bytes(data)
        tensors = _their_tensors(state_dict, form)
        for name, shard in named.items():
            with (temp / name).open("wb") as file:
                _write_shard(file, shard, tensors, path)


def write_small_folder(path: Path, files: Mapping[str, bytes], metadata: dict[str, Any]) -> None:
    """Writes files that are in memory as a folder which the functions here know as an export, as `write_folder`."""
    about = {"format": _FORMAT, "files": sorted(files), "metadata": metadata}
    with atomic_folder(path, _making_room(path)) as temp:
        (temp / RUN_FILE).write_bytes(json_bytes(about))
        for name, data in files.items():
            (temp / name).write_bytes(data)


def export_metadata(folder: Path) -> dict[str, Any]:
    """What an export says of itself; nothing for a link, or what is none, or lacks one of its files."""
    about = _about(folder)
    whole = about is not None and all((folder / name).is_file() for name in about["files"])
    return about["metadata"] if about is not None and whole else {}


def holds_export_alone(folder: Path) -> bool:
    """Whether a folder is an export, and a person keeps nothing else in it."""
    return (about := _about(folder)) is not None and _holds_only(folder, {*about["files"], RUN_FILE})


def delete_export(folder: Path) -> None:
    """Deletes an export, unless there is more in its folder. Never an error."""
    with contextlib.suppress(OSError):
        if (old := _put_aside(folder)) is not None:
            delete_aside(old)


def delete_aside(folder: Path) -> None:
    """Deletes an export under a temporary name, or what a killed process left of one, unless there is more in it. Never
    an error."""
    about = _about(folder)
    own = [*(about["files"] if about else ()), RUN_FILE]  # last: what is left after a kill is still known
    with contextlib.suppress(OSError):
        if folder.is_dir() and not folder.is_symlink() and _holds_only(folder, set(own)):
            for name in own:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


@contextlib.contextmanager
def _making_room(folder: Path) -> Iterator[None]:
    """An export makes room for the one that gets its name in the body: back where that fails, else deleted.

    A folder cannot be renamed over another, so for a moment neither has the name: the run that resumes after a kill
    there makes it from the state.
    """
    aside = _put_aside(folder)
    try:
        yield
    except BaseException:
        if aside is not None:
            with contextlib.suppress(OSError):
                aside.rename(folder)
        raise
    if aside is not None:
        delete_aside(aside)


def _put_aside(folder: Path) -> Path | None:
    """Gives an export a temporary name, which no reader looks at; None, and nothing done, for all else."""
    if not holds_export_alone(folder):
        return None
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    folder.rename(aside)
    return aside


def _about(folder: Path) -> dict[str, Any] | None:
    """RUN_FILE of a folder; None where there is none that can be believed."""
    path = folder / RUN_FILE
    if folder.is_symlink() or path.is_symlink():
        return None
    try:
        found = read_json(path)
    except UserError:
        return None
    if not isinstance(found, dict) or found.get("format") != _FORMAT or not isinstance(found.get("metadata"), dict):
        return None
    files = found.get("files")
    return found if isinstance(files, list) and all(map(_is_plain_name, files)) else None


def _is_plain_name(name: Any) -> bool:
    """Whether something is the name of a file in its folder: what is to be deleted lies nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and name == os.path.basename(name)


def _holds_only(folder: Path, names: set[str]) -> bool:
    """Whether all that lies in a folder are plain files of these names."""
    try:
        return all(path.name in names and path.is_file() and not path.is_symlink() for path in folder.iterdir())
    except OSError:  # not ours to read
        return False


def _readable_by_older(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """tokenizer_config.json as transformers 4.45 reads it too, where it is not so already.

    Version 5 gives the class of all fast tokenizers a name that earlier ones lack, and the chat template a file of its
    own that they do not look for; it reads both as they were, too.
    """
    try:
        settings = json.loads(files.get(_TOKENIZER, b""))
        template = files[_TEMPLATE].decode() if _TEMPLATE in files else None
    except ValueError:  # not ours to mend
        return {}
    if not isinstance(settings, dict):
        return {}
    later = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        later = {**PLAIN_CLASS, **settings, "tokenizer_class": PLAIN_CLASS["tokenizer_class"]}
    if template is not None:
        later.setdefault("chat_template", template)
    return {} if later == settings else {_TOKENIZER: json_bytes(later)}


def _shards(tensors: _Tensors, most_bytes: int) -> list[_Tensors]:
    """The tensors of each file, in order: as many as fit."""
    shards: list[_Tensors] = [{}]
    room = most_bytes
    for name, tensor in tensors.items():
        if tensor.size > room and shards[-1]:
            shards.append({})
            room = most_bytes
        shards[-1][name] = tensor
        room -= tensor.size
    return shards


def _shard_name(number: int, count: int) -> str:
    """As transformers looks for it."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _index(named: Mapping[str, _Tensors]) -> bytes:
    """model.safetensors.index.json."""
    size = sum(tensor.size for shard in named.values() for tensor in shard.values())
    places = {name: file for file, shard in named.items() for name in shard}
    return json_bytes({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def _their_tensors(state_dict: Mapping[str, torch.Tensor], form: ExportForm) -> Iterator[tuple[str, torch.Tensor]]:
    """The family's tensors in the order of `shapes_in`, one of ours at a time."""
    for name in our_shapes(form.architecture):
        yield from to_theirs(name, state_dict[name].detach(), form.architecture, form.names).items()


def _write_shard(
    file: BufferedWriter, shard: _Tensors, tensors: Iterator[tuple[str, torch.Tensor]], path: Path
) -> None:
    """A safetensors file: its head, then the tensors' bytes."""
    file.write(file_head({name: (tensor.dtype, tensor.shape) for name, tensor in shard.items()}, {"format": "pt"}))
    for name, expected in shard.items():
        _write_next(file, name, expected, tensors, path)


def _write_next(
    file: BufferedWriter, name: str, expected: _Tensor, tensors: Iterator[tuple[str, torch.Tensor]], path: Path
) -> None:
    """The bytes of the next tensor, which is gone from memory when this returns."""
    found, tensor = next(tensors)
    assert (found, tuple(tensor.shape)) == (name, expected.shape), (found, tensor.shape, name, expected)
    tensor = tensor.to("cpu", expected.dtype).contiguous()
    if not torch.stack(tensor.aminmax()).isfinite().all():  # both ends are nan where a number in it is
        raise UserError(
            f"cannot write {path}: {name} has numbers that are not finite in {expected.dtype}; choose another"
        )
    file.write(tensor.view(-1).view(torch.uint8).numpy().data)
