"""What Linux tells of a process, and of the machine that it runs on."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from pathlib import Path

from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER

_FILES, _FILES_A_RANK = 32, 4  # what a rank cannot do without; of 1, 2 and 4 ranks on a CPU it had 14, 29 and 42
_FEW_FILES, _FEW_A_RANK = 1024, 16


def raise_file_limit(world_size: int, local_rank: int) -> None:
    """Lets a rank open as many files and connections as the system allows it, with a warning where they are few.

    gloo aborts a process that has none left, and anybody who reaches one of its ports can use them up.

    Raises:
        UserError: there are too few for a rank.
    """
    allowed, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # "no limit" is more than some systems grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        allowed = hard
    if allowed == resource.RLIM_INFINITY:
        return
    needed, host = _FILES + _FILES_A_RANK * world_size, socket.gethostname()
    cure = "raise it for the shell (ulimit -n 65536), the service (LimitNOFILE=) or the user (nofile in limits.conf)"
    if allowed < needed:
        raise UserError(
            f"host {host}: expected that each of {world_size} ranks may open {needed} files and connections, found a "
            f"limit of {allowed}; {cure}"
        )
    few = max(_FEW_FILES, _FILES + _FEW_A_RANK * world_size)
    if allowed < few and world_size > 1 and local_rank == 0:
        LOGGER.warning("host %s: a rank may open only %d files and connections; %s", host, allowed, cure)


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the third on: state, parent's pid, ...; empty where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets


def ancestors(depth: int) -> tuple[int, ...]:
    """Process ids of the parent, its parent and so on; fewer where the system does not tell."""
    found = [os.getppid()][:depth]
    while 0 < len(found) < depth and (fields := stat_fields(found[-1])):
        found.append(int(fields[1]))
    return tuple(found)


def command_line(pid: int) -> list[str]:
    """A process's words, the program first; empty where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def working_folder(pid: int) -> str:
    """Where a process is; empty where the system does not tell."""
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


def boot_id() -> str:
    """Names this machine until it starts again, in all its containers alike; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
