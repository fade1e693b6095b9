"""Files are whole or absent, digests are blake2b, and JSON errors name file and line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from simple_llama.common import files
from simple_llama.common.errors import UserError

ROOT = Path(files.__file__).parents[2]


def full_disk(*args: object, **kwargs: object) -> None:
    """Stands in for any call that needs space."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    """What lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_and_leaves_no_temp(tmp_path: Path) -> None:
    """The second write replaces the first, and only the result is there; the folder was made."""
    path = tmp_path / "made" / "a.bin"
    files.atomic_write(path, b"old, longer")
    files.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["a.bin"]


def test_atomic_path_gives_a_hidden_temp_name_in_the_same_folder(tmp_path: Path) -> None:
    """The final name does not exist before the end of the body."""
    with files.atomic_path(tmp_path / "a.pth") as temp:
        temp.write_bytes(b"1")
        assert temp.parent == tmp_path and temp.name.startswith(".") and temp.name.endswith(".tmp")
        assert not (tmp_path / "a.pth").exists()
    assert names(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("error", [RuntimeError("in the body"), KeyboardInterrupt()])
def test_an_error_in_the_body_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    """Half of a new file was written: the old one stays, the temp goes, the error is the body's own."""
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(type(error)), files.atomic_path(tmp_path / "a") as temp:
        temp.write_bytes(b"ne")
        raise error
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("failing", ["fsync", "replace", "open"])
def test_full_disk_is_a_user_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Space can run out when the bytes reach the disk or when the name is made; both name the path and the reason."""
    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(UserError, match=r"cannot write .*a\.bin: No space left on device"):
        files.atomic_write(tmp_path / "a.bin", b"data")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_a_user_error(tmp_path: Path) -> None:
    """The folder cannot be made because a file has its name."""
    (tmp_path / "runs").write_bytes(b"")
    with pytest.raises(UserError, match=r"runs.a\.json"):
        files.atomic_write_json(tmp_path / "runs" / "a.json", {})


def test_a_file_system_without_folder_fsync_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL from the folder's fsync (some network file systems) does not fail a write that is done."""
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.atomic_write(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of calls: fsync of the file, rename, fsync of the folder. Otherwise a crash can leave an empty file."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    files.atomic_write(tmp_path / "a", b"1")
    assert calls == ["fsync", "replace", "fsync"]


def test_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """A process killed with half of the new file written: readers see the old one; the leftover is a hidden temp."""
    (tmp_path / "a").write_bytes(b"old")
    body = (
        "import os, signal, sys; from simple_llama.common.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temp:\n"
        "    temp.write_bytes(b'ne'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", body, str(tmp_path / "a")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old"
    leftover = [name for name in names(tmp_path) if name != "a"]
    assert len(leftover) == 1 and leftover[0].startswith(".a.") and leftover[0].endswith(".tmp")


def test_json_goes_out_and_comes_back(tmp_path: Path) -> None:
    """What is written is read, as UTF-8 text with letters beyond ASCII kept."""
    obj = {"a": [1, 2.5, None], "b": "\u00e9"}
    files.atomic_write_json(tmp_path / "a.json", obj)
    assert files.read_json(tmp_path / "a.json") == obj
    assert "\u00e9".encode() in (tmp_path / "a.json").read_bytes()


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """Some editors put the three bytes EF BB BF in front."""
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a": 1,\n "b": }', r"a\.json, line 2, column 7: not JSON"),
        (b'{"a": 1,\n\n "b": "\xff"}', r"a\.json, line 3: expected UTF-8 text, found byte 0xff"),
        (b"", r"a\.json, line 1, column 1: not JSON"),
        (b"[" * 200_000, r"a\.json: not JSON that can be read"),
        (b"1" * 5_000, r"a\.json: not JSON that can be read"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path: Path, data: bytes, expected: str) -> None:
    """Wrong syntax, wrong encoding, nothing, nesting without end, a number too long for Python."""
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=expected):
        files.read_json(tmp_path / "a.json")


def test_missing_files_are_user_errors(tmp_path: Path) -> None:
    """Both readers name the path and the reason."""
    for read in (files.read_json, files.file_digest):
        with pytest.raises(UserError, match="cannot read .*absent: No such file or directory"):
            read(tmp_path / "absent")


def test_digest_is_blake2b_of_the_joined_chunks(tmp_path: Path) -> None:
    """Of chunks, of a whole and of a file it is the same; its size is a parameter of blake2b, not a cut."""
    expected = hashlib.blake2b(b"abc", digest_size=16).digest()
    assert files.digest(b"a", bytearray(b"b"), memoryview(b"c")) == files.digest(b"abc") == expected
    assert files.digest(b"abc", size=8) == hashlib.blake2b(b"abc", digest_size=8).digest() != expected[:8]
    (tmp_path / "a").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "a") == expected.hex()


def test_file_digest_of_more_than_one_read(tmp_path: Path) -> None:
    """A file larger than one read buffer, and one more byte changed at its end."""
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert files.file_digest(tmp_path / "a") == files.digest(data).hex() != files.digest(data[:-1]).hex()


def test_written_json_ends_with_a_newline(tmp_path: Path) -> None:
    """A text file that tools can show and join."""
    files.atomic_write_json(tmp_path / "a.json", {"a": 1})
    text = (tmp_path / "a.json").read_text()
    assert text == json.dumps({"a": 1}, indent=2) + "\n"
