"""Settings that their owners declare: frozen dataclasses with bounds in place, read from JSON and the command line.

    @dataclass(frozen=True)
    class BatchConfig(Settings):
        batch_size: Annotated[int, Bounds(1, WHOLE)] = 16  # pairs per micro-batch per rank

The comment behind a field, or a `Doc` in its annotation, is its help text. A default of None, of a field `float | None`
say, means unset: its owner tells what is then taken. A command's settings inherit those of all
owners; a function takes the smallest class that has what it reads.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tyro

from simple_llama.common.errors import UserError
from simple_llama.common.files import brief, read_bytes, read_json, shown
from simple_llama.common.logging import LOGGER

WHOLE = 2**31 - 1  # the largest whole number of a setting
_MOST_TEXT = 1 << 20  # bytes of a file with a setting's text
_MOST_UNKNOWN = 5  # unknown settings of a file that are named


class Bounds(NamedTuple):
    """The numbers that a setting may be: from `low` to `high`, both allowed unless `above` or `below` excludes it."""

    low: float
    high: float
    above: bool = False  # low itself is excluded
    below: bool = False  # high itself is excluded

    def hold(self, value: float) -> bool:
        """Whether `value` lies within; never for NaN."""
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf and self.above and self.below:
            return f"a finite number above {self.low:g}"
        if not (self.above or self.below):
            return f"a number from {self.low} to {self.high}"
        low, high = "above" if self.above else "of at least", "below" if self.below else "at most"
        return f"a number {low} {self.low} and {high} {self.high}"


class FilePath:
    """Marks text that names a file or folder: never empty, unless it says so."""

    may_be_empty = False

    def absolute(self, text: str) -> str:
        """The same path, such as means the same in every working folder."""
        return str(Path(text).absolute())

    def leads_somewhere(self, text: str) -> bool:
        """Whether something is there."""
        return os.path.lexists(text)


class TextOrFile:
    """Marks text for which a command line or a `--config` may give @FILE: the text in it, without its last line's
    end, is then the setting."""


class Before(NamedTuple):
    """Marks a setting that came later: how runs that were started before it go on."""

    value: Any


Count = Annotated[int, Bounds(1, WHOLE)]  # at least one
CountOrNone = Annotated[int, Bounds(0, WHOLE)]  # 0 switches something off
PathText = Annotated[str, FilePath()]


class Settings:
    """Base of every owner's settings: values are checked once, whichever way they came."""

    retired: ClassVar[Mapping[str, str]] = {}  # of an owner: settings that it had once, and why they have no effect

    def __post_init__(self) -> None:
        _check_values(self)
        for owner in reversed(type(self).__mro__):
            if "check_rules" in vars(owner):
                vars(owner)["check_rules"](self)

    def check_rules(self) -> None:
        """What an owner demands beside the bounds of single fields; UserError where it does not hold."""


SomeSettings = TypeVar("SomeSettings", bound=Settings)


def _path_mark(hint: Any) -> FilePath | None:
    """What marks a field with this annotation as one that names files or folders; None where nothing does."""
    return next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, FilePath)), None)


def _check_values(settings: Settings) -> None:
    """Raises UserError for the first value that its field's annotation does not allow, text first."""
    hints = get_type_hints(type(settings), include_extras=True)
    names = [field.name for field in _declared(type(settings))]
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, str):
            _check_text(name, value, _path_mark(hints[name]))
    for name in names:
        for bounds in (extra for extra in getattr(hints[name], "__metadata__", ()) if isinstance(extra, Bounds)):
            if getattr(settings, name) is not None and not bounds.hold(getattr(settings, name)):
                raise UserError(f"{name}: expected {bounds}, found {shown(getattr(settings, name))}")


def _check_text(name: str, text: str, mark: FilePath | None) -> None:
    """Raises UserError for text that no file can be named by, or that no file can hold."""
    if not text and mark and not mark.may_be_empty:
        raise UserError(f"{name}: expected a path, found an empty one")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name}: expected Unicode text without NUL, found {shown(text)}")


def _declared(kind: type) -> list[Any]:
    """The fields of a settings class, in order."""
    return list(fields(kind))


def with_absolute_paths(settings: Settings) -> dict[str, Any]:
    """Settings by name, with paths that mean the same in every working folder."""
    marks = path_marks(type(settings))
    values = {field.name: getattr(settings, field.name) for field in _declared(type(settings))}
    return {name: marks[name].absolute(value) if name in marks else value for name, value in values.items()}


