"""The head's Triton kernels are compiled for GPUs that this machine need not have."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the Triton row kernels need triton")

import triton
import triton.language as tl

from compiled_triton import compiled
from simple_llama.ops import logprob_triton

_ROWS = {"logits_ptr": "*fp32", "row_stride": "i32"}
_KERNELS = {
    "_logps_kernel": {**_ROWS, "targets_ptr": "*i64", "logps_ptr": "*fp32", "lse_ptr": "*fp32", "vocab": "i32"},
    "_squares_kernel": {**_ROWS, "lse_ptr": "*fp32", "squares_ptr": "*fp32", "vocab": "i32"},
    "_gradient_kernel": {
        **_ROWS,
        "grad_ptr": "*bf16",
        "grad_stride": "i32",
        "targets_ptr": "*i64",
        "lse_ptr": "*fp32",
        "coefs_ptr": "*fp32",
        "vocab": "i32",
    },
    "_scale_kernel": {"gradient_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": "*bf16", "size": "i32"},
}


@triton.jit
def _hoarding_kernel(in_ptr, out_ptr, BLOCK: tl.constexpr):
    """Holds 1,024 numbers a thread of one warp at once: four times as many as a thread has registers."""
    places = tl.arange(0, BLOCK)
    numbers = tl.load(in_ptr + places)
    numbers = tl.where(tl.load(in_ptr + BLOCK) > 0, numbers / tl.sum(numbers, axis=0), numbers)
    tl.store(out_ptr + places, numbers)


def test_a_kernel_that_holds_too_much_is_seen_to_spill() -> None:
    """The measure itself: a thread of 1,024 numbers spills, one of 4 does not and reads them at once."""
    signature = {"in_ptr": "*fp32", "out_ptr": "*fp32"}
    few = compiled(_hoarding_kernel, signature, {"BLOCK": 128}, warps=1, aligned=signature)
    many = compiled(_hoarding_kernel, signature, {"BLOCK": 32768}, warps=1, aligned=signature)
    assert many.spilled > 0 and few.spilled == 0
    assert "ld.global.v4" in few.ptx


def test_every_kernel_is_compiled_here() -> None:
    """None of the file's kernels is left out below."""
    kernels = {name for name, value in vars(logprob_triton).items() if isinstance(value, triton.JITFunction)}
    assert kernels == set(_KERNELS)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", _KERNELS)
def test_kernels_fit_into_registers(name: str, arch: int) -> None:
    """As launched for a large vocabulary: nothing spills, and four programs of a block of 4,096 fit into the 65,536
    registers that an A100 and an H100 have for those that run at once."""
    block = logprob_triton._MAX_BLOCK
    warps = logprob_triton._WARPS
    found = compiled(getattr(logprob_triton, name), _KERNELS[name], {"BLOCK": block}, arch, warps, _KERNELS[name])
    assert found.spilled == 0
    assert found.registers * 32 * warps * 4 <= 65536
