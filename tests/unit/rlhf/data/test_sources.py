"""Several data files, each with a share of an epoch: which pairs stand in it how often, and in which steps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simple_llama.common.errors import UserError
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchConfig, BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairBuffer, PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from tiny_job import make_job, write_pairs, write_rankings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer; 24 pairs in a.jsonl, 40 others in b.jsonl, 12 records of four answers in ranked.jsonl."""
    folder = tmp_path_factory.mktemp("sources")
    make_job(folder)
    write_pairs(folder / "a.jsonl", range(24))
    write_pairs(folder / "b.jsonl", range(24, 64))
    write_rankings(folder / "ranked.jsonl", range(12))
    return folder


def load(folder: Path, text: str, **changes: Any) -> RLDatasetLoader:
    """A loader of paths below a folder, without held-out pairs unless `changes` say otherwise."""
    paths = ",".join(f"{folder}/{part}" for part in text.split(","))
    settings: dict[str, Any] = {"val_share": 0.0, "seed": 1, **changes}
    return RLDatasetLoader(paths, load_tokenizer(folder / "tokenizer.json"), 512, **settings)


def names(pairs: PairSet) -> list[bytes]:
    """The digests of pairs, in order."""
    return [key["digest"].tobytes() for key in pairs.keys]


def test_shares_of_one_change_nothing(folder: Path) -> None:
    """Two files beside each other, or with a share of 1, are what a folder of both is: the same pairs, digest and
    report, without copies."""
    (folder / "both").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / "both" / name).write_text((folder / name).read_text())
    plain, beside, given = (
        load(folder, text, val_share=0.2) for text in ("both", "a.jsonl,b.jsonl", "a.jsonl:1,b.jsonl")
    )
    for data in (beside, given):
        assert names(data.pairs) == names(plain.pairs) and data.digest == plain.digest == plain.pairs.digest
        assert data.report == plain.report and data.train.copies is None
        assert (data.prompts, data.largest_prompt_share) == (plain.prompts, plain.largest_prompt_share)


def test_whole_and_half_shares(folder: Path) -> None:
    """Of a share of 2.5 each pair is there twice or three times, of 0.5 once or not at all; which ones, their digests
    say: neither the order of the files nor other pairs beside them. The report tells what an epoch has."""
    data, turned = load(folder, "a.jsonl:2.5,b.jsonl:0.5"), load(folder, "b.jsonl:0.5,a.jsonl:2.5")
    times = Counter(names(data.train))
    assert times == Counter(names(turned.train)) and len(data.pairs) == len(times)
    plain = load(folder, "a.jsonl,b.jsonl")
    expected = Counter()
    for name, file in zip(names(plain.pairs), plain.pairs.places["file"].tolist(), strict=True):
        low = int.from_bytes(name[8:], "little") < 2**63
        expected[name] = (2 + low) if file == 0 else int(low)
    assert times == +expected
    made = [sum(expected[name] for name in names(plain.pairs)[part]) for part in (slice(24), slice(24, 64))]
    assert f"an epoch has {folder}/a.jsonl 2.5 times (24 pairs make {made[0]}), " in data.report
    assert f"{folder}/b.jsonl 0.5 times (40 pairs make {made[1]})" in data.report and len(data.train) == sum(made)
    assert 24 * 2 < made[0] < 24 * 3 and 8 < made[1] < 32
    assert set(names(load(folder, "b.jsonl:0.25").pairs)) < set(names(load(folder, "b.jsonl:0.5").pairs))
    assert len({load(folder, text).digest for text in ("a.jsonl", "a.jsonl:2", "a.jsonl:3", "a.jsonl:2.5")}) == 4


