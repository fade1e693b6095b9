"""`--compile` through the scripts: the losses of uncompiled layers, one compilation, a reference of its own."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.inputs import check_compiler
from tiny_job import make_job, run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs g++"),
]


def test_same_losses_without_recompiling(tmp_path: Path):
    """fp32: every loss within 1e-5 of the plain run's; evaluations, samples and other batches add no graph."""
    job = make_job(tmp_path)
    settings = {**job.settings, "step_timeout_s": 20.0}
    for run, flags in (("plain", ()), ("compiled", ("--compile",))):
        for script in ("launch/precompute_ref.py", "launch/train_dpo.py"):
            run_ranks(script, {**settings, "run_name": run}, 1, flags=flags)
    plain, compiled = (job.curve("loss", run) for run in ("plain", "compiled"))
    assert len(compiled) == 6
    assert max(abs(a - b) for a, b in zip(plain, compiled, strict=True)) < 1e-5
    assert math.isclose(job.curve("eval_loss", "compiled")[0], math.log(2), abs_tol=1e-6)
    assert len(set(job.curve("perf/compiled_graphs", "compiled"))) == 1
    assert not job.curve("perf/compiled_graphs", "plain")
    assert len([folder for folder in (tmp_path / "ref_cache").iterdir() if folder.is_dir()]) == 2


def test_a_cpu_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Before anything is computed, with what to do about it."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compiler(False, "cpu")
    with pytest.raises(UserError, match="compile: expected a C.. compiler, found no no-such-compiler"):
        check_compiler(True, "cpu")
