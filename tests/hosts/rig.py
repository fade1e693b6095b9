"""Two throw-away hosts on one Linux machine, for what only several hosts show. Needs root and the packages below.

    python tests/hosts/rig.py up                  make host-a and host-b, and wait until each can ssh to the other
    python tests/hosts/rig.py run COMMAND...      run it on host-a, in this folder and environment
    python tests/hosts/rig.py on host-b COMMAND...
    python tests/hosts/rig.py cut | mend          take host-b off the network, or back
    python tests/hosts/rig.py kill host-b         power loss: the link goes first, then every process
    python tests/hosts/rig.py down                end what runs on the hosts and remove everything

With `--name NAME` first, of a rig beside the others. A host is a set of Linux namespaces: it has its own network (a
veth pair joins the two, and there is no way out), processes, host name, /proc, /run, /dev/shm, /etc/hosts, /etc/ssh
and sshd. All other files are the machine's, so a folder is a shared disk until a host binds another over it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
PACKAGES = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "pkill": "procps"}
TIED = ("setpriv", "--pdeathsig", "KILL")  # the command dies with its parent, however that dies

SSH_CONFIG = """\
IdentityFile /etc/ssh/key
IdentitiesOnly yes
BatchMode yes
StrictHostKeyChecking yes
"""
SSHD_CONFIG = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/key.pub
PidFile none
UsePAM no
UseDNS no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""
# The first process of a host, in its new namespaces: what is mounted here is seen on this host only.
FIRST_PROCESS = """
host=$1 folder=$2 home=$3
hostname "$host"
mount -t proc proc /proc
for at in /run /dev/shm; do mount -t tmpfs tmpfs $at; done
mkdir -m 755 /run/sshd
mount --bind "$folder/$host/hosts" /etc/hosts
mount --bind "$folder/shadow" /etc/shadow
mount --bind "$folder/$host/ssh" /etc/ssh
if [ -d "$home/.ssh" ]; then mount -t tmpfs -o mode=700 tmpfs "$home/.ssh"; fi
if [ -e "$home/.bashrc" ]; then mount --bind /dev/null "$home/.bashrc"; fi # bash reads it for every ssh command
exec "$(command -v sshd)" -D -e
"""


class RigError(Exception):
    """The hosts cannot be made or are not there; the message says what to do."""


@dataclass(frozen=True)
class Process:
    """A process as the machine outside the hosts sees it; `started` tells it from a later one of the same number."""

    pid: int
    started: str

    @staticmethod
    def of(pid: int) -> Process:
        return Process(pid, _stat(pid)[19])

    @property
    def alive(self) -> bool:
        try:
            stat = _stat(self.pid)
        except (OSError, IndexError):
            return False
        return stat[19] == self.started and stat[0] not in "ZX"

    @property
    def argv(self) -> list[str]:
        return self._strings("cmdline")

    @property
    def environ(self) -> dict[str, str]:
        pairs = (line.partition("=") for line in self._strings("environ"))
        return {name: value for name, _, value in pairs}

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; nothing where the process is gone already."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _strings(self, name: str) -> list[str]:
        try:
            return Path(f"/proc/{self.pid}/{name}").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            return []


class Rig:
    """Both hosts. As a context manager they are there inside `with`, and gone after it or with this process."""

    def __init__(self, name: str = "", lasting: bool = False):
        """`lasting` hosts outlive this process. The name, this process's number by default, is no other rig's."""
        self.folder = Path(tempfile.gettempdir()) / f"two_hosts-{name or os.getpid()}"
        self.lasting = lasting
        self._children: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Rig:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # === Up and down ===

    def up(self) -> None:
        """Makes the hosts, anew where a rig of this name is half there; leaves a whole one as it is."""
        require_tools()
        if all(self.is_up(host) for host in ADDRESSES):
            return
        self.down()
        remove_orphans()
        try:
            self.folder.mkdir(mode=0o700)
            self._write_files()
            self._start()
            self._wait_for_ssh()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Ends every process on the hosts, and only these, and removes all traces. May be repeated."""
        for host in ADDRESSES:
            for part in ("first", "wire"):
                self.end_processes(host)
                if (process := self._part(host, part)) is not None:
                    process.kill()
        for child in self._children:
            child.wait()
        self._children.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_up(self, host: str) -> bool:
        """Whether the host has been made and not killed."""
        return self._part(host, "first") is not None

    def _write_files(self) -> None:
        """Keys, /etc/ssh and /etc/hosts of both hosts; each knows the other's key beforehand."""
        (self.folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")  # without PAM, sshd refuses a locked root
        for host in ADDRESSES:
            (self.folder / host / "ssh").mkdir(parents=True)
        keys = {}
        for host in ADDRESSES:
            keys[host] = _make_key(self.folder / host / "ssh" / "host_key")
        _make_key(self.folder / "key")
        for host in ADDRESSES:
            ssh = self.folder / host / "ssh"
            shutil.copy(self.folder / "key", ssh)
            shutil.copy(self.folder / "key.pub", ssh)
            (ssh / "ssh_config").write_text(SSH_CONFIG)
            (ssh / "sshd_config").write_text(SSHD_CONFIG)
            known = [f"{name},{ADDRESSES[name]} {key}" for name, key in keys.items()]
            (ssh / "ssh_known_hosts").write_text("".join(known))
            self.name_hosts(host)

    def name_hosts(self, host: str, own_address: str = "") -> None:
        """Writes the host's /etc/hosts; there its own name may have another address than for the others."""
        addresses = {**ADDRESSES, host: own_address or ADDRESSES[host]}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / host / "hosts").write_text("\n".join(lines) + "\n")  # in place: a bind mount follows the inode

    def _start(self) -> None:
        """The link, then the first process of each host. A `wire` holds a host's network also when the host is dead:
        else the other end of the veth pair would vanish, as no real host's does when its neighbour dies."""
        parts = {}
        for host in ADDRESSES:
            wire = self._spawn("unshare", "--net", "sleep", "infinity")
            _wait(lambda pid=wire.pid: _namespace(pid, "net") != _namespace(os.getpid(), "net"), "no network namespace")
            parts[host] = {"wire": wire}
        a, b = (str(parts[host]["wire"].pid) for host in ADDRESSES)
        _run(
            "nsenter", f"--net=/proc/{a}/ns/net", "ip", "link", "add", "eth0", *f"type veth peer eth0 netns {b}".split()
        )
        for host, address in ADDRESSES.items():
            inside = ("nsenter", f"--net=/proc/{parts[host]['wire'].pid}/ns/net", "ip")
            _run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run(*inside, "link", "set", link, "up")
            apart = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
            shell = ("sh", "-euc", FIRST_PROCESS, "first_process", host, str(self.folder), os.path.expanduser("~root"))
            parts[host]["first"] = self._spawn(*inside[:-1], *apart, *shell, log=self.folder / host / "sshd.log")
            first = parts[host]["first"]
            _wait(lambda pid=first.pid: _only_child(pid) != 0, f"{host} did not start", self.folder / host / "sshd.log")
        state = {host: {part: [p.pid, p.started] for part, p in both.items()} for host, both in parts.items()}
        (self.folder / "state.json").write_text(json.dumps(state))

    def _spawn(self, *command: str, log: Path | None = None) -> Process:
        """Starts a process of the rig itself, outside the hosts' process namespaces."""
        with open(log or os.devnull, "w") as output:
            child = subprocess.Popen(
                [*(() if self.lasting else TIED), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the caller, who then calls down
            )
        self._children.append(child)
        return Process.of(child.pid)

    def _wait_for_ssh(self) -> None:
        """Returns when each host can run a command on each."""
        for host in ADDRESSES:
            for other in ADDRESSES:
                probe = ("timeout", "5", "ssh", "-n", other, "true")
                log = self.folder / host / "sshd.log"
                _wait(
                    lambda host=host, probe=probe: self.run(host, *probe).returncode == 0,
                    f"{host} cannot ssh to {other} (the hosts need CAP_SYS_ADMIN and CAP_NET_ADMIN)",
                    log,
                )

    # === Use ===

    def command(self, host: str, *command: str, cwd: str | Path | None = None) -> list[str]:
        """The command line that runs `command` on a host; it ends when who started it is killed."""
        first = self._part(host, "first")
        pid = _only_child(first.pid) if first else 0
        if not pid:
            raise RigError(f"{host} is not up (of {', '.join(ADDRESSES)})")
        enter = ("nsenter", "--target", str(pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--")
        clean = ("env", "--unset=SSH_AUTH_SOCK", f"--chdir={cwd or Path.cwd()}")  # entering the mounts loses the folder
        return [*TIED, *enter, *TIED, *clean, *command]

    def start(self, host: str, *command: str, cwd: str | Path | None = None, **options: Any) -> subprocess.Popen[str]:
        """Starts a command on a host. Its number is the entering process's: signal it through `processes`."""
        return subprocess.Popen(self.command(host, *command, cwd=cwd), text=True, **options)

    def run(self, host: str, *command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host to its end; stdout has both outputs."""
        return subprocess.run(
            self.command(host, *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def processes(self, host: str) -> list[Process]:
        """All processes on a host, its sshd among them; none when it is dead."""
        first = self._part(host, "first")
        namespace = _namespace(first.pid, "pid_for_children") if first else None
        found = []
        for entry in Path("/proc").glob("[0-9]*") if namespace else ():
            with contextlib.suppress(OSError, IndexError):
                process = Process.of(int(entry.name))
                if _namespace(process.pid, "pid") == namespace and process.alive:
                    found.append(process)
        return found

    def cut(self) -> None:
        """Takes host-b off the network: packets vanish, and nobody is told."""
        self._link("down")

    def mend(self) -> None:
        """Brings host-b back, and waits until the hosts have found each other again."""
        self._link("up")
        self._wait_for_ssh()

    def kill(self, host: str) -> None:
        """Power loss of a host: it says no goodbye, so the link goes first."""
        self.cut()
        self.end_processes(host)

    def end_processes(self, host: str) -> None:
        """Kills all processes on a host, whatever they are; its network stays."""
        deadline = time.monotonic() + 10
        while processes := self.processes(host):
            for process in processes:
                process.kill()
            if time.monotonic() > deadline:
                raise RigError(f"still running on {host}: {[process.argv for process in processes]}")
            time.sleep(0.05)

    def _link(self, state: str) -> None:
        wire = self._part("host-b", "wire")
        if wire is None:
            raise RigError("the hosts are not up; first: python tests/hosts/rig.py up")
        _run("nsenter", f"--net=/proc/{wire.pid}/ns/net", "ip", "link", "set", "eth0", state)

    def _part(self, host: str, part: str) -> Process | None:
        """The outer process that holds a part of a host, if it is alive."""
        try:
            process = Process(*json.loads((self.folder / "state.json").read_text())[host][part])
        except (OSError, KeyError):
            return None
        return process if process.alive else None


def require_tools() -> None:
    """Raises RigError unless this is root with everything installed."""
    missing = [package for tool, package in PACKAGES.items() if shutil.which(tool, path=_environment()["PATH"]) is None]
    if os.geteuid() or missing:
        what = f"; missing: apt-get install {' '.join(missing)}" if missing else ""
        raise RigError(f"two hosts on one machine need root and {', '.join(PACKAGES.values())}{what}")


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}  # where sshd and ip are


def remove_orphans() -> None:
    """Removes folders of rigs whose process was killed; their hosts died with it."""
    for folder in Path(tempfile.gettempdir()).glob("two_hosts-*"):
        number = folder.name.partition("-")[2]
        if number.isdigit() and not Path("/proc", number).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _make_key(path: Path) -> str:
    """Makes a key pair and gives the public line."""
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path))
    return path.with_name(path.name + ".pub").read_text()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise RigError(f"{' '.join(command)}: {done.stderr.strip()}")


def _wait(ready: Any, failure: str, log: Path | None = None) -> None:
    """Returns when `ready()` is true; raises RigError after ten seconds."""
    deadline = time.monotonic() + 10
    while not ready():
        if time.monotonic() > deadline:
            raise RigError(failure + (f"\n{log.read_text()}" if log else ""))
        time.sleep(0.05)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: the first is the state, the twentieth the time of the start."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _namespace(pid: int, kind: str) -> str | None:
    """Identity of a process's namespace; None when there is none to read."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return None


def _only_child(pid: int) -> int:
    """The first child of a process, 0 where it has none."""
    try:
        return int((Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or ["0"])[0])
    except OSError:
        return 0


def main(arguments: Sequence[str]) -> int:
    """One command of the list at the top; gives the exit status."""
    name = "by-hand"
    if arguments[:1] == ["--name"] and len(arguments) > 1:
        name, arguments = arguments[1], arguments[2:]
    rig = Rig(name, lasting=True)
    match list(arguments):
        case ["up"]:
            rig.up()
            print(", ".join(f"{host} is {address}" for host, address in ADDRESSES.items()))
        case ["down"]:
            rig.down()
        case ["cut"]:
            rig.cut()
        case ["mend"]:
            rig.mend()
        case ["kill", host]:
            rig.kill(host)
        case ["run", *command] if command:
            return rig.start("host-a", *command).wait()
        case ["on", host, *command] if command:
            return rig.start(host, *command).wait()
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RigError as error:
        sys.exit(f"error: {error}")
