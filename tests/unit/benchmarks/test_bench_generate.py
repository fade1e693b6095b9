"""The bench of a token, on a tiny model and on made-up times."""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure
from benchmarks.bench_generate import DECODE, PRODUCTS, STEP, Bench, head, ratio, row, tokens, ways_of
from tiny_model import tiny_model

# rounds of one drifting machine: the second is twice as slow
SECONDS = {
    f"{PRODUCTS} 1": [0.010, 0.020, 0.010],
    f"{STEP} 1": [0.012, 0.026, 0.014],
    f"{DECODE} 1": [0.015, 0.030, 0.015],
    f"{PRODUCTS} 8": [0.011, 0.022, 0.011],
    f"{STEP} 8": [0.030, 0.065, 0.035],
}


def test_a_row_by_hand() -> None:
    """Token / products 1.2, 1.3, 1.4: 1.3 is met. Eight / one 2.5 each time: 2 is not."""
    assert ratio(SECONDS, f"{STEP} 1", f"{PRODUCTS} 1") == pytest.approx(1.3)
    found = dict(zip(head(8), row("bfloat16", SECONDS, 8), strict=True))
    assert found["products (ms)"] == "10.00" and found["token of 8 (ms)"] == "35.00"
    assert found["token / products"].startswith("1.30 (") and found["`decode` / products"] == "1.50"
    assert found["token of 8 / token"] == "2.50 (NOT met: 2)"
    faster = {**SECONDS, f"{STEP} 1": [0.010, 0.020, 0.013]}
    assert row("bfloat16", faster, 8)[6] == "1.00 (met: 1.3)"


def test_every_way_does_the_same_at_each_call() -> None:
    """Both ways of a token give the same logits twice, and products touch every matrix: 2 blocks of 5, and the head."""
    model = tiny_model()
    for count in (1, 3):
        step, decode = (tokens(model, count, 6, by) for by in (STEP, DECODE))
        first = step()
        assert torch.equal(step(), first) and first.shape == (count, 50)
        torch.testing.assert_close(decode(), first, atol=1e-4, rtol=1e-4)
    ways = ways_of(model, Bench(prompt=6, together=3))
    assert len(ways) == 6
    calls = measure.profile_shares(ways[f"{PRODUCTS} 1"], torch.device("cpu"))
    assert "aten::linear" in calls and "(11)" in calls
