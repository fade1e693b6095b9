"""The supervisor with launchers that fail in every way: small shell and Python programs. Real ones: tests/hosts."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from simple_llama.cluster import supervisor
from simple_llama.cluster.supervisor import FINISHED, _environment_with_keepalive
from tiny_job import ROOT

SUPERVISE = [sys.executable, str(ROOT / "launch" / "supervise.py")]


def start(folder: Path, *command: str, grace_s: float = 0.5) -> subprocess.Popen[str]:
    """Supervises a command, started in `folder`; not as a rank, as which DeepSpeed's start in a test before it left
    this process."""
    return subprocess.Popen(
        [*SUPERVISE, "--grace_s", str(grace_s), *command],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "LOCAL_RANK"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, script: str) -> tuple[int, str, str]:
    """Supervises a shell script to its end: status, stdout, stderr."""
    process = start(folder, "sh", "-c", script)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_for(path: Path) -> str:
    """The text of a file that another process writes."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text().strip()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        (f"echo '12:00:00 INFO {FINISHED}'", 0, ""),
        (f"echo 'host-a: 12:00:00 INFO {FINISHED}'", 0, ""),
        ("echo all is well", 1, "did not say that it finished"),
        (f"echo \"sample 0: '{FINISHED}'\"", 1, "did not say that it finished"),
        (f"echo {FINISHED} >&2; exit 3", 3, ""),
        ("exit 75", 75, ""),
        ("kill -9 $$", 137, "ended by SIGKILL"),
        (f"echo {FINISHED}; kill -9 $$", 137, "ended by SIGKILL"),
    ],
)
def test_the_status_is_honest(tmp_path: Path, script: str, status: int, words: str) -> None:
    """0 needs both the launcher's 0 and the job's word; a signal is 128 + its number."""
    found, _, err = run(tmp_path, script)
    assert found == status and words in err, err


def test_output_is_passed_on_as_it_is(tmp_path: Path) -> None:
    """Both streams, also bytes that are no UTF-8 text, and a last line without an end."""
    process = subprocess.run(
        [*SUPERVISE, "sh", "-c", r"printf 'a\377b\n'; printf 'to err\n' >&2; printf end"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert process.stdout == b"a\377b\nend" and process.stderr.startswith(b"to err\n")


def test_one_failed_host_ends_the_launch(tmp_path: Path) -> None:
    """pdsh says that a host has ended with an error and waits for the other one for ever: ended after the grace."""
    script = "echo 'pdsh@host-a: host-b: ssh exited with exit code 3' >&2; sleep 60"
    began = time.monotonic()
    status, _, err = run(tmp_path, script)
    assert status == 3 and time.monotonic() - began < 20
    assert "host host-b has failed, others have not ended within 0.5 s" in err
    assert "host host-b failed first, with status 3" in err


def test_a_launcher_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After _KILL_S, here 0.5 s."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from simple_llama.cluster import supervisor as s;"
        "s._KILL_S = 0.5; sys.exit(s.supervise(['sh', '-c', sys.argv[2]], 0.2))"
    )
    script = "trap '' TERM; echo 'pdsh@a: b: ssh exited with exit code 1' >&2; while :; do sleep 0.1; done"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), script], cwd=tmp_path, capture_output=True, timeout=60
    )
    assert done.returncode == 1 and b"ended by SIGKILL" in done.stderr


class Unkillable:
    """A launcher that waits for a dead disk: no signal ends it."""

    pid = 2**22 + 1  # above every real one
    stdout = stderr = io.BytesIO()

    def poll(self) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...

    def wait(self, timeout_s: float) -> None:
        raise subprocess.TimeoutExpired("launcher", timeout_s)


