"""What bench_train makes of times: ratios, gains, targets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.measure import Timed
from benchmarks.train_report import MixResult, body, targets

CPU = torch.device("cpu")
RESULT = MixResult(
    mix="hh",
    pairs_per_step=8,
    batch_size=8,
    peer_batch_size=8,
    lengths=(200.0, 50.0, 60.0),
    seconds=Timed(
        {
            "ours bf16": [1.0, 2.0, 4.0],
            "ours bf16, whole": [1.5, 3.0, 6.0],
            "ours bf16, padded": [3.0, 4.0, 12.0],
            "ours bf16, plain loop": [0.9, 1.9, 3.6],
            "ours fp32": [1.0, 2.0, 4.0],
            "TRL bf16": [10.0, 40.0, 41.0],
            "TRL fp32": [8.0, 13.0, 24.0],
        },
        {"ours bf16": [1.9, 3.8, 7.8]},
        range(3),
        "3 of 3 rounds were quiet",
    ),
    memory_gib=dict.fromkeys(
        (
            "ours bf16",
            "ours bf16, whole",
            "ours bf16, padded",
            "ours bf16, plain loop",
            "ours fp32",
            "TRL bf16",
            "TRL fp32",
        ),
        1.0,
    ),
    flops={"shared": [1e9, 2e9, 4e9], "whole": [2e9, 3e9, 6e9], "padded": [4e9, 5e9, 16e9]},
    attention={"bf16": "sdpa", "fp32": "eager"},
    gemm_flops={torch.bfloat16: 1.6e9, torch.float32: 4e9},
)


def test_ratio_of_medians_and_by_round() -> None:
    """TRL fp32: medians 13 / 2 = 6.5; rounds 8, 6.5, 6: 6.5. TRL bf16: 40 / 2 = 20; rounds 10, 20, 10.25: 10.25."""
    assert RESULT.ratio("TRL fp32", "ours bf16") == (6.5, 6.5)
    assert RESULT.ratio("TRL bf16", "ours bf16") == (20.0, 10.25)


def test_best_peer_is_the_fastest() -> None:
    """13 s in fp32 against 40 s in bf16."""
    assert RESULT.best_peer == "TRL fp32"
    assert dataclasses.replace(RESULT, seconds={"ours bf16": [1.0]}).best_peer == ""


def test_gain_by_hand() -> None:
    """Padded: times 3, 2, 3 over predictions 4, 2.5, 4 are 0.75, 0.8, 0.75."""
    assert RESULT.gain("padded") == pytest.approx((3.0, 4.0, 0.75))
    assert RESULT.gain("whole") == pytest.approx((1.5, 1.5, 1.0))


def test_overhead_and_useful_rate_by_hand() -> None:
    """1 - 0.9, 1 - 0.95, 1 - 0.9 of a step; 1e9 FLOPs a second in every round, also for a way that computes more."""
    assert RESULT.overhead() == pytest.approx(0.1)
    assert RESULT.useful_rate("ours bf16") == 1e9
    assert RESULT.useful_rate("ours bf16, whole") == pytest.approx(1e9 / 1.5)


def test_targets_are_met_or_not_by_the_numbers() -> None:
    """6.5 of 6 and 1e9 / 1.6e9 = 0.62 of 0.5 are met; 0.75 of 0.9 is not. A step of 30 % overhead is not."""
    lines = targets([RESULT], CPU)
    assert [line.startswith("- met") for line in lines] == [True, True, True, False]
    assert "6.50, target >= 6.0" in lines[0]
    slow = {**RESULT.seconds, "ours bf16, plain loop": [0.7, 1.4, 2.8], "TRL fp32": [5.0, 5.0, 5.0]}
    lines = targets([dataclasses.replace(RESULT, seconds=slow)], CPU)
    assert [line.startswith("- met") for line in lines] == [False, False, True, False]


def test_body_names_every_way() -> None:
    """Each way has a row, and each of TRL's settings its ratio against ours in the same dtype."""
    text = body([RESULT], CPU)
    for way in RESULT.seconds:
        assert f"| {way} " in text
    assert "ours fp32 against TRL fp32: 6.50" in text
    assert "ours bf16 against TRL bf16: 20.00" in text
