"""The two hosts are two, a fault of one is one, and nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.rig import ADDRESSES, Rig, RigError, remove_orphans

pytestmark = pytest.mark.hosts

KILLED_WITH_HOSTS = """
import os
from hosts.rig import Rig
rig = Rig()
rig.up()
rig.start("host-a", "ssh", "host-b", "sleep 1000")
while not any(process.argv == ["sleep", "1000"] for process in rig.processes("host-b")):
    pass
print(rig.folder, *(process.pid for host in ("host-a", "host-b") for process in rig.processes(host)), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


def reaches(rig: Rig, host: str, other: str) -> bool:
    return rig.run(host, "timeout", "3", "ssh", "-n", other, "hostname").stdout.strip() == other


def test_hosts_are_apart(rig: Rig) -> None:
    """Each has its own name, address, processes and shared memory, and a route to the other alone."""
    (address_a, address_b), here = ADDRESSES.values(), Path("/dev/shm/two_hosts_test")
    assert rig.run("host-a", "hostname").stdout == "host-a\n"
    assert rig.run("host-b", "hostname", "-I").stdout.split() == [address_b]
    route = rig.run("host-a", "ip", "route").stdout
    assert len(route.splitlines()) == 1 and "10.77.0.0/24" in route and f"src {address_a}" in route
    rig.run("host-a", "touch", str(here))
    assert rig.run("host-b", "test", "-e", str(here)).returncode == 1 and not here.exists()
    sleeper = rig.start("host-a", "sleep", "1000")
    assert reaches(rig, "host-a", "host-b") and reaches(rig, "host-b", "host-a")
    assert all(process.argv != ["sleep", "1000"] for process in rig.processes("host-b"))
    rig.end_processes("host-a")
    assert sleeper.wait(timeout=10) == -9


def test_cut_and_mend(rig: Rig) -> None:
    rig.cut()
    assert not reaches(rig, "host-a", "host-b")
    rig.mend()
    assert reaches(rig, "host-a", "host-b") and reaches(rig, "host-b", "host-a")


def test_dead_host_leaves_the_other(rig: Rig) -> None:
    """host-a keeps its interface and address, as where a neighbour loses power; down and up bring both back."""
    rig.kill("host-b")
    assert not rig.is_up("host-b") and rig.processes("host-b") == []
    assert rig.run("host-a", "hostname", "-I").stdout.split() == [ADDRESSES["host-a"]]
    assert not reaches(rig, "host-a", "host-b")
    with pytest.raises(RigError, match="host-b is not up"):
        rig.start("host-b", "true")
    rig.up()
    assert reaches(rig, "host-a", "host-b")


def test_rigs_live_side_by_side(rig: Rig) -> None:
    """A second one of another name has the same addresses; its end leaves the first alone."""
    with Rig(f"{os.getpid()}-other") as other:
        rig.cut()
        assert reaches(other, "host-a", "host-b")
    rig.mend()
    assert reaches(rig, "host-a", "host-b")
    assert not other.folder.exists()
    other.down()


def test_hosts_die_with_their_process() -> None:
    """kill -9 of who made them: the kernel ends all processes on both hosts, and the next rig removes the folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", KILLED_WITH_HOSTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    folder, *pids = done.stdout.split()
    assert len(pids) >= 4
    deadline = time.monotonic() + 10
    while any(Path("/proc", pid, "exe").exists() for pid in pids):  # a zombie has none
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert Path(folder).exists()
    remove_orphans()
    assert not Path(folder).exists()
