"""A job on the two hosts: through `deepspeed --hostfile hostfile launch/...` on host-a, or a process on each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from hosts.rig import ADDRESSES, Process, Rig
from tiny_job import ROOT

PRECOMPUTE, TRAIN = "launch/precompute_ref.py", "launch/train_dpo.py"


@dataclass
class Launch:
    """A launch that runs. `ranks` fills while it is watched: (host, rank) of every process of the script seen."""

    rig: Rig
    script: str
    process: subprocess.Popen[str]
    log: Path
    ranks: set[tuple[str, str]] = field(default_factory=set)

    @property
    def output(self) -> str:
        """What the launch and all ranks have said so far; pdsh puts the host's name before a rank's line."""
        return self.log.read_text(errors="replace")

    def rank_processes(self, host: str) -> list[Process]:
        """The ranks that run on a host."""
        found = [process for process in self.rig.processes(host) if is_rank(process, self.script)]
        self.ranks |= {(host, process.environ.get("RANK", "")) for process in found}
        return found

    def wait(self, timeout_s: float = 120) -> int:
        """The exit status. After `timeout_s` everything on both hosts but their sshd is killed: TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            for host in ADDRESSES:
                self.rank_processes(host)
            if time.monotonic() > deadline:
                end_jobs(self.rig)
                raise TimeoutError(f"no end within {timeout_s:g} s:\n{self.output}")
            time.sleep(0.2)
        return self.process.returncode


def is_rank(process: Process, script: str) -> bool:
    """Whether a process is a rank: `python -u SCRIPT --local_rank=...`; the launcher has the script's name too."""
    return process.argv[1:3] == ["-u", script]


def end_jobs(rig: Rig) -> None:
    """Kills everything on the hosts but the listening sshd, their first process."""
    for host in ADDRESSES:
        for process in rig.processes(host):
            if "[listener]" not in " ".join(process.argv):
                process.kill()


def launch(
    rig: Rig,
    folder: Path,
    script: str,
    settings: dict[str, object],
    *flags: str,
    supervised: bool = False,
    **environment: str,
) -> Launch:
    """Starts a script on both hosts, one rank each; hostfile, `.deepspeed_env` and log lie in `folder`.

    `environment` reaches the ranks through `.deepspeed_env`; an empty value leaves a variable out. `supervised` puts
    launch/supervise.py in front.
    """
    hostfile, env_file = folder / "hostfile", folder / "deepspeed_env"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in ADDRESSES))
    variables = {"PATH": f"{Path(sys.executable).parent}:$PATH", "GLOO_SOCKET_IFNAME": "eth0", **environment}
    env_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items() if value))
    log = folder / f"launch-{time.monotonic_ns()}.log"
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    front = [sys.executable, "launch/supervise.py"] if supervised else []
    command = [*front, str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile), script]
    with log.open("w") as output:
        process = rig.start(
            "host-a",
            *command,
            *arguments,
            *flags,
            cwd=ROOT,
            env={**os.environ, "DS_ENV_FILE": str(env_file)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Launch(rig, script, process, log)


def run_on_each(
    rig: Rig, script: str, settings: dict[str, object], *flags: str, **environment: str
) -> list[tuple[int, str]]:
    """Runs a script with a rank on each host and no launcher; gives exit status and output of each.

    Seconds faster than `launch`, and the variables are what torchrun would set.
    """
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    processes = []
    for rank, host in enumerate(ADDRESSES):
        place = {"RANK": rank, "WORLD_SIZE": len(ADDRESSES), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        place |= {"MASTER_ADDR": ADDRESSES["host-a"], "MASTER_PORT": 29500}
        variables = {name: str(value) for name, value in place.items()}
        processes.append(
            rig.start(
                host,
                *(sys.executable, script, *arguments, *flags),
                cwd=ROOT,
                env={**os.environ, **variables, "GLOO_SOCKET_IFNAME": "eth0", **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    except subprocess.TimeoutExpired:
        end_jobs(rig)
        raise
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