def path_marks(kind: type[Settings]) -> dict[str, FilePath]:
    """The settings of `kind` that name files or folders, with what says how."""
    hints = get_type_hints(kind, include_extras=True)
    found = {field.name: _path_mark(hints[field.name]) for field in _declared(kind)}
    return {name: mark for name, mark in found.items() if mark}


def path_defaults(kind: type[Settings]) -> dict[str, str]:
    """The settings of `kind` that name a file or folder, with their defaults."""
    marks = path_marks(kind)
    return {field.name: field.default for field in _declared(kind) if field.name in marks}


def values_before(kind: type[Settings]) -> dict[str, Any]:
    """The settings of `kind` that came later, as runs that were started before them go on."""
    hints = get_type_hints(kind, include_extras=True)
    extras = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in _declared(kind)}
    return {name: extra.value for name, found in extras.items() for extra in found if isinstance(extra, Before)}


def known_settings(kind: type[Settings], found: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(what of `found` are settings of `kind`, the names of the rest)."""
    names = {field.name for field in _declared(kind)}
    return {name: value for name, value in found.items() if name in names}, [
        name for name in found if name not in names
    ]


def _retired_settings(kind: type[Settings]) -> dict[str, str]:
    """The settings that `kind` had once, and why they have no effect."""
    return {name: why for owner in kind.__mro__ for name, why in vars(owner).get("retired", {}).items()}


def peek_settings(kind: type[SomeSettings], argv: Sequence[str] | None) -> SomeSettings:
    """What a command line and its `--config` say of the few settings of `kind`; all others are not looked at."""
    args, found, source = _split(argv)
    if {"-h", "--help"} & {*args}:
        return kind()
    base = _settings_from_dict(kind, known_settings(kind, found)[0], source)
    return tyro.cli(kind, args=args, default=base, return_unknown_args=True)[0]


def parse_settings(
    kind: type[SomeSettings],
    argv: Sequence[str] | None,
    description: str | None,
    base: Mapping[str, Any] | None = None,
    base_source: str = "",
) -> SomeSettings:
    """Settings from a command line (default: this process's): defaults < `base` < `--config FILE.json` < flags.

    `--local_rank=N`, which DeepSpeed's launcher appends, is left out: ranks come from the environment.
    Raises UserError for a bad value; ends the process with status 2 (tyro's way) for an unknown flag.

    Args:
        base: settings of a file that was found otherwise; `base_source` names it in errors.
    """
    args, found, source = _split(argv)
    args = _without_retired(kind, args)
    below = _typed_settings(kind, base or {}, base_source)
    default = kind(**{**below, **_typed_settings(kind, found, source)})
    return with_texts(tyro.cli(kind, args=args, default=default, description=description), below)


def with_texts(settings: SomeSettings, below: Mapping[str, Any]) -> SomeSettings:
    """Settings with the texts of the files that they name by @FILE; what stands `below` is text already."""
    hints = get_type_hints(type(settings), include_extras=True)
    changes = {}
    for name, hint in hints.items():
        if any(isinstance(extra, TextOrFile) for extra in getattr(hint, "__metadata__", ())):
            text = getattr(settings, name)
            if text.startswith("@") and text != below.get(name):
                changes[name] = _text_of(name, text[1:])
    values = {field.name: getattr(settings, field.name) for field in _declared(type(settings))}
    return type(settings)(**{**values, **changes})


def _text_of(name: str, path: str) -> str:
    """The text in a UTF-8 file."""
    try:
        text = read_bytes(path, _MOST_TEXT).decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{name}: cannot read {path}: {error.strerror or error}; @ stands before the name of a file that holds the "
            "text: put a text there that itself begins with @"
        ) from error
    except UnicodeDecodeError:
        raise UserError(f"{name}: {path}: expected UTF-8 text, found other bytes") from None
    return text.removesuffix("\n").removesuffix("\r")


def _split(argv: Sequence[str] | None) -> tuple[list[str], Any, str]:
    """(flags, what the file of `--config` holds, its name) of a command line; ({}, "") where there is no file."""
    args = list(sys.argv[1:] if argv is None else argv)
    files, args = _take_option(args, "--config")
    _, args = _take_option(args, "--local_rank")
    if len(files) > 1:
        raise UserError(f"--config: expected one file, found {len(files)}")
    if not files:
        return args, {}, ""
    found = read_json(files[0])
    if not isinstance(found, dict):
        raise UserError(f"{files[0]}: expected a JSON object of settings, found {type(found).__name__}")
    return args, found, files[0]


def _without_retired(kind: type[Settings], args: list[str]) -> list[str]:
    """A command line without the switches that `kind` had once."""
    retired, kept = _retired_settings(kind), []
    for arg in args:
        name = arg.replace("-", "_").removeprefix("__").removeprefix("no_")
        if arg.startswith("--") and name in retired:
            LOGGER.warning("%s has no effect: %s", arg, retired[name])
        else:
            kept.append(arg)
    return kept


def _take_option(args: list[str], name: str) -> tuple[list[str], list[str]]:
    """Splits `name VALUE`, `name=VALUE` (also with hyphens) out of `args`: (the values, all other arguments)."""
    values, rest, waiting = [], [], iter(args)
    for arg in waiting:
        flag, equals, value = arg.partition("=")
        if flag.replace("-", "_") != name.replace("-", "_"):
            rest.append(arg)
        elif equals:
            values.append(value)
        else:
            found = next(waiting, None)
            if found is None:
                raise UserError(f"{name}: expected a value behind it, found the end of the command line")
            values.append(found)
    return values, rest


def _settings_from_dict(kind: type[SomeSettings], found: Any, source: str) -> SomeSettings:
    """Builds settings from a JSON value; `source` names it in errors.

    An unknown key, or a value of another type, is a UserError.
    """
    return kind(**_typed_settings(kind, found, source))


def _typed_settings(kind: type[Settings], found: Any, source: str) -> dict[str, Any]:
    """Settings in a JSON value, by name, each of its field's type; `source` names it in errors.

    Names that are no settings, or a value of another type, are a UserError.
    """
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: expected a JSON object of settings, found {type(found).__name__}")
    settings, unknown = known_settings(kind, found)
    retired = _retired_settings(kind)
    for name in retired.keys() & {*unknown}:
        LOGGER.warning("%s: %s has no effect: %s", source, name, retired[name])
    unknown = [name for name in unknown if name not in retired]
    known, hints = {field.name: field for field in _declared(kind)}, get_type_hints(kind)
    if unknown:
        raise UserError(f"{source}: {_unknown(unknown, list(known))}")
    return {
        name: _typed_or_unset(f"{source}: {name}", value, known[name].default, hints[name])
        for name, value in settings.items()
    }


def _unknown(names: Sequence[str], known: Sequence[str]) -> str:
    """Names that are no settings, each with the setting that it may have been meant to be."""
    words = []
    for name in names[:_MOST_UNKNOWN]:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
        words.append(f"unknown setting {shown(name)}" + (f", did you mean {near[0]!r}?" if near else ""))
    if len(names) > _MOST_UNKNOWN:
        words.append(f"and {len(names) - _MOST_UNKNOWN} more")
    return "; ".join(words) + "; --help lists all settings"


def _typed_or_unset(place: str, value: Any, default: Any, hint: Any) -> Any:
    """A JSON value as the type of a setting's default; where that is None, unset, as its annotation's, or null."""
    if default is not None:
        return _typed(place, value, default, get_args(hint))
    if value is None:
        return None
    kind = next(one for one in get_args(hint) if one is not type(None))
    return _typed(place, value, "" if get_origin(kind) is Literal else kind(), get_args(kind))


def _typed(place: str, value: Any, default: Any, choices: tuple[Any, ...]) -> Any:
    """A JSON value as the type of a setting's default: a list as a tuple, a whole number as a float."""
    if isinstance(default, tuple):
        if not (isinstance(value, list) and [type(number) for number in value] == [type(n) for n in default]):
            raise UserError(f"{place}: expected a list of {len(default)} whole numbers, found {brief(value)}")
        return tuple(value)
    fits = isinstance(value, bool) == isinstance(default, bool) and (
        isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
    )
    if not fits:
        raise UserError(f"{place}: expected {type(default).__name__}, found {brief(value)}")
    if choices and value not in choices:
        raise UserError(f"{place}: expected one of {', '.join(choices)}, found {shown(value)}")
    return _as_float(place, value) if isinstance(default, float) else value


def _as_float(place: str, value: float) -> float:
    """A number of a JSON file as a float; UserError for a whole number beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{place}: expected a number that a float can hold, found {shown(value)}") from None
