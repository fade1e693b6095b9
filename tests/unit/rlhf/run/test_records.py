"""What a run writes: curves and samples, what stands on disk after a resume, and the documented names."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.run import records
from simple_llama.reinforcement_learning.rlhf.run.board import _curve_name
from simple_llama.reinforcement_learning.rlhf.run.records import (
    RunWriter,
    _append_record,
    append_samples,
    first_answers,
    read_records,
    rewind,
)
from tiny_job import make_job

OF_PAIRS = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
OF_PAIRS |= {"logps/chosen", "logps/rejected", "logps/accuracies"}
OF_STEPS = {"grad_norm", "learning_rate", "epoch"}
OF_STEPS |= {f"perf/{name}" for name in ("pairs_per_second", "tokens_per_second", "mfu", "step_time_s")}
OF_STEPS |= {f"perf/{name}" for name in ("comm_time_s", "comm_mb", "peak_memory_gb")}


def read_lines(path: Path) -> list[dict[str, float]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def board(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a folder."""
    return EventAccumulator(str(folder)).Reload()


# === files ===


def test_lines_and_curves(tmp_path: Path) -> None:
    """One line a call, in order, with the step first; the same points in TensorBoard, and a text page."""
    writer = RunWriter(tmp_path, is_main=True)
    writer.scalars(1, {"loss": 0.75, "rewards/margins": -0.5})
    writer.scalars(2, {"loss": 0.5})
    writer.text(2, "warnings", [("notice", "a_b_c of *.jsonl"), ("alarm", "x")])
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": 0.75, "rewards/margins": -0.5}\n{"step": 2, "loss": 0.5}\n'
    )
    shown = board(tmp_path)
    assert [(point.step, point.value) for point in shown.Scalars("train/loss")] == [(1, 0.75), (2, 0.5)]
    assert [(point.step, point.value) for point in shown.Scalars("train/rewards/margins")] == [(1, -0.5)]
    [page] = shown.Tensors("warnings/text_summary")
    told = b"**notice** a&#95;b&#95;c of &#42;&#46;jsonl\n\n**alarm** x"
    assert page.step == 2 and page.tensor_proto.string_val == [told]


def test_resume_drops_what_lies_beyond_the_step(tmp_path: Path) -> None:
    """Steps 1 to 4 written, resumed after 2: 3 and 4 are gone from the file and the curve, 3 stands once with its new
    value 30; step 2 stays, with its evaluation."""
    writer = RunWriter(tmp_path, is_main=True)
    for step in (1, 2, 3, 4):
        writer.scalars(step, {"loss": float(step)})
        writer.scalars(step, {"eval_loss": float(step)})
    writer.close()
    writer = RunWriter(tmp_path, is_main=True, done=2)
    writer.scalars(3, {"loss": 30.0})
    writer.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 1, "eval_loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]
    shown = board(tmp_path)
    assert [(point.step, point.value) for point in shown.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [point.step for point in shown.Scalars("eval/loss")] == [1, 2]


def test_a_start_from_nothing_drops_an_earlier_try(tmp_path: Path) -> None:
    """A run that died before its first checkpoint, started again: steps 0 and 1 stand once, with the new values."""
    for value in (1.0, 2.0):
        writer = RunWriter(tmp_path, is_main=True)
        for step in (0, 1):
            writer.scalars(step, {"loss": value})
        writer.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 2.0}]
    assert [(point.step, point.value) for point in board(tmp_path).Scalars("train/loss")] == [(0, 2.0), (1, 2.0)]


def test_flush_brings_the_curve_to_disk(tmp_path: Path) -> None:
    """What a kill right after a flush would leave is the whole curve."""
    writer = RunWriter(tmp_path, is_main=True)
    writer.scalars(1, {"loss": 0.5})
    writer.flush()
    assert [(point.step, point.value) for point in board(tmp_path).Scalars("train/loss")] == [(1, 0.5)]
    writer.close()


