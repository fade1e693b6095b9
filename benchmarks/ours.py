"""Our own training step and reference pass as the benches drive them: with DeepSpeed, and as a plain loop without.

Shapes: B pairs of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from simple_llama.cluster.distributed import Ranks, all_reduce_sum
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import LoadedModel, build_model
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import deal, sweep
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch, TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import model_dtype, read_ds_config
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine, decay_groups
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize, model_size, useful_flops
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, PolicyOutput
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.precompute import computed
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import from_store
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums, pair_statistics

Pairs = Sequence[TokenizedPair]
Pack = Callable[[Pairs], PairBatch]


def micro_batches(pairs: Pairs, count: int) -> list[list[TokenizedPair]]:
    """The pairs of a step dealt into `count` micro-batches of nearly equal rows, as BatchPlan does."""
    hands = deal([(i, pair.rows) for i, pair in enumerate(pairs)], count)
    return [[pairs[i] for i in hand] for hand in hands]


class Trainer:
    """What both trainers below share: a policy of the start weights, stored references, sums of metrics."""

    def __init__(self, start: LoadedModel, config: DPOConfig, store: RefStore, ranks: Ranks):
        self.config, self.ranks, self.model_config = config, ranks, start.config
        self.dtype = model_dtype(read_ds_config(config))
        self.model = build_model(start, self.dtype, ranks.device)
        self.size: ModelSize = model_size(self.model)
        self.loss_fn = PreferenceLoss(config.loss_type, config.beta)
        self.policy = DPOPolicy(self.model, self.loss_fn)
        self.store = store
        self.ref_logps = from_store(store)
        self.sums = MetricSums(ranks.device)

    def step(self, pairs: Pairs, pack: Pack, count: int) -> None:
        """A whole optimizer step on the mean loss of `pairs`: all that `Run.accumulate` and `Run.update` compute.

        Args:
            count: micro-batches to make of them.
        """
        device, losses = self.ranks.device, []
        parts = micro_batches(pairs, count)
        for place, chosen in enumerate(parts):
            batch = pack(chosen).to(device)
            ref_B2 = self.ref_logps(chosen, batch)
            out = self.backward(batch, ref_B2, 1 / len(pairs), last=place == len(parts) - 1)
            rewards_B2 = self.loss_fn.rewards(out.logps_B2, ref_B2)
            flops = useful_flops(self.size, self.model_config, batch, backward=True)
            self.sums.add(pair_statistics(out.losses_B, out.logps_B2, rewards_B2), len(batch.tokens_T), flops)
            losses.append(out.losses_B)
        total = all_reduce_sum(torch.stack([loss_B.sum() for loss_B in losses]).sum()).item()
        assert math.isfinite(total)
        assert math.isfinite(self.update())

    def backward(self, batch: PairBatch, ref_B2: torch.Tensor, weight: float, last: bool) -> PolicyOutput:
        """Adds `weight` times the gradient of a micro-batch's summed loss."""
        raise NotImplementedError

    def update(self) -> float:
        """Clips and steps AdamW; the gradient norm before the clip."""
        raise NotImplementedError


class EngineTrainer(Trainer):
    """As the project trains: under DeepSpeed."""

    def __init__(self, start: LoadedModel, config: DPOConfig, store: RefStore, ranks: Ranks):
        super().__init__(start, config, store, ranks)
        self.engine = Engine(self.policy, start.state_dict, config, ranks)

    def backward(self, batch: PairBatch, ref_B2: torch.Tensor, weight: float, last: bool) -> PolicyOutput:
        return self.engine.backward(batch, ref_B2, weight, last)

    def update(self) -> float:
        return self.engine.step(self.config.max_lr)


class PlainTrainer(Trainer):
    """The same computation without DeepSpeed: fp32 masters and gradients, torch's clip and fused AdamW."""

    def __init__(self, start: LoadedModel, config: DPOConfig, store: RefStore, ranks: Ranks):
        super().__init__(start, config, store, ranks)
        self.weights = dict(self.model.named_parameters())
        self.masters = {
            name: torch.nn.Parameter(start.state_dict[name].to(ranks.device, torch.float32, copy=True))
            for name in self.weights
        }
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.masters, config.weight_decay),
            lr=config.max_lr,
            betas=(config.beta1, config.beta2),
            fused=True,
        )

    def backward(self, batch: PairBatch, ref_B2: torch.Tensor, weight: float, last: bool) -> PolicyOutput:
        out = self.policy(batch, ref_B2)
        (out.loss * weight).backward()
        for name, parameter in self.weights.items():
            gradient, master = parameter.grad, self.masters[name]
            assert gradient is not None
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None
        return out

    def update(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(self.masters[name])
        return float(norm)


def new_store(folder: str | Path, name: str) -> RefStore:
    """An empty store of a reference that is called `name`."""
    return RefStore.open(folder, reference_id(name, "bench", {}))


def reference_pass(
    model: LLaMaTransformer, store: RefStore, pairs: Pairs, batch_size: int, device: torch.device, flush_pairs: int
) -> None:
    """Computes and writes the log-probs that the store lacks: the loop of `precompute`, without its heartbeats."""
    todo = [pairs[i] for i in store.missing(pairs)]
    with store.writer(every_pairs=flush_pairs) as writer:
        micro_batches = sweep([pair.rows for pair in todo], batch_size, world_size=1)[0]
        for chosen, logps_B2 in computed(model, ([todo[i] for i in batch] for batch in micro_batches), device):
            writer.add(chosen, logps_B2)
