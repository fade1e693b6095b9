"""Others on the machine or the network: what a process can do that reaches the ports of a job."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tiny_job import RankProcess, free_port, start_rank

pytestmark = pytest.mark.dist
STRANGER, TRAIN = "tests/stranger.py", "launch/train_dpo.py"


def both(first: str, second: str, one: dict[str, object], other: dict[str, object]) -> tuple[list[int], list[str]]:
    """Exit status and output of two ranks that run different programs."""
    port = free_port()
    ranks: list[RankProcess] = [
        start_rank(script, {"device": "cpu", **settings}, rank, 2, port)
        for rank, (script, settings) in enumerate(((first, one), (second, other)))
    ]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    return [rank.wait() for rank in ranks], outputs


def test_who_joins_as_a_rank_runs_no_code(tmp_path: Path) -> None:
    """A stranger, another user where the tests run as root, is rank 1 before the real one comes, and answers with a
    pickle that makes a file where it is unpickled. Rank 0 reads it as data, which it is not, and ends."""
    mark = tmp_path / "ran"
    statuses, outputs = both(TRAIN, STRANGER, {"model_path": tmp_path / "none"}, {"act": "pickle", "mark": mark})
    assert not mark.exists(), outputs[0]
    assert statuses[0] == 2 and "error: rank 1 sent something else, expected JSON" in outputs[0], outputs[0]


def test_idle_connections_do_not_use_up_the_files() -> None:
    """1,100 connections to gloo's port, which accepts each: above the usual soft limit of 1,024 files, and gloo aborts
    the process where it has none left. The hard limit is this machine's."""
    if 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1500:
        pytest.skip("this machine's hard limit of open files is too low to show it")
    settings: dict[str, object] = {"act": "idle", "files": 1024}
    statuses, outputs = both(STRANGER, STRANGER, settings, settings)
    assert statuses == [0, 0], outputs
    assert "rank 1 met the other beside 1100 idle connections" in outputs[1]
