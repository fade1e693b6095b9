"""Times the log-prob head of a DPO step, forward and backward, against TRL, torch, eager and Liger on this machine.

    python -m benchmarks.bench_logprob                  a part of the grid: about 12 minutes on two slow cores
    python -m benchmarks.bench_logprob --full           the whole grid: hours
    python -m benchmarks.bench_logprob --device cuda    the whole grid on a GPU

Run it where benchmarks/requirements.txt is installed: a peer that is not has "not installed" in place of numbers.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import tyro

from benchmarks import head_ways, measure
from benchmarks.head_ways import Errors, Exact, Outcome, Problem, worst
from benchmarks.kept import KEPT
from simple_llama.ops.machine import has_fast_bf16, synchronize

Size = tuple[int, int, int]  # N, D, V
WIDTHS, VOCABULARIES, ROWS = (512, 1024, 4096), (8192, 32000, 128256), (512, 1024, 2048, 4096)
CPU_PART: tuple[Size, ...] = (
    (512, 512, 8192),
    (2048, 512, 8192),
    (1024, 1024, 8192),
    (512, 1024, 32000),
    (512, 4096, 8192),
    (512, 512, 128256),
)
HEADLINE: Size = (4096, 4096, 128256)
GPU_TARGETS: dict[Size, tuple[float, float | None]] = {  # of bf16 inputs on an H200: milliseconds, GiB at most
    HEADLINE: (17.5, 3.3),
    (4096, 2048, 8192): (1.2, None),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MIB = 2**20


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    device: Literal["cpu", "cuda"] = "cpu"  # cuda: the whole grid
    threads: int = 2  # CPU threads
    rounds: int = 5  # each round times every way once
    dtype: Literal["auto", "bf16", "fp32", "both"] = "auto"  # inputs; auto: bf16, and fp32 on a CPU without bf16 units
    full: bool = False  # the whole grid on a CPU too
    sizes: tuple[tuple[int, int, int], ...] = ()  # N D V ... instead of the grid
    answer_tokens: int = 64  # scored tokens of every answer
    limit_s: float = 20.0  # a way whose first call takes longer is left out at that size
    minutes: float = 0.0  # after which no other measurement begins; 0: all are made
    results: str = measure.RESULTS  # file that the results are appended to; empty: only printed


@dataclass(frozen=True)
class Result:
    """One way at one size, with inputs in one dtype."""

    size: Size
    dtype: str
    way: str
    why: str = ""  # why there are no numbers
    seconds: float | None = None
    extra_bytes: int = 0
    errors: Errors | None = None


class MemoryRow(NamedTuple):
    """Peak extra bytes of one call."""

    size: Size
    ours: int
    eager: int
    results: int  # of both gradients, which the caller asked for


class Report(NamedTuple):
    """All that was measured."""

    dtypes: Sequence[str]
    gemm_flops: Mapping[str, float]
    results: Sequence[Result]
    memory: Sequence[MemoryRow]


def main(bench: Bench) -> None:
    """Measures, prints and appends the section."""
    device = torch.device(bench.device)
    torch.set_num_threads(bench.threads)
    command = shlex.join(["python", "-m", "benchmarks.bench_logprob", *sys.argv[1:]])
    KEPT.begin(command, bench.results, bench.minutes)
    # imports of peers and compilations are no part of a first call at a size
    measure_size(replace(bench, rounds=1, limit_s=math.inf), (2 * bench.answer_tokens, 16, 32), device)
    before = {name: measure.gemm_flops(dtype, device) for name, dtype in DTYPES.items()}
    results: list[Result] = []
    for size in sizes(bench):
        if results and KEPT.is_over():
            break
        print(f"N {size[0]}, D {size[1]}, V {size[2]} ...", flush=True)
        results += measure_size(bench, size, device)
    gemms = {name: max(before[name], measure.gemm_flops(dtype, device)) for name, dtype in DTYPES.items()}
    report = Report(input_dtypes(bench), gemms, results, memory_rows(bench, device))
    measure.record("The log-prob head", command, body(bench, report, device), device, bench.results)


def sizes(bench: Bench) -> Sequence[Size]:
    """The sizes to measure, in the order of their work; on a GPU the one that its targets are of comes first."""
    if bench.sizes:
        return bench.sizes
    if bench.device == "cpu" and not bench.full:
        return CPU_PART
    grid = [(rows, width, vocabulary) for rows in ROWS for width in WIDTHS for vocabulary in VOCABULARIES]
    grid.sort(key=lambda size: size[0] * size[1] * size[2])
    return [HEADLINE, *(size for size in grid if size != HEADLINE)] if bench.device == "cuda" else grid


def input_dtypes(bench: Bench) -> list[str]:
    """Names of the dtypes that the inputs are held in."""
    if bench.dtype in DTYPES:
        return [bench.dtype]
    return ["bf16"] if bench.dtype == "auto" and has_fast_bf16(bench.device) else list(DTYPES)


def measure_size(bench: Bench, size: Size, device: torch.device) -> list[Result]:
    """Every way at one size with inputs in every dtype.

    Calls of a way: one for its errors, which also tells whether it runs within the limit, one for its memory, and the
    rounds of `interleaved`, which all ways share.
    """
    given = head_ways.make_problem(*size, bench.answer_tokens, device)
    references = {nll: head_ways.exact(given, nll) for nll in (False, True)} if is_checkable(size, device) else {}
    results: list[Result] = []
    calls: list[Callable[[], Outcome]] = []
    for dtype in input_dtypes(bench):
        problem = head_ways.held_in(given, DTYPES[dtype])
        for name, way in head_ways.ways(device.type, problem.hidden_ND.dtype).items():
            call = partial(way, problem)
            why, errors = first_call(call, name, problem, references, bench.limit_s)
            extra_bytes = 0 if why else measure.peak_extra_bytes(call, device)
            results.append(Result(size, dtype, name, why, None, extra_bytes, errors))
            calls.append(call)
            KEPT.keep(_title(results[-1]), **({"why": why} if why else {"extra_bytes": extra_bytes, "errors": errors}))
    kept = {_title(result): call for result, call in zip(results, calls, strict=True) if not result.why}
    seconds = measure.medians(measure.interleaved(kept, bench.rounds, device))
    return [replace(result, seconds=seconds.get(_title(result))) for result in results]


def _title(result: Result) -> str:
    """Of one way at one size, in the lines that are kept."""
    rows, width, vocabulary = result.size
    return f"N {rows}, D {width}, V {vocabulary}, {result.dtype}, {result.way}"


def is_checkable(size: Size, device: torch.device) -> bool:
    """Whether fp64 is affordable: everywhere on a GPU, up to N 2048, D 1024, V 32000 on a CPU."""
    return device.type == "cuda" or all(have <= most for have, most in zip(size, (2048, 1024, 32000), strict=True))


def first_call(
    call: Callable[[], Outcome], name: str, problem: Problem, references: Mapping[bool, Exact], limit_s: float
) -> tuple[str, Errors | None]:
    """(why the way is left out or "", its errors where there is a reference). Ours must run; a peer may fail."""
    device = problem.hidden_ND.device
    start = time.perf_counter()
    try:
        outcome = call()
        synchronize(device)
    except ModuleNotFoundError:
        return "not installed", None
    except Exception as error:  # a peer that fails is a finding, and libraries fail in many ways
        if name.startswith("ours"):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}", None
    if time.perf_counter() - start > limit_s:
        return f"> {limit_s:g} s", None
    if not references:
        return "", None
    if name.startswith("ours"):
        outcome = head_ways.with_our_tokens(outcome, problem)
    return "", head_ways.errors(outcome, references[name == head_ways.NLL], problem)


def memory_rows(bench: Bench, device: torch.device) -> list[MemoryRow]:
    """Peak extra memory of ours and of eager over N, at one D and V."""
    rows_list = (4096, 8192, 16384) if device.type == "cuda" else ROWS
    _, width, vocabulary = HEADLINE if device.type == "cuda" else CPU_PART[0]
    if bench.sizes:
        rows, width, vocabulary = bench.sizes[0]
        rows_list = (rows, 2 * rows)
    found = []
    for rows in rows_list:
        if KEPT.is_over():
            break
        given = head_ways.make_problem(rows, width, vocabulary, bench.answer_tokens, device)
        problem = head_ways.held_in(given, DTYPES[input_dtypes(bench)[0]])
        ours, eager = (
            measure.peak_extra_bytes(partial(way, problem), device) for way in (head_ways.ours, head_ways.eager)
        )
        found.append(
            MemoryRow((rows, width, vocabulary), ours, eager, problem.hidden_ND.nbytes + problem.weight_VD.nbytes)
        )
        KEPT.keep(f"extra bytes, N {rows}, D {width}, V {vocabulary}", ours=ours, eager=eager)
    return found


def body(bench: Bench, report: Report, device: torch.device) -> str:
    """The section's text: what was done, the targets, the tables."""
    rates = ", ".join(f"{name} {flops / 1e9:,.0f}" for name, flops in report.gemm_flops.items())
    best = max(report.gemm_flops[name] for name in report.dtypes)
    tables = (
        ("Median milliseconds", lambda r: f"{1e3 * r.seconds:,.1f}"),
        ("Time over that of ours with inputs in the same dtype", lambda r: slowdown(report, r)),
        (
            f"Useful FLOPs (6 N D V: three GEMMs) over the time, as a share of {best / 1e9:,.0f} GFLOP/s",
            lambda r: f"{6 * r.size[0] * r.size[1] * r.size[2] / r.seconds / best:.0%}",
        ),
        ("Peak extra memory in MiB, both gradients included", lambda r: f"{r.extra_bytes / MIB:,.0f}"),
        ("Largest error of an answer's log-prob sum (-: not given, or fp64 too dear)", lambda r: error_cell(r, "sums")),
        ("Largest error of a token's log-prob, likewise", lambda r: error_cell(r, "token")),
        (
            "Largest error of a gradient's entry over that gradient's largest entry (-: fp64 too dear)",
            lambda r: error_cell(r, "gradient"),
        ),
    )
    parts = [
        f"Medians of {bench.rounds} rounds in which every way is called once, all in one process. Every way is given "
        f"the same scored rows, answers of {bench.answer_tokens} tokens (TRL itself scores every row on a CPU, and "
        "nobody pays for padding here), and computes the mean sigmoid DPO loss and both gradients; but the loss of "
        "`torch sum` is the plain sum over the tokens. fp32 inputs hold the same numbers as bf16 inputs.",
        f"GEMM rates measured in this run, GFLOP/s, the best of before and after: {rates}.",
        measure.table(target_rows(report, device)),
        *(f"{title}:\n\n{grid(report.results, show)}" for title, show in tables),
    ]
    if report.memory:
        _, width, vocabulary = report.memory[0].size
        title = f"Peak extra memory over N at D {width}, V {vocabulary}, {report.dtypes[0]} inputs, MiB"
        parts.append(f"{title}:\n\n{measure.table(memory_table(report.memory))}")
    return "\n\n".join(parts)


