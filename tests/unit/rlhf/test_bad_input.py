"""Every bad input ends in one message with the expected words, status 2, no traceback, and nothing written.

The cases are the table of `tests/bad_inputs.py`; each runs a launch script's own path, in this process, on a spoiled
copy of the tiny job.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bad_gguf import GGUF
from bad_inputs import (
    CHECKPOINTS,
    DATASETS,
    DEEPSPEED,
    NAN32,
    SETTINGS,
    SHARD,
    STATES,
    STORES,
    TOKENIZERS,
    Case,
    Start,
    parameters,
    states,
)
from bad_models import MODELS
from simple_llama.cluster.console import _close_log
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.settings import _settings_from_dict
from simple_llama.reinforcement_learning.rlhf import command
from simple_llama.reinforcement_learning.rlhf.apply_dpo import precompute_and_train, train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from tiny_gguf import TinyGGUFJob, make_gguf_job
from tiny_hf import TinyHFJob, make_hf_job
from tiny_job import TinyJob, make_job

WORK: dict[str, Callable[..., object]] = {
    "precompute_ref": precompute,
    "train_dpo": train,
    "apply_dpo": precompute_and_train,
}
LONGEST_MESSAGE = 3000  # characters: what a person reads
LONGEST_S = 30  # of one case; a hang would be far longer, also on a slow machine
Listing = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status and what it printed."""

    status: object
    out: str
    err: str

    @property
    def said(self) -> str:
        """All that was printed, without the line breaks and frame of a box."""
        return " ".join((self.out + self.err).replace("\u2502", " ").split())


Command = Callable[[TinyJob, str, Start], Ended]


