"""A fault in the middle of a run on two hosts: the command returns within a minute, says why, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hosts import faults
from hosts.rig import Rig
from tiny_job import TinyJob

pytestmark = [pytest.mark.hosts, pytest.mark.slow]


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
        ("kill-host", "rank 1 on host host-b is silent"),
        ("cut-link", "rank 1 on host host-b is silent"),
    ],
)
def test_lost_rank_ends_the_launch(rig: Rig, job: TinyJob, fault: str, reason: str) -> None:
    """Rank 0 names the rank and host that it lost; the command fails, and no process of it is left on either host."""
    outcome = faults.measure(rig, job, fault)
    assert outcome.returned_s is not None and outcome.returned_s < 60, outcome.output
    assert outcome.gone_s is not None and outcome.gone_s < 100, outcome.output  # DeepSpeed gives a stopped rank 30 s
    assert outcome.status not in (0, None) and outcome.left == (), outcome.output
    assert reason in outcome.output
