"""Shards of data files: the same pairs as in one reading, found again without it, and whole whenever a start is cut."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.common.paths import package_path
from simple_llama.dataset import data_blocks, json_records
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.chat_format import SimpleLLaMAChat
from simple_llama.reinforcement_learning.rlhf.data import dataset_loader, find_pairs, pair_reader
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.find_pairs import TokenCache
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.reading import ReadingConfig
from simple_llama.reinforcement_learning.rlhf.data.scored_tokens import Scoring
from simple_llama.reinforcement_learning.rlhf.data.sources import Sources
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig

WORDS = ("yes", "no", "it is", "why", "Human: no", "caf\u00e9", "\u2603", "go on and on and on and on and on")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The shipped one."""
    return load_tokenizer(package_path("dataset", "bpe_8k.json"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 600 bytes, some records each, of pieces of 100; shards of everything."""
    monkeypatch.setattr(data_blocks, "_BLOCK", 600)
    monkeypatch.setattr(data_blocks, "_PIECE", 100)
    monkeypatch.setattr(find_pairs, "_LEAST_BYTES", 1)


def load(path: Path | str, tokenizer: Tokenizer, cache: Path | None, **changes: Any) -> RLDatasetLoader:
    """The data, with a cache or without."""
    given = {"val_share": 0.2, "seed": 3, "max_unknown": 1.0, "default_system": "Hm.", **changes}
    return RLDatasetLoader(path, tokenizer, 60, cache=TokenCache(cache) if cache else None, **given)


def content(pairs: PairSet) -> list[tuple[Any, ...]]:
    """All of each pair as plain values."""
    found = []
    for i, pair in enumerate(pairs):
        ids = (pair.prefix.tolist(), pair.chosen.tolist(), pair.rejected.tolist())
        counts = (pair.chosen_scored, pair.rejected_scored, pair.weight, pair.gap, pair.group, pair.segment, pair.spans)
        found.append((*ids, *counts, pair.digest, pair.answers, pairs.origin(i)))
    return found


def assert_same(one: RLDatasetLoader, other: RLDatasetLoader) -> None:
    """Pairs, order, split, digest, and all that is said."""
    assert content(one.train) == content(other.train) and content(one.validation) == content(other.validation)
    assert one.digest == other.digest and one.train.files == other.train.files
    assert (one.report, one.warnings, one.prompts) == (other.report, other.warnings, other.prompts)


def record(rng: random.Random, ranked: bool) -> dict[str, Any]:
    """A record of few words, so that pairs, and answers both ways round, stand several times."""
    found: dict[str, Any] = {"Template": ["CUSTOM"], "User": [rng.choice(WORDS[:3])]}
    if ranked and rng.random() < 0.3:
        answers = rng.sample(WORDS, 3)
        return {**found, "Responses": answers, "Scores": [rng.randrange(3) for _ in answers], "note": 1}
    found |= {"Accepted": [rng.choice(WORDS)], "Rejected": [rng.choice(WORDS)]}
    if rng.random() < 0.2:
        found["weight"] = rng.choice((0.5, 2.0))
    return found


def write(path: Path, rows: list[Any]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), ranked=st.booleans(), options=st.sampled_from((
    {},
    {"contradictions": "drop"},
    {"scoring": Scoring("all")},
    {"group_prompts": True},
    {"overlong": "drop_oldest_turns", "val_share": 0.0},
)))  # fmt: skip
def test_the_pairs_are_those_of_one_reading(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, seed: int, ranked: bool, options: dict[str, Any]
) -> None:
    """Two files of some blocks, the first by a share: made, found again, and without a cache."""
    folder, rng = tmp_path_factory.mktemp("shards"), random.Random(seed)
    for name in ("a", "b"):
        write(folder / f"{name}.jsonl", [record(rng, ranked) for _ in range(rng.randrange(1, 40))])
    path = f"{folder / 'a.jsonl'}:2,{folder / 'b.jsonl'}"
    try:
        plain = load(path, tokenizer, None, **options)
    except UserError as error:
        with pytest.raises(UserError) as found:
            load(path, tokenizer, folder / "cache", **options)
        assert str(found.value) == str(error)
        return
    if options.get("contradictions") == "drop":  # repetitions within a block are counted before contradictions
        for one in (load(path, tokenizer, folder / "cache", **options) for _ in range(2)):
            assert content(one.train) == content(plain.train) and content(one.validation) == content(plain.validation)
        return
    assert_same(load(path, tokenizer, folder / "cache", **options), plain)
    assert_same(load(path, tokenizer, folder / "cache", **options), plain)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of several blocks, 50 different pairs."""
    rows = [
        {"Template": ["CUSTOM"], "User": [f"q {i}"], "Accepted": ["yes"], "Rejected": [f"no {i}"]} for i in range(50)
    ]
    return write(tmp_path / "a.jsonl", rows)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that were tokenized."""
    found: list[int] = []
    encode = Scoring.encode

    def counted(self: Scoring, chat_format: Any, chats: Any) -> Any:
        found.append(len(chats))
        return encode(self, chat_format, chats)

    monkeypatch.setattr(pair_reader.Scoring, "encode", counted)
    return found


def test_a_second_start_tokenizes_nothing(tmp_path: Path, data: Path, tokenizer: Tokenizer, batches: list[int]) -> None:
    """Its arrays are mapped, not read; what is appended costs its own blocks; another name of the file nothing."""
    first = load(data, tokenizer, tmp_path / "cache")
    assert sum(batches) == 100
    batches.clear()
    second = load(data, tokenizer, tmp_path / "cache")
    assert not batches
    assert_same(first, second)
    for part in (second.pairs.keys, second.pairs.places):
        assert isinstance(part.base, np.memmap) or isinstance(getattr(part.base, "base", None), object)
        assert not part.flags.writeable and not part.flags.owndata
    with open(data, "a") as opened:
        opened.write(json.dumps({"Template": ["CUSTOM"], "User": ["new"], "Accepted": ["a"], "Rejected": ["b"]}) + "\n")
    assert len(load(data, tokenizer, tmp_path / "cache").pairs) == 51
    assert 2 <= sum(batches) <= 2 * 8, "the last block and what came"
    batches.clear()
    os.rename(data, tmp_path / "b.jsonl")
    moved = load(tmp_path / "b.jsonl", tokenizer, tmp_path / "cache")
    assert not batches and moved.train.origin(0).startswith(str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("change", ["cut", "flip", "gone"])
def test_a_damaged_shard_is_made_again(
    tmp_path: Path, data: Path, tokenizer: Tokenizer, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A cut one is seen by its length, a flipped bit where all is to be compared (verify_data)."""
    first = load(data, tokenizer, tmp_path / "cache")
    shards = sorted(path for path in (tmp_path / "cache").rglob("*.arr") if not path.name.startswith("set-"))
    whole = {path: path.read_bytes() for path in shards}
    if change == "gone":
        shards[0].unlink()
    else:
        damaged = whole[shards[0]][:-1] if change == "cut" else whole[shards[0]][:-1] + b"\xff"
        shards[0].write_bytes(damaged)
    options = TokenCache(tmp_path / "cache", verify=change == "flip")
    again = RLDatasetLoader(
        data, tokenizer, 60, val_share=0.2, seed=3, max_unknown=1.0, default_system="Hm.", cache=options
    )
    assert_same(first, again)
    assert {path: path.read_bytes() for path in shards} == whole
    assert ("it is made again" in caplog.text) == (change != "gone")


def test_a_start_that_is_cut_goes_on(
    tmp_path: Path, data: Path, tokenizer: Tokenizer, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each write of a file in turn: what is there is whole, and in the end has the same bytes."""
    whole = load(data, tokenizer, tmp_path / "whole")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*.arr")}
    replace: Callable[..., None] = os.replace

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    for number in range(len(wanted)):
        calls = iter(range(2))

        def once(*args: Any, calls: Any = calls) -> None:
            killed() if next(calls, 1) else replace(*args)

        monkeypatch.setattr(os, "replace", once)
        with pytest.raises(KeyboardInterrupt):
            load(data, tokenizer, tmp_path / "cut")
        monkeypatch.setattr(os, "replace", replace)
        there = {path.name: path.read_bytes() for path in (tmp_path / "cut").rglob("*.arr")}
        assert all(wanted[name] == content for name, content in there.items()), number
    assert_same(whole, load(data, tokenizer, tmp_path / "cut"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").rglob("*.arr")} == wanted


@pytest.mark.parametrize("ranks", [2, 3, 50])
def test_ranks_together_make_the_shards_that_one_makes(
    tmp_path: Path, data: Path, tokenizer: Tokenizer, batches: list[int], ranks: int
) -> None:
    """Each makes some, none two make the same; a start behind them tokenizes nothing."""
    alone = load(data, tokenizer, tmp_path / "alone")
    options = {"seed": 3, "ascii_text": True, "scoring": Scoring(), "compared": "all", "reading": ReadingConfig()}
    options |= {"overlong": "drop", "contradictions": "keep"}
    sources, chat = Sources.of(str(data), ""), SimpleLLaMAChat(tokenizer, "Hm.")
    reader = dataset_loader.pair_reader(chat, 60, sources, **options)
    counts = []
    for rank in range(ranks):
        batches.clear()
        find_pairs.make_share(reader, sources, TokenCache(tmp_path / "shared"), rank, ranks)
        counts.append(sum(batches))
    assert sum(counts) == 100 and sum(map(bool, counts)) > 1 and max(counts) < 100
    batches.clear()
    assert_same(alone, load(data, tokenizer, tmp_path / "shared"))
    assert not batches
    found = [{p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.arr")} for name in ("alone", "shared")]
    assert found[0] == found[1]


def test_settings_that_change_no_pair_find_the_same_shards(
    tmp_path: Path, data: Path, tokenizer: Tokenizer, batches: list[int]
) -> None:
    """The settings of a whole run are given as those of reading: another rate, name or check of the data makes no token
    again, another format does."""
    load(data, tokenizer, tmp_path / "cache", reading=DPOConfig(run_name="one"))
    batches.clear()
    for reading in (DPOConfig(max_lr=1e-3, run_name="two"), DPOConfig(verify_data=True), DPOConfig(epochs=7)):
        load(data, tokenizer, tmp_path / "cache", reading=reading)
    assert not batches
    load(data, tokenizer, tmp_path / "cache", reading=DPOConfig(on_bad_record="drop"))
    assert sum(batches) == 100


def test_faults_are_those_of_one_reading(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    """In the third block and behind it; where they are dropped they are counted, and named by where they are now."""
    rows = data.read_text().splitlines()
    rows[20], rows[45] = "{", json.dumps({"Template": ["CUSTOM"], "User": ["q"], "Accepted": ["yes"], "Rejected": []})
    data.write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError) as plain:
        load(data, tokenizer, None)
    with pytest.raises(UserError) as cached:
        load(data, tokenizer, tmp_path / "cache")
    assert str(plain.value) == str(cached.value) and "2 faulty records" in str(plain.value)
    drop = ReadingConfig(on_bad_record="drop")
    for _ in range(2):
        assert_same(load(data, tokenizer, tmp_path / "cache", reading=drop), load(data, tokenizer, None, reading=drop))
    moved = data.rename(tmp_path / "moved.jsonl")
    assert_same(load(moved, tokenizer, tmp_path / "cache", reading=drop), load(moved, tokenizer, None, reading=drop))


def test_validation_files_and_other_kinds_of_files(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    """A list, whose block is the whole file, holds out a pair that trains too."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    (tmp_path / "v.json").write_text(json.dumps(rows[3:5]))
    options = {"val_share": 0.0, "validation_path": f"few={tmp_path / 'v.json'}"}
    plain = load(data, tokenizer, None, **options)
    assert "2 held out as well" in plain.report
    for _ in range(2):
        assert_same(load(data, tokenizer, tmp_path / "cache", **options), plain)


def test_a_list_is_parsed_once(
    tmp_path: Path, data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start does not look into it for the format either; the report says it all the same."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    turns = [{"prompt": row["User"][0], "chosen": row["Accepted"][0], "rejected": row["Rejected"][0]} for row in rows]
    (tmp_path / "a.json").write_text(json.dumps(turns))
    first = load(tmp_path / "a.json", tokenizer, tmp_path / "cache")
    assert "read as TRL" in first.report
    monkeypatch.setattr(json_records, "_parsed", None)
    assert_same(first, load(tmp_path / "a.json", tokenizer, tmp_path / "cache"))
