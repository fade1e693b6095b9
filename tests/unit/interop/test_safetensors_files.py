"""Safetensors files: read as their own library reads them, refused where their table is not sound, held while read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simple_llama.common.errors import UserError
from simple_llama.interop.safetensors_files import SafetensorsFiles, open_weights
from simple_llama.pretraining import held_file
from simple_llama.pretraining.start_model import StartChanged

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, table: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file of this table (JSON, or the bytes themselves) and these bytes behind it."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    """All real dtypes, a number, an empty tensor, an odd offset behind it; shapes without reading."""
    torch.manual_seed(0)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = {f"t.{dtype}": torch.randn(3, 5).to(dtype) for dtype in dtypes}
    tensors |= {"number": torch.tensor(2.5), "none": torch.empty(0, 4), "three": torch.ones(3, dtype=torch.float16)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    found = SafetensorsFiles([tmp_path / "a.safetensors"])
    assert set(found) == set(tensors) and len(found) == len(tensors)
    for name, tensor in tensors.items():
        assert found.shape(name) == tuple(tensor.shape)
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    found["number"].fill_(7)
    assert found["number"] == 2.5  # memory of its own


def test_shards_are_one_model(tmp_path: Path) -> None:
    """Two files and their index; a link to a file is a file, as in the library's cache."""
    save_file({"a": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "model-1.safetensors").symlink_to("blob")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = open_weights(tmp_path)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [1, 1], "b": [0, 0, 0]}
    assert found.file_of("b").name == "model-2.safetensors"


HUGE = 2**62
TABLES: dict[str, tuple[Any, bytes, str]] = {
    "list": ([], b"", "a list instead of an object"),
    "no JSON": (b"{", b"", "not JSON"),
    "no UTF-8": (b'{"\xff": 1}', b"", "UTF-8"),
    "nested": (b"[" * 10**5, b"", "not JSON that can be read"),
    "key twice": (b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 1}', b"", "'a' stands twice"),
    "no object": ({"a": 1}, b"", "'a': expected dtype, shape and data_offsets, found 1"),
    "part missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "expected dtype, shape and data_offsets"),
    "dtype": ({"a": {**ENTRY, "dtype": "I8"}}, bytes(8), "expected F64, F32, F16, BF16, found 'I8'; quantized"),
    "dtype list": ({"a": {**ENTRY, "dtype": []}}, bytes(8), r"found \[\]"),
    "shape": ({"a": {**ENTRY, "shape": [-2]}}, bytes(8), r"expected a shape, found \[-2\]"),
    "shape of floats": ({"a": {**ENTRY, "shape": [2.0]}}, bytes(8), "expected a shape"),
    "shape of truths": ({"a": {**ENTRY, "shape": [True, True]}}, bytes(8), "expected a shape"),
    "shape of nine": ({"a": {**ENTRY, "shape": [1] * 9}}, bytes(8), "expected a shape"),
    "huge shape": ({"a": {**ENTRY, "shape": [HUGE, HUGE]}}, bytes(8), "its data_offsets give 8"),
    "product of 0": ({"a": {**ENTRY, "shape": [2**63]}}, bytes(8), "expected a shape"),
    "offsets": ({"a": {**ENTRY, "data_offsets": [0]}}, bytes(8), "expected two data_offsets"),
    "backwards": ({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), "needs 8 bytes, its data_offsets give -8"),
    "too short": ({"a": {**ENTRY, "data_offsets": [0, 4]}}, bytes(8), "needs 8 bytes, its data_offsets give 4"),
    "behind the end": ({"a": ENTRY}, bytes(7), "'a' ends 1 bytes behind the file's end"),
    "overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), "'b' overlaps the one before"),
    "same bytes": ({"a": ENTRY, "b": ENTRY}, bytes(8), "'b' overlaps the one before"),
    "gap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20), "'b' leaves 4 bytes unsaid"),
    "rest": ({"a": ENTRY}, bytes(9), "its tensors end after"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_not_sound_is_refused(tmp_path: Path, name: str) -> None:
    """One message, naming the file and the tensor; none of it has been read into memory."""
    table, data, words = TABLES[name]
    path = write(tmp_path / "x.safetensors", table, data)
    with pytest.raises(UserError, match=f"x.safetensors: expected a safetensors file, .*{words}"):
        SafetensorsFiles([path])


@pytest.mark.parametrize("length", [3, 2**20, 2**63, 2**64 - 1])
def test_a_length_that_is_not_the_tables_is_refused(tmp_path: Path, length: int) -> None:
    """Shorter than the table, longer than the file, longer than any file."""
    with pytest.raises(UserError, match="expected a safetensors file"):
        SafetensorsFiles([write(tmp_path / "x.safetensors", {"a": ENTRY}, bytes(8), length)])


def test_a_table_longer_than_any_is_not_read(tmp_path: Path) -> None:
    """26 MiB of it: far more than the tensors of any model need."""
    path = write(tmp_path / "x.safetensors", b"{", length=26 << 20)
    os.truncate(path, 27 << 20)
    with pytest.raises(UserError, match=r"its table claims 27,262,976 bytes of the file's 28,311,552"):
        SafetensorsFiles([path])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.touch, "it has 0 bytes"),
        (Path.mkdir, "found a folder"),
        (os.mkfifo, "named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to("gone"), "No such file"),
        (lambda path: write(path, {"a": ENTRY}, bytes(2**21), 2**35), "claims 34,359,738,368 bytes"),
    ],
    ids=["empty", "folder", "pipe", "device", "broken link", "long table"],
)
def test_what_is_no_file_of_this_kind_is_refused(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    """It neither hangs nor reads on without end."""
    make(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors: expected a safetensors file, .*{words}"):
        open_weights(tmp_path)


def sharded(folder: Path, weight_map: Any) -> Path:
    """A folder with the sound files 1.safetensors (a) and 2.safetensors (b), and an index."""
    save_file({"a": torch.ones(2)}, folder / "1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "1.safetensors", "b": "3.safetensors"}, "expected its 2 files beside it, missing 3.safetensors; down"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "expected tensor 'b' in 1.safetensors, found none"),
        ({"a": "2.safetensors", "b": "1.safetensors"}, "expected tensor 'a' in 2.safetensors"),
        ({"a": "../1.safetensors"}, "file beside it for 'a', found '../1.safetensors'"),
        ({"a": "/etc/1.safetensors"}, "file beside it for 'a'"),
        ({"a": "pytorch_model-1.bin"}, "a .safetensors file beside it for 'a', found 'pytorch_model-1.bin'"),
        ({"a": ["1.safetensors"]}, "file beside it for 'a'"),
        ({}, "expected an object with a weight_map"),
        ([], "expected an object with a weight_map"),
        ({str(n): f"{n}.safetensors" for n in range(1001)}, "expected at most 1,000 files, found 1,001"),
    ],
)
def test_an_index_that_is_not_its_files_is_refused(tmp_path: Path, weight_map: Any, words: str) -> None:
    """A missing file, a tensor elsewhere, a name that leads out of the folder, pickles."""
    with pytest.raises(UserError, match=f"index.json: .*{words}"):
        open_weights(sharded(tmp_path, weight_map))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    """Which of them counts is not guessed."""
    folder = sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, folder / "2.safetensors")
    with pytest.raises(UserError, match="2.safetensors: expected each tensor in one file, found 'a' in 1.safetensors"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "found no weights"),
        (["pytorch_model.bin"], "found pickles alone .pytorch_model.bin.*save the model again as safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "found adapters alone"),
        (["consolidated.safetensors"], "found consolidated.safetensors"),
        (["model.safetensors", "model.safetensors.index.json"], "found both"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path: Path, names: list[str], words: str) -> None:
    """Pickles are named and not opened."""
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"expected model.safetensors or model.safetensors.index.json, {words}"):
        open_weights(tmp_path)


