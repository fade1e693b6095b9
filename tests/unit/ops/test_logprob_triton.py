"""The Triton row kernels without a GPU: Triton's interpreter runs them on CPU tensors."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from simple_llama.ops import elementwise, logprob_cuda
from simple_llama.ops.logprob_torch import TORCH_KERNELS
from triton_interpreter import assert_checks_pass

CHECKS = Path(__file__).with_name("interpreted_logprob_triton.py")


def test_kernels_in_the_interpreter() -> None:
    """All checks of the file beside this one pass."""
    assert_checks_pass(CHECKS)


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), subprocess.CalledProcessError(1, "gcc")])
def test_a_gpu_without_a_compiler_gets_torch_kernels(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton compiles a module when it first meets the GPU; where it cannot, the head goes on and says why."""
    pytest.importorskip("triton", reason="the Triton row kernels need triton")
    from simple_llama.ops import logprob_triton

    def fail() -> int:
        raise error

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=fail))
    monkeypatch.setattr(logprob_triton, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    for cached in (logprob_cuda._fastest_kernels, elementwise._kernels, logprob_triton.has_driver):
        cached.cache_clear()
    assert logprob_cuda._fastest_kernels("cuda", torch.bfloat16) is TORCH_KERNELS
    assert elementwise._kernels("cuda") is None
    assert caplog.text.count("Triton cannot start") == 1 and str(error) in caplog.text
    for cached in (logprob_cuda._fastest_kernels, elementwise._kernels, logprob_triton.has_driver):
        cached.cache_clear()


def test_a_cpu_and_fp64_get_torch_kernels() -> None:
    """The Triton kernels are for CUDA and compute in fp32."""
    assert logprob_cuda._fastest_kernels("cpu", torch.float32) is TORCH_KERNELS
    assert logprob_cuda._fastest_kernels("cuda", torch.float64) is TORCH_KERNELS
