"""The numbers of a run: collected on the device, reduced over all ranks once an interval, written to disk.

Names are the field's: loss, rewards/*, logps/*, grad_norm, learning_rate, epoch, perf/*; the same under eval_.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from simple_llama.cluster.distributed import all_reduce_sum
from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write
from simple_llama.common.logging import LOGGER

SUMMED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "pairs",
    "tokens",
    "useful_flops",
)


def pair_statistics(losses_B: torch.Tensor, logps_B2: torch.Tensor, rewards_B2: torch.Tensor) -> torch.Tensor:
    """Sums over the pairs of a batch, in the order of SUMMED (fp64, on the device, tokens and FLOPs 0).

    A tie of the rewards counts one half in the accuracy: a policy that equals its reference scores 0.5.
    """
    margins_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    right_B = (margins_B > 0).double() + 0.5 * (margins_B == 0)
    columns = torch.stack(
        [
            losses_B.double(),
            rewards_B2[:, 0].double(),
            rewards_B2[:, 1].double(),
            right_B,
            margins_B.double(),
            logps_B2[:, 0].double(),
            logps_B2[:, 1].double(),
            torch.ones_like(right_B),
            torch.zeros_like(right_B),
            torch.zeros_like(right_B),
        ]
    )
    return columns.sum(dim=1)


class MetricSums:
    """Sums over micro-batches of this rank; no host sync until `means`."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=device)

    def add(self, statistics: torch.Tensor, tokens: int = 0, useful_flops: float = 0.0) -> None:
        """Adds a batch's `pair_statistics`, the packed tokens computed and the FLOPs the result needed."""
        self.sums += statistics
        self.sums[-2] += tokens
        self.sums[-1] += useful_flops

    def means(self) -> dict[str, float]:
        """Means over all pairs of all ranks (collective), plus the totals `pairs`, `tokens` and `useful_flops`."""
        totals = dict(zip(SUMMED, all_reduce_sum(self.sums).tolist(), strict=True))
        count = max(totals["pairs"], 1.0)
        return {name: value if name in SUMMED[-3:] else value / count for name, value in totals.items()}

    def reset(self) -> None:
        """Starts a new interval."""
        self.sums.zero_()


def rewind(path: Path, step: int, evaluated: bool = True) -> None:
    """Drops the lines of a .jsonl file that lie beyond `step`, and a last line that a kill cut short.

    Not `evaluated`: what an evaluation wrote at `step` goes too, for it is made again.
    """
    if not path.exists():
        return
    kept = []
    with writes(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            record = json.loads(line)
            again = record["step"] == step and not evaluated and "loss" not in record
            if record["step"] <= step and not again:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            break
    atomic_write(path, "".join(kept).encode())


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line to a .jsonl file. UserError where the disk does not take it; `rewind` drops half a line."""
    with writes(path), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def writes(path: Path) -> Iterator[None]:
    """Makes the body's OSError (a full disk) a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another log_dir, then --resume"
        ) from error


class RunWriter:
    """metrics.jsonl and TensorBoard events of a run, on rank 0; elsewhere every call does nothing.

    Starting after step `done` (-1: nothing) drops what an earlier try wrote beyond it, so that each step stands once.
    """

    def __init__(self, folder: Path, is_main: bool, done: int = -1, evaluated: bool = True):
        self.is_main = is_main
        if not is_main:
            return
        self.path = folder / "metrics.jsonl"
        rewind(self.path, done, evaluated)
        with writes(folder):
            self.board = SummaryWriter(str(folder), purge_step=done + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl and one point of each curve at optimizer step `step`."""
        if not self.is_main:
            return
        append_record(self.path, {"step": step, **values})
        with writes(self.path.parent):
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a page of TensorBoard's text tab."""
        if self.is_main:
            with writes(self.path.parent):
                self.board.add_text(name, markdown, step)

    def flush(self) -> None:
        """Brings the events to disk."""
        if self.is_main:
            with writes(self.path.parent):
                self.board.flush()

    def close(self) -> None:
        """Brings the events to disk and ends. No error: it may be one that ends the run."""
        if self.is_main:
            try:
                self.board.close()
            except OSError as error:
                LOGGER.warning("curves in %s lack their end: %s", self.path.parent, error.strerror or error)
