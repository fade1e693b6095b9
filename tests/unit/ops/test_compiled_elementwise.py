"""The Triton element-wise kernels are compiled for GPUs that this machine need not have."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

import triton

from compiled_triton import compiled
from simple_llama.ops import elementwise_triton as ours

_REGISTERS = 65_536  # of what runs at once on a part of the GPU, A100 and H100 alike


def _pointers(*names: str, dtype: str = "*bf16") -> dict[str, str]:
    return {f"{name}_ptr": dtype for name in names}


def _numbers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


_EPS = {"eps": "fp32"}
_SIGNATURES = {
    "_norm_kernel": {
        **_pointers("x", "update", "weight", "sum", "y"),
        **_numbers("x_stride", "update_stride", "rows", "width"),
        **_EPS,
    },
    "_norm_gradient_kernel": {
        **_pointers("x", "weight", "grad", "onward", "out"),
        **_pointers("of_weight", dtype="*fp32"),
        **_numbers("x_stride", "rows", "width", "programs"),
        **_EPS,
    },
    "_swiglu_kernel": {**_pointers("gate", "up", "out"), **_numbers("size")},
    "_swiglu_gradient_kernel": {**_pointers("gate", "up", "grad", "of_gate", "of_up"), **_numbers("size")},
    "_place_kernel": {
        **_pointers("x", "out"),
        **_pointers("rows", dtype="*i64"),
        **_pointers("cos", "sin", dtype="*fp32"),
        **_numbers("row_stride", "group_stride", "head_stride", "heads", "shared"),
    },
    "_add_places_kernel": {**_pointers("grad", "out"), **_pointers("places", dtype="*i64"), **_numbers("size")},
}


def _compiled(name: str, constexprs: dict[str, Any], numbers: int, arch: int = 90) -> tuple[int, int, str]:
    """Registers of a program, bytes that a thread spills, and PTX; `numbers` of a tile of each tensor."""
    warps = ours._warps(numbers) if "norm" in name else 4
    kernel = getattr(ours, name)
    aligned = set(_SIGNATURES[name]) - set(_EPS) - {"rows", "programs", "heads", "shared"}
    found = compiled(kernel, _SIGNATURES[name], constexprs, arch, warps, aligned)
    return found.registers * 32 * warps, found.spilled, found.ptx


def test_every_kernel_is_compiled_here() -> None:
    """None of the file's kernels is left out below."""
    kernels = {name for name, value in vars(ours).items() if isinstance(value, triton.JITFunction)}
    assert kernels == set(_SIGNATURES)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [64, 576, 2048, 4096, ours._WIDEST])
def test_norms_fit_into_registers(width: int, arch: int) -> None:
    """Of any width up to the widest: nothing spills, and up to a width of 4,096 two programs at least run at once."""
    block, rows = ours._tile(width)
    tile = {"ROWS": rows, "BLOCK": block}
    for name, ways in (("_norm_kernel", {"ADDS": True}), ("_norm_gradient_kernel", {"PASSES_ON": 1, "OF_WEIGHT": 1})):
        registers, spilled, _ = _compiled(name, {**ways, **tile}, block * rows, arch)
        assert spilled == 0
        assert registers * (2 if width <= 4096 else 1) <= _REGISTERS


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("name", "constexprs"),
    [
        ("_swiglu_kernel", {}),
        ("_swiglu_gradient_kernel", {}),
        ("_place_kernel", {"GATHERS": True, "TURNS": 0, "K": 128}),
        ("_place_kernel", {"GATHERS": False, "TURNS": 1, "K": 64}),
        ("_place_kernel", {"GATHERS": False, "TURNS": -1, "K": 96}),
        ("_add_places_kernel", {"COPIES": 2}),
        ("_add_places_kernel", {"COPIES": 9}),
    ],
)
def test_others_leave_room_for_others(name: str, constexprs: dict[str, Any], arch: int) -> None:
    """Nothing spills, and four programs at least run at once."""
    tile = {"BLOCK": ours._TILE}
    if "K" in constexprs:
        block, heads = ours._tile(constexprs["K"])
        tile = {"BLOCK": block, "HEADS": heads}
    registers, spilled, _ = _compiled(name, {**constexprs, **tile}, ours._TILE, arch)
    assert spilled == 0 and 4 * registers <= _REGISTERS


@pytest.mark.parametrize(
    "name", ["_norm_kernel", "_norm_gradient_kernel", "_swiglu_kernel", "_swiglu_gradient_kernel", "_place_kernel"]
)
def test_rows_are_read_sixteen_bytes_at_a_time(name: str) -> None:
    """By a thread, where rows begin at multiples of 16: half as many would not keep the memory busy."""
    given = {"ROWS": 1, "ADDS": 1, "PASSES_ON": 1, "OF_WEIGHT": 1, "BLOCK": 2048}
    if name == "_place_kernel":
        given = {"GATHERS": 0, "TURNS": 1, "K": 64, "HEADS": 32, "BLOCK": 64}
    _, _, ptx = _compiled(name, {key: given[key] for key in given if key in getattr(ours, name).arg_names}, 2048)
    assert "ld.global.v4" in ptx and "ld.global.b16" not in ptx
