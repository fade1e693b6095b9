"""Our own training step and reference pass as the benches drive them: with DeepSpeed, and as a plain loop without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import Loaded, build_model
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import deal, sweep
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import model_dtype, read_ds_config
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine, decay_groups
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize, model_size, trained_part, useful_flops
from simple_llama.reinforcement_learning.rlhf.objective.coupling import Pull
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, PolicyOutput, pair_logps, trained_names
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.precompute import computed
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import from_store
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums
from simple_llama.reinforcement_learning.rlhf.run.step import Learner, Portion, optimizer_step

Pairs = Sequence[TokenizedPair]
Pack = Callable[[Pairs], PairBatch]


def micro_batches(pairs: Pairs, count: int) -> list[list[TokenizedPair]]:
    """The pairs of a step dealt into `count` micro-batches of nearly equal rows, as BatchPlan does."""
    hands = deal([(i, pair.rows) for i, pair in enumerate(pairs)], count)
    return [[pairs[i] for i in hand] for hand in hands]


def portions(hands: Sequence[Pairs], pack: Pack, weight: float) -> Iterator[Portion]:
    """The step of one rank, whose micro-batches these are, each packed when its turn comes. Args: weight: of a pair."""
    for place, part in enumerate(hands):
        yield Portion(pack(part), weight, last=place == len(hands) - 1)


class Trainer:
    """A policy of the start weights, stored references and sums of metrics; the step is the product's own."""

    def __init__(self, start: Loaded, config: DPOConfig, store: RefStore, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.dtype = model_dtype(read_ds_config(config))
        self.model = build_model(start, self.dtype, ranks.device)
        self.size: ModelSize = model_size(self.model)
        self.policy = DPOPolicy(self.model, PreferenceLoss.of(config))
        names = trained_names(self.model, config.trainable, start.path)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)
        self.store = store
        self.ref_logps = from_store(store)
        part = trained_part(self.model, names)
        work = partial(useful_flops, self.size, self.model.architecture, backward=True, trained=part)
        self.sums = MetricSums(ranks.device, work)

    @property
    def learner(self) -> Learner:
        """What a step drives."""
        raise NotImplementedError

    def step(self, pairs: Pairs, pack: Pack, count: int) -> None:
        """A whole optimizer step on the mean loss of `pairs`.

        Args:
            count: micro-batches to make of them.
        """
        self.step_of(micro_batches(pairs, count), pack, 1 / len(pairs))

    def step_of(self, hands: Sequence[Pairs], pack: Pack, weight: float) -> None:
        """The same of micro-batches that are dealt already. Args: weight: of each pair, ranks / pairs of all ranks."""
        parts, rate = portions(hands, pack, weight), self.config.max_lr
        optimizer_step(self.learner, parts, self.ref_logps, rate, self.sums, self.ranks.device)


class EngineTrainer(Trainer):
    """As the project trains: under DeepSpeed."""

    def __init__(self, start: Loaded, config: DPOConfig, store: RefStore, ranks: Ranks):
        super().__init__(start, config, store, ranks)
        self.engine = Engine(self.policy, start.state_dict, config, ranks)

    @property
    def learner(self) -> Engine:
        return self.engine


class PlainTrainer(Trainer):
    """The same computation without DeepSpeed: fp32 masters and gradients, torch's clip and fused AdamW."""

    def __init__(self, start: Loaded, config: DPOConfig, store: RefStore, ranks: Ranks):
        super().__init__(start, config, store, ranks)
        self.loop = PlainLoop(self.policy, start, config, ranks.device)

    @property
    def learner(self) -> PlainLoop:
        return self.loop


class PlainLoop:
    """A learner of one rank in plain torch."""

    def __init__(self, policy: DPOPolicy, start: Loaded, config: DPOConfig, device: torch.device):
        self.policy, self.max_grad_norm = policy, config.max_grad_norm
        self.weights = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
        self.masters = {
            name: torch.nn.Parameter(start.state_dict[name].to(device, torch.float32, copy=True))
            for name in self.weights
        }
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.masters, config.weight_decay),
            lr=config.max_lr,
            betas=(config.beta1, config.beta2),
            fused=True,
        )

    @property
    def loss_fn(self) -> PreferenceLoss:
        """The policy's loss."""
        return self.policy.loss_fn

    def logps(self, batch: PairBatch) -> torch.Tensor:
        """Log-prob sums (B, 2) with the current weights, without gradient."""
        return pair_logps(self.policy.model, batch)

    def backward(
        self, batch: PairBatch, ref_logps_B2: torch.Tensor, weight: float, last: bool, pull: Pull | None = None
    ) -> PolicyOutput:
        """Adds `weight` times the gradient of the batch's summed loss to the fp32 gradients."""
        out = self.policy(batch, ref_logps_B2, pull, weight)
        out.loss.backward()
        for name, parameter in self.weights.items():
            gradient, master = parameter.grad, self.masters[name]
            assert gradient is not None
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None
        return out

    def step(self, rate: float) -> float:
        """Clips and steps AdamW at learning rate `rate`; the gradient norm before the clip."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm)
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
    every = PairSet.of(pairs)
    todo = every.select(store.missing(every.keys))
    with store.writer(every_pairs=flush_pairs) as writer:
        mine = sweep(todo.rows, batch_size, world_size=1)[0]
        batches = (PairBatch.pack([todo[i] for i in micro_batch]) for micro_batch in mine)
        for keys, logps_B2 in computed(model, batches, device):
            writer.add(keys, logps_B2)