def test_rewind_drops_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    """A whole line, then half of one: the half goes, and the file ends with a line end. No file is no error."""
    path = tmp_path / "metrics.jsonl"
    rewind(path, 5)
    assert not path.exists()
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    rewind(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_damaged_line_goes_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Of every kind, in the middle and in front: all others stay as they are, and file and lines are named. One that is
    too long is not read into memory; nothing is said of a last line that was cut."""
    monkeypatch.setattr(records, "_MOST_IN_A_LINE", 100)
    bad = [b"\0" * 8, b'{"step": 1, "lo', b"[1]", b'{"loss": 1.0}', b'{"step": true}', b'{"step": 1, "a": "\xff"}']
    bad += [b'{"step": 1, "a": "' + b"x" * 350 + b'"}', b"[" * 99, b'{"step": ' + b"9" * 90 + b"}"]
    good = [b'{"step": %d, "loss": 1.0}' % step for step in range(len(bad))]
    path = tmp_path / "metrics.jsonl"
    mixed = [line for pair in zip(bad, good, strict=True) for line in pair]
    path.write_bytes(b"\n".join(mixed) + b'\n{"step": 9, "lo')
    rewind(path, 100)
    assert path.read_bytes() == b"".join(line + b"\n" for line in good)
    assert f"{path}: damaged lines dropped: 9, all others stay: line 1, 3, 5, 7, 9, 11, 13, 15, 17\n" in caplog.text


def test_records_are_read_as_far_as_they_are_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file has none. Of three lines the second is damaged and named, the half behind them is being written; a file
    of more bytes than allowed, or a folder in its place, is refused."""
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    path.write_text('{"step": 1, "loss": 0.5}\n[]\n{"step": 2}\n{"step": 3, "lo')
    assert read_records(path) == [{"step": 1, "loss": 0.5}, {"step": 2}]
    assert f"{path}: damaged lines left out: 1, all others stay: line 2\n" in caplog.text
    monkeypatch.setattr(records, "_MOST_READ", path.stat().st_size - 1)
    with pytest.raises(UserError, match=f"cannot read {path}: expected at most 54 bytes, found more"):
        read_records(path)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: expected a file, found a folder"):
        read_records(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_only_files_are_records(tmp_path: Path, name: str) -> None:
    """A pipe, one with a reader, and a device that never ends, in the place of a file: named, and not waited for."""
    path = tmp_path / name
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    found = ["a named pipe", "a pipe, a socket or a device", "a device"]
    for words in found:
        with pytest.raises(UserError, match=f"cannot write {path}: expected a file, found {words}"):
            _append_record(path, {"step": 1})
        for read in (
            lambda: rewind(path, 5),
            lambda: first_answers(tmp_path) if name == "samples.jsonl" else rewind(path, 5),
        ):
            with pytest.raises(UserError, match=f"{path}: expected a file, found a"):
                read()
        if words == found[0]:
            os.close(reader)
        else:
            path.unlink()
            path.symlink_to("/dev/zero")


def test_a_file_too_large_to_be_read_is_refused(tmp_path: Path) -> None:
    """17 GiB that take no room on the disk."""
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(17 << 30)
    with pytest.raises(UserError, match="expected at most 17,179,869,184 bytes, found more"):
        rewind(path, 5)


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a line and for a curve, with the file's or folder's name; closing only warns, since the run may be over."""
    writer = RunWriter(tmp_path, is_main=True)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "append_to", full)
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left on device; free space"):
        writer.scalars(1, {"loss": 0.5})
    monkeypatch.undo()
    assert writer.board
    for name in ("add_scalar", "add_text", "flush", "close"):
        monkeypatch.setattr(writer.board.file, name, full)
    for write in (lambda: writer.scalars(1, {"loss": 0.5}), lambda: writer.text(1, "page", [("a", "b")]), writer.flush):
        with pytest.raises(UserError, match="No space left on device"):
            write()
    writer.close()
    monkeypatch.undo()
    writer.close()


def test_curves_on_a_full_disk_leave_no_thread_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes no byte: the call that writes says so, and no thread dies of it with a traceback of its own."""
    writer = RunWriter(tmp_path, is_main=True)
    assert not [thread for thread in threading.enumerate() if "Writer" in type(thread).__name__]
    assert writer.board
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), writer.board.file._file.fileno())
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: No space left on device; free space"):
        writer.scalars(1, {"loss": 0.5})
    writer.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    """Every call is allowed and does nothing; not even the folder is made."""
    folder = tmp_path / "run"
    writer = RunWriter(folder, is_main=False, done=3)
    writer.scalars(1, {"loss": 0.5})
    writer.text(1, "warnings", [("a", "b")])
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_names_of_a_whole_run_are_the_documented_ones(tmp_path: Path, ranks: Ranks) -> None:
    """One epoch of two steps: the tags of the training steps, the same means under eval_, how many pairs they are of,
    what a rule without a model scores, the sample answers in numbers, and their page; metrics.jsonl has the same."""
    job = make_job(tmp_path, pairs=12)
    changes = {"epochs": 1, "batch_size": 4, "grad_accum_steps": 2, "n_samples": 1, "sample_tokens": 1}
    config = DPOConfig(**{**job.settings, **changes, "reference": "online"})
    train(config, load_inputs(config, ranks), ranks)
    documented = OF_PAIRS | OF_STEPS | {f"eval_{name}" for name in OF_PAIRS}
    documented |= {"eval_pairs", "eval_longer_is_chosen", "rewards/saturated", "eval_margin_length_correlation"}
    documented |= {"eval_log_ratio/chosen", "eval_log_ratio/rejected"}
    documented |= {f"samples/{name}" for name in ("repeated_trigrams", "tokens", "ended", "empty", "unknown")}
    documented |= {f"samples/{name}" for name in ("kl", "kl_low", "kl_high")} | {"weights/median", "weights/bits"}
    assert {name for line in job.lines() for name in line} == documented | {"step"}
    tags = board(tmp_path / "runs" / "tiny").Tags()
    no_curves = {"epoch", "eval_pairs", "weights/median", "weights/bits"}
    assert set(tags["scalars"]) == {_curve_name(name) for name in documented - no_curves}
    assert {name.split("/")[0] for name in tags["scalars"]} == {"train", "eval", "held_out", "samples", "perf"}
    pages = [f"{name}/text_summary" for name in ("samples/prompt_0", "warnings")]
    assert set(tags["tensors"]) == {"custom_scalars__config__", *pages}
    spread = ("margin_nats", "reward_chosen", "reward_rejected", "chosen_less_rejected_tokens")
    assert set(tags["histograms"]) == {f"held_out/{name}" for name in spread} | {"samples/answer_tokens"}


# === samples ===


def test_the_start_models_answers_come_back(tmp_path: Path) -> None:
    """Those of step 0, text of any kind unchanged; none without a file, nor where the first line is of another step or
    is none of ours."""
    assert first_answers(tmp_path) == []
    append_samples(tmp_path, 0, ["a\nb", "\u00e9"], ["", "\u2028 x"])
    append_samples(tmp_path, 5, ["a\nb", "\u00e9"], ['say "y"', "z"])
    assert first_answers(tmp_path) == ["", "\u2028 x"]
    path = tmp_path / "samples.jsonl"
    later = path.read_text().splitlines()[1]
    for text in (later, '{"step": 0, "prompts": [], "answers": 3}\n', "{\n", ""):
        path.write_text(text)
        assert first_answers(tmp_path) == []
