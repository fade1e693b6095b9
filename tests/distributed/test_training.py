"""Two ranks on one machine (gloo): the same numbers as one rank, ZeRO-2 and ZeRO-3, kills, and the real launcher."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tiny_job import ROOT, TinyJob, free_port, make_job, run_ranks, start_rank, write_pairs

pytestmark = pytest.mark.dist
PRECOMPUTE, TRAIN = "launch/precompute_ref.py", "launch/train_dpo.py"


def run_two(script: str, settings: dict[str, object], *flags: str) -> str:
    return run_ranks(script, settings, world=2, port=free_port(), flags=flags)


@pytest.fixture
def job(tmp_path) -> TinyJob:
    return make_job(tmp_path)


def test_two_ranks_equal_one_and_resume_on_another_number(job):
    """fp32, 8 pairs a step: two ranks (2 x 2) and one rank (2 x 4) have the same curve; so has a run of two ranks that
    one rank takes up in the middle of the first epoch. What is said of the data stands once in output and log."""
    two = {**job.settings, "run_name": "two", "grad_accum_steps": 2, "save_interval": 2, "keep_states": 9}
    output = run_two(PRECOMPUTE, two)
    assert "computed 24 pairs" in output and "2 ranks" in output
    for said in (run_two(TRAIN, two), (job.folder / "runs" / "two" / "train.log").read_text()):
        assert said.count("kept 24 of 24 pairs") == said.count("WARNING") == 1  # and 3 pairs held out
    one = {**job.settings, "run_name": "one"}
    assert "24 of 24 pairs are there" in run_ranks(PRECOMPUTE, one, world=1)
    run_ranks(TRAIN, one, world=1)
    checkpoints = job.folder / "checkpoints"
    shutil.copytree(checkpoints / "two", checkpoints / "moved")
    for state in (checkpoints / "moved" / "state").iterdir():
        if state.name != "step_00000002":
            shutil.rmtree(state)
    run_ranks(TRAIN, {**one, "run_name": "moved"}, world=1, flags=("--resume",))
    best = [json.loads((job.folder / "runs" / run / "best.json").read_text()) for run in ("one", "two", "moved")]
    for found, run, saves in zip(best, ("one", "two", "two"), ((3, 6), (2, 3, 4, 6), (2, 3, 4, 6)), strict=True):
        losses = {
            line["step"]: line["eval_loss"] for line in job.lines(run) if line["step"] in saves and "eval_loss" in line
        }
        assert found["step"] == min(losses, key=lambda step: losses[step])
    for name in ("loss", "rewards/margins", "logps/chosen", "eval_loss"):
        assert job.curve(name, "two") == pytest.approx(job.curve(name, "one"), abs=1e-4), name
    assert job.curve("loss", "moved") == pytest.approx(job.curve("loss", "one")[2:], abs=1e-4)
    for name, tensor in job.weights("two").items():
        torch.testing.assert_close(tensor, job.weights("one")[name], atol=2e-5, rtol=0)
        torch.testing.assert_close(tensor, job.weights("moved")[name], atol=2e-5, rtol=0)


def test_bf16_zero_2_and_zero_3_agree(job):
    """The same bf16 arithmetic partitioned more or less: equal curves to bf16's noise, step 0 at ln 2 within 1e-3.
    And a ZeRO-3 run that is taken up in the middle of an epoch ends where the one never stopped did."""
    base = {**job.settings, "grad_accum_steps": 2, "save_interval": 2, "keep_states": 9}
    for name in ("zero2_bf16", "zero3_bf16"):
        settings = {**base, "run_name": name, "deepspeed_config": str(ROOT / "ds_configs" / f"{name}.json")}
        if name == "zero2_bf16":
            run_two(PRECOMPUTE, settings)  # one store serves both
        run_two(TRAIN, settings)
        assert job.curve("eval_loss", name)[0] == pytest.approx(0.693147, abs=1e-3)
        assert job.curve("loss", name)[0] == pytest.approx(0.693147, abs=1e-3)
    assert job.curve("loss", "zero3_bf16") == pytest.approx(job.curve("loss", "zero2_bf16"), abs=5e-3)
    far, as_far = job.curve("samples/kl", "zero3_bf16"), job.curve("samples/kl", "zero2_bf16")
    assert far == pytest.approx(as_far, rel=0.1) and far[0] == 0 < far[-1]
    before = job.weights("zero3_bf16")
    assert before.keys() == job.weights("zero2_bf16").keys()
    for step in ("step_00000003", "step_00000004", "step_00000006"):
        shutil.rmtree(job.folder / "checkpoints" / "zero3_bf16" / "state" / step)
    run_two(TRAIN, {**base, "run_name": "zero3_bf16", "deepspeed_config": settings["deepspeed_config"]}, "--resume")
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.weights("zero3_bf16").items())


def test_two_ranks_make_tokens_together(job):
    """Each of the blocks by one rank, both of them some, all of them together; a second start makes none, and finds the
    same pairs in the store."""
    run_two(PRECOMPUTE, job.settings)
    port, flags = free_port(), (f"--script={PRECOMPUTE}",)
    made = []
    for _ in range(2):
        processes = [start_rank("tests/small_blocks.py", job.settings, rank, 2, port, flags) for rank in range(2)]
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        assert not any(process.returncode for process in processes), outputs
        assert "24 of 24 pairs are there" in outputs[0]
        made.append([re.findall(r"made block (\d+)", output) for output in outputs])
    assert all(made[0]) and not set(made[0][0]) & set(made[0][1])
    facts = json.loads(next((Path(str(job.settings["ref_cache_dir"])) / "tokens" / "files").iterdir()).read_text())
    assert len(made[0][0] + made[0][1]) == len(facts["blocks"])
    assert made[1] == [[], []]


def test_reference_pass_killed_in_the_middle_resumes(job):
    """kill -9 after the first shards: the second pass computes the rest, and only the rest."""
    write_pairs(job.folder / "pairs.jsonl", range(600))
    settings = {**job.settings, "batch_size": 1, "ref_flush_pairs": 5}
    process = start_rank(PRECOMPUTE, settings)
    store = Path(str(settings["ref_cache_dir"]))
    deadline = time.time() + 120
    while len(list(store.glob("*/*.npy"))) < 4 and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    output = run_ranks(PRECOMPUTE, settings, world=1)
    there = int(output.split(" of 600 pairs are there")[0].split()[-1])
    assert 20 <= there < 600 and f"computed {600 - there} pairs" in output
    assert "600 of 600 pairs are there" in run_ranks(PRECOMPUTE, settings, world=1)


def test_documented_command_through_the_launcher(job, tmp_path):
    """`deepspeed --hostfile hostfile launch/...` with two slots on this machine; it appends --local_rank itself. The
    compilers on the PATH are stubs that leave a note: nobody calls one."""
    called, stubs = tmp_path / "called", tmp_path / "bin"
    stubs.mkdir()
    for name in ("cc", "gcc", "c++", "g++", "clang", "ninja", "nvcc"):
        (stubs / name).write_text(f"#!/bin/sh\necho {name} >>{called}\nexit 1\n")
        (stubs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}"}
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile), "--no_ssh_check"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    arguments = [f"--{name}={value}" for name, value in {**job.settings, "epochs": 1, "n_samples": 0}.items()]
    for script in (PRECOMPUTE, TRAIN):
        command = [*launcher, script, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not called.exists(), f"{script} called {called.read_text().split()}"
    assert job.curve("loss")[0] == pytest.approx(0.693147, abs=1e-6)


def test_ranks_with_different_settings_are_named(job):
    """Rank 1 started with another beta: both ranks end; rank 0 says for both which rank it is and what differs."""
    run_ranks(PRECOMPUTE, job.settings, world=1)
    port = free_port()
    ranks = [start_rank(TRAIN, {**job.settings, "beta": beta}, rank, 2, port) for rank, beta in enumerate((0.5, 0.1))]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "\nerror (all 2 ranks): settings must be the same" in outputs[0] and outputs[1] == ""
    assert "'beta': 0.1" in outputs[0] and "rank 1 on host" in outputs[0] and "Traceback" not in outputs[0]
