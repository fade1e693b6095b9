"""What DeepSpeed's launcher reads beside its command line: the hostfile, and `.deepspeed_env`. Needs no torch.

Lines end where they end for DeepSpeed (0.19.8), files are regular ones of a bounded size, and what it would stumble
over is an error here, before anything is started.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from simple_llama.cluster.processes import ancestors, command_line, working_folder
from simple_llama.common.errors import UserError
from simple_llama.common.files import read_bytes

_MOST_BYTES = 1 << 20  # of one of these files; a hostfile of a thousand hosts has 20 kB
_HOSTFILE_LINE = re.compile(r"([\w.:@\[\]-]+)\s+slots=(\d+)\s*(#.*)?", re.ASCII)
_NAMES = {"deepspeed", "ds", "deepspeed.launcher.runner"}  # of the launcher, as a program or a module


def option(command: Sequence[str], *names: str) -> str:
    """The value of a launcher's option before the script; empty without one. Of several the last counts.

    As argparse reads it: `--name VALUE`, `--name=VALUE`, a beginning of the name (four characters here), `-NVALUE`.
    """
    found, words = "", iter(command[1:])
    for word in words:
        if word.endswith(".py"):
            break
        name, equals, value = word.partition("=")
        if name in names or any(len(name) > 3 and whole.startswith(name) for whole in names):
            found = value if equals else next(words, "")
        elif word[:2] in names:
            found = word[2:]
    return found


def read_hostfile(path: str) -> list[str]:
    """Host names of a DeepSpeed hostfile; none for an empty path.

    Raises UserError where DeepSpeed's launcher would end with a traceback, start ranks on this host alone, start
    nothing, or read half a line.
    """
    if not path:
        return []
    try:
        lines = _lines(read_bytes(path, _MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: expected a hostfile with lines like 'node-1 slots=8', found: {reason}") from error
    hosts: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = _HOSTFILE_LINE.fullmatch(text)
        if found is None or text.startswith("-"):  # ssh would take the name for an option
            raise UserError(f"{path}:{number}: expected 'HOST slots=N', found {text[:80]!r}")
        if not 0 < int(found[2][:6]) <= 1024:
            raise UserError(f"{path}:{number}: expected 1 to 1024 slots, found {found[2][:20]}")
        if found[1] in hosts:
            raise UserError(f"{path}:{number}: expected each host once, found {found[1]} again; add up its slots")
        hosts.append(found[1])
    if not hosts:
        raise UserError(f"{path}: expected at least one line 'HOST slots=N', found none")
    return hosts


def check_environment_files(environment: Mapping[str, str]) -> None:
    """UserError for a `.deepspeed_env` that DeepSpeed's launcher cannot read: it wants NAME=value lines alone."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for folder in (os.path.expanduser("~"), "."):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):  # as DeepSpeed asks
            continue
        try:
            lines = _lines(read_bytes(path, _MOST_BYTES).decode("utf-8", errors="replace"))
        except OSError as error:
            raise UserError(f"{path}: expected lines NAME=value, found: {error.strerror or error}") from error
        for number, line in enumerate(lines, 1):
            if not re.match(r"[A-Za-z_]\w*=", line):
                raise UserError(
                    f"{path}:{number}: expected NAME=value, found {line.strip()[:80]!r}; "
                    "blank lines and comments are not allowed there"
                )


def check_own_hostfile() -> None:
    """UserError in a rank whose `deepspeed` was given a hostfile that is none: it then starts ranks on its host alone.

    Only where DeepSpeed started this rank from its own host; what it was given stands in its command line.
    """
    if "CROSS_SIZE" not in os.environ:
        return
    for pid in ancestors(2):
        words = command_line(pid)
        start = next((place for place, word in enumerate(words[:3]) if Path(word).name in _NAMES), None)
        path = option(words[start:], "--hostfile", "-H") if start is not None else ""
        if path and not os.path.isfile(os.path.join(working_folder(pid), path)):
            count = os.environ.get("WORLD_SIZE", "?")
            raise UserError(
                f"--hostfile {path}: expected a hostfile, found no such file: DeepSpeed's launcher then starts ranks "
                f"on its own host alone, {count} here; give the right path, or leave it out for these"
            )


def _lines(text: str) -> list[str]:
    r"""Lines as a file opened for text gives them: they end with \n, \r or \r\n, and not with \x0b or U+2028."""
    return list(io.StringIO(text, newline=None))
