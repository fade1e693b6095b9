"""Arrays in one file: what is read is what was written, and what is damaged is no file of arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simple_llama.common.array_file import _MAGIC, Damaged, map_arrays, write_arrays

PAIR = np.dtype([("name", "V4"), ("counts", "<i4", (2,)), ("at", "<i8")])
ARRAYS = {
    "ids": np.arange(7, dtype=np.uint16),
    "pairs": np.array([(b"abcd", (1, 2), 3), (b"efgh", (4, 5), 6)], PAIR),
    "none": np.zeros((0, 2), np.int32),
    "one": np.array([1.5]),
}


def test_what_is_written_is_mapped(tmp_path: Path) -> None:
    """Each array from a multiple of 64 bytes on, of its dtype and shape, read-only; facts beside them."""
    path = tmp_path / "a.arr"
    write_arrays(path, ARRAYS, {"kept": 2})
    found, facts = map_arrays(path, verify=True)
    assert facts == {"kept": 2} and list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
        assert found[name].shape == array.shape and not found[name].flags.writeable
        assert not array.size or found[name].ctypes.data % 64 == 0
    write_arrays(path, {}, None)
    assert map_arrays(path) == ({}, None) and len(path.read_bytes()) % 64 == 0


@pytest.mark.parametrize("change", ["cut", "longer", "another", "header", "key", "dtype"])
def test_damage_is_seen(tmp_path: Path, change: str) -> None:
    """By its length, its first bytes, its header."""
    path = tmp_path / "a.arr"
    write_arrays(path, ARRAYS, {})
    data = path.read_bytes()
    header = len(_MAGIC) + 8
    changed = {
        "cut": data[:-1],
        "longer": data + b"0",
        "another": b"x" + data[1:],
        "key": data.replace(b'"facts"', b'"fakts"'),
        "dtype": data.replace(b'"<u2"', b'"<q2"'),
        "header": data[:header] + b"?" + data[header + 1 :],
    }
    path.write_bytes(changed[change])
    with pytest.raises(Damaged, match="a.arr: expected"):
        map_arrays(path)


def test_changed_numbers_are_seen_where_asked_for(tmp_path: Path) -> None:
    """One bit of the last number."""
    path = tmp_path / "a.arr"
    write_arrays(path, ARRAYS, {})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    map_arrays(path)
    with pytest.raises(Damaged, match="expected the arrays that were written, found others"):
        map_arrays(path, verify=True)
