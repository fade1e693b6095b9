"""A start checkpoint that is renamed over, deleted, overwritten or cut while a run holds it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.start_file import StartChanged, StartFile
from simple_llama.pretraining.weights import load_weights, save_weights, weights_digest
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
        assert loaded.path == path and loaded.config == CONFIG
        assert all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in tensors.items())
    merged = start.merged({"norm.weight": torch.full((32,), 7.0)})
    assert list(merged) == list(tensors) and merged["norm.weight"].tolist() == [7.0] * 32
    assert torch.equal(merged["embeddings.weight"], tensors["embeddings.weight"])
    assert start.digest == weights_digest(tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [(overwrite, "its tensors differ"), (cut, r"it had [\d,]+ bytes, now 4,096")],
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
    message = f"{path}: the start checkpoint has changed since this run read it first: {words}"
    with pytest.raises(StartChanged, match=message), start.reading():
        pass
    with pytest.raises(StartChanged, match=message):
        start.merged({"norm.weight": tensors["norm.weight"]})
    assert list(start.merged(tensors)) == list(tensors)


def test_a_file_changed_while_it_is_read_is_refused_at_the_end(tmp_path: Path) -> None:
    """What the body saw was right at first; it cannot be told, so what it made is not to be used."""
    path = tmp_path / "start.pth"
    write_model(path, 1)
    with pytest.raises(StartChanged, match="its tensors differ"), StartFile(path).reading():
        overwrite(path)


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