def test_copies_are_views_of_the_same_tokens(folder: Path) -> None:
    """A copy costs what stands beside the tokens, 52 bytes and the 2 of its number, and is the same pair."""
    data = load(folder, "a.jsonl:3")
    assert data.train.tokens is data.pairs.tokens and data.train.nbytes == 3 * (data.pairs.nbytes + 2 * 24)
    assert data.train.copies is not None and data.train.copies.tolist() == [0, 1, 2] * 24
    for index, pair in enumerate(data.train):
        assert pair.digest == data.pairs[index // 3].digest and pair.prefix.base is not None
    assert data.train.longer_is_chosen == pytest.approx(data.pairs.longer_is_chosen)


@pytest.mark.parametrize("text", ["a.jsonl:2,b.jsonl:0.5", "ranked.jsonl:3,a.jsonl:2", "ranked.jsonl:2"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("prompts", [False, True])
def test_an_epoch_has_each_copy_once_and_no_step_a_pair_twice(
    folder: Path, text: str, world_size: int, prompts: bool
) -> None:
    """By (digest, copy), over the micro-batches of all ranks; pairs of a record stay together, each copy of the record
    by itself."""
    data, steps = load(folder, text, group_prompts=prompts, val_share=0.1), []
    plan = BatchPlan.of(data.train, BatchConfig(batch_size=2, grad_accum_steps=1), 5, world_size)
    digests, copies = names(data.train), data.train.copies
    assert copies is not None and plan.steps_per_epoch > 3
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + index) for index in range(plan.steps_per_epoch)]
        met = [(digests[i], int(copies[i])) for step in steps for rank in step for micro in rank for i in micro]
        assert len(met) == len(set(met)) == len(data.train)
        for step in steps:
            mine = [digests[i] for rank in step for micro in rank for i in micro]
            assert len(mine) == len(set(mine))
    micro_batches = [set(micro) for step in steps for rank in step for micro in rank]
    for start, stop in pairwise([*data.train.units.tolist(), len(data.train)]):
        assert any(set(range(start, stop)) <= micro for micro in micro_batches)


@given(times=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any))
def test_copies_of_records_are_units(times: list[int]) -> None:
    """Units of 2, 1, 3 and 1 pairs, each so many times: the copies of a record with several pairs are records of their
    own, and share what their pairs share."""
    pairs = _mixed()
    assert pairs.units.tolist() == [0, 2, 3, 6]
    found = pairs.repeated(np.array(times))
    sizes = [2, 1, 3, 1]
    assert len(found) == sum(a * b for a, b in zip(sizes, times, strict=True)) and len(found.units) == sum(times)
    members = [[0, 1], [2], [3, 4, 5], [6]]
    expected = [i for some, count in zip(members, times, strict=True) for i in some * count]
    assert names(found) == [names(pairs)[i] for i in expected]
    assert found.unit_rows.tolist() == np.repeat(pairs.unit_rows, times).tolist()
    batch = PairBatch.pack(list(found))
    assert len(batch.answer_counts) == sum(times) and len(set(batch.groups_B.tolist())) == sum(times)


def _mixed() -> PairSet:
    """Records of 2, 1, 3 and 1 pairs."""

    def pair(chosen: Sequence[int], rejected: Sequence[int]) -> TokenizedPair:
        return TokenizedPair.from_chats([1, 2, *chosen], len(chosen), [1, 2, *rejected], len(rejected))

    buffer = PairBuffer()
    a, b, c = [3], [4, 5], [6, 7, 8]
    buffer.append_group([pair(a, b), pair(b, c)], "f", 1)
    buffer.append(pair(c, a), "f", 2)
    buffer.append_group([pair(a, [9]), pair([9], [10, 9]), pair(a, [10, 9])], "f", 3)
    buffer.append(pair([11], [12]), "f", 4)
    return buffer.finish()


def test_what_is_held_out_is_the_same_whatever_the_shares(folder: Path) -> None:
    """A held-out prompt counts once, and never trains; of a pair in two files the first file's share counts."""
    plain, mixed = (load(folder, text, val_share=0.25) for text in ("a.jsonl,b.jsonl", "a.jsonl:3,b.jsonl:0.5"))
    assert names(mixed.validation) == names(plain.validation) and len(mixed.validation)
    assert not set(names(mixed.validation)) & set(names(mixed.train))
    assert set(names(mixed.pairs)) == set(names(mixed.train)) | set(names(mixed.validation))
    assert len(set(names(mixed.pairs))) == len(mixed.pairs)
    (folder / "again.jsonl").write_text((folder / "a.jsonl").read_text())
    both = load(folder, "a.jsonl:2,again.jsonl:3")
    assert set(Counter(names(both.train)).values()) == {2} and "24 duplicate" in both.report


