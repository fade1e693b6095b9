"""`--dry_run --probe`: forward and backward passes of the largest micro-batch on the real start weights, measured.

The engine is set up as the run sets it up, so its flat buffers, masters and moments are there. No optimizer step is
made and nothing is written: what a step takes besides is arithmetic (`memory.step_extra`), its time that of AdamW on a
piece of the weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, all_reduce_sum, barrier, broadcast_object, gather_objects
from simple_llama.ops.machine import forget_peak, peak_bytes, release, resident_bytes, synchronize
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan, MicroBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.engine.fewer_passes import block_norms
from simple_llama.reinforcement_learning.rlhf.foretell.duration import FORWARD, Speed, token_s
from simple_llama.reinforcement_learning.rlhf.foretell.memory import Base, step_extra
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.coupling import pull_of
from simple_llama.reinforcement_learning.rlhf.objective.policy import scores_of
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.start_engine import start_engine
from simple_llama.reinforcement_learning.rlhf.run.start_reference import open_reference
from simple_llama.reinforcement_learning.rlhf.run.training_run import RunConfig

_PASSES, _MOST_S = 8, 30.0  # micro-batches that are computed, and seconds for them
_PIECE = 1 << 22  # weights of which AdamW is timed


class Probed(NamedTuple):
    """What a rank's probe measured, and what it adds to it. Bytes and seconds."""

    start: int  # peak up to the end of the set-up
    passes: int  # peak of the forward and backward passes
    step: int  # what an optimizer step or a save comes to, by arithmetic on what is resident after them
    largest_s: float  # the largest micro-batch
    row_s: float  # a packed row of other micro-batches
    last_s: float  # what the last micro-batch of a step takes more
    update_s: float  # the optimizer step

    @property
    def peak(self) -> int:
        """Most of the three."""
        return max(self.start, self.passes, self.step)

    def step_s(self, rows: float) -> float:
        """Seconds of a step whose micro-batches have so many packed rows on a rank, all together."""
        return rows * self.row_s + self.last_s + self.update_s

    def speed(self, rows: float, weight_bytes: int, device: torch.device, recompute: bool) -> Speed:
        """The same as the speed of a rank. Args: recompute: whether the backward pass has a forward pass in it."""
        source = (
            f"{rows:.0f} packed rows at {1e3 * self.row_s:.3g} ms, {self.last_s:.3g} s more in the last micro-batch, "
            f"{self.update_s:.3g} s for AdamW; the largest micro-batch {self.largest_s:.3g} s"
        )
        share = FORWARD * (3 / 4 if recompute else 1)
        return Speed(self.step_s(rows), self.row_s * share, token_s(weight_bytes, device), source)


def probe(
    config: RunConfig, inputs: Inputs, plan: BatchPlan, base: Base, ranks: Ranks, copies: bool = False
) -> list[Probed]:
    """Probes on all ranks (collective); gives what each found, on every rank.

    Args:
        base: of this process, whose GEMMs are made: a run has not yet made them at its start.
        copies: whether the run's saves are written beside its passes.
    """
    with watchdog.patience("probing"):
        loss_fn = PreferenceLoss.of(config)
        in_memory = config.reference == "online" and loss_fn.needs_reference and not inputs.without_adapters
        frozen = open_reference(config, inputs, ranks) if in_memory else None
        engine = start_engine(config, inputs, loss_fn, ranks).engine
        start = max(0, peak_bytes(ranks.device) - base.compiled)
        found = _passes(engine, inputs, plan, ranks, frozen is not None, copies)
        del frozen
    told = gather_objects([start, *found], ranks, list[float])
    return [Probed(int(one[0]), int(one[1]), int(one[2]), *one[3:]) for one in told]


