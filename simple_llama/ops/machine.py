"""Which GEMMs this machine runs fast: the one decision that the CPU code paths share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.cache
def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether `device` has bf16 GEMM units. A CPU without them emulates bf16 GEMMs, 3 to 4 times slower than fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # every x86 with AMX also has AVX512-bf16; other CPUs answer False and stay on the exact fp32 path
    return torch.cpu._is_avx512_bf16_supported()


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
