"""What the demo prints, from records written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo_report import report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two steps: 54 pairs held out, 50 of them right at the end; five prompts."""
    start = {
        "step": 0,
        "eval_loss": 0.693147,
        "eval_rewards/accuracies": 0.5,
        "eval_rewards/margins": 0.0,
        "eval_logps/accuracies": 0.6111,
        "eval_longer_is_chosen": 0.537,
        "eval_pairs": 54.0,
        "samples/repeated_trigrams": 0.091,
        "samples/tokens": 60.25,
        "samples/ended": 0.25,
    }
    end = {**start, "step": 2, "eval_loss": 0.469, "eval_rewards/accuracies": 50 / 54, "eval_rewards/margins": 0.568}
    end |= {"samples/repeated_trigrams": 0.071, "samples/tokens": 41.5, "samples/ended": 0.75}
    steps = [{"step": n, "perf/pairs_per_second": 2.0 + n, "perf/peak_memory_gb": 3.0 + n / 10} for n in (1, 2)]
    write(tmp_path / "metrics.jsonl", [start, *steps, end])
    prompts = [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOld question?<|im_end|>\n<|im_start|>assistant\n"
        "Yes.<|im_end|>\n<|im_start|>user\nIs two\nlines?<|im_end|>\n<|im_start|>assistant\n",
        "<SOT>Be kind.<EOT>\n\n<SOU>Hi?<EOU>\n<SOA>",
        "no format at all",
        "fourth",
        "fifth",
    ]
    write(
        tmp_path / "samples.jsonl",
        [
            {"step": 0, "prompts": prompts, "answers": ["One.\n\nTwo.", "", "\x1b[31mred", "d", "e"]},
            {"step": 2, "prompts": prompts, "answers": ["word " * 20, "B", "C", "D", "E"]},
        ],
    )
    return tmp_path


def write(path: Path, lines: list[dict]) -> None:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_numbers_stand_before_and_after(folder: Path) -> None:
    """Each with its partner; the interval is Wilson's of 50 of 54; speed and memory are the median and the most."""
    lines = [" ".join(line.split()) for line in report(folder, 64).splitlines()]
    for line in (
        "54 held-out pairs (split by prompt), 2 optimizer steps",
        "held-out accuracy 0.500 0.926 95 %: 0.82 to 0.97",
        "margin 0.000 0.568",
        "loss 0.693 0.469",
        "start model's log-probs 0.611 the likelier answer is chosen",
        "length 0.537 the longer answer is chosen",
        "language: 5 held-out prompts, greedy, at most 64 tokens",
        "repeated trigrams 9.1% 7.1%",
        "tokens, mean 60.2 41.5",
        "ended by itself 25% 75%",
        "training speed 4.0 pairs/s (median step, 2 processes)",
        "peak memory 3.20 GiB a process",
    ):
        assert line in lines, line


def test_the_first_four_prompts_have_their_answers_side_by_side(folder: Path) -> None:
    """The last user turn alone; long answers wrap in their column, line breaks are seen, nothing reaches the terminal
    that it would obey; the fifth prompt is not shown."""
    text = report(folder, 64)
    lines = text.splitlines()
    assert "Is two / lines?" in lines and "Hi?" in lines and "no format at all" in lines
    assert "Old question?" not in text and "fifth" not in text and "\x1b" not in text
    first = lines.index("Is two / lines?")
    assert lines[first + 2].split() == ["BEFORE", "|", "AFTER"]
    left, right = lines[first + 3].split("|")
    assert left.strip() == "One. / Two." and right.split() == ["word"] * 11
    assert lines[first + 4].split() == ["|", *["word"] * 9]
    second = lines.index("Hi?")
    assert lines[second + 3].split("|")[0].strip() == "(nothing)"
