"""The commands as a person types them: one message for a mistake, a traceback on demand, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.cluster.console import _close_log
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf import command
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from tiny_job import ROOT, TinyJob, make_job, start_rank

pytestmark = pytest.mark.dist
PRECOMPUTE, TRAIN = "launch/precompute_ref.py", "launch/train_dpo.py"
RLHF = ROOT / "simple_llama" / "reinforcement_learning" / "rlhf"


@pytest.fixture
def job(tmp_path: Path) -> TinyJob:
    """The tiny job, made anew."""
    return make_job(tmp_path)


def call(
    script: str, job: TinyJob, *flags: str, cwd: Path = ROOT, **changes: object
) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end with the job's settings, changed by `changes`, and `flags`."""
    arguments = [f"--{name}={value}" for name, value in {**job.settings, **changes}.items()]
    command = [sys.executable, script, *arguments, *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def call_forked(script: str, job: TinyJob, *flags: str, **changes: object) -> tuple[int, str]:
    """(status, stdout and stderr in one) of the same in a process that has its imports already."""
    process = start_rank(script, {**job.settings, **changes}, flags=flags)
    output = process.communicate(timeout=240)[0]
    return process.wait(), output


def files(job: TinyJob) -> set[str]:
    """Files and folders of the job: its inputs, and what a command left."""
    return {path.name for path in job.folder.iterdir()}


INPUTS = {"pairs.jsonl", "start.pth", "tokenizer.json"}


def assert_one_message(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Status 2 and a single line `error: ...` that has all the words; no traceback anywhere."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]


def assert_one_error(ended: tuple[int, str], *words: str) -> None:
    """The same of a forked process, whose log stands in the same stream."""
    status, output = ended
    assert status == 2 and "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), output


def test_a_tokenizer_that_is_not_there(job: TinyJob) -> None:
    """The path, and what was expected there."""
    path = str(job.folder / "none.json")
    ended = call_forked(PRECOMPUTE, job, tokenize_path=path)
    assert_one_error(ended, path, "expected a tokenizer JSON file", "No such file")
    assert files(job) == INPUTS


def test_a_model_folder_that_is_not_there(job: TinyJob) -> None:
    """The same message from training; `--debug` adds the traceback, and ends with another status than 2."""
    path = str(job.folder / "none")
    done = call(TRAIN, job, model_path=path)
    assert_one_message(done, path, "expected a .pth file, or a folder with one, found nothing there")
    status, debug = call_forked(PRECOMPUTE, job, "--debug", model_path=path)
    assert status == 1
    assert "Traceback (most recent call last)" in debug and "in find_weights" in debug
    assert "found nothing there" in debug
    assert files(job) == INPUTS


def test_a_record_that_is_no_pair(job: TinyJob) -> None:
    """File, line, key, expected and found."""
    path = job.folder / "pairs.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps({"Template": ["CUSTOM"], "User": ["hi"], "Accepted": "yes", "Rejected": ["no"]})
    path.write_text("\n".join(lines))
    ended = call_forked(PRECOMPUTE, job)
    assert_one_error(ended, f"{path}:3: Accepted", "expected a list of one or more strings, found a string")
    assert files(job) == INPUTS


def test_a_setting_out_of_range_in_a_file(job: TinyJob, tmp_path: Path) -> None:
    """The setting, what is allowed and what was found."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"beta": -1.0}))
    ended = call_forked(PRECOMPUTE, job, "--config", str(path))
    assert_one_error(ended, "beta", "expected a finite number above 0", "found -1.0")
    assert files(job) == INPUTS | {"settings.json"}


@pytest.mark.parametrize(
    ("flag", "words"), [("--betta=0.1", ["Unrecognized", "--betta"]), ("--beta=0", ["beta", "above 0", "found 0.0"])]
)
def test_a_flag_that_cannot_be(job: TinyJob, flag: str, words: list[str]) -> None:
    """An unknown name, and a value out of range: the words in one box, status 2."""
    status, output = call_forked(PRECOMPUTE, job, flag)
    assert status == 2 and "Traceback" not in output
    shown = " ".join(output.split())
    assert all(word in shown for word in words), shown
    assert output.count("For full helptext") == 1
    assert files(job) == INPUTS


def test_dry_run_prints_and_writes_nothing(job: TinyJob) -> None:
    """The report on stdout; no folder for checkpoints, reference or records."""
    status, output = call_forked(TRAIN, job, "--dry_run")
    assert status == 0, output
    for words in ("kept 24 of 24 pairs", "= 8 pairs an optimizer step", "45,984 weights", "<EOA>]]"):
        assert words in output
    assert files(job) == INPUTS


def test_status_of_a_process_whose_libraries_abort_on_the_way_out(
    job: TinyJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank ends with the status of its work, 0 or 2, not with the SIGABRT of a destructor after it."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = call(PRECOMPUTE, job)
    assert done.returncode == 0 and "job finished on all ranks" in done.stdout, done.stdout + done.stderr
    assert_one_message(call(TRAIN, job, model_path="none"), "found nothing there")


@pytest.mark.parametrize(
    ("rank", "sharers", "is_said", "expected"),
    [
        (0, 2, False, "error (all 2 ranks): no such file\n"),
        (1, 2, True, ""),
        (1, 1, False, "error (rank 1 on {host}): no such file\n"),
    ],
)
def test_an_error_of_all_ranks_is_said_once(
    rank: int, sharers: int, is_said: bool, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One of two ranks, as it ends: what both have is said by rank 0, what one has by itself. Status 2 each."""

    def fail(config: DPOConfig, ranks: Ranks, ref_cache_dir: str, settled: bool) -> None:
        error = UserError("no such file")
        error.sharers, error.is_said = sharers, is_said
        raise error

    place = Ranks(rank, 2, rank, 2, torch.device("cpu"))
    monkeypatch.setattr(command, "parse_config", lambda description: DPOConfig())
    monkeypatch.setattr(command, "init_ranks", lambda device, timeout_s: place)
    monkeypatch.setattr(command.watchdog, "start", lambda ranks, config: None)
    monkeypatch.setattr(command, "fail_together", lambda ranks: contextlib.nullcontext())
    monkeypatch.setattr(command, "load_inputs", fail)
    monkeypatch.setattr(command, "leave", sys.exit)
    with pytest.raises(SystemExit) as stop:
        command.run_command(lambda *of_a_run: None, None)
    _close_log()
    assert stop.value.code == 2 and capsys.readouterr().err == expected.format(host=socket.gethostname())


@pytest.mark.parametrize("flag", ["--config=none.json", "--betta=1", "--help"])
def test_what_is_said_of_a_command_line_is_said_once_a_host(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started by DeepSpeed's launcher, the second rank of a host ends as the first, and says nothing; one that another
    launcher started, perhaps with flags of its own, speaks for itself."""
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", flag])
    monkeypatch.setattr(command, "leave", sys.exit)
    said = []
    for variables in (
        {"CROSS_SIZE": "1", "LOCAL_RANK": "0"},
        {"CROSS_SIZE": "1", "LOCAL_RANK": "1"},
        {"LOCAL_RANK": "1"},
    ):
        with monkeypatch.context() as launcher:
            launcher.delenv("CROSS_SIZE", raising=False)
            for name, value in variables.items():
                launcher.setenv(name, value)
            with pytest.raises(SystemExit) as stop:
                command.run_command(lambda *of_a_run: None, None)
        assert stop.value.code == (0 if flag == "--help" else 2)
        said.append("".join(capsys.readouterr()))
    assert said[0] == said[2] != "" and said[1] == ""


def test_apply_dpo_runs_from_its_own_folder(job: TinyJob) -> None:
    """`python3 apply_dpo.py`: the folder's own modules must not hide installed ones of the same name."""
    done = call("apply_dpo.py", job, "--dry_run", cwd=RLHF)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== batches ==" in done.stdout
    assert files(job) == INPUTS
