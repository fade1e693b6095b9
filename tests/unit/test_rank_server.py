"""A rank that is forked is as one that Python starts: where they are compared, and how both end."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import rank_server
from tiny_job import RankProcess, start_rank

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not rank_server.possible(), reason="needs descriptors of processes: Linux from 5.3 on"),
]

# What a script can find out about the process that runs it; the last line is what must be its own.
DESCRIBE = """
import gc, json, logging, os, random, resource, signal, sys, threading
import numpy, torch, torch.distributed

print("before\\r\\nthe description", file=sys.stderr)
print(json.dumps({
    "name, file, doc": [__name__, __file__, __doc__],
    "modules of ours": [name for name in sys.modules if name.startswith(("simple_llama", "rank_server"))],
    "arguments": sys.argv,
    "path": sys.path,
    "flags": repr(sys.flags),
    "environment": dict(os.environ),
    "working folder": os.getcwd(),
    "session, group, mask of files": [os.getsid(0), os.getpgrp(), os.umask(0o22)],
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
    "input": os.readlink("/proc/self/fd/0"),
    "one place for output": os.fstat(1).st_ino == os.fstat(2).st_ino,
    "streams": [[s.encoding, s.errors, s.line_buffering, s.isatty()] for s in (sys.stdin, sys.stdout, sys.stderr)],
    "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
    "blocked signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "limits": [resource.getrlimit(number) for number in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)],
    "cores": sorted(os.sched_getaffinity(0)),
    "threads of Python": [thread.name for thread in threading.enumerate()],
    "threads of torch": [torch.get_num_threads(), torch.get_num_interop_threads(), torch.__config__.parallel_info()],
    "torch": [torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.distributed.is_initialized()],
    "handlers of the root logger": logging.getLogger().handlers,
    "garbage collection": [gc.isenabled(), gc.get_threshold()],
}))
print(json.dumps([os.getpid(), random.random(), numpy.random.random(), torch.rand(1).item()]))
"""


def start(folder: Path, code: str, *flags: str, afresh: bool = False, rank: int = 0, world: int = 1) -> RankProcess:
    """Starts a script of that code; it is written once, since an earlier rank may not have read it yet."""
    script = folder / "script.py"
    if not script.exists():
        script.write_text(code)
    return start_rank(str(script), {"device": "cpu"}, rank, world, 1234, flags, afresh)


@pytest.mark.parametrize("world", [1, 2])
def test_a_forked_rank_is_as_one_that_python_starts(tmp_path: Path, world: int) -> None:
    """The same description, in the same lines; the numbers that each draws are its own, as is its process id."""
    ranks = [
        start(tmp_path, DESCRIBE, "--flag", afresh=afresh, rank=world - 1, world=world) for afresh in (True, False)
    ]
    ranks.append(start(tmp_path, DESCRIBE, "--flag", rank=world - 1, world=world))
    assert isinstance(ranks[0], subprocess.Popen)
    assert all(isinstance(rank, rank_server.ForkedRank) for rank in ranks[1:])
    lines = [rank.communicate(timeout=60)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], lines
    assert all(len(text) == 4 for text in lines), lines
    descriptions: list[dict[str, Any]] = [json.loads(text[2]) for text in lines]
    for what, real in descriptions[0].items():
        assert [found[what] for found in descriptions[1:]] == [real, real], what
    assert all(text[:2] == ["before", "the description"] for text in lines)
    own = list(zip(*(json.loads(text[3]) for text in lines), strict=True))
    assert all(len(set(values)) == 3 for values in own), own
    assert own[0] == tuple(rank.pid for rank in ranks)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("import sys; sys.exit(75)", 75),
        ("import os; os._exit(3)", 3),
        ("import sys; sys.exit('said')", 1),
        ("raise OSError('said')", 1),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import atexit, os; atexit.register(os._exit, 4)", 4),
    ],
)
def test_how_a_rank_ends(tmp_path: Path, code: str, status: int) -> None:
    """The status that subprocess gives, also of one that Python tidies up after; the same last line."""
    ranks = [start(tmp_path, code, afresh=afresh) for afresh in (True, False)]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status, status], outputs
    assert [output.splitlines()[-1:] for output in outputs] == [outputs[0].splitlines()[-1:]] * 2


def test_signals_and_waits(tmp_path: Path) -> None:
    """Stopped, it runs still; its handlers act; a wait ends in time, and what it said is not lost by that."""
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nprint('on', flush=True)\n"
    rank = start(tmp_path, f"{code}time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        rank.communicate(timeout=0.5)
    rank.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(timeout=0.1)
    assert rank.poll() is None
    rank.send_signal(signal.SIGCONT)
    rank.terminate()
    assert rank.communicate(timeout=30) == ("on\n", None) and rank.returncode == 5
    rank = start(tmp_path, f"{code}time.sleep(60)")
    rank.kill()
    assert rank.wait(timeout=30) == -signal.SIGKILL == rank.poll()
    rank.kill()  # nothing: it has ended
    rank.communicate()


def test_another_environment_is_a_start_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries read their variables when they are imported, so one more variable makes Python start the rank."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    rank = start(tmp_path, "import os; print(os.environ['ATEN_CPU_CAPABILITY'])")
    assert isinstance(rank, subprocess.Popen)
    assert rank.communicate(timeout=60)[0] == "default\n"
