"""A process that renders chat templates: a template is a program of a stranger's, so it runs sandboxed, where its time
and memory are bounded by the system. `templates.TemplateRenderer` starts it; it needs jinja2 alone.

Its argument is the process id of what started it, without which it ends. It says {"ready": true} first of all.
First line of its input: {"template": text, "variables": {...}, "date": text or null, "cpu_seconds": of one rendering},
answered by a line {"reads": the names that the template reads} or {"error": ...}. Each further line is a list of
[messages, whether an answer is asked for], and each of these answered by a line {"text": ...} or {"error": ...}.
jinja2 computes constants when it compiles, so that is done here too.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY = 1 << 30  # bytes of address space
_MOST_CHARACTERS = 1 << 20  # of a rendering, beside eight times the messages
_MOST_SAID = 500  # characters of an error
_LOOK_S = 1.0  # how often to look whether the parent is there: a fork of it may keep the input open
_FIXED_DAY = datetime(2024, 7, 26)  # what a template that asks for the date is told; the day of Llama 3's own fallback


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark answers: its body alone."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders chat templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    for drawn in (made.filters, "random"), (made.globals, "lipsum"):  # each rendering has to be the same
        del drawn[0][drawn[1]]
    return made


def _asks_whether_date_is_known(tree: nodes.Template) -> bool:
    """Whether a template has a fallback of its own for `strftime_now`."""
    return any(
        isinstance(test.node, nodes.Name) and test.node.name == "strftime_now" and test.name == "defined"
        for test in tree.find_all(nodes.Test)
    )


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """jinja2's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    """What templates call for a chat that they do not take."""
    raise TemplateError(message)


def _open(first: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The compiled template (None where there is none), and what is said of it."""
    try:
        jinja = _environment()
        tree, date = jinja.parse(first["template"]), first["date"]
        if date is not None:
            jinja.globals["strftime_now"] = lambda form: date
        elif not _asks_whether_date_is_known(tree):
            jinja.globals["strftime_now"] = _FIXED_DAY.strftime
        reads = sorted(find_undeclared_variables(_environment().parse(first["template"])))  # names of no global
        return jinja.from_string(first["template"]), {"reads": reads}
    except Exception as error:  # noqa: BLE001 - as in _render
        return None, {"error": _words(error)}


def _render(template: Any, variables: dict[str, Any], messages: list[dict[str, str]], asked: bool) -> dict[str, Any]:
    """One rendering. What a template may do to end it has no bound but the process's, so every exception is caught."""
    try:
        text = template.render(messages=messages, add_generation_prompt=asked, tools=None, documents=None, **variables)
        text.encode()  # no half of a surrogate pair
    except Exception as error:  # noqa: BLE001
        return {"error": _words(error)}
    most = _MOST_CHARACTERS + 8 * sum(len(message["content"]) for message in messages)
    if len(text) > most:
        return {"error": f"it wrote {len(text):,} characters, more than {most:,}"}
    return {"text": text}


def _words(error: Exception) -> str:
    """What went wrong: in the template's own words, where it raised it."""
    if isinstance(error, TemplateSyntaxError):
        return f"{(error.message or '')[:_MOST_SAID]}, line {error.lineno}"
    kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
    text = f"{kind}{error}"[:_MOST_SAID]
    return text if text.isprintable() else repr(text)


def _answer(said: dict[str, Any], cpu_seconds: float) -> None:
    """Sends one line, and starts the clock of what comes next."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # of this process's own time; its signal ends it
    print(json.dumps(said), flush=True)


def _end_without(parent: int) -> None:
    """Ends this process when the one that started it is gone. By a thread: a signal would cut off what is written."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(0)


def main(parent: int) -> None:
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
    threading.Thread(target=_end_without, args=(parent,), daemon=True).start()
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = _MEMORY if allowed == resource.RLIM_INFINITY else min(_MEMORY, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"ready": True}), flush=True)
    first = json.loads(sys.stdin.readline())
    seconds = first["cpu_seconds"]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    template, said = _open(first)
    _answer(said, seconds)
    for line in sys.stdin:
        for messages, asked in json.loads(line):
            _answer(_render(template, first["variables"], messages, asked), seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]))
