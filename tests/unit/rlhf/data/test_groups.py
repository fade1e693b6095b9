"""Records with several answers: read, compared, kept once, packed into one segment, dealt whole, found in the store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simple_llama.common.errors import UserError
from simple_llama.dataset.json_records import Record
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import (
    BatchConfig,
    BatchPlan,
    _deal_together,
    _pairs_of,
    sweep_of,
)
from simple_llama.reinforcement_learning.rlhf.data.conversation import (
    Compared,
    Conversation,
    Dropped,
    Ranking,
    chosen_pairs,
)
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.own_records import from_template
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairBuffer, PairSet
from simple_llama.reinforcement_learning.rlhf.data.record_checks import ReadOptions
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import from_store, missing_pairs
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id
from tiny_job import make_job, write_rankings

BASE: dict[str, Any] = {"Template": ["CUSTOM"], "User": ["hi"]}


def pair(chosen: Sequence[int], rejected: Sequence[int], prompt: Sequence[int] = (1, 2, 3)) -> TokenizedPair:
    """Two answers, all of whose tokens are scored."""
    return TokenizedPair.from_chats([*prompt, *chosen], len(chosen), [*prompt, *rejected], len(rejected))


# answers a to d of one prompt, a and b beginning alike
A, B, C, D = (4, 5), (4, 6, 7), (8,), (9, 5, 5, 5)
ALL = [pair(A, B), pair(A, C), pair(A, D), pair(B, C), pair(B, D), pair(C, D)]


def grouped(*records: Sequence[TokenizedPair]) -> PairSet:
    """A set of records, each with its pairs."""
    buffer = PairBuffer()
    for number, pairs in enumerate(records, 1):
        buffer.append_group(pairs, "file", number)
    return buffer.finish()


# === records ===


def read(**fields: Any) -> Conversation | Ranking:
    """What a record with these fields says."""
    return from_template(Record("f.jsonl", 7, {**BASE, **fields}), ReadOptions(None))


def compared(how: Compared, **fields: Any) -> list[tuple[str, str, float | None]]:
    """Answers and gap of each pair of a record."""
    said = read(**fields)
    assert isinstance(said, Ranking)
    pairs = [said.pairs[place] for place in chosen_pairs([one.ranks for one in said.pairs], how)]
    assert all((one.file, one.record, one.users) == ("f.jsonl", 7, ("hi",)) for one in pairs)
    return [(one.chosen[0], one.rejected[0], one.gap) for one in pairs]


def test_pairs_by_hand() -> None:
    """Scores 1, 3, 2, 3: b and d are equal, never compared; adjacent and best_worst take the first of both."""
    fields = {"Responses": ["a", "b", "c", "d"], "Scores": [1, 3, 2, 3]}
    assert compared("best_worst", **fields) == [("b", "a", 2.0)]
    assert compared("adjacent", **fields) == [("b", "c", 1.0), ("c", "a", 1.0)]
    assert compared("all", **fields) == [
        ("b", "c", 1.0), ("b", "a", 2.0), ("d", "c", 1.0), ("d", "a", 2.0), ("c", "a", 1.0)
    ]  # fmt: skip


def test_ranks_and_lists_of_rejected_answers() -> None:
    """Rank 1 is the best, and no reward; an accepted answer stands above all rejected ones, which are not ordered."""
    ranks = {"Responses": [["a"], ["b"], ["c"]], "Ranks": [2, 1, 3]}
    assert compared("all", **ranks) == [("b", "a", None), ("b", "c", None), ("a", "c", None)]
    several = {"Accepted": ["a"], "Rejected": [["b"], ["c"]]}
    assert compared("all", **several) == [("a", "b", None), ("a", "c", None)]
    assert compared("adjacent", **several) == [("a", "b", None)]
    plain = read(Accepted=["a"], Rejected=["b"])
    assert isinstance(plain, Conversation) and not plain.ranks


def test_a_weight_is_that_of_each_pair() -> None:
    said = read(Responses=["a", "b", "c"], Scores=[3, 2, 1], weight=2.5)
    assert isinstance(said, Ranking) and {one.weight for one in said.pairs} == {2.5}


def test_equal_scores_are_dropped() -> None:
    said = read(Responses=["a", "b"], Scores=[2, 2.0])
    assert isinstance(said, Ranking)
    with pytest.raises(Dropped, match="answers of equal score"):
        _ = said.pairs


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"Responses": ["a", "b"]}, "expected Scores or Ranks with Responses, found none"),
        ({"Responses": ["a", "b"], "Scores": [1, 2], "Ranks": [1, 2]}, "expected Scores or Ranks .*, found Scores and"),
        ({"Scores": [1, 2]}, "expected key 'Responses'"),
        ({"Responses": ["a", "b"], "Scores": [1]}, "Scores: expected 2 numbers as in 'Responses', found 1"),
        ({"Responses": ["a", "b"], "Scores": 5}, "Scores: expected 2 numbers as in 'Responses', found the number 5"),
        ({"Responses": ["a", "b"], "Scores": [1, True]}, "Scores: expected numbers from .*, found true"),
        ({"Responses": ["a", "b"], "Scores": [1, float("nan")]}, "Scores: expected numbers from"),
        ({"Responses": ["a"], "Scores": [1]}, "Responses: expected a list of two or more answers"),
        ({"Responses": "ab", "Scores": [1, 2]}, "Responses: expected a list of two or more answers"),
        ({"Responses": ["a", ["b", "c"]], "Scores": [1, 2]}, "Responses, answer 2: expected 1 entries as in 'User'"),
        ({"Responses": ["a", 5], "Scores": [1, 2]}, "Responses, answer 2: expected a list of one or more strings"),
        ({"Responses": ["a", " "], "Scores": [1, 2]}, "Responses, answer 2, entry 1: expected a message"),
        ({"Responses": ["a", "b"], "Scores": [1, 2], "Accepted": ["a"]}, "expected no 'Accepted' beside"),
        ({"Responses": ["a", "b"], "Scores": [1, 2], "gap": 1.0}, "expected no 'gap' beside"),
        ({"Accepted": ["a"], "Rejected": [["b"], "c", 4]}, "Rejected, answer 3: expected a list"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], problem: str) -> None:
    """With file, record and key."""
    with pytest.raises(UserError, match=f"f.jsonl:7: {problem}"):
        read(**fields)


# === sets ===


def test_a_set_keeps_each_answer_once() -> None:
    """Six pairs of four answers: the prompt and 2 + 3 + 1 + 4 tokens, whatever the pairs; each pair as it came."""
    pairs = grouped(ALL, [pair((7,), (8,))], [ALL[0], ALL[1]])
    assert len(pairs.tokens) == (3 + 2 + 3 + 1 + 4) + (3 + 1 + 1) + (3 + 2 + 3 + 1)
    for found, given_pair in zip(pairs, [*ALL, pair((7,), (8,)), *ALL[:2]], strict=True):
        assert found.digest == given_pair.digest
        assert [one.tolist() for one in found.wholes] == [one.tolist() for one in given_pair.wholes]
        assert found.scored_spans == given_pair.scored_spans
    assert [one.group for one in pairs] == [0] * 6 + [-1] + [1] * 2
    assert pairs.units.tolist() == [0, 6, 7] and pairs.groups is not None and pairs.groups.count == 2
    assert pairs.origin(8) == "file:3"
    # rows: the prompt, and each answer without its last token
    assert pairs.unit_rows.tolist() == [3 + 1 + 2 + 0 + 3, 3, 3 + 1 + 2 + 0]
    assert len(PairBatch.pack(list(pairs)[:6]).tokens_T) == pairs.unit_rows[0]
    chosen = pairs.select([6, 3, 5])
    assert chosen.units.tolist() == [0, 1] and chosen.unit_rows.tolist() == [3, 3 + 2 + 0 + 3]
    assert [one.digest for one in chosen] == [pairs[6].digest, ALL[3].digest, ALL[5].digest]


def test_which_pairs_stand_together_is_part_of_the_data() -> None:
    """Their digests alone would be equal; sets without groups are called what they were called."""
    assert grouped(ALL).digest != grouped(*[[one] for one in ALL]).digest == PairSet.of(ALL).digest
    assert grouped(ALL[:3], ALL[3:]).digest != grouped(ALL[:2], ALL[2:]).digest


def test_shares() -> None:
    """Six pairs of a record count together as one pair that is of its own; weights have the factor."""
    pairs = grouped(ALL, [pair((7,), (8,))]).shared_out()
    assert [one.share for one in pairs] == pytest.approx([1 / 6] * 6 + [1])
    assert pairs.weights.tolist() == pytest.approx([1 / 6] * 6 + [1]) and pairs[0].weight == pytest.approx(1 / 6)
    assert pairs.total == pytest.approx(2) and pairs[6:].total == 1 and not pairs.is_weighted
    assert PairBatch.pack(list(pairs)).shares == pytest.approx(2)


def test_chains() -> None:
    """Neighbours in rank, of each group alone."""
    chain = grouped([ALL[0], ALL[3], ALL[5]], [pair((7,), (8,))], [pair((7,), (8,)), pair((8,), (9,))])
    assert chain.groups is not None and chain.groups.are_chains(chain.units)
    others = grouped([ALL[0], ALL[1]])
    assert others.groups is not None and not others.groups.are_chains(others.units)


# === packing ===


def test_a_segment_by_hand() -> None:
    """prompt 1 2 3, then a, b and c without their last tokens; pairs (a, b), (a, c)."""
    batch = PairBatch.pack(list(grouped(ALL[:2])))
    assert batch.layout.segments == ((3, (1, 2, 0)),) and batch.tokens_T.tolist() == [1, 2, 3, 4, 4, 6]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.rows_N.tolist() == [2, 3, 2, 4, 5, 2] and batch.targets_N.tolist() == [4, 5, 4, 6, 7, 8]
    assert batch.answers_B2.tolist() == [[0, 1], [0, 2]] and batch.answer_counts == ((2, 3, 1),)
    assert batch.edges == (0, 2) and batch.groups_B.tolist() == [0, 0] and batch.shares_segments


def test_neighbours_of_one_prompt_share_a_segment_on_request() -> None:
    """Pairs of records of their own: as they are apart, each has its own; the shared answer a stands once."""
    pairs = PairSet.of([ALL[0], pair(A, D), pair((7,), (8,), (1, 2))])
    assert not PairBatch.pack(list(pairs)).shares_segments
    together = PairBatch.pack(list(pairs.by_prompt()))
    assert together.answer_counts == ((2, 3, 4), (1, 1)) and together.edges == (0, 2, 3)
    assert together.answers_B2.tolist() == [[0, 1], [0, 2], [3, 4]] and len(set(together.groups_B.tolist())) == 3
    apart = PairBatch.pack([pairs.by_prompt()[i] for i in (0, 2, 1)])
    assert not apart.shares_segments


# === dealing ===


def test_groups_are_dealt_whole() -> None:
    """Every epoch has each pair once, a record's pairs side by side; a step has as many records whatever they are."""
    pairs = grouped(*[[pair((10 + n, 4), (5,)), pair((10 + n, 4), (6,))][: 1 + n % 2] for n in range(10)])
    plan = BatchPlan.of(pairs, BatchConfig(batch_size=2, grad_accum_steps=1), 3, 2)
    assert plan.units_per_step == 4 and plan.steps_per_epoch == 3
    records = pairs.places["record"]
    for index in range(3):
        hands = [micro for rank in plan.step(index) for micro in rank]
        assert [len({int(records[i]) for i in hand}) for hand in hands] == ([2, 2] if index < 2 else [1, 1])
        for hand in hands:
            assert [*hand] == [
                i for n in dict.fromkeys(records[list(hand)].tolist()) for i in np.flatnonzero(records == n)
            ]
    dealt = [i for index in range(3) for rank in plan.step(index) for micro in rank for i in micro]
    assert sorted(dealt) == list(range(15))
    swept = [i for share in sweep_of(pairs, 3, 2) for micro in share for i in micro]
    assert sorted(swept) == list(range(15))
    assert plan.largest_micro_batch() in [micro for index in range(3) for rank in plan.step(index) for micro in rank]


