"""Real disks that are full or read-only, and two passes that fill one store at once: whole processes, real mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simple_llama.common.files import file_digest
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from tiny_job import TinyJob, make_job, run_ranks, start_rank, write_pairs

pytestmark = [pytest.mark.dist, pytest.mark.slow]
PRECOMPUTE, TRAIN = "launch/precompute_ref.py", "launch/train_dpo.py"

Mount = Callable[..., None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts something on a folder (arguments of mount(8), the folder last) until the test ends."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    mounted: list[str] = []

    def attach(*arguments: str | Path) -> None:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs to mount a small disk: {done.stderr.strip()}")
        if not any("remount" in str(argument) for argument in arguments):
            mounted.append(str(arguments[-1]))

    yield attach
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def job(tmp_path: Path) -> TinyJob:
    return make_job(tmp_path)


def fails(script: str, settings: dict[str, object], *flags: str) -> str:
    """Runs a script that must end with a message for people and status 2; gives the message."""
    process = start_rank(script, settings, flags=flags)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 2 and "Traceback" not in output, output
    messages = [line for line in output.splitlines() if line.startswith("error")]
    assert len(messages) == 1, output
    return messages[0]


def store_of(settings: dict[str, object]) -> RefStore:
    """The only store below ref_cache_dir, as a reader sees it."""
    [folder] = Path(str(settings["ref_cache_dir"])).iterdir()
    store = RefStore(folder)
    store.load()
    return store


def hidden(folder: Path) -> list[str]:
    """Temp files below a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


def test_a_reference_pass_on_a_full_disk(job: TinyJob, mount: Mount) -> None:
    """Four pages hold reference.json and two or three shards: one message names the next; what is there is whole, and
    with more room the next pass computes the rest only."""
    settings = {**job.settings, "ref_flush_pairs": 4}
    disk = Path(str(settings["ref_cache_dir"]))
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=16k", "tmpfs", disk)
    message = fails(PRECOMPUTE, settings)
    assert ".npy: No space left on device; free space or choose another place" in message
    store = store_of(settings)
    there = len(store)
    assert 0 < there < 24 and store.set_aside == [] and hidden(disk) == []
    mount("-o", "remount,size=1m", disk)
    output = run_ranks(PRECOMPUTE, settings, world=1)
    assert f"{there} of 24 pairs are there" in output and f"computed {24 - there} pairs" in output
    assert len(store_of(settings)) == 24


def test_a_checkpoint_on_a_full_disk(job: TinyJob, mount: Mount) -> None:
    """1 MiB holds the first save (a state of 0.53 MiB, weights of 0.19) and not the second: one message names the
    file, the first state is still the newest, nothing half-written takes room, and with more of it the run goes on."""
    settings = {**job.settings, "save_interval": 2}
    run_ranks(PRECOMPUTE, settings, world=1)
    disk = job.folder / "small"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", disk)
    settings["ckpt_dir"] = str(disk)
    message = fails(TRAIN, settings)
    assert f"cannot write {disk}/tiny/" in message and "No space left" in message
    run = disk / "tiny"
    assert (run / "latest").read_text() == "step_00000002\n"
    assert [path.name for path in (run / "state").glob("step_*")] == ["step_00000002"]
    assert len(list(run.glob("*.pth"))) == 1 and hidden(run) == []
    mount("-o", "remount,size=16m", disk)
    assert "at step 2" in run_ranks(TRAIN, settings, world=1, flags=("--resume",))
    assert (run / "latest").read_text() == "step_00000006\n" and hidden(run) == []
    assert len(job.curve("loss")) == 6


def test_a_read_only_store(job: TinyJob, mount: Mount) -> None:
    """Mounted read-only, which root cannot pass over: training reads it; a pass that has to write says where. Its
    shards are called as an earlier version called them: they are audited each time, and stay."""
    settings = {**job.settings, "epochs": 1, "n_samples": 0}
    run_ranks(PRECOMPUTE, settings, world=1)
    folder = Path(str(settings["ref_cache_dir"]))
    for shard in folder.glob("*/shard-*.npy"):
        shard.rename(shard.with_name(f"{file_digest(shard)}.npy"))
    before = sorted(folder.rglob("*"))
    mount("--bind", folder, folder)
    mount("-o", "remount,ro,bind", folder)
    assert "24 of 24 pairs are there" in run_ranks(PRECOMPUTE, settings, world=1)
    output = run_ranks(TRAIN, settings, world=1)
    assert (
        "finished (all epochs are done):" in output
        and "24 of 24 pairs, drawn anew" in output
        and "Read-only file system" in output
    )
    assert sorted(folder.rglob("*")) == before
    write_pairs(job.folder / "pairs.jsonl", range(30))
    message = fails(PRECOMPUTE, settings)
    assert f"cannot write {folder}/" in message and "Read-only file system" in message


def test_two_passes_at_once(job: TinyJob) -> None:
    """Two processes find the same empty store: both end well, and it is as after one."""
    settings = {**job.settings, "ref_flush_pairs": 2}
    passes = [start_rank(PRECOMPUTE, settings) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in passes]
    assert [process.returncode for process in passes] == [0, 0], outputs
    alone = {**settings, "ref_cache_dir": str(job.folder / "alone")}
    run_ranks(PRECOMPUTE, alone, world=1)
    assert store_of(settings)._records.tobytes() == store_of(alone)._records.tobytes()
    assert hidden(Path(str(settings["ref_cache_dir"]))) == []
