"""The head's Triton kernels are compiled for GPUs that this machine need not have."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="the Triton row kernels need triton")

import triton
import triton.language as tl

from compiled_triton import compiled
from simple_llama.ops import logprob_triton

_BLOCK = {"BLOCK": logprob_triton._MAX_BLOCK}
_KERNELS: dict[str, tuple[dict[str, str], list[dict[str, Any]]]] = {  # arguments, and constants of every launch
    "_rows_kernel": (
        {
            "logits_ptr": "*fp32",
            "row_stride": "i32",
            "targets_ptr": "*i64",
            "values_ptr": "*fp32",
            "count": "i32",
            "gradient_ptr": "*bf16",
            "gradient_stride": "i32",
            "vocab": "i32",
        },
        [{**_BLOCK, "GRADIENT": gradient, "SQUARES": squares} for gradient in (0, 1) for squares in (0, 1)],
    ),
    "_sums_kernel": (
        {"values_ptr": "*fp32", "count": "i32", "edges_ptr": "*i64", "sums_ptr": "*fp32"},
        [{"BLOCK": logprob_triton._SUM_BLOCK}],
    ),
    "_weighted_kernel": (
        {
            "rows_ptr": "*fp32",
            "out_ptr": "*bf16",
            "other_rows_ptr": "*bf16",
            "other_out_ptr": "*bf16",
            "coefs_ptr": "*fp32",
            "width": "i32",
        },
        [_BLOCK],
    ),
    "_scale_kernel": (
        {
            "in_ptr": "*bf16",
            "out_ptr": "*bf16",
            "size": "i32",
            "other_ptr": "*fp32",
            "other_out_ptr": "*bf16",
            "other_size": "i32",
            "factor_ptr": "*fp32",
        },
        [{**_BLOCK, "STEPS": logprob_triton._SCALE_STEPS}],
    ),
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
    """None of the file's kernels is left out below; `_scale_blocks` is a part of one."""
    kernels = {name for name, value in vars(logprob_triton).items() if isinstance(value, triton.JITFunction)}
    assert kernels == {*_KERNELS, "_scale_blocks"}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", _KERNELS)
def test_kernels_fit_into_registers(name: str, arch: int) -> None:
    """As launched for large sizes of a multiple of 16: nothing spills, four programs of 8 warps fit into the 65,536
    registers that an A100 and an H100 have for those that run at once, and whole vectors are read and written."""
    signature, launches = _KERNELS[name]
    for constants in launches:
        aligned = [argument for argument in signature if argument != "count"]  # which is not looked at
        found = compiled(getattr(logprob_triton, name), signature, constants, arch, logprob_triton._WARPS, aligned)
        assert found.spilled == 0
        assert found.registers * 32 * logprob_triton._WARPS * 4 <= 65536
        if name != "_sums_kernel":  # whose parts begin anywhere
            assert "ld.global.v4" in found.ptx
            assert "st.global.v4" in found.ptx or not constants.get("GRADIENT", True)