def test_units_of_one_prompt_fall_together() -> None:
    """Eight pairs of two prompts and four of their own, in one step of two ranks: each prompt in one micro-batch."""
    prompts = [(1, 2), (1, 2), (1, 3), (1, 2), (1, 3), (1, 3), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7)]
    pairs = PairSet.of([pair((10 + n,), (30,), prompt) for n, prompt in enumerate(prompts)]).by_prompt()
    plan = BatchPlan.of(pairs, BatchConfig(batch_size=6, grad_accum_steps=1), 0, 2)
    hands = [micro for rank in plan.step(0) for micro in rank]
    assert sorted(map(len, hands)) == [6, 6] and sorted(i for hand in hands for i in hand) == list(range(12))
    for prompt in ((1, 2), (1, 3)):
        where = {number for number, hand in enumerate(hands) for i in hand if prompts[i] == prompt}
        assert len(where) == 1
        (hand,) = (hands[number] for number in where)
        places = [place for place, i in enumerate(hand) if prompts[i] == prompt]
        assert places == list(range(places[0], places[0] + 4))  # side by side: one segment
    pairs = PairSet.of([pair((10 + n, 4), (30,), prompt) for n, prompt in enumerate(prompts)]).by_prompt()
    for most, expected in ((5, [1, 3]), (6, [4])):  # two common rows, and one more of each pair
        by_rows = BatchPlan.of(pairs, BatchConfig(batch_size=6, grad_accum_steps=1, rows_per_micro_batch=most), 0, 2)
        hands = [micro for rank in by_rows.step(0) for micro in rank]
        for prompt in ((1, 2), (1, 3)):
            counts = sorted(sum(prompts[i] == prompt for i in hand) for hand in hands)
            assert [count for count in counts if count] == expected


