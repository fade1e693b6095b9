"""Two hosts, as README.md says: the same numbers as one host, resume, and a host that differs is named.

Both ranks compute in the same order on one machine's processor, so curves and weights are equal bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hosts.launch import PRECOMPUTE, TRAIN, Launch, launch, run_on_each
from hosts.rig import ADDRESSES, Rig
from tiny_job import ROOT, TinyJob, free_port, make_job, run_ranks, write_pairs

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
CURVES = ("loss", "eval_loss", "rewards/margins", "logps/chosen", "grad_norm")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """The hosts. What is missing here is an error and no skip: who asks for these tests wants them run."""
    with Rig() as rig:
        yield rig


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    return make_job(tmp_path_factory.mktemp("two_hosts"))


@pytest.fixture(scope="module")
def trained(rig: Rig, job: TinyJob) -> tuple[Launch, Launch]:
    """The reference pass and the training of run "two" on both hosts, each to its end."""
    first, second = (finish(launch(rig, job.folder, script, settings(job))) for script in (PRECOMPUTE, TRAIN))
    return first, second


def settings(job: TinyJob, **other: object) -> dict[str, object]:
    """Six bf16 ZeRO-2 steps of 8 pairs: 2 ranks x 2 pairs x 2 micro-batches."""
    deepspeed_config = str(ROOT / "ds_configs" / "zero2_bf16.json")
    return {**job.settings, "run_name": "two", "grad_accum_steps": 2, "deepspeed_config": deepspeed_config, **other}


def finish(run: Launch) -> Launch:
    """Waits for a launch that must succeed."""
    assert run.wait() == 0, run.output
    return run


def refusal(rig: Rig, settings: dict[str, object], *flags: str, **environment: str) -> str:
    """Output of both ranks of a training that must end on each with a message and the status of a mistake."""
    done = run_on_each(rig, TRAIN, settings, *flags, **environment)
    output = "\n".join(output for _, output in done)
    assert [status for status, _ in done] == [2, 2], output
    assert "Traceback" not in output, output
    return output


@contextlib.contextmanager
def mounted(rig: Rig, host: str, what: Path, at: Path) -> Iterator[None]:
    """`host` sees `what` in the place of `at`, as a host does whose disk has other files."""
    assert rig.run(host, "mount", "--bind", str(what), str(at)).returncode == 0
    try:
        yield
    finally:
        assert rig.run(host, "umount", str(at)).returncode == 0


def test_each_host_has_its_rank(rig: Rig, trained: tuple[Launch, Launch]) -> None:
    """Rank 0 ran on host-a and rank 1 on host-b, and what they said to each other went over the link: the gradients
    of six steps alone are megabytes."""
    for done in trained:
        assert done.ranks == {("host-a", "0"), ("host-b", "1")}
    line = next(line for line in rig.run("host-b", "cat", "/proc/net/dev").stdout.splitlines() if "eth0:" in line)
    received, sent = int(line.split()[1]), int(line.split()[9])
    assert received > 1_000_000 and sent > 1_000_000


def test_two_hosts_equal_one(job: TinyJob, trained: tuple[Launch, Launch]) -> None:
    """Two ranks on one host, with a reference store of their own: every curve and weight is the same number. The first
    loss is ln 2 = 0.6931472."""
    one = settings(job, run_name="one", ref_cache_dir=str(job.folder / "ref_cache_one"))
    for script in (PRECOMPUTE, TRAIN):
        run_ranks(script, one, world=2, port=free_port())
    assert job.curve("loss", "two")[0] == pytest.approx(0.6931472, abs=1e-6)
    for name in CURVES:
        assert job.curve(name, "two") == job.curve(name, "one"), name
    one_weights = job.weights("one")
    assert all(torch.equal(tensor, one_weights[name]) for name, tensor in job.weights("two").items())


def test_hosts_have_the_same_weights(job: TinyJob, trained: tuple[Launch, Launch]) -> None:
    """Rank 1 wrote every second parameter of the state as host-b has it; rank 0 exported all as host-a has them."""
    exported = job.weights("two")
    on_b = load_file(job.folder / "checkpoints" / "two" / "state" / "step_00000006" / "rank_00001.safetensors")
    masters = {name.removesuffix("|weight"): tensor for name, tensor in on_b.items() if name.endswith("|weight")}
    assert len(masters) == len(exported) // 2
    assert all(torch.equal(tensor, exported[name]) for name, tensor in masters.items())


def test_two_hosts_resume(rig: Rig, job: TinyJob, trained: tuple[Launch, Launch]) -> None:
    """Taken up after the first epoch, the run ends where the one never stopped did."""
    checkpoints = job.folder / "checkpoints"
    shutil.copytree(checkpoints / "two", checkpoints / "again")
    shutil.rmtree(checkpoints / "again" / "state" / "step_00000006")
    finish(launch(rig, job.folder, TRAIN, settings(job, run_name="again"), "--resume"))
    assert job.curve("loss", "again") == job.curve("loss", "two")[3:]
    before = job.weights("two")
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.weights("again").items())


def test_host_with_other_data_is_named(rig: Rig, job: TinyJob, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", range(1, 25))
    with mounted(rig, "host-b", tmp_path / "pairs.jsonl", job.folder / "pairs.jsonl"):
        output = refusal(rig, settings(job))
    assert output.count("data set (digest) must be the same on all 2 ranks") == 1
    assert output.count("rank 1 on host host-b: expected") == 1


def test_host_with_another_setting_is_named(rig: Rig, job: TinyJob, tmp_path: Path) -> None:
    shared, other = job.folder / "config.json", tmp_path / "config.json"
    shared.write_text(json.dumps({"beta": 0.5}))
    other.write_text(json.dumps({"beta": 0.1}))
    with mounted(rig, "host-b", other, shared):
        output = refusal(rig, settings(job), f"--config={shared}")
    assert output.count("settings must be the same on all 2 ranks") == 1
    assert output.count("rank 1 on host host-b: expected {'beta': 0.5}, found {'beta': 0.1}") == 1


def test_host_with_another_version_is_named(rig: Rig, job: TinyJob, tmp_path: Path) -> None:
    """host-b's environment says that it has tokenizers 0.0.1."""
    installed = distribution("tokenizers")
    metadata = Path(str(installed.locate_file(f"tokenizers-{installed.version}.dist-info"))) / "METADATA"
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.0.1\n")
    with mounted(rig, "host-b", tmp_path / "METADATA", metadata):
        output = refusal(rig, settings(job))
    expected = f"{{'tokenizers': '{installed.version}'}}"
    assert output.count(f"rank 1 on host host-b: expected {expected}, found {{'tokenizers': '0.0.1'}}") == 1


