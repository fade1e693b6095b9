"""Times what stands between a GPU's matrix products, forward and backward, by each way that is at hand.

    python -m benchmarks.bench_layers                 a GPU: ours by Triton, torch's operators, torch.compile, Liger
    python -m benchmarks.bench_layers --device cpu    the same without Triton

A row of the table is a piece of a decoder block; beside times, the share of the memory's rate that the least traffic
makes: everything read and written once, forward and backward. Attention by flash 2, and by 3 and 4 where the packages
flash_attn_interface and flash_attn.cute are installed. How far each way is from fp32, for its largest number.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro

from benchmarks import measure
from benchmarks.kept import KEPT
from simple_llama.ops import attention, elementwise
from simple_llama.ops.attention import PackedLayout
from simple_llama.pretraining.rotary import Rotation, rotate, rotation

EPS = 1e-5
Call = Callable[..., Any]  # tensors -> a tensor or several


@dataclass(frozen=True)
class Bench:
    """Sizes of the measurement."""

    device: Literal["cpu", "cuda"] = "cuda"
    rounds: int = 7  # each round times every way once
    calls: int = 10  # of a way in a round, one behind the other
    rows: int = 19_300  # T: 64 pairs of HH-RLHF
    width: int = 2048  # D
    hidden: int = 5632  # H
    head_width: int = 64  # K
    pairs: int = 64  # whose prompt is half of their rows, each answer a quarter
    gb_per_s: float = 4800.0  # memory rate of the device by data sheet: H200 4,800, H100 3,350, A100 2,039
    compiled: bool = True  # also by torch.compile
    minutes: float = 0.0  # after so many no other piece is begun; 0: all are
    results: str = measure.RESULTS  # file that the results are appended to; empty: only printed


class Piece(NamedTuple):
    """A piece of a block, its operands, and who computes it how."""

    name: str
    operands: tuple[torch.Tensor, ...]
    ways: Mapping[str, Call]
    plain: Call  # the definition, for any dtype
    passes: float  # over the largest operand that forward and backward must make; 0 where they are not the limit
    within: Mapping[str, Callable[[], AbstractContextManager[None]]] = {}  # what a way needs around it


def plain_add_norm(x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's own operators."""
    total = x + update
    return total, weight * F.rms_norm(total, weight.shape, eps=EPS)


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """In real numbers."""
    one, other = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((one * cos - other * sin, other * cos + one * sin), dim=-1).flatten(-2).to(x.dtype)


def pieces(bench: Bench) -> Iterator[Piece]:
    """The pieces of a block one after the other, each with random operands in bf16."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=bench.device).bfloat16()

    liger = _liger() if bench.device == "cuda" else {}
    rows_, width, hidden = bench.rows, bench.width, bench.hidden
    ways: dict[str, Call] = {"ours": lambda x, u, w: elementwise.add_norm(x, u, w, EPS), "torch": plain_add_norm}
    ways |= {name: call for name, call in liger.items() if name == "Liger norm"}
    yield Piece("addition and norm", (rows(rows_, width), rows(rows_, width), rows(width)), ways, plain_add_norm, 8)

    def plain_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    ways = {"ours": elementwise.swiglu, "torch": plain_swiglu}
    ways |= {name: call for name, call in liger.items() if name == "Liger SwiGLU"}
    yield Piece("SwiGLU", (rows(rows_, hidden), rows(rows_, hidden)), ways, plain_swiglu, 8)

    by = rotation(torch.arange(rows_, device=bench.device) % 300, bench.head_width, 1e4)
    heads = (rows_, width // bench.head_width, bench.head_width)
    ways = {"ours": lambda x: rotate(x, by), "torch": lambda x: _complex(x, by)}
    yield Piece("rotation", (rows(*heads),), ways, lambda x: plain_rotate(x, by.cos, by.sin), 4)

    layout = _layout(bench)
    plan = layout.varlen_plan(_device(bench)).keys
    assert plan is not None
    ways = {
        "ours": lambda x: attention._GatherKeys.apply(x, plan),
        "torch": lambda x: x.index_select(0, plan.rows_S),
    }
    yield Piece("keys of shared prefixes", (rows(layout.rows, *heads[1:]),), ways, ways["torch"], 5)
    yield _attention(bench, layout, [rows(layout.rows, *heads[1:]) for _ in "qkv"])


def _attention(bench: Bench, layout: PackedLayout, operands: list[torch.Tensor]) -> Piece:
    """Flash attention by each implementation that torch can be told to take; by blocks on a CPU."""
    scale = bench.head_width**-0.5

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention.attend(q, k, v, layout, scale)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention._attend_by_block(q, k, v, layout, scale)

    ways, within = {"ours": call}, {}
    if bench.device == "cuda":
        for name, package in (("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute")):
            if _is_installed(package):
                ways[name], within[name] = call, partial(_activated, name)
    return Piece("attention", tuple(operands), ways, plain, 0, within)


@contextmanager
def _activated(name: str) -> Iterator[None]:
    """Another implementation of flash attention in torch's dispatcher."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl(name)
    try:
        yield
    finally:
        restore_flash_attention_impl()


