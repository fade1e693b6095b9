"""Breaks a training run on two hosts in its middle and says what became of it, a row for each fault.

    python tests/hosts/faults.py                              all of them
    python tests/hosts/faults.py kill-rank cut-link ...       some
    python tests/hosts/faults.py --plain cut-link             without launch/supervise.py in front
    python tests/hosts/faults.py --limit_s 300 --set peer_timeout_s=60 --verbose stop-rank

Columns: seconds from the fault until the command returned, and until nothing of it was left on either host; the status;
what still ran after `limit_s`; the newest step in the curves and the step of the newest whole state, from which
`--resume` would go on; the first telling line. Needs root, as tests/hosts/rig.py does.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # by hand; pytest sets the path itself
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from hosts.launch import PRECOMPUTE, TRAIN, Launch, end_jobs, is_rank, launch
from hosts.rig import ADDRESSES, Process, Rig
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import newest_state
from tiny_job import ROOT, TinyJob, make_job

STEP = 8  # of the run, at which it is broken
SAVE_INTERVAL = 5  # steps
STARTS_IN_S = 120.0  # a launch on a busy machine, until STEP
SAID = re.compile(r"supervise:|ends:|error|stopped|job finished")  # lines of the output that say why it ended


@dataclass(frozen=True)
class Outcome:
    """What became of a launch after a fault. Times count from the fault; None: not within the limit."""

    fault: str
    returned_s: float | None  # until the command returned
    status: int | None
    gone_s: float | None  # until no process of the launch was left
    left: tuple[str, ...]  # "host: role" of what still ran at the end
    last_step: int  # in metrics.jsonl
    resumes_at: int  # step of the newest whole state, whose files' digests are right; 0 without one
    said: tuple[str, ...]  # the telling lines of the output
    output: str

    def row(self) -> str:
        times = ["never" if s is None else f"{s:.0f} s" for s in (self.returned_s, self.gone_s)]
        first = self.said[0] if self.said else "-"  # the reason; what follows are consequences
        left = ", ".join(self.left) or "-"
        steps = f"{self.last_step} | {self.resumes_at}"
        return f"| {self.fault} | {times[0]} | {self.status} | {times[1]} | {left} | {steps} | {first} |"


# === Who is who ===


def role(process: Process) -> str:
    """What a process of a launch is; empty for any other one."""
    argv = process.argv
    name = Path(argv[0]).name if argv else ""
    if is_rank(process, TRAIN):
        return "rank"
    if argv[1:4] == ["-u", "-m", "deepspeed.launcher.launch"]:
        return "launch"
    if argv[1:2] == ["launch/supervise.py"]:
        return "supervisor"
    if len(argv) > 1 and Path(argv[1]).name == "deepspeed":
        return "runner"
    return name if name in ("pdsh", "ssh") else ""


def find(rig: Rig, host: str, wanted: str) -> Process:
    """The oldest process of that role on a host."""
    found = [process for process in rig.processes(host) if role(process) == wanted]
    if not found:
        raise LookupError(f"no {wanted} on {host}")
    return min(found, key=lambda process: int(process.started))


def running(rig: Rig) -> tuple[str, ...]:
    """All processes of the launch on both hosts, as "host: role"."""
    return tuple(f"{host}: {what}" for host in ADDRESSES for process in rig.processes(host) if (what := role(process)))


# === Faults ===


def signal_to(host: str, wanted: str, number: int) -> Callable[[Rig], None]:
    """A fault: a signal to one process."""
    return lambda rig: find(rig, host, wanted).kill(number)


DURING: dict[str, Callable[[Rig], None]] = {
    "kill-rank": signal_to("host-b", "rank", signal.SIGKILL),
    "kill-rank-0": signal_to("host-a", "rank", signal.SIGKILL),
    "stop-rank": signal_to("host-b", "rank", signal.SIGSTOP),
    "stop-rank-0": signal_to("host-a", "rank", signal.SIGSTOP),
    "kill-launch": signal_to("host-b", "launch", signal.SIGKILL),
    "kill-launch-0": signal_to("host-a", "launch", signal.SIGKILL),
    "kill-host": lambda rig: rig.kill("host-b"),
    "cut-link": lambda rig: rig.cut(),
    "kill-pdsh": signal_to("host-a", "pdsh", signal.SIGKILL),
    "kill-runner": signal_to("host-a", "runner", signal.SIGKILL),
    "term-runner": signal_to("host-a", "runner", signal.SIGTERM),
    "kill-supervisor": signal_to("host-a", "supervisor", signal.SIGKILL),
    "term-supervisor": signal_to("host-a", "supervisor", signal.SIGTERM),
    "term-rank": signal_to("host-b", "rank", signal.SIGTERM),
    "usr1-rank": signal_to("host-b", "rank", signal.SIGUSR1),
}
BEFORE = {  # what runs on host-b in the place of the script, from the start; the clock begins with its rank
    "exit-before-init": "import sys, time; time.sleep(1); sys.exit(3)",  # long enough to be seen
    "hang-before-init": "import time; time.sleep(1e6)",
}
FAULTS = (*DURING, *BEFORE)


# === A run, a fault, an outcome ===


def long_job(folder: Path) -> TinyJob:
    """A tiny job that would run for many minutes; see `long_settings`."""
    return make_job(folder)


def long_settings(job: TinyJob, name: str, **other: object) -> dict[str, object]:
    """Thousands of steps, a state every 5 of them; the project's own timeouts, for they are what is measured."""
    settings = {**job.settings, "run_name": name, "grad_accum_steps": 2, "epochs": 2000, "eval_interval": 0}
    settings = {key: value for key, value in settings.items() if not key.endswith("_timeout_s")}
    return {**settings, "n_samples": 0, "save_interval": SAVE_INTERVAL, **other}


