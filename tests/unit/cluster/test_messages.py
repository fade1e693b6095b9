"""What may travel between ranks, and what is not believed: one process, which talks to itself. With two ranks:
tests/distributed/test_distributed.py."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simple_llama.cluster import messages
from simple_llama.common.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
# torch's and DeepSpeed's collectives that unpickle what another rank sends
PICKLED = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


def test_nothing_calls_a_collective_of_pickles() -> None:
    """By no name, whichever module it is taken from."""
    found = []
    for folder in ("simple_llama", "launch", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {
                node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
                for node in ast.walk(ast.parse(path.read_text()))
            }
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names & PICKLED]
    assert not found


@pytest.mark.parametrize(
    "value",
    [None, True, 7, -(2**63), 0.1, 1e-320, -0.0, math.inf, "\ud800 \x00 \N{SNOWMAN}", [], {}, {"a": [1, {"b": None}]}],
)
def test_plain_data_arrives_as_it_was(value: Any) -> None:
    """Each float bit for bit, text that is no valid Unicode too; NaN as NaN."""
    assert messages.gather(value) == [value] and messages.broadcast(value) == value
    assert type(messages.broadcast(value)) is type(value)
    assert math.isnan(messages.broadcast(math.nan))


def test_tuples_are_lists_on_every_rank() -> None:
    """On the one that sent them as well, so that ranks do not differ."""
    assert messages.gather((1, ("a", 2.5))) == [[1, ["a", 2.5]]]


@pytest.mark.parametrize("value", [{1: "a"}, {"a": {None: 1}}, {1, 2}, b"bytes", np.int64(3), [object()]])
def test_what_json_would_change_is_no_message(value: Any) -> None:
    """A bug of the sender's: json.dumps alone would make text of the keys 1 and None."""
    with pytest.raises(TypeError, match="a message"):
        messages.encoded(value)


def test_equal_data_has_equal_texts() -> None:
    """Whatever the order of keys, and NaN, which is not equal to itself."""
    assert messages.encoded({"a": math.nan, "b": (1,)}, True) == messages.encoded({"b": [1], "a": math.nan}, True)
    assert messages.encoded(1, True) != messages.encoded("1", True)


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (True, float, False),
        (0.5, int, False),
        ("a", str, True),
        (None, str, False),
        (None, str | None, True),
        (["a", "b"], list[str], True),
        (["a", 1], list[str], False),
        ([], list[str], True),
        ({}, list[str], False),
        (["h", 1], tuple[str, int], True),
        (["h", 1, 2], tuple[str, int], False),
        ("h1", tuple[str, str], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "1"}, dict[str, int], False),
        ([["h", [{"x": 1}]]], list[tuple[str, Any]], True),
        (None, tuple[str, str] | None, True),
        (["host"], tuple[str, str] | None, False),
    ],
)
def test_a_kind_is_kept_to(value: Any, kind: Any, fits: bool) -> None:
    """Else everybody says which rank it was."""
    assert messages._fits(value, kind) is fits
    if not fits:
        with pytest.raises(UserError, match="rank 0 sent something else, expected"):
            messages.gather(value, kind)


@pytest.mark.parametrize(
    "text", [b"\x80\x04cposix\nsystem\n", b"", b"\xff", b"{", b"[" * 10**6, b"9" * 5000, b'{"a": }', b"1 2"]
)
def test_what_is_no_json_names_the_rank(text: bytes) -> None:
    """A pickle, half a message, a nest without end, a number of thousands of digits."""
    with pytest.raises(UserError, match=r"rank 5 sent something else, expected JSON.*docs/clusters.md"):
        messages._decoded(text, int, 5)


def test_a_long_message_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MiB are the most; a stranger's claim of 2^62 bytes, or of -1, makes no room for them."""
    assert messages._MOST == 16 * 2**20
    monkeypatch.setattr(messages, "_MOST", 10)
    assert messages.gather("12345678") == ["12345678"]
    for send in (messages.gather, messages.broadcast):
        with pytest.raises(UserError, match="rank 0 sent one of 11, expected a message of at most 10 bytes"):
            send("123456789")
    for length in (2**62, -1):
        with pytest.raises(UserError, match=f"sent one of {length:,}"):
            messages._check_length(3, length, messages._MOST)


def test_a_message_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 bytes here, the last one shorter."""
    monkeypatch.setattr(messages, "_PIECE", 7)
    for length in (0, 4, 5, 6, 12, 13):  # two bytes are quotation marks
        assert messages.gather("x" * length) == ["x" * length]


def test_positions_are_within_the_sequence() -> None:
    """Of 5 items: 0 to 4, at most five."""
    sound = np.array([0, 3, 4])
    found = messages.broadcast_positions(sound, 5)
    assert found.dtype == np.int64 and found.tolist() == [0, 3, 4]
    assert messages.broadcast_positions(np.array([], np.int64), 5).tolist() == []
    for wrong in ([5], [-1], [0, 1, 2, 3, 4, 4]):
        with pytest.raises(UserError, match="rank 0 sent"):
            messages.broadcast_positions(np.array(wrong), 5)


def test_texts_are_json() -> None:
    """What is on the wire."""
    assert json.loads(messages.encoded({"a": (1, 2)})) == {"a": [1, 2]}
