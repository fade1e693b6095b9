"""Runs of benchmarks/small_runs.py made again, beside what is kept of them, and the pairs behind a spike."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from benchmarks.bench_warnings import EVALUATED, TRAINED, kept
from benchmarks.small_runs import SmallRun, drawn, run
from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.run.health import findings
from simple_llama.reinforcement_learning.rlhf.run.history import History
from simple_llama.reinforcement_learning.rlhf.run.watch_health import costliest


@pytest.mark.parametrize(("fault", "strength"), [("", 0), ("swapped", 3)])
def test_what_is_kept_is_what_a_run_records(ranks: Ranks, fault: str, strength: int) -> None:
    """A run made again: a hundredth is for half precision and another machine's rounding over its steps, which can
    draw other answers for the KL."""
    one = next(made for made in kept() if (made.spec.fault, made.spec.strength) == (fault, strength))
    again = run(drawn(one.spec.seed, fault, strength))
    assert astuple(again.facts) == pytest.approx(astuple(one.facts), rel=1e-6)
    assert [line["step"] for line in again.lines] == [line["step"] for line in one.lines]
    for found, expected in zip(again.lines, one.lines, strict=True):
        compared = [name for name in expected if not name.startswith("samples/kl")]
        assert [found[name] for name in compared] == pytest.approx(
            [expected[name] for name in compared], rel=0.01, abs=0.01
        )
        assert expected.keys() == {"step", *(name for name in (*TRAINED, *EVALUATED) if name in found)}


def test_the_pairs_behind_a_spike_are_named(ranks: Ranks) -> None:
    """Of the two pairs with garbage, that whose margin training has made hopeless comes first."""
    parts, history = SmallRun(drawn(10_000, "spikes", 3)), History()
    for index in range(parts.spec.total_steps):
        history.add(parts.step(index))
        if [finding.name for finding in findings(history, parts.facts, index + 1)] == ["gradient_spikes"]:
            break
    named = costliest(parts.train, parts.plan.step(index)[0], parts.sums.losses, ranks)
    garbage = [parts.train.origin(place) for place, rows in enumerate(parts.train.rows) if rows > 200]
    assert len(garbage) == 2 and named[0].split(" (")[0] in garbage
