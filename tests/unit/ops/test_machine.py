"""What the machine can do: its peak; what is kept of compiled GEMMs."""

from __future__ import annotations

import os

import pytest
import torch

from simple_llama.ops.machine import _measured_gemm_flops, bound_compiled_gemms, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_gemm_flops_is_a_speed(dtype: torch.dtype) -> None:
    """Above 0 and below what any machine does (1e18)."""
    assert 0 < _measured_gemm_flops(CPU, dtype, size=32, tries=2) < 1e18


def test_measured_gemm_flops_counts_two_a_multiply_and_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that says 0.5 s, then 0.25 s: the best of two 10^3 GEMMs is 2 * 1000 / 0.25 FLOP/s."""
    ticks = iter([0.0, 0.5, 1.0, 1.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert _measured_gemm_flops(CPU, torch.float32, size=10, tries=2) == 8000.0


def test_peak_of_a_known_gpu_is_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name's own words count: an H200 is no H20, an unknown GPU and fp32 are measured."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr("simple_llama.ops.machine._measured_gemm_flops", lambda *_, **__: 1.0)
    names = {"NVIDIA H200": 989e12, "NVIDIA H20": 148e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA Unheard-of": 1.0}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, torch.bfloat16) == peak
        assert peak_flops(cuda, torch.float32) == 1.0
    assert peak_flops(CPU, torch.bfloat16) == 1.0


def test_what_a_person_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is set: both are bounded. One is set, by oneDNN's other name: only ATen's is. Set again: no change."""
    onednn, other, aten = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
    for before, after in (({}, {onednn: "128", aten: "128"}), ({other: "9"}, {other: "9", aten: "128"})):
        monkeypatch.setattr("os.environ", dict(before))
        bound_compiled_gemms()
        assert os.environ == after
        os.environ[aten] = "7"
        bound_compiled_gemms()
        assert os.environ == {**after, aten: "7"}
