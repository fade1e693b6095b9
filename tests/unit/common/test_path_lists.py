"""Several paths in one setting: where one ends, what share or name it has, and how it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from simple_llama.common.errors import UserError
from simple_llama.common.path_lists import NamedPaths, SharedPaths, brief_paths, named_paths, shared_paths
from simple_llama.common.settings import Settings, path_marks, with_absolute_paths


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with some files."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "c,d.jsonl", "e:3", "f=g"):
        (tmp_path / name).touch()
    return tmp_path


@dataclass(frozen=True)
class Paths(Settings):
    """Two such settings."""

    many: Annotated[str, SharedPaths()] = "a.jsonl"
    named: Annotated[str, NamedPaths()] = ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [("a.jsonl", 1)]),
        ("a.jsonl:2,b.jsonl:0.5", [("a.jsonl", 2), ("b.jsonl", 0.5)]),
        ("a.jsonl, b.jsonl:2.5", [("a.jsonl", 1), ("b.jsonl", 2.5)]),
        ("c,d.jsonl", [("c,d.jsonl", 1)]),
        ("a.jsonl,c,d.jsonl:2,e:3,b.jsonl", [("a.jsonl", 1), ("c,d.jsonl", 2), ("e:3", 1), ("b.jsonl", 1)]),
        ("e:3:2", [("e:3", 2)]),
        ("gone.jsonl:2", [("gone.jsonl", 2)]),
        ("gone:x", [("gone:x", 1)]),
    ],
)
def test_paths_with_shares(text: str, expected: list[tuple[str, float]]) -> None:
    """A path that is there is taken as it is, with commas and colons in its name, also among others."""
    assert [(one.path, one.share) for one in shared_paths(text)] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a.jsonl:0",
            r"rlhf_dataset_path: a.jsonl: expected as its share a number above 0.0 and at most 1000.0, found 0",
        ),
        ("a.jsonl:-1", "found -1"),
        ("a.jsonl:nan", "found nan"),
        ("a.jsonl:1001", "found 1001"),
        ("a.jsonl:half", "behind the colon, found 'half'"),
        ("a.jsonl,", "expected a path before and behind each comma"),
        ("a.jsonl,,b.jsonl", "expected a path before and behind each comma"),
    ],
)
def test_what_is_no_share(text: str, said: str) -> None:
    """A share of 0 would leave a path out in silence."""
    with pytest.raises(UserError, match=said):
        shared_paths(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a.jsonl", [("", "a.jsonl")]),
        ("f=g", [("", "f=g")]),
        ("=a.jsonl", [("", "=a.jsonl")]),
        ("safety=a.jsonl,helpful=c,d.jsonl", [("safety", "a.jsonl"), ("helpful", "c,d.jsonl")]),
        ("one=f=g", [("one", "f=g")]),
    ],
)
def test_paths_with_names(text: str, expected: list[tuple[str, str]]) -> None:
    """A single path needs no name."""
    assert [(one.name, one.path) for one in named_paths(text)] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.jsonl,b.jsonl", "expected NAME=PATH, with names of letters"),
        ("x=a.jsonl,x=b.jsonl", "expected each name once, found x 2 times"),
        ("a/b=a.jsonl", "expected NAME=PATH"),
        ("rewards=a.jsonl", "that are none of loss, rewards"),
        ("x=", "expected a path behind x="),
    ],
)
def test_what_is_no_name(text: str, said: str) -> None:
    """Names become parts of metrics, so that none may be one already."""
    with pytest.raises(UserError, match=said):
        named_paths(text)


def test_each_path_is_made_absolute(folder: Path) -> None:
    """Part by part, with its share and its name; what is absolute stays, and an empty setting stays empty."""
    found = with_absolute_paths(Paths("a.jsonl:2,c,d.jsonl,b.jsonl:0.25", "x=a.jsonl,y=gone.jsonl"))
    assert found == {
        "many": f"{folder}/a.jsonl:2,{folder}/c,d.jsonl,{folder}/b.jsonl:0.25",
        "named": f"x={folder}/a.jsonl,y={folder}/gone.jsonl",
    }
    assert with_absolute_paths(Paths(**found)) == found
    assert with_absolute_paths(Paths()) == {"many": f"{folder}/a.jsonl", "named": ""}


def test_paths_that_are_gone_are_seen() -> None:
    """They lead somewhere while one of them does."""
    marks = path_marks(Paths)
    assert marks["many"].leads_somewhere("gone:2,a.jsonl:2") and not marks["many"].leads_somewhere("gone:2,away")
    assert marks["named"].leads_somewhere("x=a.jsonl") and not marks["named"].leads_somewhere("")


def test_paths_in_brief() -> None:
    """For a table: last parts with shares, also of what is gone or wrong."""
    assert brief_paths("/x/y/a.jsonl:2,/z/b") == "a.jsonl:2, b" and brief_paths("/x/a.jsonl") == "a.jsonl"
    assert brief_paths("/x/a.jsonl:0") == "a.jsonl:0"
