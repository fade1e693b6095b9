"""Whether the copies that are written while training goes on fit into the memory of the ranks' hosts."""

from __future__ import annotations

import socket
from collections import defaultdict
from typing import NamedTuple

from simple_llama.cluster.distributed import Ranks, gather_objects
from simple_llama.ops.machine import free_host_bytes

_GIB = 2**30


class CopyRoom(NamedTuple):
    """Of a host: bytes of its ranks together."""

    host: str
    ranks: int
    copies: int
    still: int  # that training takes beside them and does not hold now
    free: int | None  # None where the system does not say

    @property
    def refusal(self) -> str:
        """Why the copies are not made; "" where they fit."""
        if self.free is None or self.copies + self.still <= self.free:
            return ""
        left = max(0, self.free - self.still) / _GIB
        return (
            f"host {self.host}: saves in the background need {self.copies / _GIB:.3f} GiB for copies of masters and "
            f"moments, training leaves {left:.3f} GiB: each save is waited for"
        )


def copy_rooms(copy: int, still: int, ranks: Ranks) -> list[CopyRoom]:
    """Of each host (collective).

    Args: copy: bytes of this rank's. still: what else it will take of its host's memory.
    """
    told = gather_objects(
        (socket.gethostname(), copy, still, free_host_bytes()), ranks, tuple[str, int, int, int | None]
    )
    hosts: dict[str, list[tuple[int, int, int | None]]] = defaultdict(list)
    for host, *numbers in told:
        hosts[host].append(tuple(numbers))
    found = []
    for host, of_ranks in hosts.items():
        copies, stills, frees = zip(*of_ranks, strict=True)
        known = [free for free in frees if free is not None]
        found.append(CopyRoom(host, len(of_ranks), sum(copies), sum(stills), min(known, default=None)))
    return found
