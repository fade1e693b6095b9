"""Where the GPU's time goes in traced training steps: kernels by kind, and how long none of them ran.

    python -m benchmarks.gpu_kernels runs/NAME/profile/steps_4-5_rank_00000.pt.trace.json.gz

Reads what `--profile_steps` writes. A kind is known by the kernel's name: the first of `KINDS` that is found in it.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from benchmarks.measure import table
from simple_llama.common.errors import UserError

COLLECTIVES = "collectives"
# lower case; kernels of one kind may lie in several libraries
KINDS = {
    COLLECTIVES: r"nccl",
    "attention": r"flash|fmha|attention",
    "GEMMs": r"gemm|cutlass|nvjet|xmma|cublas|splitk",
    "log-prob head's rows": r"^_(rows|sums|weighted|scale)_kernel",
    "layers' fused rows": r"^_(norm|norm_gradient|swiglu|swiglu_gradient|place|add_places)_kernel",
    "AdamW": r"adam",
    "gathers and scatters": r"index|gather|scatter|embedding",
    "copies and dtypes": r"memcpy|copy|catarray|memset|fill",
    "reductions": r"reduce|norm|softmax",
    "other element-wise": r"elementwise|vectorized|silu|triton",
}
REST = "all else"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP = re.compile(r"ProfilerStep#\d+")


@dataclass(frozen=True)
class TraceToRead:
    """Which one."""

    trace: Annotated[str, tyro.conf.Positional]  # a file of --profile_steps, as it is or unpacked


class Kernel(NamedTuple):
    """One launch."""

    name: str
    start_us: float
    end_us: float


class Trace(NamedTuple):
    """Of a rank."""

    kernels: list[Kernel]
    steps: int


def read_trace(path: Path) -> Trace:
    """UserError for a file that is no trace, or one without a GPU's kernels."""
    try:
        data = path.read_bytes()
        found = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        events = found["traceEvents"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected a trace of --profile_steps, found {type(error).__name__}: {error}"
        ) from error
    whole = [event for event in events if event.get("ph") == "X"]
    kernels = [_kernel(event) for event in whole if event.get("cat") in _ON_DEVICE]
    steps = {event["name"] for event in whole if _STEP.fullmatch(str(event.get("name"))) and "gpu" not in event["cat"]}
    if not kernels or not steps:
        raise UserError(f"{path}: expected steps on a GPU, found {len(kernels)} kernels in {len(steps)} steps")
    return Trace(kernels, len(steps))


def _kernel(event: dict[str, Any]) -> Kernel:
    start = float(event["ts"])
    return Kernel(str(event["name"]), start, start + float(event.get("dur", 0.0)))


def kind_of(name: str) -> str:
    """The first kind whose words are in a kernel's name."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name.lower())), REST)


def busy_us(kernels: Iterable[Kernel]) -> float:
    """How long at least one of them ran."""
    busy, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_us):
        busy += max(0.0, kernel.end_us - max(kernel.start_us, end))
        end = max(end, kernel.end_us)
    return busy


class Overlap(NamedTuple):
    """Of a trace's collectives, in which ranks exchange something or wait for each other."""

    collectives_us: float  # how long at least one ran
    hidden_us: float  # of that, while a kernel that computes ran beside it

    @property
    def share(self) -> float:
        """Of the collectives' time that cost none; 0 where there are none."""
        return self.hidden_us / self.collectives_us if self.collectives_us else 0.0


def overlap(kernels: Iterable[Kernel]) -> Overlap:
    """How much of the collectives' time the computation hides. Copies and fills are no computation."""
    by_kind: dict[bool, list[Kernel]] = {True: [], False: []}
    for kernel in kernels:
        if not kernel.name.startswith(("Memcpy", "Memset")):
            by_kind[kind_of(kernel.name) == COLLECTIVES].append(kernel)
    sent, computed = by_kind[True], by_kind[False]
    alone = busy_us(sent)
    return Overlap(alone, alone + busy_us(computed) - busy_us([*sent, *computed]))


def report(trace: Trace) -> str:
    """The table, and in a line the share of the time from the first kernel to the last in which none ran; where there
    are collectives, how much of their time is beside computation."""
    steps, kinds = trace.steps, [*KINDS, REST]
    spent, launched = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0)
    for kernel in trace.kernels:
        kind = kind_of(kernel.name)
        spent[kind] += kernel.end_us - kernel.start_us
        launched[kind] += 1
    total = sum(spent.values())
    rows = [["kind", "ms a step", "share", "kernels a step"]]
    for kind in sorted(filter(launched.get, kinds), key=lambda kind: -spent[kind]):
        cells = [f"{spent[kind] / steps / 1e3:.2f}", f"{spent[kind] / total:.1%}", f"{launched[kind] / steps:,.0f}"]
        rows.append([kind, *cells])
    span = max(kernel.end_us for kernel in trace.kernels) - min(kernel.start_us for kernel in trace.kernels)
    busy, count = busy_us(trace.kernels), len(trace.kernels)
    words = f"{steps} steps, {span / steps / 1e3:.1f} ms each from first kernel to last; the GPU was busy in "
    words += f"{busy / span:.1%}, idle in {1 - busy / span:.1%}; {count / steps:,.0f} kernels a step."
    if launched[COLLECTIVES]:
        exchange = overlap(trace.kernels)
        words += f" A collective ran for {exchange.collectives_us / steps / 1e3:.2f} ms a step, "
        words += f"{exchange.share:.1%} of it beside computation."
    return f"{table(rows)}\n\n{words}"


if __name__ == "__main__":
    try:
        print(report(read_trace(Path(tyro.cli(TraceToRead, description=__doc__).trace))))
    except UserError as problem:
        sys.exit(f"error: {problem}")
