"""The table of a GPU's kernels, of a trace made by hand and of one of a CPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_kernels import Kernel, Overlap, busy_us, kind_of, overlap, read_trace, report
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.run.profiling import ProfileConfig, StepProfile


def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
    """As torch's profiler writes it."""
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


EVENTS = [
    event("ProfilerStep#4", 0, 90, "user_annotation"),
    event("ProfilerStep#5", 90, 110, "user_annotation"),
    event("ProfilerStep#4", 5, 90, "gpu_user_annotation"),
    event("aten::mm", 0, 50, "cpu_op"),
    event("nvjet_tst_128x256_64x4_2x1_v_bz_NNT", 10, 40),
    event("void at::native::vectorized_elementwise_kernel<4, silu>", 30, 40),  # beside the GEMM until 50
    event("Memcpy DtoD (Device -> Device)", 100, 10, "gpu_memcpy"),
    event("void multi_tensor_apply_kernel<FusedAdamMathFunctor>", 180, 30),
    {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 1},
]


def written(path: Path, content: Any, packed: bool) -> Path:
    """A trace as a file."""
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_a_trace_by_hand(tmp_path: Path, packed: bool) -> None:
    """Two steps from 10 to 210 us: kernels ran from 10 to 70, 100 to 110 and 180 to 210, 100 of 200 us, 120 with what
    ran beside another."""
    path = written(tmp_path / ("t.json.gz" if packed else "t.json"), {"traceEvents": EVENTS}, packed)
    lines = report(read_trace(path)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]]
    assert cells == [
        ["GEMMs", "0.02", "33.3%", "0"],
        ["other element-wise", "0.02", "33.3%", "0"],
        ["AdamW", "0.01", "25.0%", "0"],
        ["copies and dtypes", "0.01", "8.3%", "0"],
    ]
    assert lines[-1] == (
        "2 steps, 0.1 ms each from first kernel to last; the GPU was busy in 50.0%, idle in 50.0%; 2 kernels a step."
    )


def test_busy_time_counts_once() -> None:
    """One within another, two that touch, one apart: 0 to 10, 10 to 12, 20 to 21."""
    spans = [(0, 10), (2, 5), (10, 12), (20, 21)]
    assert busy_us([Kernel("k", *span) for span in spans]) == 13


def test_what_of_the_exchange_is_hidden() -> None:
    """Collectives from 10 to 40 and 50 to 60, 40 us; two kernels beside each other from 0 to 20 and one from 35 to 52
    hide 10 + 5 + 2 of them, and a copy from 20 to 30 hides none."""
    spans = [("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 10, 40), ("ncclDevKernel_AllGather", 50, 60)]
    spans += [
        ("nvjet_tst", 0, 20),
        ("silu", 5, 15),
        ("nvjet_tst", 35, 52),
        ("Memcpy HtoD (Pageable -> Device)", 20, 30),
    ]
    found = overlap(Kernel(*span) for span in spans)
    assert found == Overlap(40, 17) and found.share == 17 / 40
    assert overlap([Kernel("nvjet_tst", 0, 20)]) == Overlap(0, 0) and overlap([]).share == 0


def test_a_trace_of_several_ranks_says_so(tmp_path: Path) -> None:
    """A collective from 45 to 65 us of two steps beside the GEMM until 50 and the element-wise kernel until 70; one
    from 120 to 140 beside nothing: 40 us, half of them hidden."""
    more = [event("ncclDevKernel_AllReduce", 45, 20), event("ncclDevKernel_AllReduce", 120, 20)]
    path = written(tmp_path / "t.json", {"traceEvents": EVENTS + more}, packed=False)
    end = "A collective ran for 0.02 ms a step, 50.0% of it beside computation."
    assert report(read_trace(path)).splitlines()[-1].endswith(end)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "collectives"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMMs"),
        ("_rows_kernel", "log-prob head's rows"),
        ("_norm_gradient_kernel", "layers' fused rows"),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16>", "gathers and scatters"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies and dtypes"),
        ("void at::native::reduce_kernel<512, 1, MeanOps>", "reductions"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "other element-wise"),
        ("something new", "all else"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    """Names as the libraries have them."""
    assert kind_of(name) == kind


def test_each_of_our_kernels_has_its_kind() -> None:
    """All that both files have."""
    triton = pytest.importorskip("triton", reason="the kernels need triton")
    from simple_llama.ops import elementwise_triton, logprob_triton

    for module, kind in ((logprob_triton, "log-prob head's rows"), (elementwise_triton, "layers' fused rows")):
        names = [name for name, value in vars(module).items() if isinstance(value, triton.JITFunction)]
        names = [name for name in names if name.endswith("_kernel")]  # others are part of these
        assert names and {kind_of(name) for name in names} == {kind}


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\x1f\x8b", b'{"traceEvents": []}'])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    """With the file's name, packed or not."""
    for name in ("t.json", "t.json.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read_trace(tmp_path / name)


def test_a_trace_of_a_cpu_has_no_kernels(tmp_path: Path) -> None:
    """What a run on a CPU writes is read, and said to be of no GPU."""
    profile = StepProfile(ProfileConfig(profile_steps=(1, 1)), tmp_path, Ranks(0, 1, 0, 1, torch.device("cpu")), 0, 1)
    profile.begin(1)
    torch.mm(torch.ones(4, 4), torch.ones(4, 4))
    profile.end(1)
    [path] = (tmp_path / "profile").iterdir()
    with pytest.raises(UserError, match="expected steps on a GPU, found 0 kernels in 1 steps"):
        read_trace(path)
