"""Times the reference pass of ours, with its store on disk, against TRL's `_precompute_ref_logps` with its cache file.

    python -m benchmarks.bench_reference                # a CPU: 128 HH-RLHF pairs, 36 M weights
    python -m benchmarks.bench_reference --device cuda --shape 1.3b --pairs 1024

Same weights, same pairs, one process, in turns. TRL (benchmarks/requirements.txt) computes in bf16, under autocast and
in fp32, each with its faster attention and batch size, found on a few pairs. Its log-probs in fp32 must be ours.
"""

from __future__ import annotations

import itertools
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from benchmarks.agreement import MOST
from benchmarks.kept import KEPT
from benchmarks.measure import RESULTS, gemm_flops, interleaved, medians, peaks_gib, record, table
from benchmarks.ours import new_store, reference_pass
from benchmarks.peers import ATTENTIONS, Peer, TrlSettings
from benchmarks.train_report import SAME_DTYPE
from benchmarks.workload import HH_DATA, make_pairs, mixes_at_hand, pairs_for_rows, start_model
from simple_llama.common.errors import UserError
from simple_llama.ops.machine import peak_memory_gb, synchronize
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import WeightsFile, build_model
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import sweep
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.cost import model_size, useful_flops

ROWS_ON_CUDA = 16384  # packed rows of a batch of ours, about
CPU_SPEEDUP = 5.0  # TRL's best time over ours, on HH-RLHF
CUDA_USEFUL = 0.6  # of the bf16 GEMM rate
DTYPES = {"ours bf16": torch.bfloat16, "ours fp32": torch.float32}
FLUSH_PAIRS = 512  # pairs a shard: the default of ref_flush_pairs


@dataclass(frozen=True)
class BenchReference:
    """What is measured, on what."""

    # === Work ===
    mix: Literal["", "hh", "short", "long", "uf-71-169", "uf-200-300"] = ""  # which pairs; "": hh, or without it short
    pairs: int = 128  # of a pass
    shape: Literal["tiny", "36m", "1.3b", "llama-3.2-1b"] = "36m"  # of a model with random weights
    model_path: str = ""  # a .pth to take the weights from instead
    data: str = HH_DATA  # HH-RLHF file of the mix hh
    batch_size: int = 0  # pairs a batch of ours; 0: 16, on CUDA as many as have 16,384 packed rows
    seed: int = 0  # of weights and pairs

    # === TRL ===
    settings: tuple[Literal["bf16", "autocast", "fp32"], ...] = ("bf16", "autocast", "fp32")  # its numerics
    peer_batch_sizes: tuple[int, ...] = (2, 8, 32)  # pairs a batch of TRL's; the fastest is taken
    trial_pairs: int = 32  # pairs on which attention and batch size are chosen

    # === Measurement ===
    rounds: int = 3  # rounds after one warm-up; each times one pass of every way
    threads: int = 2  # CPU threads
    device: Literal["cpu", "cuda"] = "cpu"  # where all compute
    minutes: float = 0.0  # after which no other measurement begins; 0: all are made
    results: str = RESULTS  # file to append the outcome to; "": only print


