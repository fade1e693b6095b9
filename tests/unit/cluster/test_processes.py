"""The limit of open files, in processes that have limits of their own."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tiny_job import ROOT

ASK = """
import resource, sys
soft, hard, world = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from simple_llama.cluster.processes import raise_file_limit
from simple_llama.common.errors import UserError
try:
    raise_file_limit(world, 0)
except UserError as error:
    print("error:", error, file=sys.stderr)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "world", "limits", "words"),
    [
        (256, 2048, 2, "2048 2048", ""),
        (256, 512, 1, "512 512", ""),  # one rank has no ports
        (256, 512, 2, "512 512", "a rank may open only 512 files and connections; raise it for the shell (ulimit -n"),
        (24, 24, 2, "24 24", "expected that each of 2 ranks may open 40 files and connections, found a limit of 24"),
    ],
)
def test_files(soft: int, hard: int, world: int, limits: str, words: str) -> None:
    """The soft limit becomes the hard one; few are a warning, too few for two ranks are an error, with the host."""
    command = [sys.executable, "-c", ASK, str(soft), str(hard), str(world)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == limits and words in done.stderr
    assert (f"host {socket.gethostname()}" in done.stderr) is bool(words)
