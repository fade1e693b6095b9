"""The report of a run: from whole records, old ones and damaged ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.report.read_run import read_run
from simple_llama.reinforcement_learning.rlhf.report.run_charts import PairText, shown_pairs
from simple_llama.reinforcement_learning.rlhf.report.run_report import chat_command, main, write_report

BAD = "<script>alert(1)</script>"
N = 12


def write_lines(path: Path, *records: dict) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 4 steps with all its records; whatever people write in it is a tag."""
    found = tmp_path / "run"
    found.mkdir()
    start = {"eval_rewards/accuracies": 0.5, "eval_pairs": 100.0, "eval_loss": 0.6931, "eval_rewards/margins": 0.0}
    end = {**start, "eval_rewards/accuracies": 0.8, "eval_loss": 0.5, "samples/kl": 0.2}
    ratios = {"eval_log_ratio/chosen": -1.0, "eval_log_ratio/rejected": -3.0}
    train = {"loss": 0.6, "grad_norm": 2.0, "learning_rate": 1e-6, "perf/step_time_s": 0.5, "perf/peak_memory_gb": 1.5}
    steps = [{"step": step, **train} for step in range(1, 5)]
    write_lines(found / "metrics.jsonl", {"step": 0, **start}, *steps, {"step": 4, **end, **ratios})
    samples = [
        {"step": step, "prompts": [BAD, "b"], "answers": answers} for step, answers in ((0, [BAD, ""]), (4, ["x", BAD]))
    ]
    write_lines(found / "samples.jsonl", *samples)
    write_lines(found / "warnings.jsonl", {"step": 3, "level": "alarm", "name": "x", "text": BAD})
    settings = {"run_name": BAD, "beta": 0.5, "model_path": BAD, "batch_size": 4, "resume": True, "ckpt_dir": "c"}
    (found / "config.json").write_text(json.dumps(settings))
    (found / "environment.json").write_text(json.dumps({"torch": BAD, "git": None}))
    (found / "data.json").write_text(json.dumps({"pairs": 90, "held_out": N, "report": BAD, "files": [BAD]}))
    rng = np.random.default_rng(0)
    ref = rng.normal(-50, 5, (N, 2)).astype(np.float32)
    change = np.stack([np.arange(N), np.zeros(N)], 1).astype(np.float32)
    origins = np.array([f"{BAD}:{i}" for i in range(N)])
    counts = rng.integers(1, 30, (N, 2)).astype(np.int32)
    arrays = {"logps_N2": ref + change, "ref_N2": ref, "counts_N2": counts, "origins": origins, "prompts": np.arange(N)}
    np.savez(found / "held_out.npz", step=4, **arrays)
    return found


def texts(pairs) -> dict[int, PairText]:
    return {N - 1: PairText(BAD, f"chosen {BAD}", "rejected")}


def test_a_whole_report(folder: Path, tmp_path: Path) -> None:
    """Every section, the texts of a pair, final metrics; nothing of what people wrote is an element of the page."""
    path, metrics = write_report(folder, tmp_path / "dpo.pth", 12.5, texts)
    assert path == folder / "report.html"
    html = (folder / "report.html").read_text()
    assert "<script" not in html
    for words in (
        "rose from 0.500 to 0.800",
        "Curves",
        "Calibration",
        "Largest gain",
        "Time and memory",
        "chosen &lt;script",
    ):
        assert words in html
    assert html.count("(ended at once)") == 1
    assert metrics["eval_rewards/accuracies"] == 0.8 and metrics["loss"] == 0.6 and "step" not in metrics
    found = json.loads((folder / "report.json").read_text())
    assert found["verdict"][0].startswith("Held-out accuracy rose")
    assert found["changed_settings"] == {
        "run_name": BAD,
        "model_path": BAD,
        "batch_size": 4,
        "resume": True,
        "ckpt_dir": "c",
    }
    assert (found["steps"], found["seconds"], found["accuracy_interval"][0]) == (
        4,
        12.5,
        pytest.approx(0.711, abs=1e-3),
    )
    assert any("--no_resume" in line for line in found["commands"])


