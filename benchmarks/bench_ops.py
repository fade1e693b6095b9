"""Times the log-prob head and a decoder block on this machine: interleaved, medians, forward and backward.

python benchmarks/bench_ops.py --threads 2
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from simple_llama.ops import logprob_torch
from simple_llama.ops.attention import PackedLayout
from simple_llama.ops.linear import Linear
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer


@dataclass(frozen=True)
class Bench:
    """Sizes of the measurement."""

    threads: int = 2  # CPU threads
    repeats: int = 7  # rounds; each round times every way once
    width: int = 512  # D
    vocabulary: int = 8192  # V
    pairs: int = 21  # of 43 chosen and 54 rejected scored tokens: the means of HH-RLHF in our chat format
    rows: int = 2000  # packed rows of the decoder block


def interleaved(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each way, one warm-up round first."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def head_ways(bench: Bench, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """The three-GEMM head, the recomputing head, and the eager way."""
    counts = ((43, 54),) * bench.pairs
    rows = sum(map(sum, counts))
    hidden = torch.randn(rows, bench.width).to(dtype).requires_grad_()
    weight = (torch.randn(bench.vocabulary, bench.width) * 0.05).to(dtype).requires_grad_()
    targets = torch.randint(0, bench.vocabulary, (rows,))
    owner = torch.repeat_interleave(torch.arange(2 * bench.pairs), torch.tensor(counts).flatten())

    def losses(logps_b2: torch.Tensor, _pairs: slice) -> torch.Tensor:
        return -F.logsigmoid(0.5 * (logps_b2[:, 0] - logps_b2[:, 1]))

    def three() -> None:
        logprob_torch.pair_loss(hidden, weight, targets, counts, losses)[0].backward()

    def four() -> None:
        losses(logprob_torch.pair_logps(hidden, weight, targets, counts), slice(None)).sum().backward()

    def eager() -> None:
        logps = F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        sums = torch.zeros(2 * bench.pairs).index_add(0, owner, logps)
        losses(sums.view(-1, 2), slice(None)).sum().backward()

    return {"pair_loss (3 GEMMs)": three, "pair_logps (4 GEMMs)": four, "eager log_softmax": eager}


def block_way(bench: Bench, dtype: torch.dtype, plain: bool) -> Callable[[], None]:
    """A decoder block; `plain` multiplies in its own dtype, as torch does by itself."""
    config = TrainingConfig(n_embd=bench.width, n_heads=8, n_layers=1, max_seq_len=4096)
    model = LLaMaTransformer(config, 16).to(dtype)
    if plain:
        for module in model.modules():
            if isinstance(module, Linear):
                module.forward = lambda x, module=module: F.linear(x, module.weight, module.bias)  # type: ignore
    layout = PackedLayout.causal([250] * (bench.rows // 250))
    tokens, positions = torch.zeros(layout.rows, dtype=torch.long), torch.arange(250).repeat(bench.rows // 250)

    def way() -> None:
        model.hidden(tokens, positions, layout).float().sum().backward()

    return way


def main(bench: Bench) -> None:
    """Prints both tables."""
    torch.set_num_threads(bench.threads)
    torch.manual_seed(0)
    ways: dict[str, Callable[[], None]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ways |= {f"head {name:5} {way}": call for way, call in head_ways(bench, dtype).items()}
        ways[f"block {name:4} ours"] = block_way(bench, dtype, plain=False)
    ways["block bf16 torch's own GEMMs"] = block_way(bench, torch.bfloat16, plain=True)
    for name, milliseconds in interleaved(ways, bench.repeats).items():
        print(f"{name:36} {milliseconds:8.1f} ms")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
