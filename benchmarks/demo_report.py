"""What the demo prints of a run: held-out numbers before and after, whether the language held, answers side by side."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from simple_llama.reinforcement_learning.rlhf.run.records import read_records
from simple_llama.reinforcement_learning.rlhf.run.statistics import accuracy_interval

_SHOWN = 4  # prompts: the first ones of the held-out split, which its seed decides and no answer
_COLUMN = 57  # characters of an answer's column
# Where the last user turn stands in a chat of SimpleLLaMA's format, or of ChatML.
_USER = re.compile(
    r"(?:<SOU>|<\|im_start\|>user\n)((?:(?!<SOU>|<\|im_start\|>).)*?)(?:<EOU>|<\|im_end\|>)\s*\S+\s*$", re.DOTALL
)


def report(folder: Path, sample_tokens: int) -> str:
    """The outcome of the run with this record folder, read from metrics.jsonl and samples.jsonl."""
    lines = read_records(folder / "metrics.jsonl")
    held_out = [line for line in lines if "eval_loss" in line]
    steps = [line for line in lines if "perf/pairs_per_second" in line]
    samples = read_records(folder / "samples.jsonl")
    first, last = held_out[0], held_out[-1]
    pairs = round(last["eval_pairs"])
    speed = sorted(line["perf/pairs_per_second"] for line in steps)[len(steps) // 2]
    memory = max(line["perf/peak_memory_gb"] for line in steps)
    return "\n".join(
        [
            "",
            *_answers(samples[0], samples[-1], sample_tokens),
            f"{pairs} held-out pairs (split by prompt), {last['step']} optimizer steps",
            "",
            *_preferences(first, last, pairs),
            "",
            f"language: {len(samples[0]['prompts'])} held-out prompts, greedy, at most {sample_tokens} tokens",
            "",
            *_language(first, last),
            "",
            f"training speed        {speed:.1f} pairs/s (median step, 2 processes)",
            f"peak memory           {memory:.2f} GiB a process",
        ]
    )


def _preferences(first: dict[str, float], last: dict[str, float], pairs: int) -> list[str]:
    """Accuracies with what they have to beat, margin and loss."""
    before, after = first["eval_rewards/accuracies"], last["eval_rewards/accuracies"]
    low, high = accuracy_interval(after, pairs)
    return [
        _row("", "before", "after"),
        _row("held-out accuracy", f"{before:.3f}", f"{after:.3f}") + f"   95 %: {low:.2f} to {high:.2f}",
        _row("margin", f"{first['eval_rewards/margins']:.3f}", f"{last['eval_rewards/margins']:.3f}"),
        _row("loss", f"{first['eval_loss']:.3f}", f"{last['eval_loss']:.3f}"),
        "(before: by definition, since the policy still is the reference)",
        "",
        "to compare: accuracy of",
        _row("  start model's log-probs", f"{first['eval_logps/accuracies']:.3f}") + "   the likelier answer is chosen",
        _row("  length", f"{first['eval_longer_is_chosen']:.3f}") + "   the longer answer is chosen",
    ]


def _language(first: dict[str, float], last: dict[str, float]) -> list[str]:
    """The guards."""
    forms = (
        ("repeated trigrams", "samples/repeated_trigrams", "{:.1%}"),
        ("tokens, mean", "samples/tokens", "{:.1f}"),
        ("ended by itself", "samples/ended", "{:.0%}"),
    )
    rows = [_row(title, form.format(first[name]), form.format(last[name])) for title, name, form in forms]
    return [_row("", "before", "after"), *rows]


def _answers(first: dict[str, Any], last: dict[str, Any], most_tokens: int) -> list[str]:
    """The first prompts with both answers side by side."""
    found = []
    triples = zip(first["prompts"], first["answers"], last["answers"], strict=True)
    for number, (prompt, before, after) in enumerate(list(triples)[:_SHOWN], 1):
        question = _USER.search(prompt)
        found += [
            f"--- held-out prompt {number} of {_SHOWN}, fixed in advance; answers of at most {most_tokens} tokens"
        ]
        found += textwrap.wrap(_one_line(question[1] if question else prompt), 2 * _COLUMN + 3)
        found += ["", _line("BEFORE", "AFTER")]
        columns = [textwrap.wrap(_one_line(text), _COLUMN) or ["(nothing)"] for text in (before, after)]
        most = max(map(len, columns))
        left, right = (column + [""] * (most - len(column)) for column in columns)
        found += [*map(_line, left, right), ""]
    return found


def _one_line(text: str) -> str:
    """Text whose line breaks are seen as " / ", without what a terminal would obey."""
    parts = " / ".join(part for part in text.strip().splitlines() if part.strip())
    return "".join(letter if letter.isprintable() else "?" for letter in parts)


def _line(left: str, right: str) -> str:
    return f"{left:{_COLUMN}} | {right}".rstrip()


def _row(name: str, before: str, after: str = "") -> str:
    return f"{name:26}{before:>10}{after:>10}"