def test_it_is_made_again_from_the_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, the same page with the texts of the first; `finished.json` gives its seconds."""
    write_report(folder, tmp_path / "dpo.pth", 12.5, texts)
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    (folder / "finished.json").write_text(json.dumps({"weights": str(tmp_path / "dpo.pth"), "seconds": 12.5}))
    main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text() == page


def test_a_run_of_before_has_a_report(folder: Path, tmp_path: Path) -> None:
    """Metrics alone: what is missing is said, and the margin in nats needs beta."""
    for file in folder.iterdir():
        if file.name != "metrics.jsonl":
            file.unlink()
    path, _ = write_report(folder, tmp_path / "dpo.pth", 1.0, texts)
    assert path
    for words in ("No sample answers", "Not recorded, pair by pair", "Settings are not recorded", "not recorded"):
        assert words in path.read_text()


@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "data.json", "samples.jsonl", "warnings.jsonl", "held_out.npz"]
)
@pytest.mark.parametrize("damage", [b"\xff\0{", b"[1]\n", b'{"step": 1, "prompts": 3, "answers": [4]}\n'])
def test_damaged_records_are_left_out(
    folder: Path, tmp_path: Path, name: str, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A report is made all the same."""
    (folder / name).write_bytes(damage)
    path, metrics = write_report(folder, tmp_path / "dpo.pth", 1.0, texts)
    assert path and metrics["loss"] == 0.6
    assert "no report was made" not in caplog.text


def test_no_failure_of_the_report_is_one_of_the_run(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its place is taken, its texts cannot be had, its numbers are not there: said, and the metrics are given where
    they are."""
    (folder / "report.html").mkdir()
    path, metrics = write_report(folder, tmp_path / "dpo.pth", 1.0, texts)
    assert path is None and metrics["loss"] == 0.6
    assert "no report was made: cannot write" in caplog.text

    def broken(pairs) -> dict[int, PairText]:
        raise IndexError("of a bug")

    assert write_report(folder, tmp_path / "dpo.pth", 1.0, broken)[0] is None
    assert "the run itself is done and saved" in caplog.text
    assert write_report(tmp_path / "nowhere", tmp_path / "dpo.pth", 1.0, texts) == (None, {})


def test_the_pairs_that_changed_most(folder: Path) -> None:
    """Pair i gained i nats: the last four gained most, the first four least. Of three pairs, one at either end."""
    pairs = read_run(folder).held_out
    assert pairs
    assert np.allclose(pairs.margins_N, np.arange(N), atol=1e-4)
    assert shown_pairs(pairs) == ([11, 10, 9, 8], [0, 1, 2, 3])
    few = type(pairs)(pairs.logps_N2[:3], pairs.ref_N2[:3], pairs.counts_N2[:3], 4, pairs.origins[:3], np.arange(3))
    assert shown_pairs(few) == ([2], [0])


def test_numbers_that_are_none_are_left_out(folder: Path) -> None:
    """A curve has gaps for what is no number; final metrics have finite ones alone."""
    write_lines(
        folder / "metrics.jsonl", {"step": 1, "loss": math.nan}, {"step": 2, "loss": "x", "grad_norm": math.inf}
    )
    facts = read_run(folder)
    xs, ys = facts.curve("loss")
    assert xs == [1, 2] and all(map(math.isnan, ys))
    assert facts.final_metrics() == {}


def test_how_to_talk_to_the_result() -> None:
    """A tokenizer of its own is named; blanks are quoted."""
    assert chat_command({}, "a b.pth") == "python launch/chat.py --model_path 'a b.pth'"
    assert chat_command({"tokenize_path": "t.json"}, "a.pth").endswith(" --tokenize_path t.json")


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help"]])
def test_the_command_takes_one_folder(arguments: list[str]) -> None:
    """Anything else is a mistake that says what was expected."""
    with pytest.raises(UserError, match="expected one folder of a run"):
        main(arguments)
    with pytest.raises(UserError, match="found none"):
        main(["nowhere"])