@pytest.fixture
def run(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command as its launch script does, to its end. The session's one process group stays open."""
    monkeypatch.setattr(command, "init_ranks", lambda device, timeout_s: ranks)
    monkeypatch.setattr(command, "close_ranks", lambda: None)
    monkeypatch.setattr(command, "leave", sys.exit)

    def run(job: TinyJob, name: str, start: Start) -> Ended:
        settings = {**job.settings, **start.changes}
        argv = [name, *(f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items())]
        argv += start.flags
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.chdir(job.folder)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop, time_limit(LONGEST_S):
            command.run_command(WORK[name], "Help.")
        out, err = capfd.readouterr()
        return Ended(stop.value.code, out, err)

    yield run
    _close_log()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Ends what hangs in a system call or in Python with an error."""

    def too_late(number: int, frame: object) -> None:
        pytest.fail(f"not done after {seconds} s")  # no Exception, which the code might take for a bad file

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """The tiny job before any run."""
    return make_job(tmp_path_factory.mktemp("fresh") / "job")


@pytest.fixture(scope="module")
def fresh_hf(tmp_path_factory: pytest.TempPathFactory) -> TinyHFJob:
    """The tiny job of a Hugging Face folder before any run."""
    return make_hf_job(tmp_path_factory.mktemp("fresh_hf") / "job")


@pytest.fixture(scope="module")
def fresh_gguf(tmp_path_factory: pytest.TempPathFactory) -> TinyGGUFJob:
    """The tiny job of a GGUF file before any run."""
    return make_gguf_job(tmp_path_factory.mktemp("fresh_gguf") / "job")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, fresh: TinyJob, ranks: Ranks) -> TinyJob:
    """The tiny job with its store, and a finished run `tiny` with two states."""
    job = TinyJob(tmp_path_factory.mktemp("trained") / "job")
    shutil.copytree(fresh.folder, job.folder)
    config = _settings_from_dict(DPOConfig, job.settings, "the tiny job")
    precompute_and_train(config, load_inputs(config, ranks), ranks)
    return job


def listing(folder: Path) -> Listing:
    """Size, kind and time of change of all below a folder; of folders only that they are there, and of a store's
    reference.json, whose time says when the store was used, no time."""
    found: Listing = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        size, changed = (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
        changed = 0 if path.name == "reference.json" else changed
        found[str(path.relative_to(folder))] = (status.st_mode, size, changed)
    return found


def differences(before: Listing, after: Listing, allowed: tuple[str, ...]) -> list[str]:
    """Names that came, went or changed, but for those that are allowed to."""
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in allowed)]


def end_of(case: Case, name: str, job: TinyJob, template: TinyJob, run: Command, **changes: object) -> Ended:
    """Runs a case on a copy of `template`, and checks all that holds for every case."""
    shutil.copytree(template.folder, job.folder)
    start = case.spoil(job)
    start = start if isinstance(start, Start) else Start()
    before = listing(job.folder)
    ended = run(job, name, Start({**changes, **start.changes}, start.flags))
    assert ended.status == 2, ended
    assert "Traceback" not in ended.said
    for word in case.words:
        assert word in ended.said, ended.said
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if "For full helptext" in ended.said:  # tyro's box
        assert not errors and ended.said.count("For full helptext") == 1
    else:
        assert len(errors) == 1, ended
        assert ended.err.strip().startswith("error: ") and len(ended.err) < LONGEST_MESSAGE, ended.err[:LONGEST_MESSAGE]
    assert differences(before, listing(job.folder), case.may_change) == []
    return ended


def named(cases: list[Case]) -> pytest.MarkDecorator:
    """One test a case, under its name."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@named(DATASETS + SETTINGS + DEEPSPEED + TOKENIZERS + CHECKPOINTS)
def test_a_bad_input_ends_in_one_message(case: Case, tmp_path: Path, fresh: TinyJob, run: Command) -> None:
    """Data sets, settings, DeepSpeed JSON, tokenizers and SFT checkpoints: nothing is there yet, and nothing comes."""
    end_of(case, "precompute_ref", TinyJob(tmp_path / "job"), fresh, run)


@named(MODELS)
def test_a_broken_model_folder_ends_in_one_message(
    case: Case, tmp_path: Path, fresh_hf: TinyHFJob, run: Command
) -> None:
    """Hugging Face folders: config.json, weights, shards. No pickle in them is opened."""
    end_of(case, "precompute_ref", TinyHFJob(tmp_path / "job"), fresh_hf, run)


@named(GGUF)
def test_a_broken_gguf_file_ends_in_one_message(
    case: Case, tmp_path: Path, fresh_gguf: TinyGGUFJob, run: Command
) -> None:
    """Keys, tensors, tokenizers and templates; no code in a template runs."""
    end_of(case, "precompute_ref", TinyGGUFJob(tmp_path / "job"), fresh_gguf, run)


@named(STATES)
def test_a_bad_state_is_not_resumed_from(case: Case, tmp_path: Path, trained: TinyJob, run: Command) -> None:
    """Neither the run's checkpoints nor its logs change."""
    end_of(case, "train_dpo", TinyJob(tmp_path / "job"), trained, run, resume=True)


@named(STORES)
def test_a_bad_store_or_folder_ends_training(case: Case, tmp_path: Path, trained: TinyJob, run: Command) -> None:
    """A new run beside the finished one is not begun."""
    end_of(case, "train_dpo", TinyJob(tmp_path / "job"), trained, run, run_name="next")


DEBUGGED = [
    next(case for case in cases if case.name == name)
    for cases, name in ((DATASETS, "a blank answer"), (CHECKPOINTS, "NaN weights"), (TOKENIZERS, "no tokenizer"))
]


@named(DEBUGGED)
def test_debug_shows_the_traceback(case: Case, tmp_path: Path, fresh: TinyJob, run: Command) -> None:
    """The error itself comes out of the command, for Python to show with its traceback."""
    job = TinyJob(tmp_path / "job")
    shutil.copytree(fresh.folder, job.folder)
    start = case.spoil(job) or Start()
    with pytest.raises(UserError, match=re.escape(case.words[-1])):
        run(job, "precompute_ref", Start({**start.changes, "debug": True}, start.flags))


def test_a_damaged_state_is_passed_over_for_an_older_one(tmp_path: Path, trained: TinyJob, run: Command) -> None:
    """The newest state has NaN weights: the run goes on from the one before, and says so."""
    job = TinyJob(tmp_path / "job")
    shutil.copytree(trained.folder, job.folder)
    older, newest = states(job)
    parameters(lambda tensors: tensors.update({"norm.weight|weight": NAN32}))(newest)
    ended = run(job, "train_dpo", Start({"resume": True}))
    assert ended.status == 0, ended
    assert f"{newest} is not used: {SHARD}: 'norm.weight': expected finite fp32 numbers" in ended.said
    assert f"resumed from {older} at step 3" in ended.said


def test_the_table_is_as_long_as_it_should_be() -> None:
    """At least 60 inputs, and 30 broken model folders beside them, each with its own name."""
    cases = DATASETS + SETTINGS + DEEPSPEED + TOKENIZERS + CHECKPOINTS + STATES + STORES
    assert len({case.name for case in cases}) >= 60
    assert len({case.name for case in MODELS}) == len(MODELS) >= 30


# === Secrets ===


def test_no_secret_of_the_environment_is_left_anywhere(
    tmp_path: Path, fresh: TinyJob, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run with secrets under usual names: no value is in any file or line of output, nor is a name."""
    secret = "hunter2-correct-horse"
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_PASSWORD")
    for name in names:
        monkeypatch.setenv(name, f"{secret}-{name.lower()}")
    job = TinyJob(tmp_path / "job")
    shutil.copytree(fresh.folder, job.folder)
    ended = run(job, "apply_dpo", Start({"epochs": 1}))
    assert ended.status == 0, ended
    written = {str(path): path.read_bytes() for path in job.folder.rglob("*") if path.is_file()}
    kinds = ("metrics.jsonl", "train.log", "environment.json", "events.out", ".pth", "state.json", "reference.json")
    for kind in kinds:
        assert any(kind in name for name in written), kind
    for content in (*written.values(), ended.out.encode(), ended.err.encode()):
        assert all(word.encode() not in content for word in (secret, *names))


def test_no_secret_is_in_an_error(
    tmp_path: Path, trained: TinyJob, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of a run that stops says nothing of the environment either."""
    monkeypatch.setenv("HF_TOKEN", "hunter2-correct-horse")
    job = TinyJob(tmp_path / "job")
    shutil.copytree(trained.folder, job.folder)
    ended = run(job, "train_dpo", Start({"beta": 0.25, "resume": True}))
    assert ended.status == 2 and "hunter2" not in ended.said
