"""Reading records: places, encodings, compression, and the count of what is left out."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from simple_llama.common.errors import UserError
from simple_llama.dataset import json_records
from simple_llama.dataset.json_records import Faults, KeptCount, data_files, read_records


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


def test_names_count_without_case_and_ndjson_is_jsonl(tmp_path: Path) -> None:
    """Each is read by its kind, packed or not; documents of any case are passed over."""
    lines, whole = b'{"x": 1}\n{"x": 2}', b'[{"x": 1}, {"x": 2}]'
    for name, data in (("A.JSONL", lines), ("b.ndjson", lines), ("c.Json", whole), ("d.JSON.GZ", gzip.compress(whole))):
        written(tmp_path, name, data)
    written(tmp_path, "e.NDJSON.gz", gzip.compress(lines))
    for name in ("README", "readme.txt", "LICENSE", "Notes.MD", ".hidden.parquet"):
        written(tmp_path, name, b"")
    (tmp_path / "folder.csv").mkdir()
    files = data_files(tmp_path)
    assert [path.name for path in files] == ["A.JSONL", "b.ndjson", "c.Json", "d.JSON.GZ", "e.NDJSON.gz"]
    assert [[record.fields["x"] for record in read_records(path)] for path in files] == [[1, 2]] * 5


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("b.jsonl.ZIP", "unpack it with unzip"),
        ("b.json.tar", "unpack it with tar -x"),
        ("b.csv", "write it as .jsonl"),
        ("b.jsonl.bak", "write it as .jsonl"),
        ("license_pairs.csv.gz", "write it as .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, way_out: str) -> None:
    """In a folder beside one that can be, and given by itself: no pairs are missing in silence."""
    written(tmp_path, "a.jsonl", b"{}")
    written(tmp_path, name, b"")
    with pytest.raises(UserError) as raised:
        data_files(tmp_path)
    assert f"found 1 of another kind: {name} ({way_out}" in str(raised.value)
    assert str(raised.value).endswith("or move them out of the folder")
    with pytest.raises(UserError) as raised:
        list(read_records(tmp_path / name))
    assert "expected a file name that ends with .json, .jsonl" in str(raised.value) and way_out in str(raised.value)


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


# === packed files ===

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_are_read_whole_or_refused(tmp_path: Path, suffix: str) -> None:
    """As lines and as a list, of two parts joined, by a name in any case; a cut one, and other bytes, are refused."""
    pack, lines = PACKERS[suffix], b'{"x": "\xc3\xa9"}\n' * 40_000
    listed = json.dumps([{"x": n} for n in range(3000)]).encode()
    joined = written(tmp_path, f"a.JSONL{suffix.upper()}", pack(lines) + pack(lines))
    assert sum(record.fields == {"x": "\u00e9"} for record in read_records(joined)) == 80_000
    found = list(read_records(written(tmp_path, f"a.json{suffix}", pack(listed))))
    assert [record.fields["x"] for record in found] == list(range(3000))
    for name, data in (("cut", pack(listed)[:-5]), ("cut early", pack(listed)[:9]), ("other", b"[]" * 9)):
        for kind in ("json", "jsonl"):
            with pytest.raises(UserError, match="cannot be read: "):
                list(read_records(written(tmp_path, f"{name}.{kind}{suffix}", data)))


@pytest.mark.parametrize("suffix", [".zst", ".xz", ".bz2"])
def test_a_bomb_of_another_packer_takes_little_memory(tmp_path: Path, suffix: str) -> None:
    """1 GiB of zeros: refused after a few MiB."""
    data = PACKERS[suffix](b"\0" * 2**26) * 16
    for kind in ("json", "jsonl"):
        path = written(tmp_path, f"a.{kind}{suffix}", data)
        tracemalloc.start()
        with pytest.raises(UserError, match="at most 100 times its size"):
            list(read_records(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 128 * 2**20


# === tables ===

ROWS = [{"x": n, "chat": [{"role": "user", "content": "\u00e9"}], **({"y": 0.5} if n % 2 else {})} for n in range(600)]


def arrow(folder: Path, name: str, table: pa.Table, kind: Callable[..., pa.RecordBatchFileWriter]) -> Path:
    """An Arrow file of one of its two kinds, in batches of 250 rows."""
    with pa.OSFile(str(folder / name), "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table, 250)
    return folder / name


def test_tables_are_read_by_rows_without_their_nulls(tmp_path: Path) -> None:
    """Parquet in row groups of 70, and both kinds of Arrow files: the records that were put in, numbered from 1."""
    table = pa.Table.from_pylist(ROWS, pa.schema({"x": pa.int64(), "chat": CHAT, "y": pa.float64()}))
    pq.write_table(table, tmp_path / "A.PARQUET", row_group_size=70)
    paths = [tmp_path / "A.PARQUET", arrow(tmp_path, "b.arrow", table, pa.ipc.new_file)]
    for path in (*paths, arrow(tmp_path, "c.arrow", table, pa.ipc.new_stream)):
        found = list(read_records(path))
        assert [record.fields for record in found] == ROWS
        assert [record.number for record in found] == list(range(1, 601))
    written(tmp_path, "dataset_info.json", b"{}")
    written(tmp_path, "state.json", b"{}")
    assert [path.name for path in data_files(tmp_path)] == ["A.PARQUET", "b.arrow", "c.arrow"]


CHAT = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()}))


def test_a_large_row_group_is_not_read_whole(tmp_path: Path) -> None:
    """64 MiB of text in one row group, of which each batch takes little."""
    table = pa.table({"x": [os.urandom(16).hex() * 64 for _ in range(2**15)]})
    pq.write_table(table, tmp_path / "a.parquet")
    del table
    before = most = pa.total_allocated_bytes()
    for _ in read_records(tmp_path / "a.parquet"):
        most = max(most, pa.total_allocated_bytes())
    assert most - before < 16 * 2**20


def test_tables_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Cut ones, others' bytes, text that is no UTF-8 or ends a GiB further on, a column that stands twice."""
    table = pa.table({"x": ["a"] * 1000})
    pq.write_table(table, tmp_path / "a.parquet")
    whole = {
        "parquet": (tmp_path / "a.parquet").read_bytes(),
        "file.arrow": arrow(tmp_path, "a.arrow", table, pa.ipc.new_file).read_bytes(),
        "stream.arrow": arrow(tmp_path, "a.arrow", table, pa.ipc.new_stream).read_bytes(),
    }
    for kind, data in whole.items():
        for cut in (0, 5, 100, len(data) // 2):
            with pytest.raises(UserError, match=f"b.{kind}: cannot be read: "):
                list(read_records(written(tmp_path, f"b.{kind}", data[:cut])))
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"x": bad}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="c.parquet: cannot be read: 'utf-8' codec"):
        list(read_records(tmp_path / "c.parquet"))
    data = arrow(tmp_path, "e.arrow", pa.table({"x": ["abc" * 99] * 2}), pa.ipc.new_stream).read_bytes()
    offsets, far = (b"".join(n.to_bytes(4, "little") for n in (297, end)) for end in (594, 2**30))
    assert data.count(offsets) == 1
    with pytest.raises(UserError, match="e.arrow: cannot be read: "):
        list(read_records(written(tmp_path, "e.arrow", data.replace(offsets, far))))
    twice = pa.table([["a"], ["b"]], names=["x", "x"])
    with pytest.raises(UserError, match="d.arrow: column 'x' stands twice"):
        list(read_records(arrow(tmp_path, "d.arrow", twice, pa.ipc.new_stream)))


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.json.zst", "zstandard")]
)
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    """With what to type."""
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name}: expected the package {package}, .*pip install '\.\[data\]'"):
        list(read_records(written(tmp_path, name, b"")))


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