def wait_until(happened: Callable[[], bool], run: Launch, what: str) -> None:
    """Returns when something has happened; RuntimeError when the launch ends first or it takes too long."""
    deadline = time.monotonic() + STARTS_IN_S
    while not happened():
        if run.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come, status {run.process.poll()}:\n{run.output}")
        time.sleep(0.1)


def steps_done(job: TinyJob, name: str) -> int:
    """Newest step in metrics.jsonl, 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return max(int(line.get("step", 0)) for line in job.lines(name))
    return 0


def inject(rig: Rig, job: TinyJob, fault: str, supervised: bool = True, **settings: object) -> tuple[Launch, float]:
    """Starts a run named after the fault and breaks it; gives the launch and the time of the fault."""
    all_settings = long_settings(job, fault, **settings)
    for folder in ("runs", "checkpoints"):  # of the time before
        shutil.rmtree(job.folder / folder / fault, ignore_errors=True)
    if fault in BEFORE:
        stub = job.folder / f"{fault}.py"
        stub.write_text(BEFORE[fault])
        rig.run("host-b", "mount", "--bind", str(stub), str(ROOT / TRAIN))
        run = launch(rig, job.folder, TRAIN, all_settings, supervised=supervised)
        wait_until(lambda: any(is_rank(process, TRAIN) for process in rig.processes("host-b")), run, "the rank")
        return run, time.monotonic()
    run = launch(rig, job.folder, TRAIN, all_settings, supervised=supervised)
    wait_until(lambda: steps_done(job, fault) >= STEP, run, f"step {STEP}")
    DURING[fault](rig)
    return run, time.monotonic()


def newest_whole_state(job: TinyJob, name: str) -> int:
    """Step of the state from which a run would resume."""
    with contextlib.suppress(UserError):
        return int(newest_state(job.folder / "checkpoints" / name).facts.step)
    return 0


def watch(rig: Rig, job: TinyJob, run: Launch, fault: str, since: float, limit_s: float) -> Outcome:
    """Waits until the command has returned and no process of it is left, or for `limit_s`."""
    returned_s = gone_s = None
    while time.monotonic() - since < limit_s and (returned_s is None or gone_s is None):
        if returned_s is None and run.process.poll() is not None:
            returned_s = time.monotonic() - since
        if gone_s is None and not running(rig):
            gone_s = time.monotonic() - since
        time.sleep(0.2)
    output = run.output
    said = tuple(line.strip() for line in output.splitlines() if SAID.search(line) and " INFO]" not in line)
    steps = steps_done(job, fault), newest_whole_state(job, fault)
    return Outcome(fault, returned_s, run.process.poll(), gone_s, running(rig), *steps, said, output)


def restore(rig: Rig) -> None:
    """Brings both hosts back to how they were: nothing runs, the link is up, nothing is mounted over the script."""
    if not all(rig.processes(host) for host in ADDRESSES):
        rig.down()
        rig.up()
        return
    end_jobs(rig)
    rig.run("host-b", "umount", "--quiet", str(ROOT / TRAIN))
    rig.mend()


def measure(
    rig: Rig, job: TinyJob, fault: str, supervised: bool = True, limit_s: float = 120, **settings: object
) -> Outcome:
    """One fault from the start of the run to the end of everything; the hosts are as before afterwards."""
    try:
        run, since = inject(rig, job, fault, supervised, **settings)
        return watch(rig, job, run, fault, since, limit_s)
    finally:
        restore(rig)


def fill_store(rig: Rig, job: TinyJob) -> None:
    """The reference pass, once for all faults."""
    run = launch(rig, job.folder, PRECOMPUTE, long_settings(job, "reference"))
    if run.wait():
        raise RuntimeError(run.output)


def main(arguments: Sequence[str]) -> int:
    """Prints a table; status 1 when a launch that was supervised left something behind or did not return."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--plain", action="store_true", help="no launch/supervise.py in front")
    parser.add_argument("--limit_s", type=float, default=120.0, help="seconds that are waited for (default 120)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the run")
    parser.add_argument("--times", type=int, default=1, help="how often each fault is tried (default 1)")
    parser.add_argument("--verbose", action="store_true", help="show what each launch said")
    options = parser.parse_args(arguments)
    faults = options.faults or [name for name in FAULTS if not (options.plain and "supervisor" in name)]
    if unknown := sorted(set(faults) - set(FAULTS)):
        parser.error(f"expected faults of {', '.join(FAULTS)}; found {', '.join(unknown)}")
    settings = dict(pair.split("=", 1) for pair in options.set)
    bad = False
    with tempfile.TemporaryDirectory() as folder, Rig() as rig:
        job = long_job(Path(folder))
        fill_store(rig, job)
        heads = "fault | command returns | status | all gone | still there | last step | resumes at | says"
        print(f"| {heads} |\n|{'---|' * 8}")
        for fault in faults * options.times:
            outcome = measure(rig, job, fault, not options.plain, options.limit_s, **settings)
            print(outcome.row(), flush=True)
            if options.verbose:
                print("\n".join(outcome.said), flush=True)
            bad |= outcome.returned_s is None or outcome.gone_s is None or bool(outcome.left)
    return int(bad and not options.plain)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