def main(bench: BenchReference) -> None:
    """TRL's best way in each of its settings, then the rounds, then the record."""
    started = time.perf_counter()
    command = shlex.join(["python", "-m", "benchmarks.bench_reference", *sys.argv[1:]])
    KEPT.begin(command, bench.results, bench.minutes)
    device = torch.device(bench.device)
    torch.set_num_threads(bench.threads)
    start = start_model(bench.shape, bench.model_path, bench.seed, device)
    if not bench.mix:
        bench = replace(bench, mix="hh" if mixes_at_hand(["hh"], bench.data) else "short")
    pairs = make_pairs(bench.mix, bench.pairs, start.architecture.vocab_size, bench.seed, bench.data)
    batch_size = bench.batch_size or (pairs_for_rows(pairs, ROWS_ON_CUDA) if bench.device == "cuda" else 16)
    kinds = {name: dtype for name, dtype in DTYPES.items() if name != "ours fp32" or "fp32" in bench.settings}
    models = {name: build_model(start, dtype, device) for name, dtype in kinds.items()}
    notes, ways = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            ways[name] = our_pass(model, pairs, batch_size, device, folder)
        for setting in bench.settings:
            peer = trl_peer(bench, setting, start, pairs, device, folder)
            attention, size, tried = best_way(bench, peer, device)
            notes.append(f"- TRL {setting}: {attention}, batches of {size}; s for {bench.trial_pairs} pairs: {tried}")
            KEPT.keep(f"TRL {setting}", attention=attention, batch_size=size, tried=tried)
            peer.set_attention(attention)
            if setting == "fp32":
                notes.append(same_log_probs(bench, peer, models["ours fp32"], pairs, device))
            ways[f"TRL {setting}"] = trl_pass(peer, size, len(pairs))
        seconds = interleaved(ways, bench.rounds, device)
        memory = peaks_gib(ways, device)
    rates = {dtype: gemm_flops(dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    flops = pass_flops(models["ours bf16"], pairs, batch_size)
    body = [speeds(seconds, memory, len(pairs), flops), "\n".join(notes), facts(bench, seconds, flops, rates, device)]
    body.append(seconds.in_words())
    body.append(f"peak of the process {peak_memory_gb(device):.2f} GiB, {time.perf_counter() - started:.0f} s")
    title = f"The reference pass, {start.path.name}, {bench.pairs} pairs ({bench.mix}), ours in batches of {batch_size}"
    record(title, command, "\n\n".join(body), device, bench.results)


def our_pass(
    model: LLaMaTransformer, pairs: list[TokenizedPair], batch_size: int, device: torch.device, folder: str
) -> Callable[[], None]:
    """A pass into a store that is empty at each call."""
    numbers = itertools.count()

    def way() -> None:
        store = new_store(folder, f"{id(model)}-{next(numbers)}")
        reference_pass(model, store, pairs, batch_size, device, FLUSH_PAIRS)

    return way


def trl_pass(peer: Peer, batch_size: int, pairs: int) -> Callable[[], object]:
    """TRL's pass; it writes a new cache file at each call, since its dataset is not on disk."""
    return lambda: peer.precompute(batch_size, pairs)


def trl_peer(
    bench: BenchReference,
    setting: str,
    start: WeightsFile,
    pairs: list[TokenizedPair],
    device: torch.device,
    folder: str,
) -> Peer:
    """TRL's trainer with the start weights as its model, which is the reference before training."""
    settings = TrlSettings(setting, 8, 1, beta=0.1, rate=1e-7, betas=(0.9, 0.95), clip=1.0)
    return Peer(start, pairs, None, settings, device, str(Path(folder) / "trl"))


def best_way(bench: BenchReference, peer: Peer, device: torch.device) -> tuple[str, int, str]:
    """(attention, pairs a batch) that take least time for a few pairs, and all times in words."""
    pairs = min(bench.trial_pairs, bench.pairs)
    peer.precompute(pairs, pairs)  # cold
    seconds: dict[tuple[str, int], float] = {}
    names: tuple[str, ...] = ATTENTIONS[device.type]
    for attention, size in itertools.product(names, bench.peer_batch_sizes):
        peer.set_attention(attention)
        synchronize(device)
        start = time.perf_counter()
        peer.precompute(size, pairs)
        synchronize(device)
        seconds[attention, size] = time.perf_counter() - start
    attention, size = min(seconds, key=lambda way: seconds[way])
    return attention, size, ", ".join(f"{name} x{size} {value:.2f}" for (name, size), value in seconds.items())


def same_log_probs(
    bench: BenchReference, peer: Peer, model: LLaMaTransformer, pairs: list[TokenizedPair], device: torch.device
) -> str:
    """How far TRL's fp32 log-probs are from ours; UserError where that is more than rounding."""
    few = pairs[: bench.trial_pairs]
    with tempfile.TemporaryDirectory() as folder:
        store = new_store(folder, "agreement")
        reference_pass(model, store, few, len(few), device, FLUSH_PAIRS)
        ours_B2 = store.lookup(PairSet.of(few).keys)
    theirs_B2 = peer.precompute(8, len(few))
    worst = float(np.abs((ours_B2 - theirs_B2) / theirs_B2).max())
    line = f"- agreement with TRL in fp32 on {len(few)} pairs: log-probs differ by at most {worst:.1e} of their value"
    if not worst <= MOST:
        raise UserError(f"{line}; expected at most {MOST:g}: no speed is measured")
    return line


def pass_flops(model: LLaMaTransformer, pairs: Sequence[TokenizedPair], batch_size: int) -> float:
    """Useful FLOPs of a pass: forward only, a shared prompt once, scored rows only."""
    size = model_size(model)
    batches = sweep(PairSet.of(pairs).rows, batch_size, world_size=1)[0]
    packed = (PairBatch.pack([pairs[i] for i in batch]) for batch in batches)
    return sum(useful_flops(size, model.architecture, batch, backward=False) for batch in packed)


def speeds(seconds: dict[str, list[float]], memory: dict[str, float], pairs: int, flops: float) -> str:
    """A row a way."""
    rows = [("way", "s a pass", "pairs/s", "useful GFLOP/s", "GiB in a pass", "ours bf16 is faster by")]
    for name, middle in medians(seconds).items():
        times, by_round = ratio(seconds, name, "ours bf16")
        speed = (f"{middle:.2f}", f"{pairs / middle:.2f}", f"{flops / middle / 1e9:.1f}", f"{memory[name]:.2f}")
        rows.append((name, *speed, f"{times:.2f} (by round {by_round:.2f})"))
    return table(rows)


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> tuple[float, float]:
    """How many times faster `fast` is: of the medians, and the median of the rounds' own ratios."""
    rounds = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return statistics.median(seconds[slow]) / statistics.median(seconds[fast]), statistics.median(rounds)


def facts(
    bench: BenchReference,
    seconds: dict[str, list[float]],
    flops: float,
    rates: dict[torch.dtype, float],
    device: torch.device,
) -> str:
    """Ratios in the same dtype, the share of the GEMM rate, and the targets: met or not."""
    lines = []
    for setting in bench.settings:
        times, by_round = ratio(seconds, f"TRL {setting}", SAME_DTYPE[setting])
        lines.append(f"- {SAME_DTYPE[setting]} against TRL {setting}: {times:.2f} (by round {by_round:.2f})")
    useful = flops / statistics.median(seconds["ours bf16"])
    shares = (f"{useful / rate:.2f} of {rate / 1e9:.0f} GFLOP/s in {str(dtype)[6:]}" for dtype, rate in rates.items())
    lines.append(f"- useful FLOP/s over the best GEMM of this run: {', '.join(shares)}")
    share = useful / rates[torch.bfloat16]
    if device.type == "cuda":
        lines.append(f"- {met(share >= CUDA_USEFUL)}: {share:.2f} of the bf16 GEMM rate, target >= {CUDA_USEFUL}")
    elif bench.mix == "hh" and bench.settings:
        best = min((f"TRL {name}" for name in bench.settings), key=lambda name: statistics.median(seconds[name]))
        times, _ = ratio(seconds, best, "ours bf16")
        lines.append(
            f"- {met(times >= CPU_SPEEDUP)}: {best} (its best) / ours bf16 {times:.2f}, target >= {CPU_SPEEDUP}"
        )
    return "\n".join(lines)


def met(is_met: bool) -> str:
    """A target's outcome."""
    return "met" if is_met else "NOT met"


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchReference, description=__doc__))
    except UserError as problem:
        sys.exit(f"error: {problem}")
