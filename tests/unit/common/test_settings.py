"""Settings of made-up owners: bounds in place, help texts, JSON and flags, rules of each owner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.settings import (
    Before,
    Bounds,
    Count,
    PathText,
    Settings,
    _settings_from_dict,
    parse_settings,
    peek_settings,
    values_before,
    with_absolute_paths,
)


@dataclass(frozen=True)
class OvenConfig(Settings):
    """An owner."""

    heat: Annotated[float, Bounds(0, 300, above=True)] = 180.0  # degrees
    trays: Count = 1  # at once

    def check_rules(self) -> None:
        if self.trays > 2 and self.heat > 200:
            raise UserError("trays: expected at most 2 above 200 degrees")


@dataclass(frozen=True)
class ShopConfig(Settings):
    """Another owner."""

    folder: PathText = "shop"  # where it is
    share: Annotated[float, Bounds(0, 0.5, below=True), Doc("of the till")] = 0.1


@dataclass(frozen=True)
class BakeryConfig(ShopConfig, OvenConfig):
    """A command."""

    open: bool = False  # whether it is
    counted: Annotated[bool, Before(False), Doc("whether it counts what it bakes")] = True


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        (Bounds(0, 2), [0, 1.5, 2], [-1e-9, 2.1, math.nan], "a number from 0 to 2"),
        (Bounds(0, 2, above=True), [1e-9, 2], [0, 2.1, math.nan], "a number above 0 and at most 2"),
        (Bounds(0, 0.5, below=True), [0, 0.49995], [0.5, math.nan], "a number of at least 0 and below 0.5"),
        (Bounds(0, math.inf, True, True), [1e-300, 1e300], [0, math.inf, math.nan], "a finite number above 0"),
    ],
)
def test_bounds(bounds: Bounds, inside: list[float], outside: list[float], words: str) -> None:
    """What lies at, below and above the ends; NaN lies nowhere."""
    assert all(map(bounds.hold, inside)) and not any(map(bounds.hold, outside)) and str(bounds) == words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heat": 0.0}, "heat: expected a number above 0 and at most 300, found 0.0"),
        ({"trays": 0}, "trays: expected a number from 1 to 2147483647, found 0"),
        ({"share": 0.5}, "share: expected a number of at least 0 and below 0.5, found 0.5"),
        ({"folder": ""}, "folder: expected a path, found an empty one"),
        ({"folder": "a\0b"}, "folder: expected Unicode text without NUL"),
        ({"trays": 3, "heat": 250.0}, "trays: expected at most 2 above 200 degrees"),
    ],
)
def test_each_owner_checks_its_own(changes: dict[str, object], message: str) -> None:
    """By bounds in the annotation, and by the rule of an owner that another class inherits."""
    with pytest.raises(UserError) as error:
        BakeryConfig(**changes)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)


def test_json_and_flags() -> None:
    """A whole number becomes a float; flags come with both spellings."""
    assert _settings_from_dict(BakeryConfig, {"heat": 200}, "f") == BakeryConfig(heat=200.0)
    assert parse_settings(BakeryConfig, ["--trays", "2", "--open", "--local_rank=1"], None).trays == 2


def test_unknown_settings_of_a_file_are_named_with_what_may_have_been_meant() -> None:
    """All of them, a spelling that is near with its setting, up to five; not the list of all settings."""
    found = {"tray": 1, "Folder": "x", "beta": 1, "trays": 2}
    with pytest.raises(UserError) as error:
        _settings_from_dict(BakeryConfig, found, "f")
    assert str(error.value) == (
        "f: unknown setting 'tray', did you mean 'trays'?; unknown setting 'Folder', did you mean 'folder'?; "
        "unknown setting 'beta'; --help lists all settings"
    )
    with pytest.raises(UserError, match="'x4'; and 3 more; --help"):
        _settings_from_dict(BakeryConfig, {f"x{n}": 0 for n in range(8)}, "f")


def test_a_base_lies_below_the_file_and_the_flags(tmp_path: Path) -> None:
    """Each layer changes one setting of the one below; what is wrong in the base is named with its source."""
    path = tmp_path / "f.json"
    path.write_text('{"trays": 2, "share": 0.2}')
    base = {"heat": 100, "trays": 1, "folder": "mine"}
    found = parse_settings(BakeryConfig, ["--config", str(path), "--share=0.3"], None, base, "base")
    assert found == BakeryConfig(heat=100.0, trays=2, folder="mine", share=0.3)
    with pytest.raises(UserError, match="base: heat: expected float"):
        parse_settings(BakeryConfig, [], None, {"heat": "hot"}, "base")


def test_a_peek_looks_at_its_own_settings_only(tmp_path: Path) -> None:
    """From the file and from flags of either spelling, whatever else is there; nothing of a call for help."""
    path = tmp_path / "f.json"
    path.write_text('{"folder": "mine", "heat": -1, "nonsense": 0}')
    args = ["--config", str(path), "--no-such", "x", "--heat=-5", "--share", "0.2", "--open"]
    assert peek_settings(ShopConfig, args) == ShopConfig(folder="mine", share=0.2)
    assert peek_settings(ShopConfig, ["--help", "--share=0.2"]) == ShopConfig()


def test_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fields that are paths, as seen from the working folder."""
    monkeypatch.chdir(tmp_path)
    assert with_absolute_paths(BakeryConfig()) == {
        "heat": 180.0,
        "trays": 1,
        "folder": str(tmp_path / "shop"),
        "share": 0.1,
        "open": False,
        "counted": True,
    }
    assert with_absolute_paths(BakeryConfig(folder="/a/b"))["folder"] == "/a/b"


def test_help_is_the_comment_or_the_doc(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an inherited field too."""
    with pytest.raises(SystemExit):
        parse_settings(BakeryConfig, ["--help"], "Bakes.")
    shown = capsys.readouterr().out
    assert "degrees" in shown and "of the till" in shown and "whether it is" in shown and "Bakes." in shown


def test_settings_that_came_later_stand_as_they_were_before() -> None:
    """Of one field in five; by default it is another."""
    assert values_before(BakeryConfig) == {"counted": False} and BakeryConfig().counted
    assert values_before(OvenConfig) == {}
