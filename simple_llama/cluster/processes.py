"""What Linux tells of a process, and of the machine that it runs on."""

from __future__ import annotations

from pathlib import Path


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the third on: state, parent's pid, ...; empty where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets


def boot_id() -> str:
    """Names this machine until it starts again, in all its containers alike; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
