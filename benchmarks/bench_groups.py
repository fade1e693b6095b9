"""Times a whole optimizer step on prompts with many answers: their pairs grouped, against the same pairs one by one.

    python -m benchmarks.bench_groups

A group has a prompt and K answers of HH-RLHF's pairs, and all K (K - 1) / 2 pairs of these answers. Grouped, a segment
has the prompt once and each answer once; one by one, each pair is a segment of its own. A step is everything but
DeepSpeed: packing, forward, backward, clip, AdamW; its micro-batches have about as many packed rows either way.
References come from one store. First of all both must agree on the loss and every gradient.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro

from benchmarks.agreement import Computed, differences, gradients_of
from benchmarks.measure import RESULTS, interleaved, medians, profile_shares, record, table
from benchmarks.ours import PlainTrainer, new_store
from benchmarks.workload import HH_DATA, make_pairs, start_model
from simple_llama.cluster.distributed import Ranks, close_ranks, init_ranks
from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.interop.open_start import open_start
from simple_llama.pretraining.weights import Loaded, build_model
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import deal
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair, common_prefix
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.precompute import computed
from simple_llama.reinforcement_learning.rlhf.run.step import Portion, optimizer_step

TARGET = {4: 3.0}  # times the pairs/s, at least, by answers
MOST = 1e-5  # largest relative difference of the two in fp32
BETA, RATE = 0.1, 1e-7  # a tiny rate keeps the weights as they are


@dataclass(frozen=True)
class BenchGroups:
    """What is measured, on what."""

    # === Work ===
    answers: tuple[int, ...] = (4, 8)  # of a prompt
    shape: Literal["tiny", "36m", "1.3b", "llama-3.2-1b"] = "36m"  # of a model with random weights
    model_path: str = ""  # another model to take the weights from, as training takes it
    mix: Literal["hh", "short", "long", "uf-71-169", "uf-200-300"] = "hh"  # where prompts and answers come from
    data: str = HH_DATA  # HH-RLHF file of the mix hh
    pairs: int = 48  # a step has at least so many
    rows: int = 2048  # about so many packed rows a micro-batch
    dtypes: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    seed: int = 0  # of weights, prompts and answers

    # === Measurement ===
    rounds: int = 7  # rounds after one warm-up; each times a step of every way
    threads: int = 2  # CPU threads
    device: Literal["cpu", "cuda"] = "cpu"  # where all is computed
    results: str = RESULTS  # file to append the outcome to; "": only print


class Unit(NamedTuple):
    """Pairs that are packed side by side, in one segment or as the one that they are."""

    pairs: tuple[TokenizedPair, ...]
    rows: int  # packed


def main(bench: BenchGroups) -> None:
    """Agreement, then the steps of each number of answers, then the record."""
    started = time.perf_counter()
    ranks = init_ranks(bench.device)
    torch.set_num_threads(bench.threads)  # init_ranks takes all cores
    with opened(bench) as start:
        body = measured_body(bench, start, ranks)
    body += f"\n\n{time.perf_counter() - started:.0f} s in all"
    command = shlex.join(["python", "-m", "benchmarks.bench_groups", *sys.argv[1:]])
    record(f"Prompts with many answers, {start.path.name}", command, body, ranks.device, bench.results)
    close_ranks()


def opened(bench: BenchGroups) -> AbstractContextManager[Loaded]:
    """The model."""
    if bench.model_path:
        return open_start(bench.model_path).reading()
    return nullcontext(start_model(bench.shape, "", bench.seed))


def measured_body(bench: BenchGroups, start: Loaded, ranks: Ranks) -> str:
    """All that is recorded of the steps of each number of answers."""
    rows = [["answers", "dtype", "grouped, pairs/s", "one by one, pairs/s", "times", "rows", "scored rows", "packing"]]
    notes = []
    for answers in bench.answers:
        groups = groups_of(bench, answers, start.architecture.vocab_size)
        notes += [lengths(groups, answers), check_agreement(start, groups[:2], ranks.device)]
        print(notes[-1], flush=True)
        for dtype in bench.dtypes:
            row, note = measured(bench, dtype, groups, start, ranks)
            rows.append([str(answers), dtype, *row])
            notes.append(f"Where a grouped step's time goes, {answers} answers, {dtype}: {note}.")
    return f"{setup(bench)}\n\n{table(rows)}\n\n" + "\n\n".join(notes)


def setup(bench: BenchGroups) -> str:
    """What is common to all rows of the table, in words."""
    return (
        f"Steps of at least {bench.pairs} pairs, micro-batches of about {bench.rows:,} packed rows; medians of "
        f"{bench.rounds} interleaved rounds. Rows, scored rows and packing (ms): of the step, grouped and one by one."
    )


def groups_of(bench: BenchGroups, answers: int, vocab: int) -> list[list[TokenizedPair]]:
    """The prompts of a step, each with all pairs of so many answers, the earlier one chosen; a seed gives them again.

    A group has the prompt of one pair of the mix and the answers of `answers` others.
    """
    count = -(-bench.pairs * 2 // (answers * (answers - 1)))
    found = make_pairs(bench.mix, count + max(count, answers), vocab, bench.seed, bench.data)
    rng = np.random.default_rng(bench.seed)
    pool = [answer.tolist() for pair in found[count:] for answer in (pair.chosen, pair.rejected)]

    def group(number: int) -> list[TokenizedPair]:
        prompt = found[number].prefix.tolist()
        drawn = [pool[place] for place in rng.permutation(len(pool))[:answers].tolist()]
        pairs = []
        for chosen, rejected in combinations(drawn, 2):
            pair = TokenizedPair.from_chats(prompt + chosen, len(chosen), prompt + rejected, len(rejected))
            pairs.append(replace(pair, group=number, segment=number, answers=pair.answer_names))
        return pairs

    return [group(number) for number in range(count)]


def one_by_one(groups: Sequence[Sequence[TokenizedPair]]) -> list[TokenizedPair]:
    """The same pairs, each with a segment of its own."""
    return [replace(pair, group=-1, segment=-1) for group in groups for pair in group]


def units_of(groups: Sequence[Sequence[TokenizedPair]]) -> list[Unit]:
    """Each group, with its rows: what all its chats begin with once, each answer once."""
    units = []
    for group in groups:
        shared = common_prefix(group)
        chats = {whole.tobytes(): len(whole) for pair in group for whole in pair.wholes}
        units.append(Unit(tuple(group), shared + sum(length - 1 - shared for length in chats.values())))
    return units


def portions(units: Sequence[Unit], rows: int) -> Iterator[Portion]:
    """The step, in micro-batches of about so many rows, each packed when its turn comes."""
    count = max(1, min(len(units), round(sum(unit.rows for unit in units) / rows)))
    total = sum(len(unit.pairs) for unit in units)
    for place, hand in enumerate(deal([(number, unit.rows) for number, unit in enumerate(units)], count)):
        batch = PairBatch.pack([pair for number in hand for pair in units[number].pairs])
        yield Portion(batch, 1 / total, last=place == count - 1)


def check_agreement(start: Loaded, groups: Sequence[Sequence[TokenizedPair]], device: torch.device) -> str:
    """Says how far the two ways are apart in fp32; where that is more than 1e-5, as rounding in a deep model may be,
    also in fp64. UserError where it is more there too."""
    lines = []
    for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        found = apart(start, groups, dtype, device)
        worst = max(found, key=lambda name: found[name])
        lines.append(
            f"Grouped and one by one in {name} on {sum(map(len, groups))} pairs, relative differences: loss "
            f"{found['loss']:.1e}, log-probs {found['log-probs']:.1e}, at most {found[worst]:.1e} ({worst})."
        )
        if all(value <= MOST for value in found.values()):
            return " ".join(lines)
    raise UserError(f"{' '.join(lines)} Expected at most {MOST:g}: no speed is measured")


def apart(
    start: Loaded, groups: Sequence[Sequence[TokenizedPair]], dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Relative differences of the two ways: log-probs, loss, each parameter's gradient."""
    policy = DPOPolicy(build_model(start, dtype, device), PreferenceLoss("sigmoid", BETA))
    every = [pair for group in groups for pair in group]
    grouped, single = (PairBatch.pack(pairs).to(device) for pairs in (every, one_by_one(groups)))
    noise_B2 = 10 * torch.randn(len(single), 2, generator=torch.Generator().manual_seed(0))
    ref_B2 = pair_logps(policy.model, single) + noise_B2.to(device)  # so that no coefficient is trivial

    def side(batch: PairBatch) -> Computed:
        policy.zero_grad(set_to_none=True)
        out = policy(batch, ref_B2)
        (out.loss / len(batch)).backward()
        return Computed(out.logps_B2.cpu(), out.loss.detach().cpu() / len(batch), gradients_of(policy.model))

    return differences(side(grouped), side(single))


