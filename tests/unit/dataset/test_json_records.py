"""Reading records: places, encodings, compression, and the count of what is left out."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from simple_llama.common.errors import UserError
from simple_llama.dataset import json_records
from simple_llama.dataset.json_records import KeptCount, data_files, read_records


def written(folder: Path, name: str, data: bytes) -> Path:
    """A file with these bytes."""
    path = folder / name
    path.write_bytes(data)
    return path


def test_list_records_are_numbered_by_place_and_lines_by_line(tmp_path: Path) -> None:
    """The blank second line of the .jsonl is skipped, but counted, so that the number is the one an editor shows."""
    listed = written(tmp_path, "a.json", b'[{"x": 1},\n\n {"x": 2}]')
    lines = written(tmp_path, "b.jsonl", b'{"x": 1}\r\n\n{"x": 2}')
    assert [(record.number, record.fields["x"]) for record in read_records(listed)] == [(1, 1), (2, 2)]
    assert [(record.number, record.fields["x"]) for record in read_records(lines)] == [(1, 1), (3, 2)]
    assert next(read_records(lines)).origin == f"{lines}:1"


def test_byte_order_mark_and_gzip_are_read(tmp_path: Path) -> None:
    """A byte order mark is no part of the data, also inside a .gz file and before a list."""
    data = b'\xef\xbb\xbf{"x": "\xc3\xa9"}\n'
    for path in (written(tmp_path, "a.jsonl", data), written(tmp_path, "a.jsonl.gz", gzip.compress(data))):
        assert [record.fields for record in read_records(path)] == [{"x": "\u00e9"}]
    assert [r.fields for r in read_records(written(tmp_path, "a.json", b'\xef\xbb\xbf[{"x": 1}]'))] == [{"x": 1}]


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    """U+2028 and U+0085 are line breaks for str.splitlines, and may stand raw inside a JSON string."""
    text = "one\u2028two\u0085three"
    path = written(tmp_path, "a.jsonl", json.dumps({"x": text}, ensure_ascii=False).encode())
    assert [record.fields["x"] for record in read_records(path)] == [text]


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    """Hidden files, other files and subfolders are not data; a link to a file is."""
    outside = written(tmp_path, "target", b"[]")
    folder = tmp_path / "data"
    (folder / "sub.json").mkdir(parents=True)
    for name in ("b.jsonl", "a.json", "README.md", ".hidden.json", "c.jsonl.gz"):
        written(folder, name, b"")
    os.symlink(outside, folder / "0.json")
    assert [path.name for path in data_files(folder)] == ["0.json", "a.json", "b.jsonl", "c.jsonl.gz"]


def test_broken_link_in_a_folder_is_refused_not_skipped(tmp_path: Path) -> None:
    """Pairs that were meant to be there must not be missing in silence."""
    os.symlink(tmp_path / "gone", tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json: cannot be read"):
        [list(read_records(path)) for path in data_files(tmp_path)]


def test_cut_gzip_is_refused(tmp_path: Path) -> None:
    """A download that broke off ends in a message, whichever way the file is read."""
    whole = gzip.compress(b'{"x": 1}\n' * 1000)
    for name in ("a.jsonl.gz", "a.json.gz"):
        with pytest.raises(UserError, match="cannot be read"):
            list(read_records(written(tmp_path, name, whole[:-9])))


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    """The message says what was looked for and what was there."""
    written(tmp_path, "README.md", b"")
    with pytest.raises(UserError, match=r"at least one file of \*\.json.*found README\.md"):
        data_files(tmp_path)
    with pytest.raises(UserError, match="found nothing there"):
        data_files(tmp_path / "missing")
    with pytest.raises(UserError, match="file name that ends with"):
        list(read_records(tmp_path / "README.md"))


def test_summary_names_counts_and_first_records() -> None:
    """Most frequent reason first; 9,500 read and 3 left out is 9,497 kept."""
    count = KeptCount(total=9500)
    assert count.summary() == "kept 9,500 of 9,500 pairs"
    count.dropped.add("identical", "a.json:3")
    count.dropped.add("too long", "a.json:4")
    count.dropped.add("too long", "b.json:1")
    assert count.summary() == (
        "kept 9,497 of 9,500 pairs (2 too long, 1 identical); first too long: a.json:4; first identical: a.json:3"
    )


def test_a_bomb_takes_little_memory(tmp_path: Path) -> None:
    """4 GiB of zeros in 4 MiB: refused after a few MiB, whichever way the file is read."""
    data = gzip.compress(b"\0" * 2**24) * 256
    for name in ("a.json.gz", "a.jsonl.gz"):
        path = written(tmp_path, name, data)
        tracemalloc.start()
        with pytest.raises(UserError, match="at most 100 times its size"):
            list(read_records(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 * 2**20


def test_small_repetitive_files_and_long_lines_are_read(tmp_path: Path) -> None:
    """A thousand equal records pack to far below a hundredth; a line of a megabyte spans several blocks."""
    same = gzip.compress(b'{"x": 1, "y": "aaaaaaaaaaaaaaaaaaaaaaaa"}\n' * 1000)
    assert len(list(read_records(written(tmp_path, "a.jsonl.gz", same)))) == 1000
    long = json.dumps({"x": "y" * 3_000_000}).encode()
    records = read_records(written(tmp_path, "a.jsonl", long + b"\n{}\n" + long))
    found = [(record.number, len(record.fields.get("x", ""))) for record in records]
    assert found == [(1, 3_000_000), (2, 0), (3, 3_000_000)]


def test_lists_and_lines_beyond_the_limits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of 2 MiB here: the message says the limit, and for a line its number."""
    monkeypatch.setattr(json_records, "_MOST_LIST_BYTES", 2**21)
    monkeypatch.setattr(json_records, "_MOST_LINE_BYTES", 2**21)
    text = json.dumps([{"x": "y" * 2**21}]).encode()
    for name, data in (("a.json", text), ("a.json.gz", gzip.compress(text, 0))):
        with pytest.raises(UserError, match=f"{name}: expected a list of at most 2,097,152 bytes"):
            list(read_records(written(tmp_path, name, data)))
    with pytest.raises(UserError, match="a.jsonl:2: expected a line of at most 2,097,152 bytes"):
        list(read_records(written(tmp_path, "a.jsonl", b"{}\n" + b"y" * 2**23)))


def test_a_key_that_stands_twice_among_very_many_is_found_at_once(tmp_path: Path) -> None:
    """Two hundred thousand keys, the last one again: looked up, not counted for each."""
    keys = ", ".join(f'"{number}": 1' for number in [*range(200_000), 199_999])
    with pytest.raises(UserError, match="key '199999' stands twice"):
        list(read_records(written(tmp_path, "a.jsonl", b"{" + keys.encode() + b"}")))