# === Held ===


def held(folder: Path) -> tuple[Path, SafetensorsFiles]:
    """A file of two tensors, read once."""
    path = folder / "model.safetensors"
    save_file({"a": torch.arange(4096.0), "b": torch.ones(4)}, path)
    found = open_weights(folder)
    assert found["a"][3] == 3 and found["b"].sum() == 4
    return path, found


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_the_held_file_is_read_whatever_its_path_leads_to(tmp_path: Path, change: str) -> None:
    """Another file under its name, or none."""
    path, found = held(tmp_path)
    if change == "replaced":
        save_file({"a": torch.zeros(4096), "b": torch.zeros(4)}, tmp_path / "other")
        (tmp_path / "other").rename(path)
    else:
        path.unlink()
    found.check_sizes()
    assert found["a"][4095] == 4095


def test_a_file_overwritten_in_place_is_refused_where_it_is_read(tmp_path: Path) -> None:
    """One byte of `a`; `b` is as it was."""
    path, found = held(tmp_path)
    at = path.read_bytes().index(torch.arange(4096.0).numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(at + 100)
        file.write(b"\xff")
    found.check_sizes()
    with pytest.raises(StartChanged, match="model.safetensors: the start model has changed .* tensor 'a' differs"):
        found["a"]
    assert found["b"].sum() == 4


@pytest.mark.parametrize("at", [0, 1023, 1024, 16383])
def test_a_tensor_of_many_pieces_is_whole_and_every_piece_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """16 KiB in pieces of 1,024 bytes, read by several threads: in their order, and a byte of any is noticed."""
    monkeypatch.setattr(held_file, "_PIECE_BYTES", 1024)
    monkeypatch.setattr(held_file, "_ALONE_BYTES", 1024)
    path, found = held(tmp_path)
    assert torch.equal(found["a"], torch.arange(4096.0)) and torch.equal(found["a"], torch.arange(4096.0))
    start = path.read_bytes().index(torch.arange(4096.0).numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(start + at)
        file.write(b"\x5a")
    with pytest.raises(StartChanged, match="tensor 'a' differs"):
        found["a"]


def test_a_file_that_was_cut_is_refused_and_ends_nothing(tmp_path: Path) -> None:
    """A mapped file would end the process (SIGBUS) here."""
    path, found = held(tmp_path)
    size = path.stat().st_size
    os.truncate(path, 200)
    with pytest.raises(StartChanged, match="it is shorter than it was"):
        found["a"]
    with pytest.raises(StartChanged, match=f"it had {size:,} bytes, now 200"):
        found.check_sizes()
