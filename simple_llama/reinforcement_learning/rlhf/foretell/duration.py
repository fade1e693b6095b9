"""Time of a run: of a step by FLOPs at a stated rate or by a probe, and of all that a run does beside its steps."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from simple_llama.ops.machine import synchronize

# Of the rate of plain GEMMs, what whole steps reach: on CPUs with bf16 units each packed length needs new code.
_SHARE = {"cpu": 0.25, "cuda": 0.4}
_DISK = 0.3e9  # bytes a second that a disk takes
_COPY = 1e9  # bytes a second of a state that is copied, from all ranks
_PIECE = 1 << 24  # bytes whose reading is timed
_TOGETHER = 2.0  # a token of each of several answers at once, in tokens of one
FORWARD = 1 / 3  # of the time of a forward and a backward pass


class Speed(NamedTuple):
    """How fast a rank computes. Seconds."""

    step_s: float  # a full optimizer step
    forward_row_s: float  # a packed row without gradient
    token_s: float  # a token of an answer
    source: str  # where the numbers come from, in words


class Work(NamedTuple):
    """What a run does. Rows are packed rows of one rank."""

    steps: int
    missing_rows: float  # pairs that the reference store lacks
    evaluations: int
    held_out_rows: float
    prompt_rows: float  # of the greedy sample answers
    spoken_rows: float  # of the answers of which the KL is estimated, with their prompts; 0: of none
    sample_tokens: int  # of one answer
    saves: int
    save_bytes: int  # of one
    copied: int = 0  # bytes of a state, where saves are written beside the steps; 0: each is waited for


class _Hours(NamedTuple):
    """Seconds of each part of a run."""

    reference_s: float
    training_s: float
    evaluations_s: float
    samples_s: float
    saves_s: float


def estimated(flops: float, row_flops: float, weight_bytes: int, rate: float, device: torch.device) -> Speed:
    """Speed by FLOPs at a rate, both stated.

    Args:
        flops: useful ones of a rank's step. row_flops: those of a row, forward and backward.
        rate: FLOP/s of GEMMs, measured here or of a data sheet.
    """
    share = _SHARE[device.type]
    reached = share * rate
    source = (
        f"{flops:.3g} FLOPs a rank and step at {reached:.3g} a second, {share:.0%} of the {rate:.3g} of plain GEMMs"
    )
    return Speed(flops / reached, row_flops * FORWARD / reached, token_s(weight_bytes, device), source)


def token_s(weight_bytes: int, device: torch.device) -> float:
    """Seconds of a token of an answer: each reads all weights once, at the rate at which this machine reads memory."""
    piece = torch.zeros(_PIECE, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(3):
        synchronize(device)
        started = time.perf_counter()
        piece.view(torch.int64).sum()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best * weight_bytes / _PIECE


def _hours(work: Work, speed: Speed) -> _Hours:
    """Seconds of each part; saves at a stated rate of the disk."""
    row_s = speed.forward_row_s
    round_s = _TOGETHER * work.sample_tokens * speed.token_s
    samples_s = work.prompt_rows * row_s + round_s if work.prompt_rows else 0.0
    if work.spoken_rows:  # the policy reads the prompts, then it and the reference all rows
        samples_s += 3 * work.spoken_rows * row_s + round_s
    saves_s = work.saves * work.save_bytes / _DISK
    if work.copied:  # the last one is waited for
        saves_s = saves_s / work.saves + (work.saves - 1) * work.copied / _COPY
    return _Hours(
        reference_s=work.missing_rows * row_s,
        training_s=work.steps * speed.step_s,
        evaluations_s=work.evaluations * work.held_out_rows * row_s,
        samples_s=work.evaluations * samples_s,
        saves_s=saves_s,
    )


def told(work: Work, speed: Speed, kind: str) -> str:
    """The lines of a dry run. Args: kind: "estimate" or "probe"."""
    found = _hours(work, speed)
    beside = f"; all but the last beside the steps, from copies at {_COPY / 1e9:g} GB a second" if work.copied else ""
    lines = [
        f"a step {speed.step_s:.3f} s ({kind}: {speed.source})",
        f"{work.steps} steps {_time(found.training_s)}; {work.evaluations} evaluations {_time(found.evaluations_s)}, "
        f"their sample answers {_time(found.samples_s)}; {work.saves} saves {_time(found.saves_s)} "
        f"(at {_DISK / 1e9:g} GB a second, stated{beside})",
    ]
    if work.missing_rows:
        lines.append(f"before them a reference pass {_time(found.reference_s)}")
    lines.append(f"in all {sum(found) / 3600:.3f} h, without the reading of the inputs and audits of some ten seconds")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    """Seconds, or hours where they are many."""
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"
