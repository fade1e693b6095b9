"""The first optimizer step of cells (a loss, a DeepSpeed configuration, so many ranks), as a run makes it.

As a rank script, with the settings of a run, then DeepSpeed configurations (joined by :) and losses (by ,): writes
<ckpt_dir>/cells.json.
`plain_cells` is the same computed apart: a plain model, one chat at a time, padded, textbook slopes, torch's AdamW.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.textbook_losses import COUPLED, Sums, coupled_values_and_gradients, value_and_gradient
from simple_llama.cluster.distributed import Ranks, all_reduce_sum, close_ranks, init_ranks, leave
from simple_llama.common.settings import parse_settings
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums
from simple_llama.reinforcement_learning.rlhf.run.start_engine import start_engine
from simple_llama.reinforcement_learning.rlhf.run.start_reference import open_reference
from simple_llama.reinforcement_learning.rlhf.run.step import accumulate, portions
from tiny_job import TinyJob, make_job

RATE, PAD = 1e-3, 3


def make_weighted_job(folder: Path) -> TinyJob:
    """A tiny job whose pairs have weights of 0.5 to 2 and gaps of -1 to 2."""
    job = make_job(folder)
    path = folder / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    facts = [{"weight": 0.5 + 0.25 * (n % 7), "gap": (n % 4) - 1.0} for n in range(len(rows))]
    path.write_text("".join(json.dumps({**row, **fact}) + "\n" for row, fact in zip(rows, facts, strict=True)))
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
        plan = BatchPlan(pairs.rows, one.seed, ranks.world_size, one.batch_size, one.grad_accum_steps)
        ref_logps = open_reference(one, inputs, ranks, loss_fn.needs_reference).logps
        shown = []
        for _ in range(2):
            parts = portions(plan.step(0), ranks.rank, pairs)
            mine = accumulate(engine, parts, ref_logps, MetricSums(ranks.device), ranks.device)
            loss = float(all_reduce_sum(torch.cat(mine).double().sum())) / plan.pairs_per_step
            shown += [loss, engine.step(RATE)]
        found[loss_type] = Cell(*shown)
    return found


def plain_cells(config: DPOConfig, loss_types: Sequence[str], ranks: Ranks) -> dict[str, Cell]:
    """The same of a plain model in the same dtype; the pairs of a step are those of one rank."""
    inputs = load_inputs(config, ranks)
    pairs = inputs.data.train
    plan = BatchPlan(pairs.rows, config.seed, 1, config.batch_size, config.grad_accum_steps)
    mine = [pairs[i] for micro_batch in plan.step(0)[0] for i in micro_batch]
    with inputs.start.reading() as start:
        model = inputs.build_model(start, ranks.device)
        masters = {name: start.state_dict[name].clone() for name, _ in model.named_parameters()}
    sums_N2 = alone(model, mine)
    ref_N2, found = sums_N2.detach(), {}
    for loss_type in loss_types:
        loss, gradients = _gradients(loss_type, sums_N2, ref_N2, mine, list(model.parameters()))
        moved = {name: master.clone().requires_grad_() for name, master in masters.items()}
        for master, gradient in zip(moved.values(), gradients, strict=True):
            master.grad = gradient.float()
        norm = torch.nn.utils.clip_grad_norm_(moved.values(), config.max_grad_norm)
        torch.optim.AdamW(moved.values(), RATE, (config.beta1, config.beta2), weight_decay=0.0).step()
        stepped = {name: master.detach().to(inputs.dtype).requires_grad_() for name, master in moved.items()}
        after_N2 = alone(partial(_with, model, stepped), mine)
        loss_after, gradients = _gradients(loss_type, after_N2, ref_N2, mine, list(stepped.values()))
        norm_after = torch.stack([gradient.float().norm() for gradient in gradients]).norm()
        found[loss_type] = Cell(loss, float(norm), loss_after, float(norm_after))
    return found


def _gradients(
    loss_type: str,
    sums_N2: torch.Tensor,
    ref_N2: torch.Tensor,
    pairs: Sequence[TokenizedPair],
    weights: Sequence[torch.Tensor],
) -> tuple[float, Sequence[torch.Tensor]]:
    """The mean loss of pairs, and its gradient: the textbook's slopes by the sums, then autograd."""
    loss, slopes_N2 = textbook(loss_type, sums_N2.detach(), ref_N2, pairs)
    return loss, torch.autograd.grad((slopes_N2 * sums_N2.double()).sum(), weights, retain_graph=True)


def _with(model: LLaMaTransformer, weights: dict[str, torch.Tensor], ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits with other weights."""
    return torch.func.functional_call(model, weights, (ids_BT,))


def alone(model: Callable[[torch.Tensor], torch.Tensor], pairs: Sequence[TokenizedPair]) -> torch.Tensor:
    """Sums (N, 2): each chat whole and padded, log_softmax of all logits, then gather."""
    sums = []
    for pair in pairs:
        for ids, scored in pair.without_sharing():
            row = torch.tensor([[*ids.tolist(), *[0] * PAD]])
            logps = model(row)[0, : len(ids) - 1].float().log_softmax(-1)
            sums.append(logps.gather(1, row[0, 1 : len(ids), None])[-scored:].sum())
    return torch.stack(sums).view(-1, 2)


def textbook(
    loss_type: str, sums_N2: torch.Tensor, ref_N2: torch.Tensor, pairs: Sequence[TokenizedPair]
) -> tuple[float, torch.Tensor]:
    """The mean loss of pairs with default options, and its slopes (N, 2) by their sums."""
    options = PreferenceLoss(loss_type).own_options()
    rows: list[Sums] = [
        (*sums, *ref, pair.chosen_scored, pair.rejected_scored, pair.gap)
        for sums, ref, pair in zip(sums_N2.tolist(), ref_N2.tolist(), pairs, strict=True)
    ]
    weights = [pair.weight for pair in pairs]
    if loss_type in COUPLED:
        values, slopes = coupled_values_and_gradients(loss_type, rows, options, weights)
    else:
        found = (value_and_gradient(loss_type, row, options, weight) for row, weight in zip(rows, weights, strict=True))
        values, slopes = zip(*found, strict=True)
    return sum(values) / len(rows), torch.tensor(slopes, dtype=torch.float64) / len(rows)


def main() -> None:
    """The cells of a configuration after the other."""
    losses, paths = sys.argv.pop().split(","), sys.argv.pop().split(":")
    config = parse_settings(DPOConfig, None, None)  # a loss option that is not given stays so: each loss has its own
    ranks = init_ranks(config.device, config.start_timeout_s)
    found = {path: cells(replace(config, deepspeed_config=path), losses, ranks) for path in paths}
    if ranks.is_main:
        Path(config.ckpt_dir).mkdir(parents=True, exist_ok=True)
        (Path(config.ckpt_dir) / "cells.json").write_text(json.dumps(found))
    close_ranks()
    leave(0)


if __name__ == "__main__":
    main()
