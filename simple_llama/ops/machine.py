"""What this machine can do: which GEMMs it runs fast (the decision that all CPU paths share), its peak, its memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_BF16_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}

# What bounds the compiled GEMMs that a process keeps on a CPU: of oneDNN (either name), of ATen above it.
_CACHE_BOUNDS = (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"), ("LRU_CACHE_CAPACITY",))
_PRIMITIVES_KEPT = "128"  # more than the shapes of a micro-batch: as fast as with all of them


def prepare_gemms() -> None:
    """Asks the libraries of a CPU's GEMMs for few compiled ones and for equal results; to be called before the first.

    With bf16 units oneDNN compiles code for every new shape, and packed lengths are always new: of the 1,024 that it
    and ATen keep, each takes some 0.6 MiB. MKL promises the same bits from run to run in its conditional numerical
    reproducibility alone, where reductions and the dealing to threads are fixed, and wherever arrays lie in memory only
    in its strict form (oneMKL guide, "MKL_CBWR"; on the CPUs of others than Intel it would take slower code). Set in
    the environment, where all look; what a person has set stays.
    """
    for names in _CACHE_BOUNDS:
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = _PRIMITIVES_KEPT
    if _is_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


@functools.cache
def _is_intel() -> bool:
    """Whether this is a CPU of Intel's; False where the system does not say."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@functools.cache
def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether `device` has bf16 GEMM units. A CPU without them emulates bf16 GEMMs, 3 to 4 times slower than fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # every x86 with AMX also has AVX512-bf16; other CPUs answer False and stay on the exact fp32 path
    return torch.cpu._is_avx512_bf16_supported()


def has_tiles() -> bool:
    """Whether this CPU multiplies bf16 in AMX's tiles, where the rounding of a row depends on how many there are."""
    return torch.cpu._is_amx_tile_supported()


def cpu_emulates_bf16() -> bool:
    """Whether a bf16 GEMM on this CPU is emulated; a constant to `torch.compile` (`compile_layers`)."""
    return not has_fast_bf16("cpu")


@contextmanager
def bf16_valued_gemms() -> Iterator[None]:
    """Within, fp32 GEMMs on the CPU may round their operands to bf16 (AMX units); products and sums stay fp32.

    Exact for fp32 operands that hold bf16 values, which is what it is for. CPUs without such units ignore it.
    """
    setting = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s for MFU: a GPU's data sheet (dense bf16) where known, else the best of a few square GEMMs here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        words = re.split(r"[\s-]", torch.cuda.get_device_name(device))  # NVIDIA A100-SXM4-80GB
        for key, peak in _BF16_PEAK_FLOPS.items():
            if key in words:
                return peak
    return _measured_gemm_flops(device, dtype, size=1024 if device.type == "cpu" else 8192)


@functools.cache
def _measured_gemm_flops(device: torch.device, dtype: torch.dtype, size: int, tries: int = 5) -> float:
    """Best FLOP/s of `size`^3 GEMMs in `dtype`, or in fp32 where a CPU is faster in it than in bf16. Measured once: a
    tenth of a second on a CPU, as long as some steps of a small model."""
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    best = 0.0
    for kind in dtypes:
        left, right = (torch.ones(size, size, dtype=kind, device=device) for _ in range(2))
        for _ in range(tries):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(left, right)
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GiB: of the CUDA allocator, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_bytes(device: torch.device) -> int:
    """Largest memory since `forget_peak`: of the CUDA allocator, or the process's resident set on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def resident_bytes(device: torch.device) -> int:
    """Memory now, of the same kind."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def forget_peak(device: torch.device) -> None:
    """Lets `peak_bytes`, and `peak_memory_gb`, begin anew, where the system can (man 5 proc)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def free_host_bytes() -> int | None:
    """Memory of this host that processes can still take: what the kernel calls available, or what the control groups
    (v2) of this process leave, where that is less. None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
    except (OSError, StopIteration):
        return None
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError, StopIteration):  # no such group, or "max"
            limit, taken = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, limit - taken + next(int(number) for name, number in cached if name == "inactive_file"))
    return max(0, free)


def release(device: torch.device) -> None:
    """Gives back to the system what is no longer used, and forgets the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_heap()
    forget_peak(device)


def trim_heap() -> None:
    """Gives back to the system what malloc keeps of freed memory, as of activations and of a state that was written: a
    process seems to need both at once."""
    with contextlib.suppress(AttributeError, OSError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    """A size of this process in /proc/self/status, which systems other than Linux lack: there the peak of all time."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