def grid(results: Sequence[Result], show: Callable[[Result], str]) -> str:
    """A row a size and dtype, a column a way."""
    cells = {(result.size, result.dtype, result.way): result.why or show(result) for result in results}
    columns = list(dict.fromkeys(result.way for result in results))
    rows = [["N", "D", "V", "inputs", *columns]]
    for size, dtype in dict.fromkeys((result.size, result.dtype) for result in results):
        rows.append([*map(str, size), dtype, *(cells.get((size, dtype, way), "-") for way in columns)])
    return measure.table(rows)


def error_cell(result: Result, name: Literal["sums", "token", "gradient"]) -> str:
    """An error, or "-" where it is not known."""
    error = None if result.errors is None else getattr(result.errors, name)
    return "-" if error is None else f"{error:.1e}"


def memory_table(memory: Sequence[MemoryRow]) -> list[list[str]]:
    """Peak memory over N."""
    rows = [["N", "gradients asked for", "ours beyond them", "ours", "eager", "ours / eager"]]
    for row in memory:
        sizes_mib = [f"{n / MIB:,.1f}" for n in (row.results, row.ours - row.results, row.ours, row.eager)]
        rows.append([str(row.size[0]), *sizes_mib, f"{row.ours / row.eager:.3f}"])
    return rows


