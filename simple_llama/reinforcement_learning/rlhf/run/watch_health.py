"""Judges a run's numbers as they are recorded, and says each warning once: log, warnings.jsonl, TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from simple_llama.cluster.distributed import Ranks, broadcast_object, gather_objects
from simple_llama.common.logging import LOGGER
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import MicroBatch
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.objective.policy import PolicyOutput
from simple_llama.reinforcement_learning.rlhf.run.health import Facts, Finding, findings
from simple_llama.reinforcement_learning.rlhf.run.history import History
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums
from simple_llama.reinforcement_learning.rlhf.run.records import WARNINGS, RunWriter, append_warning, read_records
from simple_llama.reinforcement_learning.rlhf.run.schedule import ScheduleConfig

_MOST_NAMED = 8  # pairs
_SPIKE = "gradient_spikes"


class StepSums(MetricSums):
    """Sums of an interval that also keep the losses of the newest step's pairs, on the device."""

    losses: tuple[torch.Tensor, ...] = ()  # (B,) of each of this rank's micro-batches that count

    def add(self, out: PolicyOutput, batch: PairBatch) -> None:
        """Adds what a forward pass gave for a batch."""
        super().add(out, batch)
        self.losses += (out.losses_B,)

    def begin_step(self) -> None:
        """Forgets the losses of the step before."""
        self.losses = ()


def facts_of(config: ScheduleConfig, data: RLDatasetLoader, total_steps: int, beta: float) -> Facts:
    """What a run of so many steps knows before the first."""
    counts_N2 = data.validation.keys["counts"]
    return Facts(
        pairs=len(data.train),
        held_out=len(data.validation),
        total_steps=total_steps,
        beta=beta,
        rates=sum(config.rates(total_steps)),
        answer_tokens=float(counts_N2.mean()) if len(counts_N2) else 0.0,
        largest_prompt_share=data.largest_prompt_share,
    )


def costliest(pairs: PairSet, mine: Sequence[MicroBatch], losses: Sequence[torch.Tensor], ranks: Ranks) -> list[str]:
    """The pairs of a step with the largest losses, each with its loss and its scored tokens (collective).

    Args:
        mine: this rank's micro-batches. losses: (B,) of each that is not empty.
    """
    filled = (micro_batch for micro_batch in mine if micro_batch)
    found = [
        (loss, f"{Path(pairs.origin(i)).name} (loss {loss:.3g}, {int(pairs.keys['counts'][i].sum())} tokens)")
        for micro_batch, loss_B in zip(filled, losses, strict=True)
        for i, loss in zip(micro_batch, loss_B.tolist(), strict=True)
    ]
    largest = sorted(found, reverse=True)[:_MOST_NAMED]
    gathered = gather_objects(largest, ranks, list[tuple[float, str]])
    return [name for _, name in sorted((pair for rank in gathered for pair in rank), reverse=True)[:_MOST_NAMED]]


class HealthWatch:
    """The numbers of a run so far, on rank 0, and which warnings it has given, over resumes too."""

    def __init__(self, folder: Path, facts: Facts, writer: RunWriter, ranks: Ranks):
        """Reads what the run's folder has of both."""
        self.folder, self.facts, self.writer, self.ranks = folder, facts, writer, ranks
        self.history = History()
        self.given: list[Finding] = []
        if ranks.is_main:
            for record in read_records(folder / "metrics.jsonl"):
                self.history.add(record)
            self.given = [
                Finding(record["step"], record["level"], record["name"], record["text"])
                for record in read_records(folder / WARNINGS)
                if all(isinstance(record.get(name), str) for name in ("level", "name", "text"))
            ]

    def see(self, step: int, values: dict[str, float], culprits: Callable[[], list[str]] | None = None) -> None:
        """Judges a line that was just recorded.

        Args:
            culprits: names the pairs of the step (collective); with it this call is collective.
        """
        found: list[Finding] = []
        if self.ranks.is_main:
            self.history.add({"step": step, **values})
            found = findings(self.history, self.facts, step, {finding.name for finding in self.given})
        if culprits and broadcast_object(any(finding.name == _SPIKE for finding in found), self.ranks, bool):
            named = "; ".join(culprits())
            found = [
                finding._replace(text=f"{finding.text}. Its pairs with the largest loss: {named}")
                if finding.name == _SPIKE
                else finding
                for finding in found
            ]
        for finding in found:
            self._say(finding)

    def _say(self, finding: Finding) -> None:
        """Keeps a warning, and tells of it."""
        self.given.append(finding)
        append_warning(self.folder, finding.step, finding.level, finding.name, finding.text)
        tell = LOGGER.warning if finding.level == "alarm" else LOGGER.info
        tell("%s (%s): %s", finding.level, finding.name, finding.text)
        parts = [(f"{one.level}, step {one.step}:", one.text) for one in self.given]
        self.writer.text(finding.step, "warnings", parts)
