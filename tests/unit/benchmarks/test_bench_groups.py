"""The bench of prompts with many answers, on few."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_groups
from benchmarks.bench_groups import (
    BenchGroups,
    check_agreement,
    groups_of,
    lengths,
    one_by_one,
    portions,
    units_of,
    verdict,
)
from benchmarks.workload import SHAPES, Shape, start_model
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair

SMALL = BenchGroups(mix="short", pairs=7)
# three answers of 2, 1 and 3 tokens to a prompt of 3: rows 3 + 1 + 0 + 2 grouped; 4 + 6 + 5 one by one
PROMPT, ANSWERS = [1, 2, 3], ([4, 5], [6], [7, 8, 9])


def ranking() -> list[TokenizedPair]:
    """All pairs of these."""
    pairs = []
    for chosen, rejected in ((0, 1), (0, 2), (1, 2)):
        (w, r) = ANSWERS[chosen], ANSWERS[rejected]
        pair = TokenizedPair.from_chats(PROMPT + w, len(w), PROMPT + r, len(r))
        pairs.append(replace(pair, group=0, segment=0, answers=pair.answer_names))
    return pairs


def test_groups_have_all_pairs_of_their_answers() -> None:
    """7 pairs are two prompts of four answers, six pairs each; answers differ, the prompt does not; a seed repeats."""
    groups = groups_of(SMALL, 4, vocab=100)
    assert [len(group) for group in groups] == [6, 6]
    for number, group in enumerate(groups):
        assert len({name for pair in group for name in pair.answer_names}) == 4
        assert {(pair.group, pair.segment, pair.prefix[:16].tobytes()) for pair in group} == {
            (number, number, group[0].prefix[:16].tobytes())
        }
    again = groups_of(SMALL, 4, vocab=100)
    assert [pair.digest for group in groups for pair in group] == [pair.digest for group in again for pair in group]


def test_rows_by_hand() -> None:
    """What a unit says is what it packs, with the prompt once and each answer once."""
    (unit,) = units_of([ranking()])
    assert unit.rows == 6 == len(PairBatch.pack(unit.pairs).tokens_T)
    assert [pair.rows for pair in one_by_one([ranking()])] == [4, 6, 5]
    assert len(PairBatch.pack(one_by_one([ranking()])).tokens_T) == 4 + 6 + 5


def test_a_step_has_each_pair_once_in_micro_batches_of_some_rows() -> None:
    """36 grouped rows in micro-batches of 12: three of two groups; weights are those of a mean over all pairs."""
    units = units_of([ranking()] * 6)
    parts = list(portions(units, rows=12))
    assert [len(part.batch) for part in parts] == [6, 6, 6]
    assert [part.weight for part in parts] == [1 / 18] * 3 and [part.last for part in parts] == [False, False, True]


def test_lengths_by_hand() -> None:
    """Answers of 2, 1 and 3 tokens to one prompt of 3."""
    assert lengths([ranking()], 3) == (
        "3 answers: 1 prompts of 3 tokens on average (3 to 3), answers of 2 (1 to 3), 3 pairs."
    )


def test_verdict() -> None:
    """Four answers have a target, eight have none."""
    assert [verdict(3.0, 4), verdict(2.99, 4), verdict(2.0, 8)] == ["3.00 (met: 3)", "2.99 (NOT met: 3)", "2.00"]


def test_groups_that_compute_something_else_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two answers that change places are found."""
    monkeypatch.setitem(SHAPES, "tiny", Shape(16, 1, 1, 16, 20))
    start = start_model("tiny", "", seed=0)
    assert "on 3 pairs" in check_agreement(start, [ranking()], torch.device("cpu"))
    pack = PairBatch.pack.__func__

    def wrong(cls: type[PairBatch], pairs: list[TokenizedPair]) -> PairBatch:
        batch = pack(cls, pairs)
        return replace(batch, answers_B2=batch.answers_B2.flip(0)) if batch.shares_segments else batch

    monkeypatch.setattr(PairBatch, "pack", classmethod(wrong))
    with pytest.raises(UserError, match="no speed is measured"):
        check_agreement(start, [ranking()], torch.device("cpu"))


def test_a_small_bench_gives_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row for each number of answers and dtype, below the check of each."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # which it sets itself, and leaves
    monkeypatch.setitem(SHAPES, "tiny", Shape(16, 1, 1, 16, 64))
    file = tmp_path / "results.md"
    settings = {"shape": "tiny", "mix": "short", "pairs": 6, "rounds": 1, "results": str(file), "dtypes": ("fp32",)}
    bench_groups.main(BenchGroups(answers=(4, 3), threads=torch.get_num_threads(), **settings))
    lines = file.read_text().splitlines()
    assert [line.split("|")[1:3] for line in lines if " of " in line and line.startswith("| ")] == [
        [" 4       ", " fp32  "],
        [" 3       ", " fp32  "],
    ]
    assert sum(line.startswith("Grouped and one by one in fp32") for line in lines) == 2
