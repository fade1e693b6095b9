"""A probe of a tiny model: it leaves weights as they were, and its numbers are sums of what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.foretell.memory import Base
from simple_llama.reinforcement_learning.rlhf.foretell.probe import Probed, probe
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from tiny_job import make_job


def test_a_probe_of_a_tiny_model(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes and no step: the largest micro-batch first, others of the plan, the largest one last, as a step's end.

    A step needs more than what is left after the passes: the flat gradients.
    """
    job = make_job(tmp_path)
    config = DPOConfig(**job.settings)  # type: ignore[arg-type]
    inputs = load_inputs(config, ranks)
    plan = BatchPlan(inputs.data.train.rows, config.seed, 1, 2, 4)
    before = {path.name for path in tmp_path.rglob("*")}
    computed: list[tuple[int, bool]] = []
    backward = Engine.backward

    def watched(engine: Engine, batch, ref_B2, weight: float, last: bool, *more):
        computed.append((len(batch.tokens_T), last))
        return backward(engine, batch, ref_B2, weight, last, *more)

    def refuse(*_: object) -> None:
        raise AssertionError("a probe makes no step")

    monkeypatch.setattr(Engine, "backward", watched)
    monkeypatch.setattr(Engine, "step", refuse)
    [found] = probe(config, inputs, plan, Base(0, 0), ranks)
    largest = sum(plan.rows[list(plan.largest_micro_batch())].tolist())
    assert computed[0] == (largest, False) and computed[-1] == (largest, True)
    planned = [sum(plan.rows[list(micro)].tolist()) for step in (0, 1) for micro in plan.step(step)[0]]
    assert [rows for rows, _ in computed[1:-1]] == planned[:8] and not any(last for _, last in computed[:-1])
    assert found.peak == max(found.start, found.passes, found.step) > 0
    assert found.row_s > 0 and found.largest_s > 0 and found.update_s > 0
    assert {path.name for path in tmp_path.rglob("*")} == before


def test_the_reference_counts_where_a_step_computes_it(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on 5 s in the probe's own forward pass, and else not."""
    clock, logps = [0.0], Engine.logps

    def slow(engine: Engine, batch: PairBatch) -> torch.Tensor:
        clock[0] += 5.0
        return logps(engine, batch)

    monkeypatch.setattr(Engine, "logps", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    job, found = make_job(tmp_path), []
    for reference in ("store", "online"):
        config = DPOConfig(**{**job.settings, "reference": reference})  # type: ignore[arg-type]
        inputs = load_inputs(config, ranks)
        plan = BatchPlan(inputs.data.train.rows, config.seed, 1, 2, 4)
        found += [one.largest_s for one in probe(config, inputs, plan, Base(0, 0), ranks)]
    assert found == [0.0, 5.0]


def test_a_steps_seconds_by_hand() -> None:
    """1000 rows of 2 ms, 0.5 s more at the end, 0.1 s for AdamW."""
    assert Probed(1, 3, 2, 9.0, 0.002, 0.5, 0.1).step_s(1000) == pytest.approx(2.6)
    assert Probed(1, 3, 2, 9.0, 0.002, 0.5, 0.1).peak == 3
