"""Starts the ranks of a bench as processes of this machine, without a launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from simple_llama.common.paths import root_path


def run_ranks(module: str, arguments: Sequence[str], world: int, variables: Mapping[str, object] | None = None) -> None:
    """Runs `python -m module arguments` as `world` ranks with the variables of a launcher, and waits.

    Raises SystemExit where one fails. Args: variables: more of the environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", module, *arguments]
    processes = []
    for rank in range(world):
        told = {**place, **(variables or {}), "RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in told.items()}
        processes.append(subprocess.Popen(command, env=environment, cwd=root_path()))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{module}: a rank of {world} failed")
