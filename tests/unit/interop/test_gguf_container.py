"""A GGUF file's keys and table: every broken one ends in a message, however much it claims to hold."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from simple_llama.common.errors import UserError
from simple_llama.interop.gguf_container import GGUFContainer

F32, Q8_0 = 0, 8  # types of tensors
UINT32, TEXT, LIST = 4, 8, 9  # types of values


def text(value: str | bytes) -> bytes:
    """Length and bytes."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, code: int, value: bytes) -> bytes:
    """An entry of the metadata."""
    return text(name) + struct.pack("<I", code) + value


def tensor(name: str, shape: list[int], offset: int, code: int = F32) -> bytes:
    """An entry of the table, inner dimension first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)


def gguf(
    keys: list[bytes], tensors: list[bytes], data: bytes, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    """A file; `counts` are those of tensors and keys where they are not the lists'."""
    head = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32) + data


FOUR = struct.pack("<4f", 1, 2, 3, 4)
SPACE = bytes(16)  # to the next multiple of 32
ONE = [tensor("one", [4], 0)]
LONG = struct.pack("<Q", 2**62)


def opened(path: Path, content: bytes) -> GGUFContainer:
    """A file of these bytes."""
    path.write_bytes(content)
    return GGUFContainer(path)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("end", [b"", SPACE], ids=["ends with its numbers", "padded"])
def test_a_file_by_hand(tmp_path: Path, version: int, end: bytes) -> None:
    """Values of each kind by key; two tensors, the second from byte 32 on, (2, 2) where the file says 2, 2."""
    keys = [
        key("a.number", UINT32, struct.pack("<I", 7)),
        key("a.text", TEXT, text("caf\u00e9")),
        key("a.list", LIST, struct.pack("<IQ3i", 5, 3, -1, 0, 1)),
        key("texts", LIST, struct.pack("<IQ", TEXT, 2) + text("x") + text("")),
        key("none", LIST, struct.pack("<IQ", TEXT, 0)),
    ]
    found = opened(
        tmp_path / "x.gguf", gguf(keys, [*ONE, tensor("two", [2, 2], 32)], FOUR + SPACE + FOUR + end, version)
    )
    assert found.metadata == {
        "a.number": 7,
        "a.text": "caf\u00e9",
        "a.list": [-1, 0, 1],
        "texts": ["x", ""],
        "none": [],
    }
    assert list(found) == ["one", "two"] and len(found) == 2 and "one" in found and "three" not in found
    assert found["one"].tolist() == [1, 2, 3, 4] and found["two"].tolist() == [[1, 2], [3, 4]]
    assert found.shape("two") == (2, 2)


def test_another_alignment(tmp_path: Path) -> None:
    """Of 8 bytes: the second tensor follows without a gap."""
    keys = [key("general.alignment", UINT32, struct.pack("<I", 8))]
    head = struct.pack("<4sIQQ", b"GGUF", 3, 2, 1) + keys[0] + ONE[0] + tensor("two", [4], 16)
    found = opened(tmp_path / "x.gguf", head + bytes(-len(head) % 8) + FOUR + FOUR)
    assert found["two"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has 0 bytes, and claims 4 from byte 0 on"),
        (b"GGUF", "it has 4 bytes"),
        (b"\x93NUMPY" + bytes(99), "it begins with b'\\x93NUM' instead of b'GGUF'"),
        (gguf([], ONE, FOUR, version=1), "version 1 instead of 2 or 3"),
        (gguf([], ONE, FOUR, version=3 << 24), "version 50331648 instead of 2 or 3, little-endian"),
        (gguf([], ONE, FOUR, counts=(2**60, 0)), "it claims 1,152,921,504,606,846,976 tensors"),
        (gguf([], ONE, FOUR, counts=(0, 2**60)), "it claims 1,152,921,504,606,846,976 keys"),
        (gguf([key("x", LIST, struct.pack("<I", UINT32) + LONG)], ONE, FOUR), "key 'x': it claims 4,611,686,0"),
        (gguf([key("x", LIST, struct.pack("<I", TEXT) + LONG)], ONE, FOUR), "key 'x': it claims 4,611,686,0"),
        (gguf([key("x", LIST, struct.pack("<IQ", LIST, 1))], ONE, FOUR), "key 'x': a list of type 9 cannot be read"),
        (gguf([key("x", TEXT, LONG)], ONE, FOUR), "key 'x': a text of 4,611,686,0"),
        (gguf([key("x", TEXT, struct.pack("<Q", 9999))], ONE, FOUR), "bytes, and claims 9,999 from byte"),
        (gguf([key("x", TEXT, text(b"\xff"))], ONE, FOUR), "key 'x': a text is not UTF-8"),
        (gguf([key("x", 13, b"")], ONE, FOUR), "key 'x': type 13 of a value is not known"),
        (gguf([key("x", UINT32, bytes(4))] * 2, ONE, FOUR), "key 'x' stands twice"),
        (
            gguf([key("general.alignment", UINT32, struct.pack("<I", 24))], ONE, FOUR),
            "general.alignment: expected a power of two, found 24",
        ),
        (gguf([], ONE * 2, FOUR), "tensor 'one' stands twice"),
        (gguf([], [*ONE, tensor("two", [4], 0)], FOUR), "tensor 'two' overlaps the one before"),
        (gguf([], [*ONE, tensor("two", [4], 64)], FOUR * 9), "tensor 'two' leaves 32 bytes unsaid"),
        (gguf([], [tensor("one", [5], 0)], FOUR), "tensor 'one' ends 4 bytes behind the file's end"),
        (gguf([], [tensor("one", [2**39, 2**39], 0)], FOUR), "tensor 'one' ends 1,208,925,8"),
        (gguf([], ONE, FOUR + SPACE + b"more"), "its tensors end after"),
        (gguf([], [tensor("one", [], 0)], FOUR), "tensor 'one': [] is no shape of F32"),
        (gguf([], [tensor("one", [0, 4], 0)], FOUR), "tensor 'one': [0, 4] is no shape of F32"),
        (gguf([], [tensor("one", [1] * 5, 0)], FOUR), "tensor 'one': 5 dimensions"),
        (gguf([], [tensor("one", [16, 2], 0, Q8_0)], FOUR), "[16, 2] is no shape of Q8_0, 32 numbers a block"),
        (gguf([], [tensor("one", [4], 0, 4)], FOUR), "tensor 'one': gguf cannot dequantize type 4"),
        (gguf([], [tensor("one", [4], 0, 999)], FOUR), "tensor 'one': gguf cannot dequantize type 999"),
        (gguf([], [tensor("one", [4], 0, 26)], FOUR), "tensor 'one': gguf cannot dequantize type 26"),  # int32
    ],
)
def test_a_file_that_is_not_sound_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    """One message that names the file, and says what is wrong in it."""
    with pytest.raises(UserError) as error:
        opened(tmp_path / "x.gguf", content)
    start = f"{tmp_path / 'x.gguf'}: expected a GGUF file, found one that is not sound: "
    assert str(error.value).startswith(start) and words in str(error.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Nothing there, and a pipe, which would hang."""
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("none.gguf", "pipe.gguf"):
        with pytest.raises(UserError, match=f"{name}: expected a GGUF file, found: "):
            GGUFContainer(tmp_path / name)