def test_names_that_are_loopback_give_the_hint(rig: Rig, job: TinyJob) -> None:
    """Debian's line for each host's own name, and no GLOO_SOCKET_IFNAME: no rank can reach the other. One gives up at
    once, the one that listens after start_timeout_s, though gloo would try five times as long."""
    for host in ADDRESSES:
        rig.name_hosts(host, own_address="127.0.1.1")
    try:
        output = refusal(rig, settings(job, start_timeout_s=6), GLOO_SOCKET_IFNAME="")
    finally:
        for host in ADDRESSES:
            rig.name_hosts(host)
    for host in ADDRESSES:
        assert f"of 2 on host {host} could not join the others" in output
    assert "host names do not resolve to 127.0.1.1 (else set GLOO_SOCKET_IFNAME" in output


@pytest.mark.parametrize("setting", ["ref_cache_dir", "ckpt_dir"])
def test_disk_that_is_not_shared_is_named(
    rig: Rig, job: TinyJob, trained: tuple[Launch, Launch], tmp_path: Path, setting: str
) -> None:
    """host-b has an empty folder in the place of the shared one; the message comes through the launcher."""
    mine = settings(job, run_name=f"own_{setting}", epochs=1, n_samples=0)
    with mounted(rig, "host-b", tmp_path, Path(str(mine[setting]))):
        run = launch(rig, job.folder, TRAIN, mine)
        assert run.wait() == 2, run.output
    assert "Traceback" not in run.output and "host-b" in run.output and setting in run.output
