"""DPO runs of a third of a second, by the project's own step, loss, evaluation and metrics, with and without faults.

A fault is a cause: other pairs, other labels, another rate. Nobody touches a number that is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.ours import PlainLoop
from benchmarks.small_language import (
    ANSWER,
    ARCHITECTURE,
    END,
    UNKNOWN,
    VOCABULARY,
    Preference,
    Tokens,
    has_unknown,
    is_empty,
    loops,
    make_preferences,
    runs_on,
    start_weights,
)
from simple_llama.inference.generate import Sampling, generate_together
from simple_llama.inference.guards import count_language, language_metrics
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import LoadedModel
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan, sweep
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, evaluating, pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.divergence import Spoken, k3_sums, kl_metrics, spoken_logps
from simple_llama.reinforcement_learning.rlhf.run.evaluate import evaluate
from simple_llama.reinforcement_learning.rlhf.run.health import Facts
from simple_llama.reinforcement_learning.rlhf.run.metrics import TOTALS
from simple_llama.reinforcement_learning.rlhf.run.run_facts import weight_facts
from simple_llama.reinforcement_learning.rlhf.run.schedule import learning_rate
from simple_llama.reinforcement_learning.rlhf.run.step import optimizer_step, portions
from simple_llama.reinforcement_learning.rlhf.run.watch_health import StepSums

CPU = torch.device("cpu")
STRENGTHS = (1, 2, 3)
_STARTS = 8  # start models that runs of one thousand seeds share
_SAMPLES, _SAMPLE_TOKENS = 4, 24  # the language's longest answer has 15
_GREEDY = Sampling()
_GARBAGE = (50, 150, 230)  # tokens
_EVALUATIONS = 2  # after the one at the start


@dataclass(frozen=True)
class Spec:
    """What a run is; with its seed all that it does."""

    seed: int
    fault: str = ""
    strength: int = 0  # of STRENGTHS
    beta: float = 0.1
    rate: float = 1e-3  # the highest
    pairs: int = 256
    held_out: int = 200
    epochs: int = 2
    batch: int = 16  # pairs of a step
    bf16: bool = False
    sharpness: float = 2.0  # of the labels
    length_bias: float = 0.0

    @property
    def total_steps(self) -> int:
        """Optimizer steps."""
        return -(-self.pairs // self.batch) * self.epochs

    def rate_at(self, index: int) -> float:
        """Learning rate of step `index` (from 0); a tenth of the steps warm up."""
        return learning_rate(index, self.total_steps, self.total_steps // 10, self.rate, 0.0)


class Made(NamedTuple):
    """A run that was made: which, what it knew, what it recorded."""

    spec: Spec
    facts: Facts
    lines: Sequence[dict[str, float]]  # as those of metrics.jsonl


Settings = Callable[[Spec, int], Spec]  # with a fault of that level, a strength from 0
Pairs = Callable[[np.random.Generator, list[Preference], BatchPlan, int], list[Preference]]


class Fault(NamedTuple):
    """A cause that an alarm is meant for."""

    alarm: str
    cause: str
    strengths: str
    settings: Settings = lambda spec, level: spec
    pairs: Pairs = lambda rng, pairs, plan, level: pairs
    habit: Callable[[Tokens], Tokens] | None = None  # that the start model has a little


# === Faults ===


def _in_shares(shares: Sequence[float], change: Callable[[Preference], Preference]) -> Pairs:
    """Changes such a share of the pairs."""

    def pairs(rng: np.random.Generator, found: list[Preference], plan: BatchPlan, level: int) -> list[Preference]:
        chances = rng.random(len(found))
        return [change(pair) if chance < shares[level] else pair for pair, chance in zip(found, chances, strict=True)]

    return pairs


def _chosen(shares: Sequence[float], habit: Callable[[Tokens], Tokens]) -> Pairs:
    """Gives such a share of the chosen answers the habit."""
    return _in_shares(shares, lambda pair: replace(pair, chosen=habit(pair.chosen)))


def _garbage(rng: np.random.Generator, pairs: list[Preference], plan: BatchPlan, level: int) -> list[Preference]:
    """One token again and again as the chosen answer of a pair of a later step, and as the rejected one of another.

    By then training has moved that token one way or the other: one of both pairs has a margin that is far off.
    """
    found, length = list(pairs), _GARBAGE[level]
    one, other = plan.step(int(rng.integers(10, plan.steps_per_epoch)))[0][0][:2]
    garbage = [*[int(rng.integers(ANSWER + 1, VOCABULARY))] * length, END]
    found[one], found[other] = replace(found[one], chosen=garbage), replace(found[other], rejected=garbage)
    return found


def _carrying(spec: Spec, share: float) -> Spec:
    """A rate whose steps together carry a weight that share of the way to half the next bf16 number."""
    weights = torch.cat([tensor.flatten() for tensor in _start(spec).values() if tensor.dim() == 2])
    half = 2.0 ** (math.floor(math.log2(weights.abs().median().item())) - 8)
    spec = replace(spec, bf16=True)
    return replace(spec, rate=spec.rate * share * half / sum(map(spec.rate_at, range(spec.total_steps))))


def _fast(spec: Spec, level: int) -> Spec:
    """A rate at which habits are learned."""
    return replace(spec, rate=5e-3)


_SHARES = (0.3, 0.6, 1.0)
_OF_CHOSEN = "share of the pairs: 0.3, 0.6, 1"
FAULTS = {
    "length": Fault(
        "length_explains",
        "labels go by length alone",
        "log-odds of a label by a token of length: 0.5, 1, 2",
        lambda spec, level: replace(spec, sharpness=0.0, length_bias=(0.5, 1.0, 2.0)[level]),
    ),
    "memorised": Fault(
        "memorised",
        "few pairs with labels by chance, many epochs, a high rate",
        "pairs: 64, 32, 16; epochs: 7, 14, 28",
        lambda spec, level: replace(
            spec, sharpness=0.0, length_bias=0.0, pairs=64 >> level, epochs=7 << level, rate=5e-3
        ),
    ),
    "saturated": Fault(
        "saturated",
        "few pairs without label noise, many epochs, beta 0.5",
        "pairs: 64, 32, 16; epochs: 10, 20, 40",
        lambda spec, level: replace(spec, sharpness=20.0, beta=0.5, pairs=64 >> level, epochs=10 << level, rate=5e-3),
    ),
    "spikes": Fault(
        "gradient_spikes",
        "two of the 16 pairs of a step have one token again and again, as the chosen or the rejected answer",
        f"times: {', '.join(map(str, _GARBAGE))}",
        lambda spec, level: replace(spec, pairs=256, epochs=1),
        _garbage,
    ),
    "far": Fault(
        "far",
        "a small beta and a high rate",
        "beta: 0.03, 0.02, 0.01; rate: 0.005, 0.01, 0.02",
        lambda spec, level: replace(spec, beta=(0.03, 0.02, 0.01)[level], rate=(5e-3, 1e-2, 2e-2)[level]),
    ),
    "swapped": Fault(
        "swapped",
        "labels of the training pairs are swapped, those held out are not",
        "share of the pairs: 0.8, 0.95, 1",
        lambda spec, level: replace(spec, held_out=200),
        _in_shares((0.8, 0.95, 1.0), Preference.swapped),
    ),
    "still": Fault(
        "still",
        "bf16, and a rate that moves few weights",
        "sum of the rates, of half the distance to the next number: 0.5, 0.2, 0.05",
        lambda spec, level: _carrying(spec, (0.5, 0.2, 0.05)[level]),
    ),
    "loops": Fault("answers_loop", "chosen answers loop", _OF_CHOSEN, _fast, _chosen(_SHARES, loops), loops),
    "empty": Fault("answers_empty", "chosen answers are empty", _OF_CHOSEN, _fast, _chosen(_SHARES, is_empty)),
    "endless": Fault(
        "answers_run_on", "chosen answers are cut off", _OF_CHOSEN, _fast, _chosen(_SHARES, runs_on), runs_on
    ),
    "unknown": Fault(
        "answers_unknown",
        "a third of the words of chosen answers are <UNK>",
        _OF_CHOSEN,
        _fast,
        _chosen(_SHARES, has_unknown),
        has_unknown,
    ),
}


def drawn(seed: int, fault: str = "", strength: int = 0) -> Spec:
    """A run as people make them, its settings drawn by its seed; of one with a fault only what it leaves free."""
    rng = np.random.default_rng([seed, 2])
    spec = Spec(
        seed,
        fault,
        strength,
        beta=float(rng.choice([0.1, 0.2, 0.5])),
        rate=float(np.exp(rng.uniform(np.log(5e-4), np.log(2e-3)))),
        pairs=int(rng.integers(160, 257)),
        held_out=int(rng.integers(200, 241)),
        epochs=int(rng.choice([1, 2])),
        batch=int(rng.choice([8, 16, 32])),
        bf16=bool(rng.random() < 0.25),
        sharpness=float(rng.uniform(1.0, 3.0)),
        length_bias=float(rng.uniform(-0.1, 0.2)),
    )
    if not fault:
        return spec
    spec = replace(spec, rate=1.5e-3, pairs=160, held_out=120, epochs=2, batch=16, sharpness=2.5)
    return FAULTS[fault].settings(spec, strength - 1)


# === A run ===


class _Kept:
    """Reference log-probs of pairs, by their names."""

    def __init__(self, model: LLaMaTransformer, pairs: Sequence[TokenizedPair]):
        logps_B2 = pair_logps(model, PairBatch.pack(pairs))
        self.values = {pair.digest: row for pair, row in zip(pairs, logps_B2, strict=True)}

    def __call__(self, batch: PairBatch) -> torch.Tensor:
        return torch.stack([self.values[pair.digest] for pair in batch.pairs])


def _start(spec: Spec) -> dict[str, torch.Tensor]:
    """The start model's weights, which some runs share."""
    habit = FAULTS[spec.fault].habit if spec.fault else None
    return start_weights(spec.seed // 10_000 * _STARTS + spec.seed % _STARTS, habit)


def _model(weights: dict[str, torch.Tensor], spec: Spec) -> LLaMaTransformer:
    """A model of its own, in the run's dtype."""
    model = LLaMaTransformer(ARCHITECTURE)
    model.load_state_dict(weights)
    return model.to(torch.bfloat16 if spec.bf16 else torch.float32)


class SmallRun:
    """The parts of a run."""

    def __init__(self, spec: Spec):
        self.spec = spec
        rng = np.random.default_rng([spec.seed, 1])
        wanted = make_preferences(rng, spec.pairs, spec.sharpness, spec.length_bias)
        self.train = _tokenized(wanted)
        self.plan = BatchPlan(self.train.rows, spec.seed, 1, spec.batch, 1)
        if spec.fault:
            wanted = FAULTS[spec.fault].pairs(rng, wanted, self.plan, spec.strength - 1)
            self.train = _tokenized(wanted)
        self.held_out = _tokenized(make_preferences(rng, spec.held_out, spec.sharpness, spec.length_bias))
        self.prompts = [pair.prompt_ids.tolist() for pair in self.held_out[:_SAMPLES]]
        weights = _start(spec)
        self.model, self.reference = (_model(weights, spec) for _ in range(2))
        self.ref_logps = _Kept(self.reference, [*self.train, *self.held_out])
        self.policy = DPOPolicy(self.model, PreferenceLoss(beta=spec.beta))
        config = DPOConfig(max_lr=spec.rate, min_lr=0.0)
        self.loop = PlainLoop(self.policy, LoadedModel(weights, ARCHITECTURE, Path()), config, CPU)
        self.sums = StepSums(CPU)

    @property
    def facts(self) -> Facts:
        """What the run knows before its first step."""
        spec = self.spec
        return Facts(
            pairs=len(self.train),
            held_out=len(self.held_out),
            total_steps=spec.total_steps,
            beta=spec.beta,
            rates=sum(map(spec.rate_at, range(spec.total_steps))),
            answer_tokens=float(self.held_out.keys["counts"].mean()),
        )

    def step(self, index: int) -> dict[str, float]:
        """An optimizer step, and its line."""
        self.sums.begin_step()
        rate, parts = self.spec.rate_at(index), portions(self.plan.step(index), 0, self.train)
        norm = optimizer_step(self.loop, parts, self.ref_logps, rate, self.sums, CPU)
        means = self.sums.means()
        values = {name: value for name, value in means.items() if name not in TOTALS}
        values["rewards/saturated"] = self.sums.saturated_share(means["pairs"])
        self.sums.reset()
        return {"step": index + 1, **values, "grad_norm": norm, "learning_rate": rate}

    def evaluate(self, step: int) -> dict[str, float]:
        """An evaluation, and its line."""
        logps, parts = partial(pair_logps, self.model), sweep(self.held_out.rows, 256, 1)[0]
        found = evaluate(logps, self.policy.loss_fn, self.ref_logps, self.held_out, parts, CPU)
        values = {**found.metrics, "eval_longer_is_chosen": self.held_out.longer_is_chosen}
        if step == 0:
            own = (weights for weights in self.loop.masters.values() if weights.dim() == 2)
            values |= weight_facts(own, next(self.model.parameters()).dtype, CPU)
        return {"step": step, **values, **self.samples(), **(self.divergence() if step else {})}

    def samples(self) -> dict[str, float]:
        """What the answers to some held-out prompts say of the language."""
        return language_metrics(count_language(self.answers(_GREEDY), {END}, UNKNOWN))

    def divergence(self) -> dict[str, float]:
        """KL to the reference on sampled answers to the same prompts."""
        sampled = self.answers(Sampling(temperature=1.0, seed=self.spec.seed))
        spoken = Spoken.pack(self.prompts, [[answer] for answer in sampled])
        policy_N, ref_N = spoken_logps(self.model, spoken), spoken_logps(self.reference, spoken)
        return kl_metrics(k3_sums(policy_N, ref_N, spoken.counts), spoken.counts)

    def answers(self, sampling: Sampling) -> list[Tokens]:
        """Answers to the sample prompts, with what ended them."""
        found: list[Tokens] = [[] for _ in self.prompts]
        with evaluating(self.model):
            for tokens in generate_together(self.model, self.prompts, _SAMPLE_TOKENS, {END}, sampling):
                for answer, token in zip(found, tokens, strict=True):
                    answer += [] if token is None else [token]
        return found


def _tokenized(pairs: Sequence[Preference]) -> PairSet:
    return PairSet.of(pair.tokenized() for pair in pairs)


def run(spec: Spec) -> Made:
    """Trains, and gives what was recorded."""
    parts, total = SmallRun(spec), spec.total_steps
    evaluated = {total * part // _EVALUATIONS for part in range(1, _EVALUATIONS + 1)}
    lines = [parts.evaluate(0)]
    for index in range(total):
        lines.append(parts.step(index))
        if index + 1 in evaluated:
            lines.append(parts.evaluate(index + 1))
    return Made(spec, parts.facts, lines)
