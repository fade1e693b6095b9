"""What a run writes: curves and samples, what stands on disk after a resume, and the documented names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.run.records import (
    RunWriter,
    append_samples,
    read_samples,
    rewind,
)
from tiny_job import make_job

OF_PAIRS = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
OF_PAIRS |= {"logps/chosen", "logps/rejected"}
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
    writer.text(2, "samples/prompt_0", "**prompt**")
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": 0.75, "rewards/margins": -0.5}\n{"step": 2, "loss": 0.5}\n'
    )
    shown = board(tmp_path)
    assert [(point.step, point.value) for point in shown.Scalars("loss")] == [(1, 0.75), (2, 0.5)]
    assert [(point.step, point.value) for point in shown.Scalars("rewards/margins")] == [(1, -0.5)]
    [page] = shown.Tensors("samples/prompt_0/text_summary")
    assert page.step == 2 and page.tensor_proto.string_val == [b"**prompt**"]


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
    assert [(point.step, point.value) for point in shown.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [point.step for point in shown.Scalars("eval_loss")] == [1, 2]


def test_a_start_from_nothing_drops_an_earlier_try(tmp_path: Path) -> None:
    """A run that died before its first checkpoint, started again: steps 0 and 1 stand once, with the new values."""
    for value in (1.0, 2.0):
        writer = RunWriter(tmp_path, is_main=True)
        for step in (0, 1):
            writer.scalars(step, {"loss": value})
        writer.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 2.0}]
    assert [(point.step, point.value) for point in board(tmp_path).Scalars("loss")] == [(0, 2.0), (1, 2.0)]


def test_flush_brings_the_curve_to_disk(tmp_path: Path) -> None:
    """What a kill right after a flush would leave is the whole curve."""
    writer = RunWriter(tmp_path, is_main=True)
    writer.scalars(1, {"loss": 0.5})
    writer.flush()
    assert [(point.step, point.value) for point in board(tmp_path).Scalars("loss")] == [(1, 0.5)]
    writer.close()


def test_rewind_drops_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    """A whole line, then half of one: the half goes, and the file ends with a line end. No file is no error."""
    path = tmp_path / "metrics.jsonl"
    rewind(path, 5)
    assert not path.exists()
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    rewind(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a line and for a curve, with the file's or folder's name; closing only warns, since the run may be over."""
    writer = RunWriter(tmp_path, is_main=True)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left on device; free space"):
        writer.scalars(1, {"loss": 0.5})
    monkeypatch.undo()
    for name in ("add_scalar", "add_text", "flush", "close"):
        monkeypatch.setattr(writer.board, name, full)
    for write in (lambda: writer.scalars(1, {"loss": 0.5}), lambda: writer.text(1, "page", "text"), writer.flush):
        with pytest.raises(UserError, match="No space left on device"):
            write()
    writer.close()
    monkeypatch.undo()
    writer.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    """Every call is allowed and does nothing; not even the folder is made."""
    folder = tmp_path / "run"
    writer = RunWriter(folder, is_main=False, done=3)
    writer.scalars(1, {"loss": 0.5})
    writer.text(1, "samples/prompt_0", "x")
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_names_of_a_whole_run_are_the_documented_ones(tmp_path: Path, ranks: Ranks) -> None:
    """One epoch of two steps: the tags of the training steps, the same means under eval_, how many pairs they are of,
    and the sample page; metrics.jsonl has the same names."""
    job = make_job(tmp_path, pairs=12)
    changes = {"epochs": 1, "batch_size": 4, "grad_accum_steps": 2, "n_samples": 1, "sample_tokens": 1}
    config = DPOConfig(**{**job.settings, **changes, "reference": "online"})
    train(config, load_inputs(config, ranks), ranks)
    documented = OF_PAIRS | OF_STEPS | {f"eval_{name}" for name in OF_PAIRS} | {"eval_pairs"}
    tags = board(tmp_path / "runs" / "tiny").Tags()
    assert set(tags["scalars"]) == documented
    assert tags["tensors"] == ["samples/prompt_0/text_summary"]
    assert {name for line in job.lines() for name in line} == documented | {"step"}


# === samples ===


def test_samples_round_trip(tmp_path: Path) -> None:
    """Two lines in order, text of any kind unchanged; without a file there are none."""
    assert read_samples(tmp_path) == []
    append_samples(tmp_path, 0, ["a\nb", "\u00e9"], ["", "\u2028 x"])
    append_samples(tmp_path, 5, ["a\nb", "\u00e9"], ['say "y"', "z"])
    assert read_samples(tmp_path) == [
        {"step": 0, "prompts": ["a\nb", "\u00e9"], "answers": ["", "\u2028 x"]},
        {"step": 5, "prompts": ["a\nb", "\u00e9"], "answers": ['say "y"', "z"]},
    ]