def seconds_of(report: Report, size: Size, way: str, dtype: str | None) -> float | None:
    """Time of a way with inputs in one dtype, or (None) in its faster one; None where it has no time."""
    times = [
        result.seconds
        for result in report.results
        if (result.size, result.way) == (size, way) and dtype in (None, result.dtype) and result.seconds is not None
    ]
    return min(times, default=None)


def slowdown(report: Report, result: Result) -> str:
    """A way's time over that of ours; "-" where ours took longer than the limit."""
    ours = seconds_of(report, result.size, "ours", result.dtype)
    return "-" if ours is None or result.seconds is None else f"{result.seconds / ours:.2f}"


def target_rows(report: Report, device: torch.device) -> list[list[str]]:
    """What was aimed at, what came out, and whether that is enough."""
    rows = [["target", "measured", ""]]
    everywhere = list(dict.fromkeys(result.size for result in report.results))
    if device.type == "cpu":
        for peer, floor in {"TRL 1.16": 3.0, "torch none": 4.0, "torch none, own chunks": 4.0}.items():
            rows += ratio_rows(report, peer, floor, everywhere, "all sizes")
        return rows + accuracy_rows(report) + memory_target_rows(report.memory)
    rows += gpu_rows(report)
    for where, those in {"that size": [HEADLINE], "all sizes": everywhere}.items():
        for peer, floor in {"TRL 1.16": 1.3, "Liger Triton": 7.0, "Liger Triton, large chunks": 7.0}.items():
            rows += ratio_rows(report, peer, floor, those, where)
    return rows + accuracy_rows(report, 1e-4) + memory_target_rows(report.memory)


