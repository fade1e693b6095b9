"""The audit of the reference's values: whom it draws, how many, what it finds; values kept by a state.

Pair i is the tokens [1, 2, 10 + i | 10 + i, 5]: 1 and 2 scored tokens. The honest reference gives -i and -2 i.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.files import file_digest
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.reference import audit
from simple_llama.reinforcement_learning.rlhf.reference.audit import Auditor, Bound, require_kept
from simple_llama.reinforcement_learning.rlhf.reference.kept_values import KeptValues
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import from_store
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id

FP32, BF16 = Bound(torch.float32, "cpu"), Bound(torch.bfloat16, "cpu")
REFERENCE = reference_id("weights", "tokenizer", {})
PAIRS = PairSet.of(TokenizedPair.from_chats([1, 2, 10 + i], 1, [1, 2, 10 + i, 5], 2) for i in range(1000))


def honest(batch: PairBatch) -> torch.Tensor:
    """Sums (B, 2) of the reference."""
    numbers_B = torch.tensor([int(pair.chosen[-1]) - 10 for pair in batch.pairs], dtype=torch.float32)
    return torch.stack([-numbers_B, -2 * numbers_B], 1)


def auditor(ranks: Ranks, pairs: PairSet = PAIRS, bound: Bound = FP32, batch_size: int = 16) -> Auditor:
    return Auditor(pairs, bound, batch_size, seed=42, ranks=ranks)


def store_of(folder: Path, shift: float = 0.0) -> RefStore:
    """A store in which every pair has its honest sums, changed by `shift`."""
    store = RefStore.open(folder, REFERENCE)
    store.add(PAIRS.keys, honest(PairBatch.pack(PAIRS)).numpy() + np.float32(shift))
    return store


def unbind(store: RefStore) -> None:
    """Gives its only shard the name that it had before names told of the reference."""
    (shard,) = store.folder.glob("shard-*.npy")
    shard.rename(store.folder / f"{file_digest(shard)}.npy")
    store.load()


# === the bound ===


def test_bound_is_the_smaller_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 1e-4 a token up to 0.01 an answer: 0.0003 for 3 tokens, 0.01 for 1000, and 2^-20 of a sum of 2^14 nats,
    which is 2^-6. CUDA: 0.1 for 1000. bf16: 0.03 for 3 tokens, 0.5 for 1000. In AMX's tiles bf16 has 0.1 a token, 0.3
    for 3 and 100 for 1000, and fp32 what it has without. No number is beyond it."""
    monkeypatch.setattr(audit, "_AN_ANSWER", {torch.float32: 0.01, torch.bfloat16: 0.5})
    sums, counts = torch.tensor([-9.0, -3000.0, -(2.0**14)]), torch.tensor([3, 1000, 1000])
    on_cuda = Bound(torch.float32, "cuda")
    in_tiles = {BF16._replace(tiles=True): (0.3, 100.0, 100.0), FP32._replace(tiles=True): (3e-4, 0.01, 2**-6)}
    without = {FP32: (3e-4, 0.01, 2**-6), on_cuda: (3e-4, 0.1, 0.1), BF16: (0.03, 0.5, 0.5)}
    for bound, expected in {**without, **in_tiles}.items():
        assert bound.of(sums, counts).tolist() == [pytest.approx(value) for value in expected]
    ours = torch.tensor([[-1.0, -2.00029], [-1.0, -2.00031], [math.nan, -2.0], [-math.inf, -2.0]])
    far = FP32.exceeded(ours, torch.tensor([[-1.0, -2.0]]), torch.full((4, 2), 3))
    assert far.tolist() == [[False, False], [False, True], [True, False], [True, False]]


# === who is drawn ===


def global_random_numbers() -> bytes:
    """The states of all generators that a run shares."""
    return pickle.dumps((random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()))