# === faults ===

MARK = b"\xef\xbb\xbf"
# name of the file, its bytes, and what the message says behind the file's name
JOINED = {
    "a mark in a line": (
        "a.jsonl",
        MARK + b"{}\n\n" + MARK + b"{}",
        ":3: {}, found a byte order mark inside the file (column 1)",
    ),
    "two marks": ("a.jsonl", MARK * 2 + b"{}", ":1: {}, found a byte order mark inside the file (column 1)"),
    "a mark between two": (
        "a.jsonl",
        b"{}" + MARK + b"{}",
        ":1: {}, found a byte order mark inside the file (column 3)",
    ),
    "a mark at the end": ("a.jsonl", b"{}\n" + MARK, ":2: {}, found a byte order mark inside the file (column 1)"),
    "a mark in a list": (
        "a.json",
        b"[{},\n " + MARK + b"{}]",
        ": {}, found a byte order mark inside the file (line 2, column 2)",
    ),
    "two on a line": ("a.jsonl", b"{}\n{}{}", ":2: {}, found two: a line break is missing before column 3"),
    "two apart": ("a.jsonl", b"{} \t[]", ":1: {}, found two: a line break is missing before column 5"),
    "a comma": ("a.jsonl", b"{},", ":1: {}, found invalid JSON: Extra data: line 1 column 3 (char 2)"),
    "two lists": ("a.json", b"[][]", ": {}, found invalid JSON: Extra data: line 1 column 3 (char 2)"),
}