def gpu_rows(report: Report) -> list[list[str]]:
    """Times and memory of ours with bf16 inputs at the sizes that have a target."""
    rows = []
    for size, (most_ms, most_gib) in GPU_TARGETS.items():
        ours = [
            result for result in report.results if (result.size, result.dtype, result.way) == (size, "bf16", "ours")
        ]
        where = "at N {}, D {}, V {}, bf16".format(*size)
        found = [1e3 * result.seconds for result in ours if result.seconds]
        cells = verdict(min(found, default=None), "{:.2f} ms", lambda x, most=most_ms: x <= most)
        rows.append([f"<= {most_ms:g} ms {where}", *cells])
        if most_gib:
            taken = [result.extra_bytes / 2**30 for result in ours if result.extra_bytes]
            cells = verdict(min(taken, default=None), "{:.2f} GiB", lambda x, most=most_gib: x <= most)
            rows.append([f"<= {most_gib:g} GiB, both gradients included, {where}", *cells])
    return rows


def ratio_rows(report: Report, peer: str, floor: float, those: Sequence[Size], where: str) -> list[list[str]]:
    """Whether ours is `floor` times as fast as a peer at every size where both have a time, for each dtype of inputs.

    Where the peer was called with both dtypes, also each way in its faster one: what its user would choose.
    """
    dtypes: dict[str, str | None] = {
        f"{result.dtype} inputs": result.dtype for result in report.results if result.way == peer
    }
    if len(dtypes) > 1:
        dtypes["each in its faster dtype"] = None
    rows = []
    for label, dtype in dtypes.items():
        pairs = [[seconds_of(report, size, way, dtype) for way in (peer, "ours")] for size in those]
        ratios = [theirs / ours for theirs, ours in pairs if theirs and ours]
        most = f" to {max(ratios):.2f} (at {len(ratios)} of {len(those)})" if ratios else ""
        cells = verdict(min(ratios, default=None), "{:.2f}" + most, lambda x: x >= floor)
        rows.append([f">= {floor:g}x {peer}, {where}, {label}", *cells])
    return rows


def accuracy_rows(report: Report, most: float = 1e-3) -> list[list[str]]:
    """The error of a token's log-prob, for each dtype of the inputs."""
    rows = []
    for dtype in report.dtypes:
        ours = [result.errors for result in report.results if (result.dtype, result.way) == (dtype, "ours")]
        known = [errors.token for errors in ours if errors is not None and errors.token is not None]
        cells = verdict(worst(known) if known else None, "{:.1e}", lambda x: x <= most)
        rows.append([f"a token's log-prob within {most:g} of fp64, {dtype} inputs", *cells])
    return rows


def memory_target_rows(memory: Sequence[MemoryRow]) -> list[list[str]]:
    """Whether memory beyond the gradients stays the same over N, and is a fifth of eager's at the largest N."""
    if not memory:
        return [["memory beyond the gradients the same for all N", "-", "not measured"]]
    beyond = [row.ours - row.results for row in memory]
    last = memory[-1]
    share = (last.ours - last.results) / (last.eager - last.results)
    least_rows, most_rows = memory[0].size[0], last.size[0]
    growth = max(beyond) / min(beyond)
    logits_row = 4 * last.size[2]
    per_row = (beyond[-1] - beyond[0]) / (most_rows - least_rows)
    return [
        [
            f"memory beyond the gradients the same for N {least_rows} to {most_rows}",
            *verdict(
                growth,
                "{:.2f}x" + f": {per_row:,.0f} bytes a row of N; a row of fp32 logits has {logits_row:,}",
                lambda x: x <= 1.05,
            ),
        ],
        [
            f"memory beyond the gradients <= 1/5 of eager's at N {most_rows}",
            *verdict(share, "{:.3f}", lambda x: x <= 0.2),
        ],
    ]


def verdict(value: float | None, shown: str, is_met: Callable[[float], bool]) -> tuple[str, str]:
    """(the value in words, whether it is enough)."""
    return ("-", "not measured") if value is None else (shown.format(value), "met" if is_met(value) else "not met")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
