"""A rank of two that means no good: `python tests/stranger.py --device=cpu --act=pickle --mark=FILE`, as rank 1.

pickle   as user nobody where it may, joins before the real rank 1 and answers rank 0's first question with a
         pickle, which makes FILE in a process that trusts it
idle     on both ranks: with --files as the soft limit of open files, rank 1 holds more idle connections to rank 0's
         gloo port than that, and both go on
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from simple_llama.cluster import distributed
from simple_llama.cluster.distributed import barrier, broadcast_object, init_ranks, leave

NOBODY = 65534
IDLE = 1100


class RunsCode:
    """Unpickled by who trusts it, it makes a file."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.mark, "w")


def send_pickle(mark: str) -> None:
    """Joins as this program does, and then says a pickle, by whatever the program says things."""
    if os.geteuid() == 0:
        os.setuid(NOBODY)
    say = dist.all_gather_object

    def poison(*_: object) -> None:
        say([None, None], RunsCode(mark))

    dist.all_gather_object = poison
    if hasattr(distributed, "messages"):
        distributed.messages.gather = poison
    init_ranks("cpu", timeout_s=30)


def keep_idle(soft: int) -> None:
    """Both ranks; rank 1 keeps the connections until both have met again."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft if os.environ["RANK"] == "0" else hard, hard))
    ranks = init_ranks("cpu", timeout_s=30)
    port = int(os.environ["MASTER_PORT"])
    doors = broadcast_object([door for door in listening() if door[1] != port], ranks)
    idle = []
    if not ranks.is_main:
        host, door = doors[0]
        for _ in range(IDLE):
            idle.append(socket.create_connection((host, door), 10))
    for _ in range(3):  # the first message would be taken by who is connected already
        barrier(ranks)
    print(f"rank {ranks.rank} met the other beside {len(idle)} idle connections", flush=True)
    leave(0)


def listening() -> list[tuple[str, int]]:
    """Addresses at which this process listens, IPv4."""
    mine = {os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.exists() or fd.is_symlink()}
    found = []
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
            address, port = fields[1].split(":")
            found.append((socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)))
    return found


def main() -> None:
    """One act."""
    options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
    if options["act"] == "pickle":
        send_pickle(options["mark"])
    else:
        keep_idle(int(options["files"]))


if __name__ == "__main__":
    main()
