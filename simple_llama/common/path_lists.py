"""Several paths in one setting.

    a.jsonl:2,folder:0.5                 each with a share, 1 where none is given
    safety=a.jsonl,helpful=b.jsonl       each with a name

A path that exists with a comma, a colon or an equals sign in its name is that path.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import NamedTuple

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.settings import Bounds, FilePath

_SHARE = Bounds(0.0, 1000.0, above=True)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_METRICS = ("loss", "rewards", "logps", "log_ratio", "pairs")  # names that curves of all held-out pairs begin with


class ListedPath(NamedTuple):
    """One path of several."""

    path: str
    share: float = 1.0
    name: str = ""

    def __str__(self) -> str:
        """As it is given."""
        name, share = self.name and f"{self.name}=", "" if self.share == 1 else f":{self.share:.15g}"
        return f"{name}{self.path}{share}"


class SharedPaths(FilePath):
    """Marks text that names files or folders, each with a share."""

    def absolute(self, text: str) -> str:
        """The same paths, such as mean the same in every working folder."""
        return ",".join(str(_absolute(one)) for one in shared_paths(text))

    def leads_somewhere(self, text: str) -> bool:
        """Whether one of them is there."""
        return any(os.path.lexists(one.path) for one in shared_paths(text))


class NamedPaths(FilePath):
    """Marks text that names files or folders, each with a name; none, where it is empty."""

    may_be_empty = True

    def absolute(self, text: str) -> str:
        """The same paths, such as mean the same in every working folder."""
        return ",".join(str(_absolute(one)) for one in named_paths(text))

    def leads_somewhere(self, text: str) -> bool:
        """Whether one of them is there."""
        return any(os.path.lexists(one.path) for one in named_paths(text))


def shared_paths(text: str, setting: str = "rlhf_dataset_path") -> list[ListedPath]:
    """The paths of a setting, each with its share. UserError for a share that is none, or a path that is missing."""

    def read(part: str) -> ListedPath:
        path, colon, number = part.rpartition(":")
        if os.path.lexists(part) or not path:
            return ListedPath(part)
        if _NUMBER.fullmatch(number):
            if not _SHARE.hold(float(number)):
                raise UserError(f"{setting}: {path}: expected as its share {_SHARE}, found {number}")
            return ListedPath(path, float(number))
        if colon and os.path.lexists(path):
            raise UserError(
                f"{setting}: {path}: expected as its share {_SHARE} behind the colon, found {shown(number)}"
            )
        return ListedPath(part)

    return _listed(text, setting, read)


def named_paths(text: str, setting: str = "validation_path") -> list[ListedPath]:
    """The paths of a setting, each with its name; a single one may have none. UserError for a name that is none."""

    def read(part: str) -> ListedPath:
        name, equals, path = part.partition("=")
        if os.path.lexists(part) or not name or not equals:
            return ListedPath(part)
        return ListedPath(path, name=name)

    found = _listed(text, setting, read) if text else []
    names = [one.name for one in found]
    for one in found:
        if one.name in _METRICS or not (_NAME.fullmatch(one.name) or (len(found) == 1 and not one.name)):
            raise UserError(
                f"{setting}: expected NAME=PATH, with names of letters, digits, _ and - that are none of "
                f"{', '.join(_METRICS)} (a single path needs no name), found {shown(str(one))}"
            )
        if not one.path:
            raise UserError(f"{setting}: expected a path behind {one.name}=, found none")
        if names.count(one.name) > 1:
            raise UserError(f"{setting}: expected each name once, found {one.name} {names.count(one.name)} times")
    return found


def same_paths(here: str, there: str) -> bool:
    """Whether two settings lead to the same data, whatever the shares; never to none."""
    if not (here and there):
        return False
    mine, theirs = ({Path(one.path).resolve() for one in shared_paths(text)} for text in (here, there))
    return mine == theirs


def brief_paths(text: str) -> str:
    """The last part of each path with its share, for people; also of paths that are no longer there."""
    try:
        return ", ".join(str(one._replace(path=PurePath(one.path).name)) for one in shared_paths(text))
    except UserError:
        return PurePath(text).name


def _absolute(one: ListedPath) -> ListedPath:
    return one._replace(path=str(Path(one.path).absolute()))


def _listed(text: str, setting: str, read: Callable[[str], ListedPath]) -> list[ListedPath]:
    """What stands between commas; of those of a path that exists it is the longest that counts."""
    parts = text.split(",")
    found: list[ListedPath] = []
    while parts:
        if not parts[0].strip():
            raise UserError(f"{setting}: expected a path before and behind each comma, found none; leave the comma out")
        count, one = 1, None
        for more in range(len(parts), 1, -1):
            with contextlib.suppress(UserError):  # of what is no path
                joined = read(",".join(parts[:more]))
                if os.path.lexists(joined.path):
                    count, one = more, joined
                    break
        found.append(one or read(parts[0].strip() if found else parts[0]))
        parts = parts[count:]
    return found