@given(
    items=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 50)), min_size=1, max_size=20),
    hands=st.integers(1, 6),
)
def test_dealing_together(items: list[tuple[int, int]], hands: int) -> None:
    """Each unit once, no hand above its equal share of units, the first never empty."""
    numbers, start = [], 0
    for size, rows in items:
        numbers.append((tuple(range(start, start + size)), size * rows))
        start += size
    dealt = _deal_together(numbers, hands)
    assert sorted(unit for hand in dealt for unit in hand) == list(range(start))
    assert max(map(len, dealt)) <= -(-start // hands) and dealt[0]


def test_pairs_of_units() -> None:
    assert _pairs_of([2, 0], np.array([0, 2, 3, 6])) == (3, 4, 5, 0, 1) and _pairs_of([2, 0], None) == (2, 0)


# === the store ===


def test_an_answer_is_an_entry(tmp_path: Path) -> None:
    """Four entries for six pairs, one for the pair of a record of two answers; each pair gets its own answers' sums."""
    pairs = grouped(ALL, [pair((7,), (8,))])
    store = RefStore.open(tmp_path, reference_id("w", "t", {}))
    batch = PairBatch.pack(list(pairs))
    assert missing_pairs(store, pairs, False).tolist() == list(range(7))
    of_answer = {A: -2.0, B: -3.0, C: -1.0, D: -4.0}
    sums = [[of_answer[one], of_answer[other]] for one, other in _answers_of(ALL)] + [[-0.5, -0.25]]
    entries = batch.entries()
    store.add(entries.keys, entries.spread(np.array(sums, np.float32)))
    assert len(store) == 5 and not len(missing_pairs(store, pairs, False))
    assert from_store(store)(batch).tolist() == sums
    whole = pairs.entries()
    assert whole.sums(store.lookup(whole.keys)).tolist() == sums
    # as pairs of their own they are others' entries
    assert len(missing_pairs(store, PairSet.of(ALL), False)) == 6
    # a record that shares an answer lacks the others alone
    more = grouped([pair(A, (10,)), pair(A, B)])
    assert missing_pairs(store, more, False).tolist() == [0]


def _answers_of(pairs: Sequence[TokenizedPair]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Both answers of pairs of the prompt 1 2 3."""
    return [(tuple(a.tolist()[3:]), tuple(b.tolist()[3:])) for a, b in (one.wholes for one in pairs)]


# === the loader ===


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, and 20 records of four answers."""
    folder = tmp_path_factory.mktemp("ranked")
    make_job(folder)
    write_rankings(folder / "ranked.jsonl", range(20))
    return folder


def load(folder: Path, **changes: Any) -> RLDatasetLoader:
    settings: dict[str, Any] = {"val_share": 0.2, "seed": 1, **changes}
    return RLDatasetLoader(folder / "ranked.jsonl", load_tokenizer(folder / "tokenizer.json"), 512, **settings)


def test_the_loader_deals_and_tells(ranked: Path) -> None:
    """Five pairs a record, since two of four answers are equal; texts are found again, a prompt stays on its side."""
    data = load(ranked)
    rows = [json.loads(line) for line in (ranked / "ranked.jsonl").read_text().splitlines()]
    count = sum(a > b for row in rows for a in row["Scores"] for b in row["Scores"])
    assert len(data.pairs) == count == 100 and data.prompts == 20
    assert f"kept {count} of {count} pairs; {count} of them compare answers of 20 ranked records" in data.report
    train, held = ({int(n) for n in part.places["record"]} for part in (data.train, data.validation))
    assert train and held and not train & held
    for one, said in zip(data.train, data.conversations(data.train), strict=True):
        scores = dict(zip(rows[said.record - 1]["Responses"], rows[said.record - 1]["Scores"], strict=True))
        assert one.gap == scores[said.chosen[0]] - scores[said.rejected[0]] > 0
    assert len(load(ranked, compared="best_worst").pairs) == 20
    assert load(ranked, compared="best_worst").pairs.groups is None
    assert load(ranked, group_weight="prompt").pairs.total == pytest.approx(20)


def test_a_long_answer_is_left_out_alone(tmp_path: Path, ranked: Path) -> None:
    """Of four answers by rank, the second too long: the others are compared as if it were not there, and what is
    dropped is counted: its three pairs."""
    record = {**BASE, "Responses": ["cat", "cat dog " * 200, "dog", "mat"], "Scores": [4, 3, 2, 1]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record))
    tokenizer = load_tokenizer(ranked / "tokenizer.json")
    said: dict[Compared, list[tuple[str, str]]] = {}
    ways: tuple[Compared, ...] = ("all", "adjacent", "best_worst")
    for how in ways:
        data = RLDatasetLoader(tmp_path / "pairs.jsonl", tokenizer, 300, val_share=0, seed=1, compared=how)
        said[how] = [(one.chosen[0], one.rejected[0]) for one in data.conversations(data.train)]
        assert f"kept {len(data.pairs)} of {len(data.pairs) + 3} pairs" in data.report and "too long" in data.report
    assert said["all"] == [("cat", "dog"), ("cat", "mat"), ("dog", "mat")]
    assert said["adjacent"] == [("cat", "dog"), ("dog", "mat")] and said["best_worst"] == [("cat", "mat")]