def measured(
    bench: BenchGroups, dtype: str, groups: list[list[TokenizedPair]], start: Loaded, ranks: Ranks
) -> tuple[list[str], str]:
    """A row of the table, and where the time of a grouped step goes."""
    units = {"grouped": units_of(groups), "one by one": [Unit((pair,), pair.rows) for pair in one_by_one(groups)]}
    config = DPOConfig(
        deepspeed_config=root_path("ds_configs", f"zero2_{dtype}.json"), beta=BETA, max_lr=RATE, min_lr=RATE
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = PlainTrainer(start, config, new_store(folder, dtype), ranks)
        fill_store(trainer, units["grouped"])
        ways = {name: stepper(trainer, some, bench.rows, ranks.device) for name, some in units.items()}
        seconds = medians(interleaved(ways, bench.rounds, ranks.device))
        packs = {name: packer(some, bench.rows) for name, some in units.items()}
        packing = medians(interleaved(packs, bench.rounds, ranks.device))
        profile = profile_shares(ways["grouped"], ranks.device, most=6)
    pairs = sum(map(len, groups))
    grouped, single = pairs / seconds["grouped"], pairs / seconds["one by one"]
    rows = {name: sum(unit.rows for unit in some) for name, some in units.items()}
    scored = {name: sum(len(part.batch.rows_N) for part in portions(some, bench.rows)) for name, some in units.items()}
    cells = [f"{grouped:.2f}", f"{single:.2f}", verdict(grouped / single, answers_of(groups))]
    for both in (rows, scored):
        cells.append(f"{both['grouped']:,} of {both['one by one']:,}")
    cells.append(f"{1e3 * packing['grouped']:.1f}, {1e3 * packing['one by one']:.1f} ms")
    return cells, profile


def verdict(times: float, answers: int) -> str:
    """The ratio, beside the target where there is one."""
    target = TARGET.get(answers)
    if target is None:
        return f"{times:.2f}"
    return f"{times:.2f} ({'met' if times >= target else 'NOT met'}: {target:g})"


def answers_of(groups: Sequence[Sequence[TokenizedPair]]) -> int:
    """How many different answers the first prompt has."""
    return len({name for pair in groups[0] for name in pair.answer_names})


def fill_store(trainer: PlainTrainer, units: Sequence[Unit]) -> None:
    """The reference pass over all groups."""
    batches = (PairBatch.pack(unit.pairs) for unit in units)
    with trainer.store.writer(every_pairs=512) as writer:
        for keys, logps_B2 in computed(trainer.model, batches, trainer.ranks.device):
            fresh = trainer.store.missing(keys)
            writer.add(keys[fresh], logps_B2[fresh])


def stepper(trainer: PlainTrainer, units: Sequence[Unit], rows: int, device: torch.device) -> Callable[[], float]:
    """An optimizer step at each call."""
    return lambda: optimizer_step(trainer.learner, portions(units, rows), trainer.ref_logps, RATE, trainer.sums, device)


def packer(units: Sequence[Unit], rows: int) -> Callable[[], int]:
    """Packs the micro-batches of a step at each call."""
    return lambda: sum(len(part.batch) for part in portions(units, rows))


def lengths(groups: Sequence[Sequence[TokenizedPair]], answers: int) -> str:
    """How long prompts and answers are, in words."""
    prompts = [len(group[0].prefix) for group in groups]
    found = {name: n for g in groups for p in g for name, n in zip(p.answer_names, p_counts(p), strict=True)}
    return (
        f"{answers} answers: {len(groups)} prompts of {np.mean(prompts):.0f} tokens on average ({min(prompts)} to "
        f"{max(prompts)}), answers of {np.mean(list(found.values())):.0f} ({min(found.values())} to "
        f"{max(found.values())}), {sum(map(len, groups))} pairs."
    )


def p_counts(pair: TokenizedPair) -> tuple[int, int]:
    """Scored tokens of both answers."""
    return pair.chosen_scored, pair.rejected_scored


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchGroups, description=__doc__))
    except UserError as problem:
        sys.exit(f"error: {problem}")
