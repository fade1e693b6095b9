"""Compiles Triton kernels for a GPU that need not be there: what they take of it, and their PTX.

Triton brings ptxas and cuobjdump along. Not for a process with TRITON_INTERPRET=1, where kernels are plain Python.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Resources(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # of a thread; ptxas gives 255 at most
    spilled: int  # bytes of a thread in local memory, which lies in the GPU's own: registers that it had not
    shared: int  # bytes of a program in shared memory
    ptx: str


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int = 90,
    warps: int = 8,
    aligned: Collection[str] = (),
) -> Resources:
    """Compiles a kernel as its launch would.

    Args:
        kernel: of `triton.jit`.
        signature: type of each argument in order, as "*bf16" or "i32"; constants may be left out.
        constexprs: the constants by name.
        arch: 80 for an A100, 90 for an H100 or H200.
        warps: num_warps of the launch.
        aligned: arguments that are multiples of 16, which a launch sees by itself (addresses of tensors mostly are).

    Raises triton.CompilationError, or RuntimeError with the words of ptxas.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    assert set(constexprs) == {name for name, kind in types.items() if kind == "constexpr"}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, dict(constexprs), attributes)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(done.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    counts = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return Resources(counts["REG"], counts["STACK"] + counts["LOCAL"], done.metadata.shared, str(done.asm["ptx"]))
