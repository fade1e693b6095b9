"""Two ranks (gloo): bytes a step by hand, and one reduction a step against one a micro-batch, on the same gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny_job import ROOT, TinyJob, free_port, make_job, run_ranks

pytestmark = pytest.mark.dist
PARAMETERS = 45_984  # embeddings and vocabulary matrix 300 * 32 each, 2 layers of 13,312, 5 norms of 32


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    return make_job(tmp_path_factory.mktemp("scaling"))


@pytest.fixture(scope="module")
def each_bf16(job: TinyJob) -> torch.Tensor:
    """The first step's gradient as shipped: bf16, reduced after each of 4 micro-batches."""
    return gradient(job, with_settings(job, "zero2_bf16", {}))


def with_settings(job: TinyJob, name: str, changes: dict[str, object]) -> str:
    """A DeepSpeed JSON of ours with changes at its top and in its ZeRO section; gives its path."""
    settings = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    settings["zero_optimization"] |= {key: value for key, value in changes.items() if key != "communication_data_type"}
    settings |= {key: value for key, value in changes.items() if key == "communication_data_type"}
    path = job.folder / f"{name}_{len(list(job.folder.glob('*.json')))}.json"
    path.write_text(json.dumps(settings))
    return str(path)


def run_two(job: TinyJob, script: str, ds_config: str, accum: int, *flags: str) -> None:
    """Two ranks of a script with 16 pairs a step; the run has the name of its DeepSpeed JSON."""
    settings = {**job.settings, "reference": "online", "n_samples": 0, "epochs": 1, "val_share": 0}
    settings |= {"deepspeed_config": ds_config, "batch_size": 8 // accum, "grad_accum_steps": accum}
    settings |= {"run_name": Path(ds_config).stem}
    run_ranks(script, settings, world=2, port=free_port(), flags=flags)


def gradient(job: TinyJob, ds_config: str, *flags: str) -> torch.Tensor:
    """The gradient of the first step, of 4 micro-batches a rank."""
    run_two(job, "tests/step_gradient.py", ds_config, 4, *flags)
    return torch.load(job.folder / "checkpoints" / "gradient.pt")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, in units of the expected norm."""
    assert found.norm() > 0.1 and found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("accum", "communication", "flags", "reduced"),
    [
        (1, "fp32", (), 1 * 4),
        (2, "fp32", (), 2 * 4),
        (2, "bf16", (), 2 * 2),
        (2, "fp32", ("--reduce_once",), 1 * 4),
    ],
)
def test_bytes_a_step_by_hand(
    job: TinyJob, accum: int, communication: str, flags: tuple[str, ...], reduced: int
) -> None:
    """zero2_bf16 on n = 2 ranks: a ring's 2 (n - 1) / n = 1 times the gradients, a reduction of each micro-batch in the
    communication's dtype; (n - 1) / n = 1/2 times the bf16 weights that are gathered; 8 bytes of the norm, which tells
    of an overflow too. 24 pairs: a step of 16 and one of 8, which has half as many micro-batches."""
    path = with_settings(job, "zero2_bf16", {"communication_data_type": communication})
    run_two(job, "launch/train_dpo.py", path, accum, *flags)
    first = next(line for line in job.lines(Path(path).stem) if "loss" in line)
    assert first["perf/comm_mb"] * 1e6 == pytest.approx(PARAMETERS * (reduced + 1) + 8, abs=0.5)
    assert 0 < first["perf/comm_time_s"] < first["perf/step_time_s"]


def test_fp32_sums_of_one_reduction_a_step_are_those_of_each_micro_batch(job: TinyJob) -> None:
    """fp32, 2 ranks of 4 micro-batches, or of as many as have 90 rows: the same gradient to 1e-6 of its norm (the order
    of fp32 additions)."""
    ways = ((), ("--reduce_once",), ("--rows_per_micro_batch", "90"))
    each, *others = (gradient(job, with_settings(job, "zero2_fp32", {}), *flags) for flags in ways)
    assert all(relative(other, each) <= 1e-6 for other in others)


@pytest.mark.parametrize(
    ("name", "changes", "flags"),
    [
        ("zero2_bf16", {}, ()),
        ("zero2_bf16", {"reduce_bucket_size": 5000}, ("--activation_checkpointing",)),
        ("zero2_bf16", {"overlap_comm": False, "contiguous_gradients": False, "reduce_scatter": False}, ()),
        ("zero2_offload", {}, ()),
    ],
)
def test_bf16_micro_batches_add_up_in_fp32(
    job: TinyJob, each_bf16: torch.Tensor, name: str, changes: dict[str, object], flags: tuple[str, ...]
) -> None:
    """bf16: the micro-batches' gradients are the same bf16 values in both ways, summed in fp32 in both. A sum of 8
    values has 7 fp32 additions: at most 7 * 2^-24 = 4e-7 of the sum of magnitudes. In bf16 (`.grad`, what DeepSpeed's
    coalesce_grad_reduction does alone) it would be 7 * 2^-8, and was measured at 2e-3."""
    path = with_settings(job, name, changes)
    assert relative(gradient(job, path, *flags, "--reduce_once"), each_bf16) <= 1e-6


def test_bf16_communication_rounds_the_sum_of_a_step(job: TinyJob, each_bf16: torch.Tensor) -> None:
    """One rounding of each rank's sum and one of the two ranks' sum, 2^-9 each: at most 2^-8 of the exact gradient."""
    path = with_settings(job, "zero2_bf16", {"communication_data_type": "bf16"})
    assert 1e-5 < relative(gradient(job, path, "--reduce_once"), each_bf16) <= 2**-8
