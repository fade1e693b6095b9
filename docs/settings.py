"""Writes docs/settings.md, the list of all settings, from the classes that declare them: `make docs`."""

from __future__ import annotations

import ast
import inspect
import io
import math
import textwrap
import tokenize
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from typing_extensions import Doc

from simple_llama.common.files import atomic_write
from simple_llama.common.paths import root_path
from simple_llama.common.settings import WHOLE, Bounds, FilePath
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES

PAGE = Path(root_path("docs", "settings.md"))
INTRODUCTION = """\
# Settings

Made by `make docs` from the classes that declare them; do not edit by hand.

Defaults < with `--resume` the run's own `config.json` < `--config FILE.json` < flags. In JSON a setting has the name
below; as a flag it is `--name VALUE`, a switch `--name` or `--no-name`. An unknown key, a value out of bounds and an
option that would have no effect are errors. The DeepSpeed JSON ([ds_configs](../ds_configs/README.md)) carries no
batch size, learning rate or clip: a number that stands in both places is an error. Relative paths start at the working
folder.
"""
LOSSES_INTRODUCTION = """\
## Losses

Which options a `loss_type` has, and what they are where they are unset. An option that is given and that the loss does
not have is refused. [losses.md](losses.md) says what each loss is, where it comes from, and how it was checked.
"""
SHOWN = {"system_prompt": "the project's own"}  # defaults that a table has no room for


def page(kind: type = DPOConfig) -> str:
    """The whole page: a section for each class that declares settings of `kind`, in the order of its fields."""
    owners: dict[type, list[Any]] = {}
    for field in fields(kind):
        owners.setdefault(_owner(kind, field.name), []).append(field)
    return "\n".join([INTRODUCTION, *(_section(owner, declared) for owner, declared in owners.items()), _losses()])


def _owner(kind: type, name: str) -> type:
    """The class whose body declares a field."""
    return next(owner for owner in kind.__mro__ if name in vars(owner).get("__annotations__", ()))


def _section(owner: type, declared: list[Any]) -> str:
    """Heading, docstring and table of one class."""
    hints, comments = get_type_hints(owner, include_extras=True), _comments(owner)
    rows = []
    for field in declared:
        marks = get_args(hints[field.name])[1:] if get_origin(hints[field.name]) is Annotated else ()
        docs = [mark.documentation for mark in marks if isinstance(mark, Doc)]
        what = docs[0] if docs else comments.get(field.name)
        if not what:
            raise ValueError(f"{owner.__name__}.{field.name}: expected a Doc, or a comment behind it on one line")
        rows.append(f"| `{field.name}` | {_default(field)} | {_values(hints[field.name])} | {escaped(what)} |")
    home = owner.__module__.replace(".", "/") + ".py"
    about = (inspect.getdoc(owner) or "").partition("\n\n")[0]
    about = textwrap.fill(escaped(f"`{home}`: {about}"), 120, break_long_words=False, break_on_hyphens=False)
    table = ["| setting | default | values | what |", "|---|---|---|---|", *rows]
    return "\n".join([f"## {owner.__name__}", "", about, "", *table, ""])


def _losses() -> str:
    """Which options each `loss_type` has, with their defaults."""
    rows = ["| loss_type | options |", "|---|---|"]
    for name, loss in LOSSES.items():
        rows.append(f"| `{name}` | {', '.join(f'`{option}` {value}' for option, value in loss.defaults.items())} |")
    return "\n".join([LOSSES_INTRODUCTION, *rows, ""])


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, also in a table."""
    return text.replace("<", "\\<").replace("|", "\\|")


def _comments(owner: type) -> dict[str, str]:
    """The comment behind each field in the source of the class that declares it.

    A field over several lines has none: the command line's help would not find it there either.
    """
    source = textwrap.dedent(inspect.getsource(owner))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.lineno == node.end_lineno:
            found[node.target.id] = comments.get(node.lineno, "")
    return found


def _default(field: Any) -> str:
    """A default as a table shows it; paths from the checkout's root."""
    if field.default is None:
        return "unset"
    text = str(field.default).removeprefix(f"{root_path()}/")
    return SHOWN.get(field.name) or (f"`{text}`" if text else "(empty)")


def _values(hint: Any) -> str:
    """What a setting may be: choices, bounds or kind."""
    marks: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        marks = tuple(rest)
    if type(None) in get_args(hint):
        hint = next(one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    bounds = [mark for mark in marks if isinstance(mark, Bounds)]
    if bounds:
        return _range(bounds[0])
    if hint is bool:
        return "switch"
    if get_origin(hint) is tuple:
        return f"{len(get_args(hint))} whole numbers"
    return "path" if any(isinstance(mark, FilePath) for mark in marks) else "text" if hint is str else hint.__name__


def _range(bounds: Bounds) -> str:
    """Bounds in a few words; the largest whole number is no bound that a reader cares for."""
    low = f"above {_number(bounds.low)}" if bounds.above else _number(bounds.low)
    if bounds.high in (math.inf, WHOLE):
        return low if bounds.above else f"{low} or more"
    return f"{low} to {'below ' if bounds.below else ''}{_number(bounds.high)}"


def _number(value: float) -> str:
    """A bound without an exponent."""
    return f"{int(value):,}" if value == int(value) else str(value)


if __name__ == "__main__":
    atomic_write(PAGE, page().encode())