def _passes(engine: Engine, inputs: Inputs, plan: BatchPlan, ranks: Ranks, online: bool, copies: bool) -> list[float]:
    """Computes micro-batches; gives the fields of `Probed` after the first.

    Args: online: whether a step has the reference's forward pass in it, which takes as long as the policy's own.
    copies: see `probe`.
    """
    pairs, device = inputs.data.train, ranks.device
    several = plan.accumulates
    forget_peak(device)

    def timed(micro_batch: MicroBatch, last: bool) -> tuple[int, float]:
        """(packed rows, seconds) of a micro-batch."""
        watchdog.beat("probing")
        barrier(ranks)
        synchronize(device)
        started = time.perf_counter()
        batch = PairBatch.pack([pairs[i] for i in micro_batch]).to(device)
        packed = time.perf_counter()
        # as at a run's start: margins far from 0 make gradients denormal, and a CPU many times slower
        ref_B2 = engine.logps(batch)
        synchronize(device)
        since = started + (0.0 if online else time.perf_counter() - packed)
        pull = pull_of(engine.loss_fn, scores_of(ref_B2, ref_B2, batch)) if engine.loss_fn.couples else None
        engine.backward(batch, ref_B2, 1.0 / len(batch), last, pull)
        synchronize(device)
        return len(batch.tokens_T), time.perf_counter() - since

    largest = plan.largest_micro_batch()
    began = time.perf_counter()
    timed(largest, last=not several)  # the first pass makes what later ones find
    peak = peak_bytes(device)
    measured: list[tuple[int, float]] = []
    for micro_batch in islice(_others(plan, ranks.rank), _PASSES):
        measured.append(timed(micro_batch, last=not several))
        spent = (time.perf_counter() - began) * (1 + 1 / len(measured)) > _MOST_S
        if broadcast_object(spent, ranks, bool):  # by one clock
            break
    rows, seconds = (sum(column) for column in zip(*measured, strict=True))
    row_s = seconds / rows
    largest_rows, largest_s = timed(largest, last=True)
    if several:  # only then gradients were there when it was computed
        peak = peak_bytes(device)
    release(device)  # what malloc keeps of the passes is used again
    masters = sum(engine.masters)
    extra = step_extra(engine.masters, engine.largest_parameter, engine.offloads, engine.sums_in_one)
    copy = 12 * masters if copies and device.type == "cpu" else 0
    if device.type == "cpu" and not copies:  # a save then holds as much, without the 4 bytes of gradients
        extra = max(extra, 8 * masters)
    peak, step = peak + copy, resident_bytes(device) + copy + extra
    last_s = max(0.0, largest_s - largest_rows * row_s) if several else 0.0
    update_s = _update_s(masters, ranks, inputs.dtype, engine.sums_in_one)
    return [peak, step, largest_s, row_s, last_s, update_s]


def _others(plan: BatchPlan, rank: int) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the run, from its first step on; each rank has as many."""
    for index in range(plan.steps_per_epoch):
        step = plan.step(index)
        yield from (micro_batch or step[0][0] for micro_batch in step[rank])


def _update_s(weights: int, ranks: Ranks, dtype: torch.dtype, sums_in_one: bool) -> float:
    """Seconds of an optimizer step on a rank's share of so many weights, by those of a piece of them (collective).

    Args: sums_in_one: whether their gradients lie in one tensor, and for all steps in the same one.
    """
    piece = max(1, min(weights, _PIECE))
    masters, gradient = torch.zeros(piece, device=ranks.device), torch.full((piece,), 1e-3, device=ranks.device)
    computing, zeroed = torch.zeros(piece, device=ranks.device, dtype=dtype), torch.zeros(piece, device=ranks.device)
    optimizer = torch.optim.AdamW([masters], lr=0.0, fused=True)
    seconds = 0.0
    for _ in range(3):  # the first two warm up
        barrier(ranks)
        synchronize(ranks.device)
        started = time.perf_counter()
        if sums_in_one:
            block_norms(gradient)
            masters.grad = gradient.mul_(1.0)
        else:
            gradient.double().norm()
            masters.grad = gradient.clone().mul_(0.5)
        optimizer.step()
        computing.copy_(masters)
        if sums_in_one and ranks.world_size > 1:
            zeroed.zero_()
        synchronize(ranks.device)
        seconds = time.perf_counter() - started
    if ranks.world_size > 1:  # an exchange of sums sends twice what the gathering of the new weights does
        started = time.perf_counter()
        all_reduce_sum(computing)
        synchronize(ranks.device)
        seconds += (time.perf_counter() - started) / 2 * ranks.world_size
    return seconds * weights / piece
