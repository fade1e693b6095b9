"""Times decoder blocks on this machine, forward and backward: ours, and with torch's own bf16 GEMMs.

python -m benchmarks.bench_block --threads 2
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from benchmarks import measure
from simple_llama.ops.attention import PackedLayout
from simple_llama.ops.linear import Linear
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer

SEGMENT = 250  # tokens of a packed sequence


@dataclass(frozen=True)
class Bench:
    """Sizes of the measurement."""

    threads: int = 2  # CPU threads
    rounds: int = 7  # each round times every way once
    width: int = 512  # D
    rows: int = 2000  # packed rows
    layers: int = 2  # blocks
    results: str = measure.RESULTS  # file that the results are appended to; empty: only printed


def block_way(bench: Bench, dtype: torch.dtype, plain: bool = False) -> Callable[[], None]:
    """Decoder blocks; `plain` ones multiply in their own dtype, as torch does by itself."""
    config = TrainingConfig(n_embd=bench.width, n_heads=8, n_layers=bench.layers, max_seq_len=4096)
    model = LLaMaTransformer(Architecture.of(config, 16)).to(dtype)
    if plain:
        for module in model.modules():
            if isinstance(module, Linear):
                module.forward = lambda x, module=module: F.linear(x, module.weight, module.bias)  # type: ignore
    segments = bench.rows // SEGMENT
    layout = PackedLayout.causal([SEGMENT] * segments)
    tokens, positions = torch.zeros(layout.rows, dtype=torch.long), torch.arange(SEGMENT).repeat(segments)

    def way() -> None:
        model.hidden(tokens, positions, layout).float().sum().backward()

    return way


def main(bench: Bench) -> None:
    """Measures, prints and appends the section."""
    torch.set_num_threads(bench.threads)
    torch.manual_seed(0)
    ways = {
        "fp32": block_way(bench, torch.float32),
        "bf16": block_way(bench, torch.bfloat16),
        "bf16, torch's own GEMMs": block_way(bench, torch.bfloat16, plain=True),
    }
    device = torch.device("cpu")
    timed = measure.interleaved(ways, bench.rounds, device)
    seconds = measure.medians(timed)
    rows = [[f"{bench.layers} blocks, {bench.rows} rows, width {bench.width}", "ms"]]
    rows += [[name, f"{1e3 * median:.1f}"] for name, median in seconds.items()]
    command = shlex.join(["python", "-m", "benchmarks.bench_block", *sys.argv[1:]])
    body = f"Forward and backward, medians of interleaved rounds.\n\n{measure.table(rows)}\n\n{timed.in_words()}"
    measure.record("Decoder blocks", command, body, device, bench.results)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