def test_each_pair_has_the_same_chance_and_a_planted_shard_its_share(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 of 1,000 pairs, 300 times: a pair comes 19.2 times in the mean (standard deviation 4.2). A shard of another
    model with 50 of the pairs is missed with a chance of C(950, 64) / C(1000, 64) = 0.0336: 10.1 times, deviation 3.1.
    """
    seeds = itertools.count()
    monkeypatch.setattr(os, "urandom", lambda size: next(seeds).to_bytes(size, "little"))
    times, missed = np.zeros(len(PAIRS), int), 0
    for _ in range(300):
        drawn = auditor(ranks)._draw(None)
        assert len(set(drawn)) == 64
        times[drawn] += 1
        missed += not any(500 <= i < 550 for i in drawn)
    assert math.comb(950, 64) / math.comb(1000, 64) == pytest.approx(0.0336, abs=5e-5)
    assert 3 <= missed <= 18 and times.min() >= 4 and times.max() <= 36
    assert abs(times[500:550].mean() - 19.2) < 2


def test_two_starts_draw_other_pairs_and_global_random_numbers_stay(ranks: Ranks) -> None:
    """Nobody can say beforehand which; dropout and the order of data go on as if nothing had been drawn."""
    before = global_random_numbers()
    assert sorted(auditor(ranks)._draw(None)) != sorted(auditor(ranks)._draw(None))
    auditor(ranks).audit(honest, honest, "audit")
    assert global_random_numbers() == before


@pytest.mark.parametrize(("seconds", "computed"), [(1.0, 64), (2.0, 64), (3.0, 48), (60.0, 16)])
def test_fewer_are_computed_where_time_is_short_but_never_under_16(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: float, computed: int
) -> None:
    """16 pairs a turn. At 3 s a turn, three turns take 9 s, and a fourth would end after 12; the log says how many."""
    now = [0.0]
    monkeypatch.setattr(audit.time, "monotonic", lambda: now[0])

    def slow(batch: PairBatch) -> torch.Tensor:
        now[0] += seconds
        return honest(batch)

    with caplog.at_level(logging.INFO):
        auditor(ranks).audit(slow, honest, "step-0 audit")
    spent = computed / 16 * seconds
    assert f"at most 0 nats a token on {computed} of 1000 pairs, drawn anew ({spent:.1f} s)" in caplog.text


def test_micro_batches_are_no_larger_than_the_run_s(ranks: Ranks) -> None:
    """5 pairs at once: 64 pairs in 13 calls."""
    sizes = []

    def counting(batch: PairBatch) -> torch.Tensor:
        sizes.append(len(batch))
        return honest(batch)

    auditor(ranks, batch_size=5).audit(counting, honest, "audit")
    assert sizes == [5] * 12 + [4]


def test_pairs_beyond_the_bound_are_named(ranks: Ranks) -> None:
    """Of 10 pairs, all of which are drawn, pair 3 is 0.01 nats off on its rejected side; the bound is 0.0002."""

    def wrong(batch: PairBatch) -> torch.Tensor:
        ours_B2 = honest(batch)
        ours_B2[ours_B2[:, 0] == -3, 1] -= 0.01
        return ours_B2

    message = (
        r"audit: 1 of 10 pairs .*: pairs:4 \(chosen -3, stored -3; rejected -6\.01, stored -6\)\. The store does not"
    )
    with pytest.raises(UserError, match=message):
        auditor(ranks, PAIRS[:10]).audit(wrong, honest, "audit")


def test_a_model_that_gives_no_numbers_is_no_reference(ranks: Ranks) -> None:
    with pytest.raises(UserError, match="audit: 64 of 64 pairs drawn are further"):
        auditor(ranks).audit(lambda batch: honest(batch) * math.nan, honest, "audit")


# === stores of before ===


def test_an_unbound_store_is_audited_by_256_and_bound(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of(tmp_path)
    unbind(store)
    before = store._records.tobytes()
    one = auditor(ranks)
    assert one.finds_unbound(store)
    with caplog.at_level(logging.INFO):
        one.take_over(store, honest)
    assert "on 256 of 1000 pairs" in caplog.text and "bound 1000 records" in caplog.text
    found = RefStore.open(tmp_path, REFERENCE)
    assert found._records.tobytes() == before and not found.has_unbound and not one.finds_unbound(found)


def test_an_unbound_store_of_another_model_is_refused_and_stays(tmp_path: Path, ranks: Ranks) -> None:
    store = store_of(tmp_path, shift=-0.5)
    unbind(store)
    before = sorted(path.name for path in store.folder.iterdir())
    with pytest.raises(UserError, match="no name binds to the reference: 256 of 256 pairs .*Delete what is"):
        auditor(ranks).take_over(store, honest)
    assert sorted(path.name for path in store.folder.iterdir()) == before


def test_an_unbound_store_that_cannot_be_written_is_audited_and_stays(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of(tmp_path)
    unbind(store)
    before = sorted(path.name for path in store.folder.iterdir())

    def refuse(*args: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "replace", refuse)
    with caplog.at_level(logging.INFO):
        auditor(ranks).take_over(store, honest)
    assert "on 256 of 1000 pairs" in caplog.text and "stay (cannot write" in caplog.text
    assert sorted(path.name for path in store.folder.iterdir()) == before
    assert from_store(store)(PairBatch.pack(PAIRS[:3])).tolist() == [[0, 0], [-1, -2], [-2, -4]]


# === what a state keeps ===


def test_equal_values_are_kept_and_pass_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """256 records of 1,000, the same ones each time, through JSON and back."""
    store = store_of(tmp_path)
    content = store.content_digest(PAIRS.keys)
    kept = KeptValues.of(store, PAIRS.keys, content)
    again = KeptValues.from_json(kept.to_json(), "state")
    assert again.digest == content and again.records.tobytes() == kept.records.tobytes()
    assert len(np.unique(kept.records["digest"])) == 256
    assert kept.records.tobytes() == KeptValues.of(store, PAIRS.keys, content).records.tobytes()
    require_kept(again, store, content, FP32, "state")
    assert caplog.text == ""


def test_other_values_are_refused_and_rounding_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shifted by 0.01 nats (the bound is 0.0001 for one token), and by 2^-15 = 0.00003."""
    store = store_of(tmp_path / "then")
    kept = KeptValues.of(store, PAIRS.keys, store.content_digest(PAIRS.keys))
    other = store_of(tmp_path / "other", shift=-0.01)
    with pytest.raises(UserError, match=r"state: cannot resume: 256 of 256 log-probs .*up to 0\.01 nats apart"):
        require_kept(kept, other, other.content_digest(PAIRS.keys), FP32, "state")
    near = store_of(tmp_path / "near", shift=-(2.0**-15))
    require_kept(kept, near, near.content_digest(PAIRS.keys), FP32, "state")
    assert "not those that the run was trained with, but as near as rounding: at most 3.1e-05 nats" in caplog.text


NO_VALUES = [None, 3, [], {}, {"digest": "a"}, {"digest": 1, "records": ""}]


@pytest.mark.parametrize("found", [*NO_VALUES, *({"digest": "a", "records": text} for text in ("AA==", "\0", 3))])
def test_values_that_a_state_cannot_have_written_are_refused(found: object) -> None:
    with pytest.raises(UserError, match="state: reference_values: expected a digest and records"):
        KeptValues.from_json(found, "state")
