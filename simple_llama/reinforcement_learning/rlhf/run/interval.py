"""The metrics of the optimizer steps since the last line: sums on the device, the clock, the traffic."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from simple_llama.cluster.distributed import Ranks, gather_objects
from simple_llama.common.settings import Count, Settings
from simple_llama.ops.machine import peak_memory_gb
from simple_llama.reinforcement_learning.rlhf.engine.communication import CommunicationMeter
from simple_llama.reinforcement_learning.rlhf.run.metrics import TOTALS, MetricSums


@dataclass(frozen=True)
class IntervalConfig(Settings):
    """How often metrics are written."""

    # === Intervals ===
    log_interval: Count = 1  # optimizer steps between lines of metrics


class Interval:
    """What is measured from one line of metrics to the next."""

    def __init__(self, sums: MetricSums, traffic: CommunicationMeter, peak: float, ranks: Ranks):
        """Args: peak: FLOP/s that all ranks' devices could do together."""
        self.sums, self.traffic, self.peak, self.ranks = sums, traffic, peak, ranks
        self.grad_norm = 0.0
        self.start()

    def start(self) -> None:
        """Starts the sums and the clock of the next interval."""
        self.sums.reset()
        self.traffic.reset()
        self.since, self.steps = time.perf_counter(), 0

    def count(self, grad_norm: float) -> None:
        """A step was made."""
        self.grad_norm, self.steps = grad_norm, self.steps + 1

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """The body's time counts for no step."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def values(self, rate: float, epoch: float) -> dict[str, float]:
        """The metrics of the interval over all ranks (collective), by their names.

        Args:
            rate: learning rate of its last step. epoch: passes over the pairs so far.
        """
        means = self.sums.means()
        saturated = self.sums.saturated_share(means["pairs"])
        self.traffic.settle(wait=True)
        mine = (peak_memory_gb(self.ranks.device), self.traffic.sent_bytes, self.traffic.seconds)
        of_all = gather_objects(mine, self.ranks, tuple[float, float, float])
        peak_gb, sent_bytes, communicating_s = zip(*of_all, strict=True)
        seconds = time.perf_counter() - self.since
        return {
            **{name: value for name, value in means.items() if name not in TOTALS},
            "rewards/saturated": saturated,
            "grad_norm": self.grad_norm,
            "learning_rate": rate,
            "epoch": epoch,
            "perf/pairs_per_second": means["pairs"] / seconds,
            "perf/tokens_per_second": means["tokens"] / seconds,
            "perf/mfu": means["useful_flops"] / seconds / self.peak,
            "perf/step_time_s": seconds / self.steps,
            "perf/comm_time_s": sum(communicating_s) / self.ranks.world_size / self.steps,
            "perf/comm_mb": sum(sent_bytes) / self.ranks.world_size / self.steps / 1e6,
            "perf/peak_memory_gb": max(peak_gb),
        }
