"""The judge: what it is asked, what becomes of its words, and what is said when it does something else."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.assess import judge
from simple_llama.reinforcement_learning.rlhf.assess.judge import Duel, judge_all

DUELS = [Duel("p", "good", "bad"), Duel("q", "bad", "good"), Duel("r", "one", "two"), Duel("s", "same", "same")]
HEAD = "import json, sys, time\nasked = [json.loads(line) for line in sys.stdin]\n"


def command(folder: Path, body: str) -> str:
    """A judge with this Python code."""
    path = folder / "judge it.py"  # a blank: the command is split as a shell would
    path.write_text(HEAD + body)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(path))}"


def test_both_orders_make_one_verdict(ranks: Ranks, tmp_path: Path) -> None:
    """Ours is better, theirs is better, always the first one (a tie, flipped), the same text (not asked)."""
    asked = tmp_path / "asked.json"
    body = f"""
json.dump(asked, open({str(asked)!r}, "w"))
for one in reversed(asked):
    better = "a" if one["prompt"] == "r" or one["a"] == "good" else "b"
    print(json.dumps({{"id": one["id"], "better": better}}))
"""
    found = judge_all(command(tmp_path, body), DUELS, 20, ranks)
    assert found == [(1, False), (0, False), (0.5, True), (0.5, False)]
    told = json.loads(asked.read_text())
    assert [(one["prompt"], one["a"], one["b"]) for one in told] == [
        ("p", "good", "bad"),
        ("q", "bad", "good"),
        ("r", "one", "two"),
        ("p", "bad", "good"),
        ("q", "good", "bad"),
        ("r", "two", "one"),
    ]
    assert len({one["id"] for one in told}) == 6


def test_a_tie_and_a_winner(ranks: Ranks, tmp_path: Path) -> None:
    """A tie in one order and a win in the other is three quarters; no flip."""
    body = 'for one in asked: print(json.dumps({"id": one["id"], "better": "a" if one["a"] == "good" else "tie"}))'
    assert judge_all(command(tmp_path, body), DUELS[:1], 20, ranks) == [(0.75, False)]
    assert judge_all("no-such-command", DUELS[3:], 20, ranks) == [(0.5, False)]  # nothing to ask


FIRST = '"id": asked[0]["id"]'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('print("better: a")', "judge: answer 1: expected .*, found 'better: a'"),
        (f'print(json.dumps({{{FIRST}, "better": "c"}}))', "judge: answer 1: expected .*'c'"),
        ('print(json.dumps({"id": "9", "better": "a"}))', "found an id that was not asked: '9'"),
        (f'print(2 * (json.dumps({{{FIRST}, "better": "a"}}) + chr(10)))', "answer 2: .*answered before"),
        (
            f'print(json.dumps({{{FIRST}, "better": "a"}}))',
            "expected 2 answers and status 0, found 1 answers and status 0",
        ),
        ("while True: print(flush=True); time.sleep(0.1)", "within 1 s .*, found none"),
        ("sys.exit(3)", "found 0 answers and status 3 of"),
        ("time.sleep(60)", r"within 1 s \(judge_timeout_s\), found none; it had answered 0 of 2"),
    ],
)
def test_a_judge_that_does_something_else(ranks: Ranks, tmp_path: Path, body: str, words: str) -> None:
    """The line and its words, or how it ended."""
    with pytest.raises(UserError, match=words):
        judge_all(command(tmp_path, body), DUELS[:1], 1, ranks)


def test_a_judge_that_stays_when_all_is_said(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words count: it has some time to end by itself, and is ended."""
    monkeypatch.setattr(judge, "_END_S", 0.2)
    body = 'for one in asked: print(json.dumps({"id": one["id"], "better": "tie"}), flush=True)\ntime.sleep(60)'
    assert judge_all(command(tmp_path, body), DUELS[:1], 20, ranks) == [(0.5, False)]


def test_a_judge_that_is_none(ranks: Ranks) -> None:
    """No such program, and quotes that do not close."""
    for bad in ("no-such-command", "python '"):
        with pytest.raises(UserError, match="judge: cannot run"):
            judge_all(bad, DUELS[:1], 20, ranks)
