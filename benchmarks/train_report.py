"""What the times of bench_train say: tables, ratios, and the targets that were met or not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.measure import Timed, medians, table
from simple_llama.ops.machine import peak_flops

# TRL's best time over ours, by mix
CPU_SPEEDUPS = {"hh": 6.0, "short": 3.0}
CUDA_SPEEDUPS = {"hh": 2.1, "uf-71-169": 1.7, "uf-200-300": 1.7}
MOST_OVERHEAD = 0.10  # of DeepSpeed in a step
LEAST_USEFUL = 0.5  # of the bf16 GEMM rate
LEAST_GAIN = 0.9  # of the gain that FLOPs predict
SAME_DTYPE = {"bf16": "ours bf16", "autocast": "ours bf16", "fp32": "ours fp32"}


@dataclass
class MixResult:
    """Times of one mix. Lists have one entry a round."""

    mix: str
    pairs_per_step: int
    batch_size: int  # pairs a micro-batch of ours
    peer_batch_size: int  # of TRL, and of ours whole and padded
    lengths: tuple[float, float, float]  # mean tokens of prompts, chosen and rejected answers
    seconds: Timed  # of a step, by way
    memory_gib: dict[str, float]  # of a step, beyond what is there before
    flops: dict[str, list[float]]  # of a step that is packed so
    attention: dict[str, str]  # of TRL, by setting: the faster one, and both times
    profile: str = ""  # operations of a step of ours in bf16, by their share of its time
    gemm_flops: dict[torch.dtype, float] = field(default_factory=dict)  # FLOP/s measured in the same run

    @property
    def best_peer(self) -> str:
        """TRL's fastest way; "" where none was measured."""
        times = {name: value for name, value in medians(self.seconds).items() if name.startswith("TRL ")}
        return min(times, key=lambda name: times[name]) if times else ""

    def ratio(self, slow: str, fast: str) -> tuple[float, float]:
        """How many times faster `fast` is: of the medians, and the median of the rounds' own ratios."""
        rounds = [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        middle = medians(self.seconds)
        return middle[slow] / middle[fast], statistics.median(rounds)

    def gain(self, way: str) -> tuple[float, float, float]:
        """Of sharing over a way of packing: measured, predicted by FLOPs, measured / predicted; medians of rounds."""
        pairs = zip(self.seconds[f"ours bf16, {way}"], self.seconds["ours bf16"], strict=True)
        measured = [a / b for a, b in pairs]
        predicted = [a / b for a, b in zip(self.flops[way], self.flops["shared"], strict=True)]
        shares = [a / b for a, b in zip(measured, predicted, strict=True)]
        return statistics.median(measured), statistics.median(predicted), statistics.median(shares)

    def overhead(self) -> float:
        """Share of a step that goes away without DeepSpeed; median of rounds."""
        pairs = zip(self.seconds["ours bf16, plain loop"], self.seconds["ours bf16"], strict=True)
        return statistics.median(1 - plain / whole for plain, whole in pairs)

    def useful_rate(self, way: str) -> float:
        """Useful FLOP/s of a step of ours (a shared prompt once, scored rows only); median of rounds."""
        rates = [flops / seconds for flops, seconds in zip(self.flops["shared"], self.seconds[way], strict=True)]
        return statistics.median(rates)


def body(results: Sequence[MixResult], device: torch.device) -> str:
    """The whole report."""
    parts = []
    for result in results:
        prompt, chosen, rejected = result.lengths
        head = (
            f"{result.mix}: {result.pairs_per_step} pairs a step in micro-batches of {result.batch_size} (TRL, whole "
            f"and padded: {result.peer_batch_size}), mean tokens: prompt {prompt:.0f}, chosen {chosen:.0f}, "
            f"rejected {rejected:.0f}"
        )
        parts += [head, speeds(result), "\n".join(facts(result, device))]
    parts.append("\n".join(targets(results, device)))
    return "\n\n".join(parts)


def speeds(result: MixResult) -> str:
    """A row a way: time, speed, useful FLOP/s, memory, and how many times faster ours in bf16 is."""
    rows = [("way", "s a step", "pairs/s", "useful GFLOP/s", "GiB in a step", "ours bf16 is faster by")]
    for name, seconds in medians(result.seconds).items():
        times, by_round = result.ratio(name, "ours bf16")
        rows.append(
            (
                name,
                f"{seconds:.3f}",
                f"{result.pairs_per_step / seconds:.2f}",
                f"{result.useful_rate(name) / 1e9:.1f}",
                f"{result.memory_gib[name]:.2f}",
                f"{times:.2f} (by round {by_round:.2f})",
            )
        )
    return table(rows)


def facts(result: MixResult, device: torch.device) -> list[str]:
    """Lines of what the times say beside the table."""
    lines = []
    for setting, attention in result.attention.items():
        ours = SAME_DTYPE[setting]
        times, by_round = result.ratio(f"TRL {setting}", ours)
        lines.append(f"- {ours} against TRL {setting}: {times:.2f} (by round {by_round:.2f}); attention {attention}")
    for way in ("whole", "padded"):
        measured, predicted, share = result.gain(way)
        lines.append(f"- gain over {way}: {measured:.2f}, FLOPs predict {predicted:.2f}: {share:.2f} of it")
    rates = ", ".join(
        f"{result.useful_rate('ours bf16') / rate:.2f} of {rate / 1e9:.0f} GFLOP/s in {str(dtype)[6:]}"
        for dtype, rate in result.gemm_flops.items()
    )
    lines.append(f"- useful FLOP/s over the best GEMM of this run: {rates}")
    if device.type == "cuda":
        mfu = result.useful_rate("ours bf16") / peak_flops(device, torch.bfloat16)
        lines.append(f"- MFU {mfu:.3f} of the data sheet's {peak_flops(device, torch.bfloat16) / 1e12:.0f} TFLOP/s")
    lines.append(f"- without DeepSpeed a step is {100 * result.overhead():.1f} % shorter")
    lines.append(f"- a step of ours in bf16 is: {result.profile}")
    lines.append(f"- {result.seconds.in_words()}")
    return lines


def targets(results: Sequence[MixResult], device: torch.device) -> list[str]:
    """What was aimed at, what came out, met or not."""
    lines = []

    def check(what: str, found: float, met: bool, wanted: str) -> None:
        lines.append(f"- {'met' if met else 'NOT met'}: {what} {found:.2f}, target {wanted}")

    for result in results:
        speedup = (CUDA_SPEEDUPS if device.type == "cuda" else CPU_SPEEDUPS).get(result.mix)
        if speedup and result.best_peer:
            times, _ = result.ratio(result.best_peer, "ours bf16")
            check(f"{result.mix}, {result.best_peer} (its best) / ours bf16", times, times >= speedup, f">= {speedup}")
        overhead, useful = result.overhead(), result.useful_rate("ours bf16") / result.gemm_flops[torch.bfloat16]
        check(f"{result.mix}, DeepSpeed's share of a step", overhead, overhead <= MOST_OVERHEAD, f"<= {MOST_OVERHEAD}")
        check(
            f"{result.mix}, useful FLOP/s over the bf16 GEMM rate", useful, useful >= LEAST_USEFUL, f">= {LEAST_USEFUL}"
        )
        share = result.gain("padded")[2]
        check(f"{result.mix}, gain over padding / predicted", share, share >= LEAST_GAIN, f">= {LEAST_GAIN}")
    return lines
