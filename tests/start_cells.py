"""The first optimizer step of cells (a loss, a DeepSpeed configuration, so many ranks), as a run makes it.

As a rank script, with the settings of a run, then a JSON object of cases (by name: losses, and what differs from the
settings): writes <ckpt_dir>/cells.json.
The same computed apart: plain_cells.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from simple_llama.cluster.distributed import Ranks, all_reduce_sum, close_ranks, init_ranks, leave
from simple_llama.common.settings import parse_settings
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums
from simple_llama.reinforcement_learning.rlhf.run.start_engine import start_engine
from simple_llama.reinforcement_learning.rlhf.run.start_reference import open_reference, through_policy
from simple_llama.reinforcement_learning.rlhf.run.step import accumulate, portions
from tiny_job import TinyJob, make_job, write_rankings


def make_weighted_job(folder: Path) -> TinyJob:
    """A tiny job whose pairs have weights of 0.5 to 2 and gaps of -1 to 2."""
    job = make_job(folder)
    path = folder / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    facts = [{"weight": 0.5 + 0.25 * (n % 7), "gap": (n % 4) - 1.0} for n in range(len(rows))]
    path.write_text("".join(json.dumps({**row, **fact}) + "\n" for row, fact in zip(rows, facts, strict=True)))
    return job


def make_ranked_job(folder: Path) -> TinyJob:
    """A tiny job whose 12 records have four answers, and weights of 0.5 to 2."""
    job = make_job(folder)
    path = folder / "pairs.jsonl"
    write_rankings(path, range(12))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "weight": 0.5 + 0.25 * (n % 7)}) + "\n" for n, row in enumerate(rows)))
    return job


class Cell(NamedTuple):
    """What a first step showed: its loss and its gradient's norm, and those of its pairs after it."""

    loss: float
    norm: float
    loss_after: float
    norm_after: float


def cells(config: DPOConfig, loss_types: Sequence[str], ranks: Ranks) -> dict[str, Cell]:
    """A step with each loss, by the engine that a run has (collective)."""
    found, inputs = {}, load_inputs(config, ranks)
    pairs = inputs.data.train
    for loss_type in loss_types:
        one = replace(config, loss_type=loss_type)
        loss_fn = PreferenceLoss.of(one)
        engine = start_engine(one, inputs, loss_fn, ranks).engine
        plan = BatchPlan.of(pairs, one, one.seed, ranks.world_size)
        opened = open_reference(one, inputs, ranks, loss_fn.needs_reference, loss_fn.asks.fronts)
        ref_logps = through_policy(opened, engine, inputs, ranks).logps
        shown = []
        for _ in range(2):
            parts = portions(plan.step(0), ranks.rank, pairs)
            mine = accumulate(engine, parts, ref_logps, MetricSums(ranks.device), ranks.device)
            step = [i for hands in plan.step(0) for micro_batch in hands for i in micro_batch]
            loss = float(all_reduce_sum(torch.cat(mine).double().sum())) / pairs.select(step).total
            shown += [loss, engine.step(config.max_lr)]
        found[loss_type] = Cell(*shown)
    return found


def main() -> None:
    """The cells of one case after the other."""
    cases = json.loads(sys.argv.pop())
    config = parse_settings(DPOConfig, None, None)  # a loss option that is not given stays so: each loss has its own
    ranks = init_ranks(config.device, config.start_timeout_s)
    found = {name: cells(replace(config, **changes), losses, ranks) for name, (losses, changes) in cases.items()}
    if ranks.is_main:
        Path(config.ckpt_dir).mkdir(parents=True, exist_ok=True)
        (Path(config.ckpt_dir) / "cells.json").write_text(json.dumps(found))
    close_ranks()
    leave(0)


if __name__ == "__main__":
    main()
