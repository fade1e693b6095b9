"""What the benches share: interleaved timing, extra memory, the machine in words, and a table for RESULTS.md."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.kept import KEPT
from benchmarks.quiet import CoreWatch, Share, own_cpu
from simple_llama.common.paths import root_path
from simple_llama.ops.machine import synchronize

Way = Callable[[], object]
MOST_AGAIN = 3  # rounds that are made again because the machine was not quiet
RESULTS = root_path("benchmarks", "RESULTS.md")
PACKAGES = ("torch", "deepspeed", "triton", "trl", "transformers", "accelerate", "liger-kernel")


class Timed(dict[str, list[float]]):
    """Seconds of each call, by way, of the rounds that count."""

    def __init__(
        self, seconds: Mapping[str, list[float]], cpu: Mapping[str, list[float]], rounds: Sequence[int], noise: str
    ):
        """Args: cpu: CPU seconds of the same calls. rounds: which ones count, from 0. noise: of others, in words."""
        super().__init__(seconds)
        self.cpu, self.rounds, self.noise = cpu, rounds, noise

    def in_words(self) -> str:
        """CPU seconds of each way, and how quiet the machine was."""
        cpu = ", ".join(f"{name} {middle:.2f}" for name, middle in medians(self.cpu).items())
        return f"CPU seconds a call: {cpu}; {self.noise}"


def interleaved(ways: Mapping[str, Way], repeats: int, device: torch.device) -> Timed:
    """Times each call of each way: rounds of one call a way, so that a drift of the machine meets all alike.

    A round more than `repeats` is made; the first one warms up and is not counted. A round in which others had much of
    the cores is said and made again, up to MOST_AGAIN of them. Quiet rounds alone count; all where fewer than half of
    those that were wanted are quiet, which is said. Each time is kept as it comes (`kept.py`); one round is made in any
    case, and no further one that would not end before the bench's time does.
    """
    rounds: list[tuple[Share, dict[str, tuple[float, float]]]] = []
    _round(ways, device, "warm-up")
    last_s = 0.0
    while len(rounds) < repeats + MOST_AGAIN and sum(share.is_quiet for share, _ in rounds) < repeats:
        if rounds and KEPT.is_over(last_s):
            break
        watch, began = CoreWatch(), time.monotonic()
        times = _round(ways, device, f"round {len(rounds) + 1}")
        rounds.append((watch.share(), times))
        last_s = time.monotonic() - began
        wrong = "" if rounds[-1][0].is_quiet else "; not quiet"
        print(f"round {len(rounds)}: {rounds[-1][0]}{wrong}", file=sys.stderr, flush=True)
    quiet = [number for number, (share, _) in enumerate(rounds) if share.is_quiet]
    counted = quiet if quiet and 2 * len(quiet) >= repeats else range(len(rounds))
    seconds, cpu = ({name: [rounds[n][1][name][which] for n in counted] for name in ways} for which in (0, 1))
    loudest = max((share for share, _ in rounds), key=lambda share: share.others + share.steal)
    kept = f"{len(quiet)} of {len(rounds)} rounds were quiet" + ("" if counted is quiet else ", NOT QUIET: all count")
    return Timed(seconds, cpu, counted, f"{kept}; at most {loudest}")


def _round(ways: Mapping[str, Way], device: torch.device, title: str) -> dict[str, tuple[float, float]]:
    """Seconds and CPU seconds of a call of each way, kept as they come."""
    found = {}
    for name, way in ways.items():
        synchronize(device)
        start, cpu = time.perf_counter(), own_cpu()
        way()
        synchronize(device)
        found[name] = time.perf_counter() - start, own_cpu() - cpu
        KEPT.keep(f"{title}, {name}", seconds=found[name][0], cpu_seconds=found[name][1])
    return found


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each way's times."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_extra_bytes(way: Way, device: torch.device) -> int:
    """Most bytes of tensors that exist at once during a call, beyond those before it: workspace and results.

    CUDA: of the caching allocator. CPU: of torch's allocator, as its profiler records each allocation; of the scratch
    memory of GEMMs that has what oneDNN asks torch for, but not what a library takes for itself.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        way()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    held = most = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, held)
    return most


