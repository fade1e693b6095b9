"""A start checkpoint that is renamed over, deleted, overwritten or cut while a run holds it."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.pretraining import start_file
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.held_file import HeldFile
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartChanged
from simple_llama.pretraining.weights import build_model, load_weights, save_weights, weights_digest
from tiny_job import TINY

SHAPE: dict[str, Any] = {**TINY, "n_layers": 1}
CONFIG = TrainingConfig(batch_size=1, tokens_per_update=512, **SHAPE)


def write_model(path: Path, seed: int) -> dict[str, torch.Tensor]:
    """A model of random weights; the files of two seeds have the same size."""
    torch.manual_seed(seed)
    tensors = LLaMaTransformer(Architecture.of(CONFIG, 10)).state_dict()
    save_weights(path, tensors, CONFIG, {})
    return tensors


def overwrite(path: Path) -> None:
    """Another model's bytes in the same file: its name, inode and size stay."""
    write_model(path.with_name("other.pth"), 2)
    data = path.with_name("other.pth").read_bytes()
    assert len(data) == path.stat().st_size
    with path.open("r+b") as file:
        file.write(data)


def cut(path: Path) -> None:
    """The first 4 KiB are left: where a mapped file is read beyond its end, the process dies of SIGBUS."""
    os.truncate(path, 4096)


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_the_held_file_is_read_whatever_its_path_leads_to(tmp_path: Path, change: str) -> None:
    """Another model under its name, or none: the names and values of the first read, and its digest."""
    path = tmp_path / "start.pth"
    tensors = write_model(path, 1)
    start = StartFile(path)
    if change == "replaced":
        write_model(tmp_path / "other.pth", 2)
        (tmp_path / "other.pth").rename(path)
        assert weights_digest(load_weights(path).state_dict) != start.digest
    else:
        path.unlink()
    with start.reading() as loaded:
        assert loaded.path == path and start.config == CONFIG
        assert all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in tensors.items())
    merged = start.merged({"norm.weight": torch.full((32,), 7.0)})
    assert list(merged) == list(tensors) and merged["norm.weight"].tolist() == [7.0] * 32
    assert torch.equal(merged["embeddings.weight"], tensors["embeddings.weight"])
    assert start.digest == weights_digest(tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [(overwrite, "tensor 'embeddings.weight' differs"), (cut, r"it had [\d,]+ bytes, now 4,096")],
    ids=["overwritten", "cut"],
)
def test_a_file_changed_in_place_is_refused_at_every_read(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    """No read gives the other bytes, and none ends the process; what needs no read is whole."""
    path = tmp_path / "start.pth"
    tensors = write_model(path, 1)
    start = StartFile(path)
    change(path)
    message = f"{path}: the start model has changed since this run read it first: {words}"
    with pytest.raises(StartChanged, match=message), start.reading() as loaded:
        build_model(loaded, torch.float32, "cpu")
    with pytest.raises(StartChanged, match=message):
        start.merged({"norm.weight": tensors["norm.weight"]})
    assert list(start.merged(tensors)) == list(tensors)


@pytest.mark.parametrize(
    ("change", "words"), [(overwrite, "tensor 'final_linear.weight' differs"), (cut, "it is shorter than it was")]
)
def test_a_file_changed_while_it_is_read_is_refused_there(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    """What was read before is right; a tensor that is asked for behind the change is refused, and ends no process."""
    path = tmp_path / "start.pth"
    tensors = write_model(path, 1)
    with StartFile(path).reading() as loaded:
        assert torch.equal(loaded.state_dict["final_linear.weight"], tensors["final_linear.weight"])
        change(path)
        with pytest.raises(StartChanged, match=words):
            loaded.state_dict["final_linear.weight"]


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Digests are made when the event is set."""
    go, digest = threading.Event(), weights_digest

    def later(tensors: Mapping[str, torch.Tensor]) -> str:
        assert go.wait(60)
        return digest(tensors)

    monkeypatch.setattr(start_file, "weights_digest", later)
    return go


def test_a_digest_beside_is_that_of_what_was_read_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is read while no digest is made yet; then it is the digest of one read at once."""
    path = tmp_path / "start.pth"
    tensors = write_model(path, 1)
    go = held_back(monkeypatch)
    start = StartFile(path, beside=True)
    assert torch.equal(start.load().state_dict["norm.weight"], tensors["norm.weight"])
    go.set()
    assert start.digest == weights_digest(tensors)


def test_weights_that_were_used_are_digested_or_the_digest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor is used, then the file changes, then it is digested: no digest names what was used."""
    path = tmp_path / "start.pth"
    write_model(path, 1)
    go = held_back(monkeypatch)
    start = StartFile(path, beside=True)
    start.load().state_dict["embeddings.weight"]
    overwrite(path)
    go.set()
    for _ in range(2):  # to whoever asks
        with pytest.raises(StartChanged, match="tensor 'embeddings.weight' differs"):
            start.digest  # noqa: B018


def in_shared_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values, all in one storage, matrices by columns."""
    whole, parts = torch.zeros(sum(tensor.numel() for tensor in tensors.values()) + 1), {}
    at = 1
    for name, tensor in tensors.items():
        part = whole[at : (at := at + tensor.numel())]
        part.copy_((tensor.T if tensor.dim() == 2 else tensor).flatten())
        parts[name] = part.view(tensor.shape[::-1]).T if tensor.dim() == 2 else part
    return parts


@pytest.mark.parametrize("form", ["zip", "old", "shared", "swapped", "half"])
def test_tensors_of_every_form_are_read_as_torch_reads_them(tmp_path: Path, form: str) -> None:
    """Bit for bit, of both formats, of views on one storage, of the other order of bytes, of another dtype; and no
    more bytes are read of the file than its tensors have."""
    path = tmp_path / "start.pth"
    tensors = write_model(path, 1)
    if form == "half":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if form == "shared":
        tensors = in_shared_memory(tensors)
    content = {"model_state_dict": tensors, "config": CONFIG}
    torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    if form == "swapped":
        swap(path)
        assert torch.equal(load_weights(path).state_dict["norm.weight"], tensors["norm.weight"])
    start = StartFile(path)
    found = start.load().state_dict
    assert list(found) == list(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert start.digest == weights_digest(tensors)


def swap(path: Path) -> None:
    """Writes a file of fp32 tensors as a machine with the other order of bytes would."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            if "/data/" in name:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            archive.writestr(name, b"big" if name.endswith("/byteorder") else data)


def test_each_tensor_is_read_once_for_the_digest_and_once_for_each_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read of the whole file, and none of what is not asked for."""
    path = tmp_path / "start.pth"
    tensors = write_model(path, 1)
    read, sizes = HeldFile.read_into, []

    def counted(self: HeldFile, memory: memoryview, start: int) -> None:
        sizes.append(len(memory))
        read(self, memory, start)

    monkeypatch.setattr(HeldFile, "read_into", counted)
    start = StartFile(path)
    assert sorted(sizes) == sorted(tensor.nbytes for tensor in tensors.values())
    with start.reading() as loaded:
        build_model(loaded, torch.bfloat16, "cpu", unread=set(tensors) - {"norm.weight"})
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values()) + tensors["norm.weight"].nbytes


def test_one_bit_is_found(tmp_path: Path) -> None:
    """A bit of a tensor in the middle of the file."""
    path = tmp_path / "start.pth"
    write_model(path, 1)
    start = StartFile(path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(StartChanged):
        start.merged({})


def test_what_is_no_checkpoint_is_named_by_its_path(tmp_path: Path) -> None:
    """Nothing there, a folder, text."""
    (tmp_path / "text.pth").write_text("hello")
    for path in (tmp_path / "nowhere.pth", tmp_path, tmp_path / "text.pth"):
        with pytest.raises(UserError) as error:
            StartFile(path)
        assert str(path) in str(error.value)
