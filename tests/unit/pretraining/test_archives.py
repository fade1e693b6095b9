"""Files of torch.save: read as torch reads them, through one open file, and refused before they take memory."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from crafted_weights import CRAFTED, archive, checkpoint
from simple_llama.common.errors import UserError
from simple_llama.common.files import open_file
from simple_llama.pretraining.archives import read_archive

MOST_MIB = 100  # that a file may take before it is refused
MEASURE = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from simple_llama.common.errors import UserError
from simple_llama.pretraining.weights import load_weights
for path in sys.argv[1:]:
    before, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
    try:
        load_weights(path)
    except UserError as error:
        said = str(error)
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, said]), flush=True)
"""


def read(path: Path) -> Any:
    """What is in a file."""
    with open_file(path) as file:
        return read_archive(file)


def check_same(found: Any, expected: Any) -> None:
    """Equal, of the same types, in the same order; tensors of the same dtype and strides."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        whole = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in (found, expected)]
        mine, other = (tensor.view(-1).view(torch.uint8) for tensor in whole)
        assert torch.equal(mine, other)
        return
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        check_same(list(found.items()), list(expected.items()))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            check_same(mine, other)
    else:
        assert found == expected


def content(zipped: bool) -> dict[Any, Any]:
    """Of all kinds that checkpoints hold: weights, a module's state dict, an optimizer's state, plain values."""
    torch.manual_seed(0)
    layer, matrix = torch.nn.Linear(3, 5), torch.randn(4, 6)
    optimizer = torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}])
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool)
    kinds += (torch.complex64, *((torch.uint16, torch.float8_e4m3fn) if zipped else ()))
    return {
        "model_state_dict": layer.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "dtypes": [torch.arange(6).reshape(2, 3).to(dtype) for dtype in kinds],
        "views": [matrix, matrix.T, matrix[1:3, ::2], torch.ones(1, 1).expand(3, 4), matrix[0, 0], torch.empty(0, 2)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [
            None,
            True,
            -1,
            300,
            70_000,
            2**40,
            -(2**70),
            1e-300,
            "text \ud800 \u00e9 \0",
            b"\0\xff",
            (),
            (1, 2, 3, 4),
        ],
        "more": OrderedDict(a={1, 2}, b=Counter("aab"), c=2j, d=torch.Size([2, 3]), e=torch.bfloat16),
        "device": torch.device("cuda", 1),
        "random": torch.get_rng_state(),
        ("a", 1): {2: [{"nested": [[]]}]},
        "many": {f"a name of some length {i}": i for i in range(300)},
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool) -> None:
    """In both formats."""
    torch.save(content(zipped), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    check_same(read(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_tensors_stay_tied(tmp_path: Path, zipped: bool) -> None:
    """A head that is its embeddings, and a list at two places: each is read once."""
    weight, values = torch.randn(3, 2), [1, 2]
    torch.save([weight, weight.T, values, values], tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    one, other, first, second = read(tmp_path / "a.pth")
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert first is second and torch.equal(other, weight.T)


def test_numbers_of_the_other_byte_order(tmp_path: Path) -> None:
    """1.0 is 3f 80 00 00 on a big-endian machine, which its file says."""
    torch.save([torch.ones(2), torch.arange(2)], tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("/byteorder"):
                data = b"big"
            elif name.split("/")[1:] == ["data", "0"]:
                data = bytes.fromhex("3f8000003f800000")
            elif name.split("/")[1:] == ["data", "1"]:
                data = bytes(15) + b"\1"
            new.writestr(zipfile.ZipInfo(name), data)
    check_same(read(tmp_path / "b.pth"), [torch.ones(2), torch.arange(2)])


def test_the_open_file_is_what_is_read(tmp_path: Path) -> None:
    """Its tensors live on when it is closed, and when another file has its name."""
    torch.save([torch.ones(1000)], tmp_path / "a.pth")
    with open_file(tmp_path / "a.pth") as file:
        torch.save([torch.zeros(1000)], tmp_path / "b.pth")
        (tmp_path / "b.pth").replace(tmp_path / "a.pth")
        [first], [again] = read_archive(file), read_archive(file)
    assert torch.equal(first, torch.ones(1000)) and torch.equal(again, first)


def test_any_flipped_bit_of_the_table_is_seen(tmp_path: Path) -> None:
    """A size, a stride or a number of the config: the zip's checksum of data.pkl is held against it."""
    table = checkpoint()
    sound = archive(table)
    start = sound.index(table)
    (tmp_path / "a.pth").write_bytes(sound)
    assert list(read(tmp_path / "a.pth")) == ["model_state_dict", "config", "metadata"]
    for at in range(len(table)):
        (tmp_path / "a.pth").write_bytes(sound[: start + at] + bytes([table[at] ^ 4]) + sound[start + at + 1 :])
        with pytest.raises(UserError, match="checksum"):
            read(tmp_path / "a.pth")


def test_crafted_files_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    """Each in a word, with less than 100 MiB, in a process that a file of more would end."""
    paths = [tmp_path / f"{at:02}.pth" for at in range(len(CRAFTED))]
    for path, (data, _) in zip(paths, CRAFTED.values(), strict=True):
        path.write_bytes(data)
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{list(CRAFTED)[len(answers)]}: {done.stderr[-500:]}"
    for name, (_, expected), (taken, said) in zip(CRAFTED, CRAFTED.values(), answers, strict=True):
        assert expected in said and len(said) < 1000, f"{name}: {said[:1000]}"
        assert taken < MOST_MIB << 10, f"{name}: {taken >> 10} MiB"
