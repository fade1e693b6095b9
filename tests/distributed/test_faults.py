"""Two ranks on this machine, and what goes wrong on the way: both end soon, say why, and `--resume` goes on.

The same on two hosts, with links that are cut and launchers that are killed: tests/hosts.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from simple_llama.cluster.stopping import STOPPED
from simple_llama.cluster.watchdog import LOST
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import newest_state
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from tiny_job import RankProcess, TinyJob, free_port, make_job, run_ranks, start_rank

pytestmark = [pytest.mark.dist, pytest.mark.slow]
PRECOMPUTE, TRAIN, FAULTY = "launch/precompute_ref.py", "launch/train_dpo.py", "tests/faulty_rank.py"
ENDS_S = 60.0  # what users are promised, for the settings as they are shipped


class Pair:
    """Two ranks of a training run that is long enough to be hit in the middle."""

    started: ClassVar[list[RankProcess]] = []  # of one test, so that none outlives it

    def __init__(self, job: TinyJob, *flags: str, fault: str = "", **settings: object):
        """`fault` is one of tests/faulty_rank.py, for rank 1."""
        self.job = job
        self.settings = {**job.settings, "grad_accum_steps": 2, "epochs": 400, "eval_interval": 2, **settings}
        self.settings.pop("start_timeout_s")
        port = free_port()
        faulty = (FAULTY, (*flags, f"--fault={fault}", f"--script={TRAIN}"))
        starts = [(TRAIN, flags), faulty if fault else (TRAIN, flags)]
        self.ranks = [start_rank(script, self.settings, n, 2, port, also) for n, (script, also) in enumerate(starts)]
        self.outputs: list[str] = []
        Pair.started += self.ranks

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl has a line of that step or a later one."""
        path = self.job.folder / "runs" / "tiny" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (path.exists() and any(json.loads(line)["step"] >= step for line in whole_lines(path))):
            assert time.monotonic() < deadline and self.ranks[0].poll() is None, self.end(0)
            time.sleep(0.05)

    def end(self, timeout_s: float = ENDS_S) -> list[int]:
        """Exit statuses, of ranks that must end by themselves; kills what is left after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.1, deadline - time.monotonic()))
        left = [index for index, rank in enumerate(self.ranks) if rank.poll() is None]
        for rank in self.ranks:
            rank.kill()
        self.outputs = [rank.communicate()[0] for rank in self.ranks]
        assert not left or not timeout_s, f"ranks {left} did not end:\n" + "\n".join(self.outputs)
        return [rank.wait() for rank in self.ranks]


def whole_lines(path: Path) -> list[str]:
    """Lines of a file that is being written."""
    return path.read_text().split("\n")[:-1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """The tiny job with its reference pass done, and a run of 8 epochs that nothing stopped, by name `whole`."""
    job = make_job(tmp_path_factory.mktemp("prepared"))
    run_ranks(PRECOMPUTE, job.settings, world=1)
    assert Pair(job, epochs=8, run_name="whole").end(120) == [0, 0]
    return job


@pytest.fixture
def job(prepared: TinyJob, tmp_path: Path) -> Iterator[TinyJob]:
    """A copy of the prepared job; ranks that a failing test leaves are killed."""
    Pair.started.clear()
    shutil.copytree(prepared.folder, tmp_path / "job")
    yield TinyJob(tmp_path / "job")
    for rank in Pair.started:
        if rank.poll() is None:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other(job: TinyJob, victim: int) -> None:
    """kill -9: the other one names it within seconds, in the log of the run too, and nothing half-written is left."""
    pair = Pair(job, save_interval=3)
    pair.wait_for_step(4)
    pair.ranks[victim].kill()
    began = time.monotonic()
    statuses = pair.end(20)
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == LOST, pair.outputs
    assert time.monotonic() - began < 20
    assert f"rank {victim} on host {socket.gethostname()} is gone" in pair.outputs[1 - victim]
    assert "Traceback" not in pair.outputs[1 - victim]
    if victim:
        assert "rank 1 on host" in (job.folder / "runs" / "tiny" / "train.log").read_text()


def test_a_stopped_rank_ends_the_other(job: TinyJob) -> None:
    """SIGSTOP: silent for 6 s (20 as shipped: tests/unit/cluster/test_watchdog.py has a made-up clock), then the other
    ends. Continued, the stopped one ends too."""
    pair = Pair(job, "--peer_timeout_s=6")
    pair.wait_for_step(2)
    pair.ranks[1].send_signal(signal.SIGSTOP)
    assert pair.ranks[0].wait(ENDS_S) == LOST
    pair.ranks[1].send_signal(signal.SIGCONT)
    assert pair.end() == [LOST, LOST]
    assert "is silent for" in pair.outputs[0] and "peer_timeout_s" in pair.outputs[0]
    assert " ends: rank " in pair.outputs[1]  # what rank 0 said before it ended, or that it is gone


def test_a_rank_that_hangs_alive_ends_both(job: TinyJob) -> None:
    """Rank 1's main thread sleeps for ever in a step while its watchdog lives: nobody gets on, both end and say where
    each of them was."""
    pair = Pair(job, "--step_timeout_s=3", fault="hang")
    assert pair.end(90) == [LOST, LOST]
    for output in pair.outputs:
        assert "no rank got on for" in output and "step_timeout_s" in output and "rank 1 on host" in output
        assert "after step 2" in output or "step 3" in output


def test_a_rank_that_never_comes_ends_the_start(job: TinyJob) -> None:
    """Rank 1 ended before it joined: rank 0 waits start_timeout_s, here 2 s."""
    settings = {**job.settings, "start_timeout_s": 2}
    rank = start_rank(TRAIN, settings, 0, 2, free_port())
    began = time.monotonic()
    output = rank.communicate(timeout=ENDS_S)[0]
    assert rank.returncode == 2 and time.monotonic() - began < 40
    assert "could not join the others" in output and "within 2 s" in output and "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_stops_both(job: TinyJob, number: signal.Signals) -> None:
    """Status 75 on both. Resumed, the run ends with the weights and the curve of one that was never stopped, bit for
    bit on any CPU: the same ranks have the same threads. So the steps between two checkpoints are not lost."""
    pair = Pair(job, epochs=8)
    pair.wait_for_step(5)
    pair.ranks[1].send_signal(number)
    assert pair.end() == [STOPPED, STOPPED], pair.outputs
    assert "stopped (all 2 ranks)" in pair.outputs[0] and number.name in pair.outputs[0]
    stopped_at = int(pair.outputs[0].split("stopped after step ")[1].split(";")[0])
    states = [path.name for path in (job.folder / "checkpoints" / "tiny" / "state").iterdir()]
    assert f"step_{stopped_at:08d}" in states and not (job.folder / "checkpoints" / "tiny" / "lock").exists()
    assert not (job.folder / "runs" / "tiny" / "finished.json").exists()
    again = Pair(job, "--resume", epochs=8)
    assert again.end(120) == [0, 0] and f"at step {stopped_at}\n" in again.outputs[0]
    assert (job.folder / "runs" / "tiny" / "finished.json").exists()
    for name in ("loss", "eval_loss", "rewards/margins"):
        assert job.curve(name) == job.curve(name, "whole"), name
    assert all(torch.equal(tensor, job.weights("whole")[name]) for name, tensor in job.weights().items())


def test_a_reference_pass_stops_and_goes_on(job: TinyJob) -> None:
    """SIGTERM to rank 0 in the pass: what was computed is written, the next pass computes only the rest."""
    settings = {**job.settings, "batch_size": 1, "ref_flush_pairs": 4, "ref_cache_dir": str(job.folder / "other")}
    port = free_port()
    flags = ("--fault=slow", f"--script={PRECOMPUTE}")
    ranks = [start_rank(FAULTY, settings, rank, 2, port, flags) for rank in range(2)]
    store = job.folder / "other"
    deadline = time.monotonic() + 120
    while not list(store.glob("*/*.npy")) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks[0].terminate()
    outputs = [rank.communicate(timeout=ENDS_S)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [STOPPED, STOPPED], outputs
    output = run_ranks(PRECOMPUTE, settings, world=1)
    there = int(output.split(" of 24 pairs are there")[0].split()[-1])
    assert 4 <= there < 24 and f"computed {24 - there} pairs" in output


def test_a_bug_on_one_rank_is_told_to_the_other(job: TinyJob) -> None:
    """Rank 1 raises something unforeseen: it shows the traceback, rank 0 the reason."""
    pair = Pair(job, fault="bug")
    assert pair.end() == [LOST, 1], pair.outputs
    assert "Traceback" in pair.outputs[1] and "a bug in step 3" in pair.outputs[1]
    assert "rank 1 on host" in pair.outputs[0] and "failed: RuntimeError: a bug in step 3" in pair.outputs[0]
    assert "Traceback" not in pair.outputs[0]


def test_a_full_disk_in_one_ranks_thread_ends_both(job: TinyJob) -> None:
    """Rank 1 finds no room for its shard of the second save while both train on: both end with its message, nothing of
    it is left, the first one is whole, and the run goes on from there to the weights of one that nothing stopped."""
    pair = Pair(job, fault="full", epochs=8, save_interval=2)
    assert pair.end() == [2, 2], pair.outputs
    words = "cannot write {}: No space left on device; free space or choose another place"
    shard = words.format(job.folder / "checkpoints/tiny/state/.step_00000003.tmp/rank_00001.safetensors")
    assert (
        f"failed: {shard}" in pair.outputs[0]
        and f"error (rank 1 on {socket.gethostname()}): {shard}" in pair.outputs[1]
    )
    assert not any("Traceback" in output for output in pair.outputs)
    home = job.folder / "checkpoints" / "tiny"
    assert (home / "latest").read_text() == "step_00000002\n" and len(list((home / "state").iterdir())) == 1
    again = Pair(job, "--resume", epochs=8, save_interval=2)
    assert again.end(120) == [0, 0] and "at step 2\n" in again.outputs[0]
    assert all(torch.equal(tensor, job.weights("whole")[name]) for name, tensor in job.weights().items())


def test_a_slow_disk_of_one_rank_stops_no_steps(job: TinyJob) -> None:
    """Two seconds for each shard of rank 1, three steps from save to save: when the first state gets its name, steps
    behind it are made; asked to stop, both wait for the save under way, and the last step has a whole state."""
    pair = Pair(job, fault="slow_disk", save_interval=3000, n_samples=0, eval_interval=0)
    home = job.folder / "checkpoints" / "tiny"
    deadline = time.monotonic() + 120
    while not (home / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    last = json.loads(whole_lines(job.folder / "runs" / "tiny" / "metrics.jsonl")[-1])["step"]
    saved = int((home / "latest").read_text().split("_")[1])
    pair.ranks[0].terminate()
    assert pair.end() == [STOPPED, STOPPED], pair.outputs
    assert saved == 3 and last > saved, (saved, last)
    assert newest_state(home).facts.step >= last and not list((home / "state").glob(".*"))


def test_one_wrong_value_on_one_rank_ends_both_before_the_weights_change(job: TinyJob) -> None:
    """A pair of rank 1's second micro-batch of step 1 has a stored sum that is 0.01 nats off, and the audit happens to
    pass over it: both ranks end in the first step, rank 0 names it for both, and nothing is saved."""
    config = DPOConfig(**{**job.settings, "grad_accum_steps": 2})
    loader = RLDatasetLoader(
        config.rlhf_dataset_path,
        load_tokenizer(config.tokenize_path),
        512,
        val_share=config.held_out_share,
        seed=config.seed,
    )
    bad = BatchPlan(loader.train.rows, config.seed, 2, 2, 2).step(0)[1][1][0]
    (folder,) = (job.folder / "ref_cache").iterdir()
    store = RefStore(folder)
    store.load()
    sums, keys = store.lookup(loader.pairs.keys), loader.pairs.keys
    sums[keys == loader.train.keys[bad], 0] -= np.float32(0.01)
    for path in folder.glob("*.npy"):
        path.unlink()
    RefStore(folder).add(keys, sums)
    settings, port = {**job.settings, "grad_accum_steps": 2, "run_name": "new"}, free_port()
    flags = ("--fault=unaudited", f"--script={TRAIN}")
    Pair.started += (ranks := [start_rank(FAULTY, settings, rank, 2, port, flags) for rank in range(2)])
    outputs = [rank.communicate(timeout=ENDS_S)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "step 1: 1 pairs" in outputs[0] and loader.train.origin(bad) in outputs[0]
    assert not any("Traceback" in output for output in outputs)
    assert not (job.folder / "checkpoints" / "new" / "latest").exists()


def test_a_second_run_of_the_name_is_refused(job: TinyJob) -> None:
    """While one trains, another one that wants the same folder ends and names the first; the first goes on."""
    pair = Pair(job)
    pair.wait_for_step(2)
    second = start_rank(TRAIN, pair.settings, flags=("--resume",))
    output = second.communicate(timeout=ENDS_S)[0]
    assert second.returncode == 2 and f"pid {pair.ranks[0].pid}" in output and "Traceback" not in output, output
    assert pair.ranks[0].poll() is None
    pair.ranks[0].terminate()
    assert pair.end() == [STOPPED, STOPPED]
