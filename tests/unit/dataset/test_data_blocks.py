"""Blocks of data files: what is appended leaves the earlier ones as they are, what is changed is seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simple_llama.common.errors import UserError
from simple_llama.dataset import data_blocks
from simple_llama.dataset.data_blocks import UncutFile, blocks_of, read_block


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 100 bytes, of pieces of 10."""
    monkeypatch.setattr(data_blocks, "_BLOCK", 100)
    monkeypatch.setattr(data_blocks, "_PIECE", 10)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """25 lines of 9 bytes: blocks of 12, 12 and 1 lines, as line 12 is the first that ends behind byte 99."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"line %03d\n" % number for number in range(25)))
    return path


def test_blocks_end_with_lines(file: Path, tmp_path: Path) -> None:
    """They are the file, one behind the other, and know which line is their first."""
    blocks = blocks_of(file, tmp_path / "facts")
    assert [(b.start, b.length, b.first, b.lines) for b in blocks] == [
        (0, 108, 1, 12),
        (108, 108, 13, 12),
        (216, 9, 25, 1),
    ]
    assert b"".join(map(read_block, blocks)) == file.read_bytes()
    assert blocks == blocks_of(file, tmp_path / "facts") == blocks_of(file, tmp_path / "others")


def test_what_is_appended_is_a_new_last_block(file: Path, tmp_path: Path) -> None:
    """Also behind a last line without an end, whose block is another then."""
    before = blocks_of(file, tmp_path / "facts")
    with open(file, "ab") as opened:
        opened.write(b"more")
    after = blocks_of(file, tmp_path / "facts")
    assert after[:2] == before[:2] and (after[2].length, after[2].lines) == (13, 2)
    assert after[2].digest != before[2].digest
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    assert [b.digest for b in blocks_of(copy, tmp_path / "facts")] == [b.digest for b in after]


def test_a_change_is_seen_though_time_and_size_are_the_same(file: Path, tmp_path: Path) -> None:
    """All 24 pieces are drawn of so small a file; with `verify` none is left to chance."""
    before, status = blocks_of(file, tmp_path / "facts"), file.stat()
    data = bytearray(file.read_bytes())
    data[120] ^= 1
    with open(file, "r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns and file.stat().st_ino == status.st_ino
    with pytest.raises(UserError, match="expected the data that was looked at first, found other bytes"):
        read_block(before[1])
    after = blocks_of(file, tmp_path / "facts")
    assert [b.digest == a.digest for b, a in zip(before, after, strict=True)] == [True, False, True]
    assert blocks_of(file, tmp_path / "facts", verify=True) == after


def test_pieces_are_read_only_where_nothing_looks_changed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start reads two drawn pieces, not the file; facts that are damaged count as none."""
    blocks = blocks_of(file, tmp_path / "facts")
    monkeypatch.setattr(data_blocks, "_DRAWN", 2)
    monkeypatch.setattr(data_blocks, "_cut", None)
    assert blocks_of(file, tmp_path / "facts") == blocks
    monkeypatch.undo()
    monkeypatch.setattr(data_blocks, "_BLOCK", 100)
    [about] = (tmp_path / "facts").iterdir()
    for damage in ("{", "[]", '{"format": 1}', about.read_text().replace('"blocks": [', '"blocks": [1, ')):
        about.write_text(damage)
        assert blocks_of(file, tmp_path / "facts")[0].length == 108


def test_a_line_without_an_end_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than the most that a line may go on: its reader says so."""
    monkeypatch.setattr(data_blocks, "_MOST_LINE", 50)
    (tmp_path / "a.jsonl").write_bytes(b"0" * 150)
    with pytest.raises(UncutFile, match="a line of more than 50 bytes"):
        blocks_of(tmp_path / "a.jsonl", tmp_path / "facts")
    (tmp_path / "a.jsonl").write_bytes(b"0" * 149)
    assert blocks_of(tmp_path / "a.jsonl", tmp_path / "facts")[0].length == 149


def test_another_kind_of_file_is_one_block(tmp_path: Path) -> None:
    """A list, an empty file, one that is not there."""
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b" " * 250 + b"]")
    [block] = blocks_of(path, tmp_path / "facts")
    assert (block.start, block.length, block.first, block.is_lines) == (0, 252, 1, False)
    (tmp_path / "empty.jsonl").touch()
    assert blocks_of(tmp_path / "empty.jsonl", tmp_path / "facts") == []
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read: No such file"):
        blocks_of(tmp_path / "gone.jsonl", tmp_path / "facts")
