"""What the machine can do: its peak; what is kept of compiled GEMMs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from simple_llama.ops.machine import _is_intel, _measured_gemm_flops, peak_flops, prepare_gemms

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


@pytest.mark.parametrize("intel", [False, True])
def test_what_a_person_has_set_stays(intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set: all is, MKL's for a CPU of Intel's alone. One is set, by oneDNN's other name: the others are.
    Set again: no change."""
    onednn, other, aten = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
    monkeypatch.setattr("simple_llama.ops.machine._is_intel", lambda: intel)
    mkl = {"MKL_CBWR": "AUTO,STRICT"} if intel else {}
    for before, after in (({}, {onednn: "128", aten: "128"}), ({other: "9"}, {other: "9", aten: "128"})):
        monkeypatch.setattr("os.environ", dict(before))
        prepare_gemms()
        assert os.environ == {**after, **mkl}
        own = {aten: "7", **dict.fromkeys(mkl, "AVX2")}
        os.environ.update(own)
        prepare_gemms()
        assert os.environ == {**after, **own}


def test_gemms_of_mkl_are_asked_to_be_equal() -> None:
    """On a CPU of Intel's a command's first GEMM says so, though torch is imported before the environment is set."""
    code = """
import torch
from simple_llama.ops.machine import prepare_gemms
prepare_gemms()
torch.ones(9, 9) @ torch.ones(9, 9)
"""
    if not (_is_intel() and torch.backends.mkl.is_available()):
        pytest.skip("no MKL on a CPU of Intel's")
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"} | {"MKL_VERBOSE": "1"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"SGEMM.*CNR:AUTO,STRICT", said.stdout), said.stdout
