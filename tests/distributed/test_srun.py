"""Starts by other launchers than DeepSpeed's: what srun, Kubernetes and torchrun on each host set is enough.

Two processes on this machine stand for two tasks or pods; all give the curve of ranks with torchrun's variables, bit
for bit: each has half of the machine's cores as threads, whoever starts it. That matters on CPUs with AVX-512, where
torch's kernels add in another order with two threads than with one (seen on an AMD Zen 4; with ATEN_CPU_CAPABILITY=avx2
they do not).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_job import ROOT, TinyJob, free_port, make_job, run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]
TRAIN = "launch/train_dpo.py"
BOTH = "simple_llama/reinforcement_learning/rlhf/apply_dpo.py"  # the reference pass, then training
Variables = dict[str, object]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """A job whose run "expected" was started with RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""
    job = make_job(tmp_path_factory.mktemp("starts"))
    run_ranks(BOTH, settings(job, "expected"), world=2, port=free_port())
    return job


def settings(job: TinyJob, name: str) -> dict[str, object]:
    """Three steps of 8 pairs on two ranks; each run has a store of its own, which the start under test must fill."""
    own = {"run_name": name, "ref_cache_dir": str(job.folder / f"ref_{name}")}
    return {**job.settings, "grad_accum_steps": 2, "epochs": 1, "n_samples": 0, **own}


def start(command: list[str], settings: dict[str, object], variables: Variables) -> subprocess.Popen[str]:
    """Starts a process with these variables of a launcher and no other's."""
    return subprocess.Popen(
        [*command, *(f"--{name}={value}" for name, value in settings.items())],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_both(job: TinyJob, name: str, commands: list[list[str]], variables: list[Variables]) -> None:
    """The reference pass and the training of run `name` by two processes; the curve must be the expected one."""
    address: Variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        start([*(part.format(**address) for part in command), BOTH], settings(job, name), {**address, **own})
        for command, own in zip(commands, variables, strict=True)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert "computed 24 pairs" in outputs[0] and "2 ranks" in outputs[0]
    for curve in ("loss", "eval_loss", "grad_norm"):
        assert job.curve(curve, name) == job.curve(curve, "expected"), curve


def slurm(task: int) -> Variables:
    """What srun sets in task `task` of `sbatch --nodes=1 --ntasks-per-node=2`."""
    return {
        "SLURM_JOB_ID": 4711,
        "SLURM_STEP_ID": 0,
        "SLURM_JOB_NODELIST": "node-1",
        "SLURM_NODELIST": "node-1",
        "SLURM_NNODES": 1,
        "SLURM_NODEID": 0,
        "SLURM_NTASKS": 2,
        "SLURM_NTASKS_PER_NODE": 2,
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_PROCID": task,
        "SLURM_LOCALID": task,
    }


def test_srun(job: TinyJob) -> None:
    run_both(job, "srun", [[sys.executable]] * 2, [slurm(0), slurm(1)])


def test_pod_of_a_pytorch_job(job: TinyJob) -> None:
    """Kubeflow sets RANK and WORLD_SIZE; the manifest in docs/clusters.md adds LOCAL_RANK for one process a pod."""
    pods: list[Variables] = [{"RANK": pod, "WORLD_SIZE": 2, "LOCAL_RANK": 0} for pod in (0, 1)]
    run_both(job, "pods", [[sys.executable]] * 2, pods)


def test_torchrun_on_each_host(job: TinyJob) -> None:
    """`torchrun --nnodes 2 --node_rank ...` on both: also what a pod of an Indexed Job runs."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    place = ["--nnodes=2", "--nproc_per_node=1", "--master_addr={MASTER_ADDR}", "--master_port={MASTER_PORT}"]
    run_both(job, "torchrun", [[torchrun, *place, f"--node_rank={index}"] for index in (0, 1)], [{}, {}])


def test_srun_without_address_says_what_to_export(job: TinyJob) -> None:
    """srun itself gives no address; the batch script must."""
    process = start([sys.executable, TRAIN], settings(job, "none"), slurm(0))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert "SLURM_NTASKS is 2 but MASTER_ADDR is not set" in output