@pytest.mark.parametrize("case", JOINED)
def test_files_that_were_joined_are_told_so(tmp_path: Path, case: str) -> None:
    """Not in the words of a parser, which speaks of codecs, and of names that the file has; packed or not."""
    name, data, words = JOINED[case]
    expected = "expected one JSON object on a line" if name.endswith("l") else "expected one JSON list"
    for path in (written(tmp_path, name, data), written(tmp_path, f"{name}.gz", gzip.compress(data))):
        with pytest.raises(UserError) as raised:
            list(read_records(path))
        said = str(raised.value)
        assert said.startswith(f"{path}{words.format(expected)}"), said
        assert "utf-8-sig" not in said and "is named" not in said


def test_faults_are_gathered_and_sound_records_still_come(tmp_path: Path) -> None:
    """Lines 1 to 12 are faulty in four ways, 13 and 14 are sound: ten in words, with their lines, and how many."""
    bad = (b"{", b"[]", b'{"x": 1, "x": 2}', b"\xff") * 3
    path = written(tmp_path, "a.jsonl", b"\n".join((*bad, b"{}", b"{}")))
    faults = Faults()
    assert [record.number for record in read_records(path, faults)] == [13, 14]
    with pytest.raises(UserError) as raised:
        faults.end()
    first, *lines = str(raised.value).split("\n")
    assert first == "12 faulty records, the first 10:"
    assert [line.split(": ")[0] for line in lines] == [f"  {path}:{number}" for number in range(1, 11)]
    for line, words in zip(lines, ("invalid JSON", "found a list of 0", "stands twice", "byte 0xff"), strict=False):
        assert words in line


def test_faults_of_one_and_of_none() -> None:
    """One is the message itself; none is no error; long ones are cut where there are several."""
    faults = Faults()
    faults.end()
    faults.add(UserError("a" * 300))
    with pytest.raises(UserError, match=f"^{'a' * 300}$"):
        faults.end()
    faults.add(UserError("b"))
    with pytest.raises(UserError, match=f"^2 faulty records:\n  {'a' * 250}[.]{{3}}\n  b$"):
        faults.end()


def test_reading_ends_when_faults_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five are enough here: the sixth line is not looked at, and the number is a lower bound."""
    monkeypatch.setattr(json_records, "_MOST_FAULTS", 5)
    faults = Faults()
    assert list(read_records(written(tmp_path, "a.jsonl", b"[]\n" * 5 + b"{}"), faults)) == []
    with pytest.raises(UserError, match="^at least 5 faulty records:"):
        faults.end()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_only_the_records_that_are_wanted(tmp_path: Path, name: str) -> None:
    """By their numbers; of lines no other is parsed, so that one may be broken, blank or begin with a mark."""
    rows = [{"n": number} for number in range(1, 6)]
    lines = ["\ufeff{", json.dumps(rows[1]), "", json.dumps(rows[3]), "["]
    numbers = {2, 4} if ".jsonl" in name else {2, 4, 9}
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    else:
        text = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    faults = Faults()
    found = [(record.number, record.fields) for record in read_records(path, faults, numbers)]
    assert found == [(2, {"n": 2}), (4, {"n": 4})] and not faults.number