def test_a_launcher_that_cannot_be_ended_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host has failed, the launcher stays: it is named, and the status is that of the host; without one, 1."""
    for name in ("_KILL_S", "_CLEAN_UP_S", "_UNKILLABLE_S"):
        monkeypatch.setattr(supervisor, name, 0.1)
    monkeypatch.setattr(supervisor, "_descendants", lambda root: [Unkillable.pid])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(supervisor, "_prctl", lambda what, value: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: Unkillable())
    launch = supervisor._Launch(["launcher"], [])
    launch.failed_host, launch.failed_status = "host-b", 3
    launch.wait(grace_s=0)
    launch.clean_up()
    assert launch.left == [Unkillable.pid] and launch.status() == 3
    launch.failed_host, launch.failed_status = "", 0
    assert launch.status() == 1
    assert f"cannot end processes {Unkillable.pid}" in capsys.readouterr().err


def test_what_a_killed_launcher_leaves_is_ended(tmp_path: Path) -> None:
    """The launcher is killed; its child in a session of its own would run on for a minute."""
    note = tmp_path / "pid"
    began = time.monotonic()
    status, _, err = run(tmp_path, f"setsid sh -c 'echo $$ >{note}; exec sleep 60' & sleep 0.5; kill -9 $$")
    assert status == 137 and time.monotonic() - began < 30
    assert "ending 1 processes that the launcher left" in err
    assert not is_alive(int(wait_for(note)))


def test_the_launcher_does_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    """kill -9 of the supervisor itself: the launcher gets SIGTERM."""
    note = tmp_path / "pid"
    process = start(tmp_path, "sh", "-c", f"echo $$ >{note}; exec sleep 60")
    pid = int(wait_for(note))
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_the_ranks_not_the_launcher(tmp_path: Path, number: signal.Signals) -> None:
    """The rank (LOCAL_RANK is set) saves and ends with 75; the launcher, which passes that on, is left alone. A helper
    process of the rank gets no signal."""
    rank = (
        f"sh -c 'trap \"echo helper got it >>{tmp_path}/got\" TERM; sleep 2' & helper=$!;"
        f"trap 'echo rank got it >>{tmp_path}/got; sleep 0.3; kill -9 $helper; exit 75' TERM;"
        f"echo $$ >{tmp_path}/pid; while :; do sleep 0.1; done"
    )
    (tmp_path / "rank.sh").write_text(rank)
    launcher = f"trap 'echo launcher got it >>{tmp_path}/got' TERM INT USR1; LOCAL_RANK=0 sh {tmp_path}/rank.sh"
    process = start(tmp_path, "sh", "-c", launcher + "; exit $?")
    wait_for(tmp_path / "pid")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and f"{number.name}: asking all ranks" in err
    assert (tmp_path / "got").read_text() == "rank got it\n"


def slow_to_save(folder: Path, on_interrupt: str) -> subprocess.Popen[str]:
    """A supervised rank that takes SIGTERM for a wish to save, which takes it a minute, and SIGINT as told."""
    rank = f"trap : TERM; trap '{on_interrupt}' INT; echo >{folder}/up; for i in $(seq 600); do sleep 0.1; done"
    process = start(folder, "sh", "-c", 'LOCAL_RANK=0 sh -c "$1"; exit $?', "launcher", rank)
    wait_for(folder / "up")
    return process


@pytest.mark.parametrize(
    ("on_interrupt", "status"),
    [
        ("exit 130", 130),  # as a rank does
        ("", 128 + signal.SIGTERM),  # as one that hangs does: killed, and the launcher ended before
    ],
)
def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, on_interrupt: str, status: int) -> None:
    """Half a second after the first: the ranks get SIGINT too, and 3 s later all are killed that are left."""
    process = slow_to_save(tmp_path, on_interrupt)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=80)
    assert process.returncode == status and "SIGINT again: ending all without saving" in err
    assert time.monotonic() - began < (2 if on_interrupt else 8)


def test_the_same_wish_by_another_way_is_one(tmp_path: Path) -> None:
    """SIGTERM 0.3 s after SIGINT, and a SIGINT that comes twice at once; SIGTERM a second later is more."""
    process = slow_to_save(tmp_path, "exit 130")
    for number in (signal.SIGINT, signal.SIGINT):
        process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.9)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=80)
    assert process.returncode == 130 and "SIGTERM again" in err


def test_a_second_ctrl_c_shortens_a_wait_that_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a launcher that was told to end and has 20 s for it."""
    monkeypatch.setattr(supervisor, "_HURRY_S", 0.1)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(supervisor, "_prctl", lambda what, value: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: Unkillable())
    launch = supervisor._Launch(["launcher"], [])
    threading.Timer(0.3, lambda: [launch.on_signal(signal.SIGINT, None), time.sleep(0.2)]).start()
    threading.Timer(0.6, lambda: launch.on_signal(signal.SIGINT, None)).start()
    began = time.monotonic()
    assert not launch.wait_for_launcher() and 0.6 <= time.monotonic() - began < 2


def test_a_bad_hostfile_ends_with_one_message(tmp_path: Path) -> None:
    """As a person sees it: status 2, one line, nothing started."""
    (tmp_path / "hostfile").write_text("host-a\n")
    (tmp_path / "deepspeed").write_text("#!/bin/sh\ntouch started\n")
    (tmp_path / "deepspeed").chmod(0o755)
    process = start(tmp_path, "./deepspeed", "--hostfile=hostfile", "x.py")
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 2 and out == "" and err == "error: hostfile:1: expected 'HOST slots=N', found 'host-a'\n"
    )
    assert not (tmp_path / "started").exists()


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    """A typing mistake, and no command at all."""
    for command in ([], ["deepsped", "x.py"]):
        process = start(tmp_path, *command)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and err.startswith("error: expected a launcher's command")


def test_ssh_gets_a_keepalive_unless_it_has_one() -> None:
    """The user's own options stay."""
    assert _environment_with_keepalive({"A": "b"}) == {"A": "b", "PDSH_SSH_ARGS_APPEND": supervisor._KEEPALIVE}
    own = {"PDSH_SSH_ARGS_APPEND": "-p 2222"}
    assert _environment_with_keepalive(own)["PDSH_SSH_ARGS_APPEND"] == f"-p 2222 {supervisor._KEEPALIVE}"
    own = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=60"}
    assert _environment_with_keepalive(own) == own


def test_descendants_are_found_below_below(tmp_path: Path) -> None:
    """A child, its child, and nobody else."""
    process = subprocess.Popen(["sh", "-c", f"sh -c 'echo $$ >{tmp_path}/pid; sleep 60; :' ; :"])
    try:
        below = int(wait_for(tmp_path / "pid"))
        found = supervisor._descendants(os.getpid())
        assert process.pid in found and below in found and os.getpid() not in found and os.getppid() not in found
    finally:
        for pid in supervisor._descendants(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def test_a_slow_reader_gets_all(tmp_path: Path) -> None:
    """20,000 lines into a pipe that is read late: all of them arrive, and the job counts as finished."""
    process = start(tmp_path, "sh", "-c", f"seq 1 20000; echo {FINISHED}")
    time.sleep(2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.splitlines()[-2:] == ["20000", FINISHED], err


def test_another_launcher_has_hosts_of_its_own(tmp_path: Path) -> None:
    """mpirun's hostfile is not DeepSpeed's; DeepSpeed's with another launcher may be anything too."""
    (tmp_path / "hostfile").write_text("node-1 max_slots=4\n")
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\necho {FINISHED}\n")
    (tmp_path / "mpirun").chmod(0o755)
    (tmp_path / "deepspeed").symlink_to("mpirun")
    for command in (["./mpirun"], ["./deepspeed", "--launcher=openmpi"]):
        process = start(tmp_path, *command, "--hostfile", "hostfile", "x.py")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
