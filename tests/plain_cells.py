"""What start_cells.py makes with an engine, computed apart: a plain model, one chat at a time, padded, textbook slopes,
torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.textbook_losses import COUPLED, Sums, coupled_values_and_gradients, value_and_gradient
from simple_llama.cluster.distributed import Ranks
from simple_llama.pretraining.architecture import LORA_MARK
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from start_cells import Cell

PAD = 3


def plain_cells(config: DPOConfig, loss_types: Sequence[str], ranks: Ranks) -> dict[str, Cell]:
    """The same of a plain model in the same dtype; the pairs of a step are those of one rank."""
    inputs = load_inputs(config, ranks)
    pairs = inputs.data.train
    plan = BatchPlan.of(pairs, config, config.seed, 1)
    mine = [pairs[i] for micro_batch in plan.step(0)[0] for i in micro_batch]
    with inputs.start.reading() as start:
        model = inputs.build_model(start, ranks.device)
        names = [name for name, _ in model.named_parameters() if not config.lora_rank or LORA_MARK in name]
        masters = {name: start.state_dict[name].float().clone() for name in names}
    sums_N6 = alone(model, mine)
    ref_N6, found = sums_N6.detach(), {}
    for loss_type in loss_types:
        loss_fn = PreferenceLoss.of(replace(config, loss_type=loss_type))
        loss, gradients = _gradients(loss_fn, sums_N6, ref_N6, mine, [model.get_parameter(name) for name in names])
        moved = {name: master.clone().requires_grad_() for name, master in masters.items()}
        for master, gradient in zip(moved.values(), gradients, strict=True):
            master.grad = gradient.float()
        norm = torch.nn.utils.clip_grad_norm_(moved.values(), config.max_grad_norm)
        torch.optim.AdamW(moved.values(), config.max_lr, (config.beta1, config.beta2), weight_decay=0.0).step()
        stepped = {name: master.detach().to(inputs.dtype).requires_grad_() for name, master in moved.items()}
        after_N6 = alone(partial(_with, model, stepped), mine)
        loss_after, gradients = _gradients(loss_fn, after_N6, ref_N6, mine, list(stepped.values()))
        norm_after = torch.stack([gradient.float().norm() for gradient in gradients]).norm()
        found[loss_type] = Cell(loss, float(norm), loss_after, float(norm_after))
    return found


def _gradients(
    loss_fn: PreferenceLoss,
    sums_N6: torch.Tensor,
    ref_N6: torch.Tensor,
    pairs: Sequence[TokenizedPair],
    weights: Sequence[torch.Tensor],
) -> tuple[float, Sequence[torch.Tensor]]:
    """The mean loss of pairs, and its gradient: the textbook's slopes by the sums, then autograd."""
    loss, slopes_NS = textbook(loss_fn, sums_N6.detach(), ref_N6, pairs)
    moved_NS = sums_N6[:, : slopes_NS.shape[1]]
    return loss, torch.autograd.grad((slopes_NS * moved_NS).sum(), weights, retain_graph=True)


def _with(model: LLaMaTransformer, weights: dict[str, torch.Tensor], ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits with other weights."""
    return torch.func.functional_call(model, weights, (ids_BT,))


def alone(model: Callable[[torch.Tensor], torch.Tensor], pairs: Sequence[TokenizedPair]) -> torch.Tensor:
    """Sums (N, 6) of chosen and rejected: of whole answers, over the common length, of log sum p^2. Each chat whole and
    padded, log_softmax of all logits, then gather."""
    sums = []
    for pair in pairs:
        common = min(pair.chosen_scored, pair.rejected_scored)
        for ids, scored in pair.without_sharing():
            row = torch.tensor([[*ids.tolist(), *[0] * PAD]])
            logps = model(row)[0, : len(ids) - 1].float().log_softmax(-1)[-scored:]
            taken = logps.gather(1, row[0, 1 : len(ids), None][-scored:]).double()
            squares = (2 * logps).logsumexp(-1).double().sum()
            sums.append(torch.stack([taken.sum(), taken[:common].sum(), squares]))
    return torch.stack(sums).view(-1, 2, 3).transpose(1, 2).flatten(1)


def textbook(
    loss_fn: PreferenceLoss, sums_N6: torch.Tensor, ref_N6: torch.Tensor, pairs: Sequence[TokenizedPair]
) -> tuple[float, torch.Tensor]:
    """The mean loss of pairs, and its slopes by their sums: (N, 2), or (N, 4) where an option reads others."""
    loss_type, options = loss_fn.loss_type, loss_fn.own_options()
    read = None if options.keys() & {"ld_alpha", "weighting"} else 7
    rows: list[Sums] = [
        (
            *sums[:2],
            *ref[:2],
            pair.chosen_scored,
            pair.rejected_scored,
            pair.gap,
            *sums[2:4],
            *ref[2:4],
            *sums[4:],
            pair.group if pair.group >= 0 else -1 - place,
        )
        for place, (sums, ref, pair) in enumerate(zip(sums_N6.tolist(), ref_N6.tolist(), pairs, strict=True))
    ]
    weights = [pair.weight for pair in pairs]
    if loss_type in COUPLED:
        values, slopes = coupled_values_and_gradients(loss_type, rows, options, weights)
    else:
        found = (
            value_and_gradient(loss_type, row[:read], options, weight)
            for row, weight in zip(rows, weights, strict=True)
        )
        values, slopes = zip(*found, strict=True)
    total = sum(pair.share for pair in pairs)
    return sum(values) / total, torch.tensor(slopes, dtype=torch.float64) / total