def _liger() -> dict[str, Call]:
    """Liger's kernels for two of the pieces, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    def norm(x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = LigerFusedAddRMSNormFunction.apply(x, update, weight, EPS, 0.0, "llama", False)
        return total, y

    return {"Liger norm": norm, "Liger SwiGLU": LigerSiLUMulFunction.apply}


def _complex(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    from simple_llama.pretraining.rotary import _Rotate

    return _Rotate.apply(x, by.turns)


def _layout(bench: Bench) -> PackedLayout:
    quarter = bench.rows // bench.pairs // 4
    return PackedLayout(((2 * quarter, (quarter, quarter)),) * bench.pairs)


def _device(bench: Bench) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if bench.device == "cuda" else torch.device("cpu")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package that it would be in
        return False


def run(call: Call, operands: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Values, and gradients of the sum of all of them."""
    leaves = [x.detach().requires_grad_() for x in operands]
    out = call(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, leaves, [torch.ones_like(y) for y in outs])]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest difference, as a share of the largest number of its tensor."""
    return max(
        float((one.float() - other).abs().max() / other.abs().max()) for one, other in zip(found, exact, strict=True)
    )


def measured(piece: Piece, bench: Bench) -> list[tuple[str, ...]]:
    """A row of the table for each way."""
    ways = dict(piece.ways)
    if bench.compiled and piece.passes:
        ways["torch.compile"] = torch.compile(piece.plain, dynamic=True)
    exact = run(piece.plain, tuple(x.float() for x in piece.operands))
    errors: dict[str, float] = {}
    timed_ways: dict[str, measure.Way] = {}
    for name, call in ways.items():
        within = piece.within.get(name, nullcontext)

        operands = tuple(x.clone() for x in piece.operands)  # Liger's SwiGLU writes its gradients there

        def several(
            times: int, call: Call = call, within: Any = within, operands: tuple[torch.Tensor, ...] = operands
        ) -> list[torch.Tensor]:
            with within():
                return [run(call, operands) for _ in range(times)][-1]

        errors[name] = error(several(1), exact)
        timed_ways[name] = partial(several, bench.calls)
    seconds = measure.medians(measure.interleaved(timed_ways, bench.rounds, torch.device(bench.device)))
    most = max(piece.operands, key=torch.numel)
    least_s = piece.passes * most.nbytes / (1e9 * bench.gb_per_s)
    rows = []
    for name, total in seconds.items():
        each = total / bench.calls
        share = f"{least_s / each:.2f}" if piece.passes else "-"
        KEPT.keep(f"{piece.name}, {name}", ms=1e3 * each, of_the_memory_rate=share, largest_error=errors[name])
        rows.append((piece.name, name, f"{1e3 * each:.3f}", share, f"{errors[name]:.1e}"))
    return rows


def main(bench: Bench) -> None:
    """Measures, prints each row as it comes, and appends the section."""
    torch.manual_seed(0)
    command = shlex.join(["python", "-m", "benchmarks.bench_layers", *sys.argv[1:]])
    KEPT.begin(command, bench.results, bench.minutes)
    rows: list[tuple[str, ...]] = [("piece", "way", "ms", "of the memory's rate", "largest error")]
    for piece in pieces(bench):
        if KEPT.is_over():
            break
        rows += measured(piece, bench)
    body = f"Forward and backward of {bench.rows} rows of width {bench.width} in bf16, {bench.calls} calls in a round, "
    body += f"medians of interleaved rounds.\n\n{measure.table(rows)}"
    measure.record("Between the products", command, body, torch.device(bench.device), bench.results)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
