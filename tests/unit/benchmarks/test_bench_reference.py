"""The reference pass's bench without its peer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.bench_reference import BenchReference, facts, our_pass, pass_flops, ratio
from benchmarks.workload import make_pairs
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.objective.cost import model_size, useful_flops

CPU = torch.device("cpu")
ARCHITECTURE = Architecture.of(TrainingConfig(n_embd=16, n_heads=2, n_layers=1, multiple_of=8, max_seq_len=256), 50)
SECONDS = {"ours bf16": [2.0, 2.0, 5.0], "TRL bf16": [12.0, 16.0, 20.0], "TRL fp32": [9.0, 8.0, 10.0]}
RATES = {torch.bfloat16: 4e9, torch.float32: 8e9}


def test_every_pass_computes_every_pair(tmp_path: Path) -> None:
    """Each call fills a store of its own: one would find all pairs there and have nothing to time."""
    pairs = make_pairs("short", 5, 50, seed=0)
    way = our_pass(LLaMaTransformer(ARCHITECTURE), pairs, 2, CPU, str(tmp_path))
    way()
    way()
    assert len(list(tmp_path.iterdir())) == len(list(tmp_path.glob("*/*.npy"))) == 2


def test_pass_flops_are_those_of_its_batches() -> None:
    """One batch of all pairs: a forward's useful FLOPs, a third of a step's."""
    pairs, model = make_pairs("short", 3, 50, seed=0), LLaMaTransformer(ARCHITECTURE)
    step = useful_flops(model_size(model), ARCHITECTURE, PairBatch.pack(pairs), backward=True)
    assert pass_flops(model, pairs, batch_size=3) == pytest.approx(step / 3)


def test_facts_by_hand() -> None:
    """Best of TRL: fp32, 9 s against 2 s is 4.5, below 5. 4e9 FLOPs in 2 s are half of 4 GFLOP/s."""
    assert ratio(SECONDS, "TRL bf16", "ours bf16") == (8.0, 6.0)
    bench = BenchReference(mix="hh", settings=("bf16",))
    lines = facts(bench, SECONDS, 4e9, RATES, CPU).splitlines()
    assert lines[0] == "- ours bf16 against TRL bf16: 8.00 (by round 6.00)"
    assert "0.50 of 4 GFLOP/s in bfloat16, 0.25 of 8 GFLOP/s in float32" in lines[1]
    assert lines[2].startswith("- met: TRL bf16 (its best) / ours bf16 8.00")
    both = {**SECONDS, "ours fp32": [2.0, 2.0, 2.0]}
    lines = facts(BenchReference(mix="hh", settings=("bf16", "fp32")), both, 4e9, RATES, CPU).splitlines()
    assert lines[-1].startswith("- NOT met: TRL fp32 (its best) / ours bf16 4.50")


def test_cuda_target_is_the_gemm_rate() -> None:
    """On CUDA the share of the bf16 GEMM rate decides: 0.5 of 0.6."""
    lines = facts(BenchReference(settings=()), SECONDS, 4e9, RATES, torch.device("cuda")).splitlines()
    assert lines[-1] == "- NOT met: 0.50 of the bf16 GEMM rate, target >= 0.6"
