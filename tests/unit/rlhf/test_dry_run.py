"""The report before a run: literal numbers of a tiny job, and that nothing is computed or written for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf import dry_run
from simple_llama.reinforcement_learning.rlhf.data.batch_plan import BatchPlan
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.dry_run import _batch_arithmetic, _checkpoints, describe
from simple_llama.reinforcement_learning.rlhf.foretell.duration import Work
from simple_llama.reinforcement_learning.rlhf.foretell.memory import Moment
from simple_llama.reinforcement_learning.rlhf.foretell.probe import Probed
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize
from simple_llama.reinforcement_learning.rlhf.run import start_warnings
from simple_llama.reinforcement_learning.rlhf.run.start_warnings import saved_bytes
from tiny_hf import make_hf_job
from tiny_job import TinyJob, make_job, write_rankings


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """24 pairs, and one behind them whose two answers are the same."""
    job = make_job(tmp_path_factory.mktemp("job"))
    same = {"Template": ["CUSTOM"], "User": ["hi"], "Accepted": ["the cat"], "Rejected": ["the cat"]}
    with (job.folder / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(same) + "\n")
    return job


@pytest.fixture(scope="module")
def config(job: TinyJob) -> DPOConfig:
    """2 pairs x 4 micro-batches, 2 epochs, fp32, a short system prompt."""
    return DPOConfig(**{**job.settings, "system_prompt": "Be kind."})


@pytest.fixture(scope="module")
def inputs(config: DPOConfig, ranks: Ranks) -> Inputs:
    """What the job reads from disk."""
    return load_inputs(config, ranks)


def sections(report: str) -> dict[str, str]:
    """The report's parts by their titles."""
    parts = report.removeprefix("== ").split("\n\n== ")
    return {part.split(" ==\n", 1)[0]: part.split(" ==\n", 1)[1] for part in parts}


def test_the_report_has_all_parts(config: DPOConfig, inputs: Inputs, ranks: Ranks) -> None:
    """Twelve parts in order; the settings, and the dict that DeepSpeed gets (2 * 4 * 3 = 24), as JSON."""
    found = sections(describe(config, inputs, replace(ranks, world_size=3)))
    assert list(found) == [
        "config",
        "DeepSpeed",
        "data",
        "system prompt",
        "batches",
        "learning rate",
        "loss",
        "memory per rank",
        "time",
        "checkpoints",
        "warnings",
        "first pair (scored tokens in [[ ]])",
    ]
    assert json.loads(found["config"])["system_prompt"] == "Be kind."
    assert found["system prompt"] == "\"CUSTOM\" stands for 'Be kind.'"
    assert json.loads(found["DeepSpeed"])["train_batch_size"] == 24


def test_kept_dropped_and_held_out_pairs(job: TinyJob, config: DPOConfig, inputs: Inputs, ranks: Ranks) -> None:
    """25 records, the last one identical on both sides; what is held out and what is trained on are the 24 others."""
    lines = sections(describe(config, inputs, ranks))["data"].splitlines()
    assert lines[0] == f"kept 24 of 25 pairs (1 identical); first identical: {job.folder}/pairs.jsonl:25"
    held_out = len(inputs.data.validation)
    assert 0 < held_out < 24
    assert lines[1:] == [f"{24 - held_out} pairs train, {held_out} are held out by prompt"]


def test_a_loss_and_what_it_needs(config: DPOConfig, inputs: Inputs, ranks: Ranks) -> None:
    """DPO begins at ln 2; with a likelihood beside it, at what the store says. SimPO misses no reference."""
    told = {name: sections(describe(replace(config, loss_type=name), inputs, ranks)) for name in ("sigmoid", "simpo")}
    assert told["sigmoid"]["loss"].endswith("at the start 0.693147")
    assert (
        told["simpo"]["loss"] == "simpo (beta 2.0, gamma 1.0, nll_weight 0.0); reads no reference: no store is opened"
    )
    assert "reference store lacks" in told["sigmoid"]["warnings"]
    assert "reference" not in told["simpo"]["warnings"] + told["simpo"]["time"]