def test_the_commonest_prompt_counts_its_copies(tmp_path: Path, folder: Path) -> None:
    """Four prompts with a pair each, one of them in a file that stands three times: 3 of 6."""
    rows = [{"Template": ["S"], "User": [f"Q{n}"], "Accepted": ["cat"], "Rejected": ["dog"]} for n in range(4)]
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "rest.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    text = f"{tmp_path}/one.jsonl:3,{tmp_path}/rest.jsonl"
    data = RLDatasetLoader(text, tokenizer, 512, val_share=0, seed=0, max_unknown=1.0)
    assert (data.prompts, data.largest_prompt_share, len(data.train)) == (4, 0.5, 6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.jsonl,a.jsonl:2", r"a.jsonl: expected each data file once, found it in \S+a.jsonl and in \S+a.jsonl:2"),
        ("a.jsonl,.", "expected each data file once"),
        ("a.jsonl:0", "a.jsonl: expected as its share a number above 0.0 and at most 1000.0, found 0"),
        ("a.jsonl,gone.jsonl:2", "gone.jsonl: expected a data file or a folder of them"),
        (
            "a.jsonl:0.000001",
            "expected training pairs, found none: of 24 pairs no one is there by its share; an epoch has",
        ),
    ],
)
def test_what_is_refused(folder: Path, tmp_path: Path, text: str, said: str) -> None:
    """One message, which names the path."""
    for name in ("a.jsonl", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer.json").rename(tmp_path / ".tokenizer")
    paths = ",".join(f"{tmp_path}/{part}" for part in text.split(","))
    with pytest.raises(UserError, match=said):
        RLDatasetLoader(paths, load_tokenizer(folder / "tokenizer.json"), 512, val_share=0, seed=0)


# === validation files ===


def test_files_hold_out_what_they_have(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each named set has its pairs in the order of the paths, each once, and all others train, with their shares; no
    share of prompts is held out. The report counts them."""
    write_pairs(folder / "v.jsonl", range(100, 130))
    write_pairs(folder / "w.jsonl", range(130, 135))
    sets = f"safe={folder}/v.jsonl,help-2={folder}/w.jsonl"
    data, plain = load(folder, "a.jsonl:2", validation_path=sets), load(folder, "a.jsonl:2")
    assert data.validation_sets == {"safe": slice(0, 30), "help-2": slice(30, 35)}
    assert [data.validation.origin(i) for i in (0, 30)] == [f"{folder}/v.jsonl:1", f"{folder}/w.jsonl:1"]
    assert names(data.train) == names(plain.train) and len(data.pairs) == 24 + 35
    assert "; held out by files: safe 30, help-2 5" in data.report and not data.warnings
    one = load(folder, "a.jsonl", validation_path=f"{folder}/w.jsonl")
    assert one.validation_sets == {} and len(one.validation) == 5 and "; held out by files: 5" in one.report
    assert one.warnings == ["pairs held out: 5, and fewer than 20 say little; add data"]
    digests = {each.digest for each in (data, plain, one, load(folder, "a.jsonl", validation_path=f"{folder}/v.jsonl"))}
    assert len(digests) == 4


def test_a_held_out_pair_does_not_train(folder: Path) -> None:
    """24 pairs train, of which the first 3 stand in the validation file too: these are left out of training, and
    counted. Two others have prompts of it, with other answers: they train, with a warning that names one."""
    rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    others = [{**row, "Accepted": ["mat"], "Rejected": ["cat dog"]} for row in rows[10:12]]
    write_pairs(folder / "far.jsonl", range(200, 220))
    kept = [*rows[:3], *others, *map(json.loads, (folder / "far.jsonl").read_text().splitlines())]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, kept)))
    data = load(folder, "a.jsonl", validation_path=f"{folder}/mixed.jsonl")
    assert (len(data.train), len(data.validation)) == (21, 25)
    assert f"3 held out as well); first held out as well: {folder}/a.jsonl:1" in data.report
    (warning,) = data.warnings
    assert warning.startswith(
        "prompts that stand in training and validation files both: 2 (validation pairs: 2, first: "
        f"{folder}/mixed.jsonl:4, trained on in {folder}/a.jsonl:11): "
    )
    texts = data.conversations(data.validation)
    assert (texts[0].file, texts[0].record) == (f"{folder}/mixed.jsonl", 1)


def test_ranked_records_are_held_out_whole(folder: Path) -> None:
    """12 records of five pairs each, beside pairs; with segments by prompt and shares by prompt."""
    data = load(
        folder, "a.jsonl", validation_path=f"r={folder}/ranked.jsonl", group_weight="prompt", group_prompts=True
    )
    assert data.validation_sets == {"r": slice(0, 36)} or len(data.validation) == data.validation_sets["r"].stop
    assert data.validation.total == pytest.approx(len(data.validation.units)) and len(data.train) == 24


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        ("{}/gone.jsonl", "gone.jsonl: expected a data file or a folder of them"),
        ("x={0}/a.jsonl", r"a.jsonl: expected each data file once, found it in x=\S+a.jsonl and in \S+a.jsonl"),
        ("x={0}/b.jsonl,y={0}/same.jsonl", r"validation_path: y=\S+same.jsonl: expected at least one usable pair"),
        ("{0}/b.jsonl,{0}/same.jsonl", "validation_path: expected NAME=PATH"),
    ],
)
def test_validation_files_that_are_refused(folder: Path, validation: str, said: str) -> None:
    """A path with nothing in it, one that trains too, one without a usable pair, two without names."""
    (folder / "same.jsonl").write_text((folder / "b.jsonl").read_text())
    with pytest.raises(UserError, match=said):
        load(folder, "a.jsonl", validation_path=validation.format(folder))
