"""Dialogues that are too long lose their oldest turns, and contradictory pairs are left out, where that is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.scored_tokens import Scoring
from tiny_job import make_job

LONG = "cat dog tree house " * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The one of the tiny job."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_job(folder)
    return load_tokenizer(folder / "tokenizer.json")


def record(users: list[str], chosen: list[str], rejected: list[str]) -> dict[str, Any]:
    return {"Template": ["S"], "User": users, "Accepted": chosen, "Rejected": rejected}


def dialogue(turns: int, last: str = "red") -> dict[str, Any]:
    """Turns of equal length, the last answers apart."""
    users = [f"{LONG} {n}" for n in range(turns)]
    return record(users, ["mat"] * (turns - 1) + [last], ["mat"] * (turns - 1) + ["blue"])


def load(folder: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], most: int = 4096, **settings: Any) -> Any:
    """A loader of these records, without held-out pairs unless `settings` say otherwise."""
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return RLDatasetLoader(
        folder / "pairs.jsonl", tokenizer, most, **{"val_share": 0.0, "seed": 0, "max_unknown": 1.0, **settings}
    )


def longest(data: RLDatasetLoader) -> int:
    """Tokens of the longest chat."""
    return int(max(data.train.chosen_len.max(), data.train.rejected_len.max()))


@pytest.mark.parametrize("scored", ["last", "all"])
def test_the_oldest_turns_go_until_both_chats_fit(tmp_path: Path, tokenizer: Tokenizer, scored: Any) -> None:
    """Of 5, 2 and 1 turns with room for 3: the first loses two and is then the pair of a record that never had them;
    the others stay as they are. Texts are found again without these turns, and the count is said."""
    rows = [dialogue(5), dialogue(2), dialogue(1)]
    short = {**rows[0], **{name: rows[0][name][2:] for name in ("User", "Accepted", "Rejected")}}
    settings: dict[str, Any] = {"scoring": Scoring(scored)}
    wanted = load(tmp_path, tokenizer, [short, *rows[1:]], **settings)
    most = longest(wanted)
    names = wanted.train.keys.tobytes()
    found = load(tmp_path, tokenizer, rows, most, overlong="drop_oldest_turns", **settings)
    assert found.train.keys.tobytes() == names and "kept 3 of 3 pairs" in found.report
    (warning,) = found.warnings
    assert warning == (
        f"chats were too long, and lost their oldest turns (overlong) (pairs: 1, first: {tmp_path}/pairs.jsonl:1)"
    )
    (said, *_) = found.conversations(found.train)
    assert (said.system, list(said.users)) == ("S", short["User"])
    dropped = load(tmp_path, tokenizer, rows, most, **settings)
    assert len(dropped.train) == 2 and "1 too long" in dropped.report


def test_a_last_turn_that_does_not_fit_is_too_long(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Nothing is cut of the last turn: the pair is dropped, with its turns uncounted. One whose answers are then the
    same is identical, one that another record has already is a duplicate."""
    most = longest(load(tmp_path, tokenizer, [dialogue(2)]))
    last = record(["Q", LONG * 9], ["mat", "red"], ["mat", "blue"])
    earlier = record([LONG * 2, "Q 1", "end"], ["red", "mat", "mat"], ["blue", "mat", "mat"])
    rows = [last, earlier, dialogue(4), dialogue(2), dialogue(3, "dog")]
    data = load(tmp_path, tokenizer, rows, most, overlong="drop_oldest_turns")
    # dialogue(4) keeps its turns 2 and 3, dialogue(3) its turns 1 and 2
    assert len(data.train) == 3 and "1 identical, 1 too long" in data.report
    assert f"(overlong) (pairs: 3, first: {tmp_path}/pairs.jsonl:2)" in data.warnings[-1]


def test_pairs_of_a_record_lose_the_same_turns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Three answers, of which the second needs one turn less: all pairs have the same prompt. A fourth that never fits
    is left out alone."""
    users = [LONG, LONG, "end"]
    answers = [["mat", "mat", last] for last in ("red", LONG, "blue", LONG * 30)]
    row = {"Template": ["S"], "User": users, "Responses": answers, "Scores": [4, 3, 2, 1]}
    whole = load(tmp_path, tokenizer, [row])
    short = {**row, "User": users[1:], "Responses": [answer[1:] for answer in answers]}
    wanted = load(tmp_path, tokenizer, [short], compared="all")
    lengths = np.sort(np.unique(np.concatenate([whole.train.chosen_len, whole.train.rejected_len])))
    most = int(lengths[-2]) - 1  # the second answer does not fit, the first and the third do
    found = load(tmp_path, tokenizer, [row], most, overlong="drop_oldest_turns")
    assert len(found.train) == 3 and "3 too long" in found.report
    assert len(set(found.train.prompts.tolist())) == 1 and found.train.groups is not None
    kept = {key["digest"].tobytes() for key in found.train.keys}
    assert kept < {key["digest"].tobytes() for key in wanted.train.keys}
    assert [list(said.users) for said in found.conversations(found.train)] == [users[1:]] * 3


def test_contradictory_pairs_are_left_out_on_both_sides(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Four records of one question: red before blue, mat before dog, blue before red, and red before blue again. Kept,
    both ways are warned of; dropped, neither of the two is there, whichever comes first, and both are counted."""
    rows = [record(["Q"], [a], [b]) for a, b in (("red", "blue"), ("mat", "dog"), ("blue", "red"), ("red", "blue"))]
    kept = load(tmp_path, tokenizer, rows)
    assert len(kept.train) == 3 and "both ways round (pairs: 1" in kept.warnings[-1]
    data = load(tmp_path, tokenizer, rows, contradictions="drop")
    assert [pair.digest for pair in data.train] == [kept.train[1].digest]
    assert "kept 1 of 4 pairs (2 contradictory, 1 duplicate)" in data.report
    assert [said.chosen for said in data.conversations(data.train)] == [("mat",)]
    turned = load(tmp_path, tokenizer, rows[::-1], contradictions="drop")
    assert [pair.digest for pair in turned.train] == [kept.train[1].digest]


def test_a_held_out_pair_is_not_refuted_by_training_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The validation file's pair stays whatever trains; the pair that says the contrary does not train."""
    (tmp_path / "v.jsonl").write_text(json.dumps(record(["Q"], ["red"], ["blue"])))
    rows = [record(["Q"], ["blue"], ["red"]), record(["P"], ["mat"], ["dog"])]
    data = load(tmp_path, tokenizer, rows, contradictions="drop", validation_path=str(tmp_path / "v.jsonl"))
    assert (len(data.train), len(data.validation)) == (1, 1) and "1 contradictory" in data.report


def test_unknown_bytes_of_pairs_that_are_left_out_do_not_count(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A contradictory pair with bytes that the tokenizer does not know stands between two others: neither gets them."""
    saved = json.loads(tokenizer.to_str())
    saved["model"]["vocab"].pop("\u00e4")  # the first byte of the letter below
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    odd = [record(["Q"], [a], [b]) for a, b in (("red \u4e00", "blue"), ("blue", "red \u4e00"))]
    rows = [record(["P"], ["mat"], ["dog"]), *odd, record(["R"], ["mat"], ["dog"])]
    kept = load(tmp_path, tokenizer, rows)
    assert f"became <UNK> (pairs: 2, first: {tmp_path}/pairs.jsonl:2)" in kept.report
    data = load(tmp_path, tokenizer, rows, contradictions="drop")
    assert "<UNK>" not in data.report and len(data.train) == 2