def test_weights_and_gaps_are_told(config: DPOConfig, ranks: Ranks, tmp_path: Path) -> None:
    """24 weights of 3, the held-out ones too: the first loss is 3 ln 2. One record has no gap: rpo_gap is refused."""
    rows = [json.loads(line) for line in Path(config.rlhf_dataset_path).read_text().splitlines()[:24]]
    rows = [{**row, "weight": 3, **({"gap": 1.5} if n else {})} for n, row in enumerate(rows)]
    (tmp_path / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, rlhf_dataset_path=str(tmp_path / "weighted.jsonl"))
    inputs = load_inputs(config, ranks)
    found = sections(describe(config, inputs, ranks))
    assert "; weights from 3 to 3, mean 3; gaps from 1.5 to 1.5, mean 1.5 (pairs: 23)" in found["data"]
    assert found["loss"].endswith("at the start 2.079442, 0.693147 times the mean weight of the held-out pairs, 3")
    with pytest.raises(
        UserError, match=r"under 'gap' in every record, found none in 1 of 24 \(first: .*weighted.jsonl:1\)"
    ):
        describe(replace(config, loss_type="rpo_gap"), inputs, ranks)


def test_prompts_with_many_answers(
    config: DPOConfig, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps count prompts; the mean over them begins at ln 2, as that over pairs does; time is of what is packed."""
    works: list[Work] = []
    monkeypatch.setattr(dry_run.duration, "told", lambda work, *_: works.append(work) or "")
    write_rankings(tmp_path / "ranked.jsonl", range(24))
    ranked = replace(config, rlhf_dataset_path=str(tmp_path / "ranked.jsonl"), group_weight="prompt")
    inputs = load_inputs(ranked, ranks)
    found = sections(describe(ranked, inputs, ranks))
    assert found["loss"].endswith("at the start 0.693147")
    assert "prompts a micro-batch" in found["batches"] and " pairs of " in found["batches"]
    every, held_out = (len(PairBatch.pack(list(some)).tokens_T) for some in (inputs.data.pairs, inputs.data.validation))
    assert [(work.missing_rows, work.held_out_rows) for work in works] == [(every, held_out)]


def test_saves_and_their_bytes_by_hand(config: DPOConfig, inputs: Inputs) -> None:
    """2**30 weights, a quarter of them trained: 4 GiB a .pth, 12 / 4 = 3 GiB a state. 2 epochs of 100 steps with a save
    every 30: 30, 60, 90, 120, 150 and 180, and 100 and 200; of the 6 between, 3 stay where keep_exports says so,
    and the best one."""
    changed = replace(config, save_interval=30, keep_states=4)

    def lines(config: DPOConfig) -> list[str]:
        return _checkpoints(saved_bytes(config, 200, 100, 2**30, 2**28, inputs.start), inputs).splitlines()

    assert lines(changed) == [
        "8 saves: 2 at epochs' ends, 6 between (save_interval)",
        "8 .pth files stay (keep_exports), 4.000 GiB each, 32.000 GiB",
        "4 states stay (keep_states), 3.000 GiB each, 12.000 GiB; one more in a save",
    ]
    assert lines(replace(changed, keep_exports=3))[1] == "6 .pth files stay (keep_exports), 4.000 GiB each, 24.000 GiB"


def test_a_tied_model_with_grouped_keys_by_hand(ranks: Ranks, tmp_path: Path) -> None:
    """A layer: q 32 x 32, k and v 16 x 32, out 32 x 32, three matrices 48 x 32: 7,680; two layers, 300 x 32 embeddings
    that are the head, 5 norms of 32: 25,120 weights, all trained."""
    job = make_hf_job(tmp_path)
    config = DPOConfig(**job.settings)  # type: ignore[arg-type]
    inputs = load_inputs(config, ranks)
    counted = dry_run._Job(config, inputs, ranks)
    assert (counted.size, counted.trained) == (ModelSize(15_360, 9_600, 160), 25_120)
    found = sections(describe(config, inputs, replace(ranks, world_size=2)))
    assert found["memory per rank"].splitlines()[-1].startswith("25,120 weights; ")
    assert found["checkpoints"].splitlines()[1].startswith("2 Hugging Face folders stay (keep_exports), 0.000 GiB")


def test_batch_arithmetic_by_hand(config: DPOConfig) -> None:
    """21 pairs of prefix 3, branches of 2 and 3 tokens, on 2 ranks.

    A step has 2 * 4 * 2 = 16 pairs; 21 pairs are a step of 16 and one of 5; two epochs are 4 steps. A pair has
    3 + 1 + 2 = 6 packed rows, 126 in all, and 5 + 6 = 11 tokens as whole chats, 231 in all; 231 / 126 = 1.83.
    """
    pairs = PairSet.of([TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 6, 7, 8], 3)] * 21)
    plan = BatchPlan(pairs.rows, 0, 2, config.batch_size, config.grad_accum_steps)
    assert _batch_arithmetic(config, plan, pairs) == (
        "2 pairs a micro-batch x 4 micro-batches x 2 ranks = 16 pairs an optimizer step\n"
        "21 pairs = 2 steps an epoch (the last has 5 pairs); 2 epochs = 4 steps; warm-up over 2\n"
        "126 packed tokens an epoch; both chats whole would be 231 (1.83 times as many)"
    )
    by_rows = _batch_arithmetic(config, replace(plan, most_rows=40), pairs).splitlines()
    assert by_rows[0] == (
        "8 pairs x 2 ranks = 16 pairs an optimizer step, in micro-batches of at most 40 rows, or those of the longest"
    )


def test_a_full_last_step_is_said_so(config: DPOConfig) -> None:
    """16 pairs in steps of 8: two steps, the last has 8."""
    pairs = PairSet.of([TokenizedPair.from_chats([1, 2], 1, [1, 3], 1)] * 16)
    plan = BatchPlan(pairs.rows, 0, 1, config.batch_size, config.grad_accum_steps)
    assert "16 pairs = 2 steps an epoch (the last has 8 pairs); 2 epochs = 4 steps" in _batch_arithmetic(
        config, plan, pairs
    )


def test_memory_lines(config: DPOConfig, inputs: Inputs, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two moments of 6 and 6.5 GiB: the fuller one with its parts. The weights are counted by hand.

    Width 32, 2 layers, vocabulary 300: embeddings and vocabulary matrix 9,600 each, layers 2 * 13,312, 5 norms of 32:
    45,984. The largest micro-batch is that of most rows.
    """
    asked: list[Any] = []

    def estimate(*args: Any) -> list[Moment]:
        asked.append(args)
        return [Moment("start", {"all": 6 * 2**30}), Moment("passes", {"a": 2**30, "none": 0, "b": 11 * 2**29})]

    monkeypatch.setattr(dry_run, "moments", estimate)
    lines = sections(describe(config, inputs, replace(ranks, world_size=2)))["memory per rank"].splitlines()
    assert lines[:3] == [
        "a                         1.000 GiB",
        "b                         5.500 GiB",
        "sum                       6.500 GiB (estimate by arithmetic, at the fullest moment: passes; others: "
        "start 6.000; --probe measures it)",
    ]
    model, engine, batch, _ = asked[-1]
    assert (sum(model.size), model.trained, model.dtype.itemsize) == (45_984, 45_984, 4)
    assert (engine.world_size, engine.stage, engine.accumulates, engine.recompute) == (2, 2, True, False)
    assert lines[3:] == [
        f"45,984 weights; largest micro-batch {len(batch.tokens_T)} rows, {len(batch.targets_N)} scored"
    ]
    plan = BatchPlan(inputs.data.train.rows, config.seed, 2, 2, 4)
    steps = [plan.step(index) for index in range(plan.steps_per_epoch)]
    rows = [sum(plan.rows[i] for i in micro) for step in steps for rank in step for micro in rank]
    assert len(batch.tokens_T) == max(rows) > min(rows)


def test_the_largest_batch_for_a_memory(
    config: DPOConfig, inputs: Inputs, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that takes 1 GiB and a quarter for each pair: 8 fit in 3 GiB and leave nothing, all of a rank in 100, none
    in 1.2. A probe that finds twice that has the batch lowered until it is at most 3 GiB: 2 * (1 + 2 / 4) = 3."""
    sizes: list[int] = []
    monkeypatch.setattr(dry_run._Job, "moments", lambda _, size, base: [Moment("all", {"all": 2**30 + size * 2**28})])

    def words(fit_gb: float, probe: bool = False, **changes: int) -> str:
        changed = replace(config, fit_gb=fit_gb, dry_run=True, probe=probe, **changes)
        [line] = [one for one in describe(changed, inputs, ranks).splitlines() if one.startswith(f"in {fit_gb:g} GiB")]
        return line

    assert "in 3 GiB fits batch_size 8: it takes 3.000 GiB (estimate) and leaves 0.000 GiB" in words(3)
    assert f"fits batch_size {len(inputs.data.train)}, which are all pairs of a rank" in words(100)
    assert words(1.2) == "in 1.2 GiB not even batch_size 1 fits: it takes 1.250 GiB (estimate)"
    assert "fits rows_per_micro_batch 8: it takes 3.000 GiB" in words(3, rows_per_micro_batch=64)
    assert "which are all rows of a rank's step" in words(1e6, rows_per_micro_batch=64)

    def measured(config: DPOConfig, *_: object) -> list[Probed]:
        sizes.append(config.batch_size)
        return [Probed(0, 2 * (2**30 + config.batch_size * 2**28), 0, 0.0, 0.0, 0.0, 0.0)]

    monkeypatch.setattr(dry_run, "probe", measured)
    assert "fits batch_size 2: it takes 3.000 GiB (probe) and leaves 0.000 GiB" in words(3, probe=True)
    assert sizes == [8, 2]


def test_warnings_are_those_of_the_run(
    job: TinyJob, config: DPOConfig, inputs: Inputs, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few held out (the data's own), a warm-up as long as the run, no room on the disk, and all pairs that the store
    lacks, which are all."""
    monkeypatch.setattr(start_warnings, "_free_bytes", lambda folder: 0)
    lines = sections(describe(replace(config, warmup_iterations=8), inputs, ranks))["warnings"].splitlines()
    assert lines[0] == inputs.data.warnings[0] and "pairs held out" in lines[0]
    assert lines[1] == (  # 1/8 + ... + 6/8 = 21/8 of 1e-3; a warm-up of one step and a cosine over five: 3.3e-3
        "warmup_iterations is 8, but the run has 6 steps: max_lr is never reached, the largest rate is 0.00075 and not "
        "0.001. All rates together, about what Adam can change a weight by, are 0.0026; with warmup_ratio 0.1 in its "
        "place they would be 0.0033"
    )
    assert lines[2].startswith(f"{job.folder}/checkpoints: the checkpoints take up to 0.002 GiB, 0.000 GiB are free")
    assert "the reference store lacks 24 of 24 pairs" in lines[3] and len(lines) == 4
    monkeypatch.setattr(inputs.data, "largest_prompt_share", 0.5)
    lines = sections(describe(replace(config, max_lr=1e-12, min_lr=1e-12), inputs, ranks))["warnings"].splitlines()
    assert lines[-2].startswith("notice: one prompt has 50% of the 24 pairs")
    assert lines[-1].startswith("alarm: the rate is too small to move the weights: all 6 steps")


def test_the_first_pair_is_shown_with_its_scored_tokens(config: DPOConfig, inputs: Inputs, ranks: Ranks) -> None:
    """[[ ]] stand around each answer and its <EOA>, and nowhere else. (Each text begins with the tokenizer's space.)"""
    tokenized = inputs.data.train[0]
    [pair] = inputs.data.conversations(inputs.data.train[:1])
    prompt = f"<SOT> Be kind.<EOT> \n\n<SOU> {pair.users[0]}<EOU> \n<SOA>"
    assert sections(describe(config, inputs, ranks))["first pair (scored tokens in [[ ]])"] == (
        f"chosen ({tokenized.chosen_len} tokens, {tokenized.chosen_scored} scored): "
        f"{prompt}[[ {pair.chosen[0]}<EOA>]]\n"
        f"rejected ({tokenized.rejected_len} tokens, {tokenized.rejected_scored} scored): "
        f"{prompt}[[ {pair.rejected[0]}<EOA>]]"
    )


def test_it_writes_nothing_and_computes_on_meta_only(
    job: TinyJob, config: DPOConfig, inputs: Inputs, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file appears or changes; the one model made has no memory, is never called, and none is read from disk."""
    devices: set[str] = set()
    count = dry_run.model_size

    def watched(model: LLaMaTransformer) -> Any:
        devices.update(parameter.device.type for parameter in model.parameters())
        return count(model)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("without a probe a dry run computes nothing with the model")

    monkeypatch.setattr(dry_run, "model_size", watched)
    monkeypatch.setattr(LLaMaTransformer, "hidden", refuse)
    monkeypatch.setattr(Inputs, "build_model", refuse)
    before = snapshot(job.folder)
    describe(config, inputs, replace(ranks, world_size=2))
    assert devices == {"meta"}
    assert snapshot(job.folder) == before and before.keys() == {"pairs.jsonl", "start.pth", "tokenizer.json"}


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files below a folder with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
