"""launch/evaluate.py on two ranks."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_job import TinyJob, free_port, make_job, make_tuned, run_ranks, start_rank

pytestmark = pytest.mark.dist
SCRIPT = "launch/evaluate.py"
ASKED = {"device": "cpu", "share": "all", "generate": 20, "max_new_tokens": 6, "temperature": 0.8}
JUDGE = (
    'import json, sys\nfor line in sys.stdin:\n    print(json.dumps({"id": json.loads(line)["id"], "better": "a"}))\n'
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """The tiny job with a tuned model."""
    job = make_job(tmp_path_factory.mktemp("evaluate"))
    make_tuned(job)
    return job


def settings_of(job: TinyJob, name: str, judge: str) -> dict[str, Any]:
    """An evaluation with a store of its own."""
    path = job.folder / f"{name}.py"
    path.write_text(judge)
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(path))}"
    places = {"output": str(job.folder / name), "ref_cache_dir": str(job.folder / f"{name}_cache")}
    return {**ASKED, "models": str(job.folder / "tuned.pth"), "judge": command, **places}


def assert_alike(one: Any, other: Any) -> None:
    """The same JSON, but for rounding."""
    if isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-5)
    elif isinstance(one, dict | list):
        assert type(one) is type(other) and len(one) == len(other)
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_alike(one[key], other[key])
    else:
        assert one == other


def test_two_ranks_give_the_numbers_of_one(job: TinyJob) -> None:
    """The whole report.json but for how it was made: log-probs, answers drawn with a seed, the judge's words. Numbers
    are equal within fp32 rounding: on some CPUs a rank that has fewer threads sums in another order.

    The judge always takes the first answer, so all verdicts are ties that flipped.
    """
    reports = []
    for name, world in (("one", 1), ("two", 2)):
        log = run_ranks(SCRIPT, settings_of(job, name, JUDGE), world, free_port())
        assert (
            log.rstrip()
            .splitlines()[-2]
            .endswith(f"report: {job.folder / name}/report.html and {job.folder / name}/report.json")
        )
        found = json.loads((job.folder / name / "report.json").read_text())
        assert f"{world} rank" in found.pop("made_by")["ranks"]
        reports.append(found)
    assert_alike(*reports)
    judged = reports[0]["judge"]["tuned.pth"]
    assert (judged["tied"], judged["flipped"], judged["win_rate"][0]) == (20, 20, 0.5)


def test_a_judge_that_fails_ends_all_ranks(job: TinyJob) -> None:
    """Status 2 on both, one message, no report."""
    settings, port = settings_of(job, "bad", "print('better: a')"), free_port()
    ranks = [start_rank(SCRIPT, settings, rank, 2, port) for rank in range(2)]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    said = [line for line in "".join(outputs).splitlines() if line.startswith("error")]
    assert len(said) == 1 and "judge: answer 1" in said[0]
    assert not Path(job.folder / "bad").exists()
