"""A fault in the middle of a run on two hosts: the command returns within a minute, says why, and leaves nothing.

What was measured, also for the plain launcher: docs/reliability.md; by hand: `python tests/hosts/faults.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from hosts import faults
from hosts.launch import TRAIN, launch
from hosts.rig import Rig
from simple_llama.cluster.stopping import STOPPED
from tiny_job import TinyJob

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
WITHIN_S = 60.0  # from the fault until nothing of the launch runs on a host that can still run anything


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


@pytest.fixture(scope="module")
def job(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """A long job whose reference store is filled."""
    job = faults.long_job(tmp_path_factory.mktemp("faults"))
    faults.fill_store(rig, job)
    return job


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("kill-rank", "rank 1 on host host-b is gone"),
        ("stop-rank", "rank 1 on host host-b is silent"),
        ("kill-launch", "stopped after step"),
        ("kill-host", "rank 1 on host host-b is silent"),
        ("cut-link", "rank 1 on host host-b is silent"),
        ("kill-pdsh", "the job did not say that it finished"),
        ("kill-runner", "the launcher was ended by SIGKILL"),
        ("kill-supervisor", ""),  # which cannot say anything any more
        ("exit-before-init", "host host-b failed first, with status 3"),
    ],
)
def test_a_fault_ends_the_launch(rig: Rig, job: TinyJob, fault: str, reason: str) -> None:
    """The command fails and says why; no process of it is left on either host; the state before the fault is whole."""
    outcome = faults.measure(rig, job, fault)
    assert outcome.returned_s is not None and outcome.returned_s < WITHIN_S, outcome.output
    assert outcome.gone_s is not None and outcome.gone_s < WITHIN_S, outcome.output
    assert outcome.status not in (0, None) and outcome.left == (), outcome.output
    assert reason in outcome.output
    if fault not in faults.BEFORE:
        assert 0 <= outcome.last_step - outcome.resumes_at <= faults.SAVE_INTERVAL, outcome


def test_a_preempted_launch_saves_and_goes_on(rig: Rig, job: TinyJob) -> None:
    """SIGTERM to the supervisor: status 75 and the last step saved; the next start goes on behind it, on both hosts."""
    outcome = faults.measure(rig, job, "term-supervisor")
    assert outcome.status == STOPPED and outcome.left == () and outcome.resumes_at == outcome.last_step, outcome.output
    run = launch(rig, job.folder, TRAIN, faults.long_settings(job, outcome.fault), "--resume", supervised=True)
    try:
        faults.wait_until(lambda: faults.steps_done(job, outcome.fault) >= outcome.last_step + 3, run, "more steps")
        assert f"at step {outcome.last_step}\n" in run.output
        faults.find(rig, "host-b", "rank").kill(signal.SIGUSR1)
        assert run.wait() == STOPPED, run.output
    finally:
        faults.restore(rig)
    assert faults.newest_whole_state(job, outcome.fault) > outcome.last_step
