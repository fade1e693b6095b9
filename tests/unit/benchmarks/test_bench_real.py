"""The bench on a real model: its arithmetic by hand, and the pairs that all ways train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_real
from benchmarks.bench_real import (
    OURS,
    BenchReal,
    Measured,
    Way,
    check,
    hands_of,
    make_steps,
    passes,
    quiet_turn,
    run_job,
    speeds,
    together,
)
from benchmarks.quiet import CoreWatch, Share
from simple_llama.common.errors import UserError
from simple_llama.interop.open_start import open_start
from tiny_hf import TinyHFJob, make_hf_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyHFJob:
    """24 pairs of one turn and a model of Hugging Face's form."""
    return make_hf_job(tmp_path_factory.mktemp("job"))


def bench_of(job: TinyHFJob, **changes: Any) -> BenchReal:
    """Two counted steps of 6 pairs."""
    sizes = {"pairs_per_step": 6, "batch_size": 3, "steps": 2}
    return BenchReal(**{"model": str(job.model), "data": str(job.folder / "pairs.jsonl"), **sizes, **changes})


def test_a_turn_is_as_slow_as_its_slowest_process() -> None:
    """Times are the largest of each step, losses the mean of equal shares, rates the sum; work is counted of all."""
    useful = [1e12, 2e12]
    found = together(
        [Measured([1.0, 4.0], [0.5, 0.25], useful, 2e11), Measured([3.0, 2.0], [0.75, 0.75], useful, 1e11)]
    )
    assert found == Measured([3.0, 4.0], [0.625, 0.5], useful, 3e11)


def test_a_turn_that_was_not_quiet_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loud turns and a quiet one, which counts; of loud ones alone the third, which says so."""
    shares = [Share(1.0, 0.5, 0.0, 2.0, seconds=5.0)] * 2 + [Share(1.0, 0.0, 0.0, 1.0, seconds=0.0)]
    turns: list[Measured] = []

    def job(*_: Any) -> list[Measured]:
        turns.append(Measured([float(len(turns))]))
        return [turns[-1]]

    monkeypatch.setattr(bench_real, "run_job", job)
    for given, noisy in ((shares, 0), (shares[:1] * 3, 1)):
        turns.clear()
        left = iter(given)
        monkeypatch.setattr(CoreWatch, "share", lambda _, left=left: next(left))
        turn = quiet_turn(BenchReal("model"), Way(OURS, 1), "")
        assert (turn.seconds, turn.noisy, len(turns)) == ([2.0], noisy, 3)


def test_speeds_by_hand() -> None:
    """16 pairs in a median step of 4 s are 4 pairs/s; TRL's 10 s are 1.6, by round 3.3, 2 and 1.3 times as long. Of
    GEMMs at 4e11 FLOP/s ours reaches 0.5, 0.375 and 0.25."""
    ours = Measured([3.0, 4.0, 9.0], [0.6931, 0.5], [6e11, 6e11, 9e11], 4e11, peak_gib=1.25)
    trl = Measured([10.0, 8.0, 12.0], [0.6931, 0.5], peak_gib=7.0, noisy=1)
    found = {Way(OURS, 2): ours, Way("autocast", 2): trl}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in speeds(BenchReal("model"), found).splitlines()[2:]
    ]
    trl_said = "TRL, autocast, 2 processes (1 turns NOT QUIET)"
    assert rows == [
        ["ours, bf16, 2 processes", "4.00", "4.00 s (3.00-9.00)", "-", "0.38", "1.25", "0.6931, 0.5000"],
        [trl_said, "1.60", "10.00 s (8.00-12.00)", "2.00x", "-", "7.00", "0.6931, 0.5000"],
    ]


def test_reference_passes_by_hand() -> None:
    """64 pairs in 8 s and in 32 s; two processes make none."""
    found = {Way("bf16", 1): Measured(passed=32.0), Way("bf16", 2): Measured()}
    assert passes(BenchReal("model"), 8.0, found) == (
        "The reference pass of 64 pairs, the first one of its process: 8.00 pairs/s of ours in bf16, 2.00 of TRL, "
        "bf16, 1 process (4.00x our time)."
    )


def test_sizes_that_do_not_fit_are_refused() -> None:
    """24 pairs are 8 for each of 3 processes, but not for 2."""
    check(BenchReal("model", pairs_per_step=24, processes=(1, 3)))
    with pytest.raises(UserError, match="expected a multiple of 2 processes x batch_size 8, found 24"):
        check(BenchReal("model", pairs_per_step=24))


def test_all_ways_have_the_same_steps(job: TinyHFJob) -> None:
    """Three steps of 6 of the 24 pairs, none twice, the same ones again; one pair more a step would be too many."""
    start = open_start(job.model)
    steps, again = (make_steps(bench_of(job), start) for _ in range(2))
    digests = [[pair.digest for pair in step] for step in steps]
    assert [len(step) for step in steps] == [6, 6, 6] and len({name for step in digests for name in step}) == 18
    assert digests == [[pair.digest for pair in step] for step in again]
    with pytest.raises(UserError, match="expected 27 pairs with one prompt, found 24"):
        make_steps(bench_of(job, pairs_per_step=9), start)


def test_micro_batches_of_ours(job: TinyHFJob) -> None:
    """Six pairs in two of three, whichever ranks have them; by rows as many as are allowed, all pairs once."""
    step = make_steps(bench_of(job), open_start(job.model))[0]
    for world in (1, 2):
        hands = hands_of(bench_of(job), step, world)
        assert len(hands) == world and [len(hand) for rank in hands for hand in rank] == [3, 3]
    most = 2 * max(pair.rows for pair in step)
    hands = [hand for rank in hands_of(bench_of(job, rows=most), step, 2) for hand in rank]
    assert sorted(pair.digest for hand in hands for pair in hand) == sorted(pair.digest for pair in step)
    assert all(sum(pair.rows for pair in hand) <= most for hand in hands)


def test_a_process_finds_its_job(job: TinyHFJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `run_job` writes is what `work` reads, each process having its share of the cores; here one stands in."""

    def stand_in(module: str, arguments: list[str], world: int, variables: dict[str, Any]) -> None:
        assert (module, arguments[:3], variables) == (
            "benchmarks.bench_real",
            ["--model", str(job.model), "--worker"],
            {"OMP_NUM_THREADS": 2},
        )
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            bench_real.work(Path(arguments[3]))

    monkeypatch.setattr(bench_real, "run_ranks", stand_in)
    [found] = run_job(bench_of(job), Way(bench_real.REFERENCE, 1), str(tmp_path))
    assert found.losses == [] and found.passed > 0
    assert (tmp_path / "pairs.txt").read_text().startswith("0.0 M weights, 18 pairs of pairs.jsonl: prompt ")
    assert json.loads((tmp_path / "job.json").read_text())["way"] == {"name": "reference", "world": 1}
