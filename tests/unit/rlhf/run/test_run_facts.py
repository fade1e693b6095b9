"""What a run leaves beside its curves: the pairs of its last evaluation, and what is said of its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.run.evaluate import HeldOut
from simple_llama.reinforcement_learning.rlhf.run.run_facts import (
    drop_held_out,
    histograms_of,
    weight_facts,
    write_held_out,
)


def test_held_out_pairs_are_kept_until_their_step_is_made_anew(tmp_path: Path) -> None:
    """Whole and in order, with the record of each; a resume at the step keeps the file, one before it does not; nor
    does any a damaged one."""
    pairs = PairSet.of([TokenizedPair.from_chats([1, 2, 3], 1, [1, 2, 4, 5], 2)], [("pairs.jsonl", 7)])
    logps_N2, ref_N2, rewards_N2 = np.array([[[-1.0, -2.0]], [[-1.5, -1.0]], [[0.1, 0.2]]], np.float32)
    found = HeldOut(logps_N2, ref_N2, np.array([[1, 2]], np.int32), np.array([0.5], np.float32), rewards_N2, {})
    write_held_out(tmp_path, 4, found, pairs)
    path = tmp_path / "held_out.npz"
    drop_held_out(tmp_path, 4)
    with np.load(path, allow_pickle=False) as kept:
        assert kept["step"] == 4 and kept["origins"].tolist() == ["pairs.jsonl:7"]
        assert np.array_equal(kept["logps_N2"], logps_N2) and np.array_equal(kept["ref_N2"], ref_N2)
        assert kept["counts_N2"].tolist() == [[1, 2]] and np.array_equal(kept["rewards_N2"], rewards_N2)
    assert found.margins_N.tolist() == [1.5] and len(histograms_of(found)) == 4
    free = dataclasses.replace(found, ref_N2=ref_N2 * np.nan)  # a loss that reads no reference
    assert "held_out/margin_nats" not in histograms_of(free) and len(histograms_of(free)) == 3
    drop_held_out(tmp_path, 3)
    assert not path.exists()
    path.write_bytes(b"PK\3\4 cut short")
    drop_held_out(tmp_path, 9)
    assert not path.exists()
    drop_held_out(tmp_path, 9)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8.0), (torch.float32, 24.0)])
def test_the_median_weight(ranks: Ranks, dtype: torch.dtype, bits: float) -> None:
    """Of the magnitudes 0, 0.25, 0.5, 2 and 3, whatever their signs and tensors: 0.5. Nothing of no weights."""
    own = [torch.tensor([[-3.0, 0.25]], dtype=dtype), torch.tensor([[0.0], [-0.5], [2.0]], dtype=dtype)]
    assert weight_facts(own, dtype, ranks.device) == {"weights/median": 0.5, "weights/bits": bits}
    assert weight_facts([], dtype, ranks.device) == {}
