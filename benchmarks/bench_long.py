"""One step on one pair of two long chats that share one token, of a real model: seconds, and memory at most.

    python -m benchmarks.bench_long --model SmolLM2-135M-Instruct

The reference pass of the pair first, then a step as training makes it, with recomputation in the backward pass, in one
process of its own on all cores. The model is a folder of Hugging Face's form (launch/export.py makes one of a .gguf),
the chats are random tokens of its vocabulary. Memory is the process's largest resident set, from its start on.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.measure import RESULTS, record, resident_kib, table
from benchmarks.ours import EngineTrainer, new_store, reference_pass
from benchmarks.quiet import CoreWatch
from benchmarks.workload import pack_shared
from simple_llama.cluster.distributed import close_ranks, init_ranks, leave
from simple_llama.common.errors import UserError
from simple_llama.interop.open_start import open_start
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig


@dataclass(frozen=True)
class BenchLong:
    """What is measured, on what."""

    model: str  # folder of a model in Hugging Face's form
    tokens: int = 8192  # of each chat, one of them the prompt; the model has to take so many
    checkpointing: bool = True  # recompute layers in the backward pass
    results: str = RESULTS  # file to append the outcome to; "": only print


def main(bench: BenchLong) -> None:
    """The pass and the step, then the record."""
    ranks = init_ranks("cpu")
    start = open_start(bench.model)
    drawn = np.random.default_rng(0).integers(10, start.architecture.vocab_size, (2, bench.tokens)).tolist()
    drawn[1][0] = drawn[0][0]  # what a chat begins with, in both
    pair = TokenizedPair.from_chats(drawn[0], bench.tokens - 1, drawn[1], bench.tokens - 1)
    config = DPOConfig(batch_size=1, grad_accum_steps=1, max_lr=1e-6, min_lr=1e-6)
    seconds, watch = [], CoreWatch()
    with tempfile.TemporaryDirectory() as folder:
        store = new_store(Path(folder), "bench_long")
        with start.reading() as loaded:
            trainer = EngineTrainer(loaded, config, store, ranks)
        trainer.model.activation_checkpointing = bench.checkpointing
        before = resident_kib("VmHWM") / 2**20
        for work in (
            lambda: reference_pass(trainer.model, store, [pair], 1, ranks.device, flush_pairs=1),
            lambda: trainer.step([pair], pack_shared, 1),
        ):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    peak, means = resident_kib("VmHWM") / 2**20, trainer.sums.means()
    head = ["reference pass", "step", "useful GFLOP/s of the step", "GiB before", "GiB at most", "loss"]
    rate = means["useful_flops"] / seconds[1] / 1e9
    row = [f"{seconds[0]:.1f} s", f"{seconds[1]:.1f} s", f"{rate:.0f}", f"{before:.2f}", f"{peak:.2f}"]
    how = "with" if bench.checkpointing else "without"
    words = f"One pair of 2 x {bench.tokens:,} tokens, {how} activation checkpointing, bf16, AdamW; {watch.share()}."
    command = shlex.join(["python", "-m", "benchmarks.bench_long", *sys.argv[1:]])
    body = words + "\n\n" + table([head, [*row, f"{means['loss']:.4f}"]])
    record(f"A long pair, {Path(bench.model).name}", command, body, ranks.device, bench.results)
    close_ranks()
    leave(0)


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchLong, description=__doc__))
    except UserError as problem:
        sys.exit(f"error: {problem}")