def gemm_flops(dtype: torch.dtype, device: torch.device, tries: int = 5) -> float:
    """Best FLOP/s of x W^T over several shapes, in exactly `dtype`."""
    small = ((1024, 1024, 1024), (2048, 512, 2048), (2048, 2048, 2048))  # T rows, I inputs, O outputs
    large = ((8192, 8192, 8192), (16384, 2048, 8192), (16384, 4096, 4096))
    best = 0.0
    for rows, inputs, outputs in large if device.type == "cuda" else small:
        x_TI = torch.randn(rows, inputs, device=device).to(dtype)
        weight_OI = torch.randn(outputs, inputs, device=device).to(dtype)
        for _ in range(tries):
            synchronize(device)
            start = time.perf_counter()
            F.linear(x_TI, weight_OI)
            synchronize(device)
            best = max(best, 2 * rows * inputs * outputs / (time.perf_counter() - start))
    return best


def peak_gib(way: Way, device: torch.device) -> float:
    """GiB that a call needs beyond what is there before it: of the CUDA allocator, or of the process's resident set.

    The resident set counts all threads and libraries.
    """
    if device.type == "cuda":
        return peak_extra_bytes(way, device) / 2**30
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have left for reuse goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (man 5 proc)
    before = resident_kib("VmRSS")
    way()
    return (resident_kib("VmHWM") - before) / 2**20


def peaks_gib(ways: Mapping[str, Way], device: torch.device) -> dict[str, float]:
    """`peak_gib` of each way, kept as it comes; nan where the bench's time was over."""
    found = dict.fromkeys(ways, math.nan)
    for name, way in ways.items():
        if not KEPT.is_over():
            found[name] = peak_gib(way, device)
            KEPT.keep(f"memory, {name}", gib=found[name])
    return found


def resident_kib(field: str) -> int:
    """A size of this process from /proc/self/status."""
    lines = read_lines("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class PeakMemory:
    """Most memory at once, while the body runs, of the children that it starts and of theirs: `peak_gib`.

    A sum of proportional set sizes, in which a page that several share counts once; looked at every second.
    """

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._others: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._others = _descendants(os.getpid())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self.peak_gib = max(self.peak_gib, sum(map(_pss_kib, _descendants(os.getpid(), self._others))) / 2**20)


def _descendants(root: int, but: Collection[int] = ()) -> set[int]:
    """Processes that descend from `root`, itself left out, and those in `but` with what descends from them."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):  # gone meanwhile
                # "pid (name) state parent ...", where the name may hold anything
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    level = {root}
    while level := {pid for pid, parent in parents.items() if parent in level and pid not in but}:
        found |= level
    return found


def _pss_kib(pid: int) -> int:
    """A process's proportional set size; 0 where it is gone."""
    try:
        return next(int(line.split()[1]) for line in read_lines(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def profile_shares(way: Way, device: torch.device, most: int = 12) -> str:
    """Where the time of a call goes: operations by share of the time on the device (CPU: its own time), with calls."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        way()
        synchronize(device)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events)
    rest = 1 - sum(getattr(event, own) for event in events[:most]) / total
    shares = [f"{event.key[:60]} {getattr(event, own) / total:.1%} ({event.count})" for event in events[:most]]
    return ", ".join([*shares, f"all else {rest:.1%}"])


def machine(device: torch.device) -> str:
    """The machine and what runs on it, in one line."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{place}; CPython {platform.python_version()}, {', '.join(versions)}"


def cpu_name() -> str:
    """The CPU's name, the threads that torch uses, and whether it has bf16 units."""
    names = [line.split(":", 1)[1] for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    name = " ".join(names[0].split()) if names else platform.processor() or platform.machine()
    units = "bf16 units" if torch.cpu._is_avx512_bf16_supported() else "no bf16 units"
    return f"{name}, {torch.get_num_threads()} threads, {units}"


def read_lines(path: str) -> list[str]:
    """Lines of a file; none where it does not exist."""
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def record(title: str, command: str, body: str, device: torch.device, results: str = RESULTS) -> None:
    """Prints a section and appends it to `results` ("": only prints): date, machine, versions, command, `body`."""
    head = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, {machine(device)}."
    section = f"## {title}\n\n{head}\n\n    {command}\n\n{body}\n"
    print(section)
    if results:
        with Path(results).open("a") as file:
            file.write(f"\n{section}")
