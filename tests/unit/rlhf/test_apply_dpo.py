"""Whole runs in one process on a tiny job: step-0 facts, learning, records, resume, and stops."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from simple_llama.cluster import stopping
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.pretraining.weights import load_weights
from simple_llama.reinforcement_learning.rlhf.apply_dpo import precompute_and_train, train
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import newest_state
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective import policy
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import Asked
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from simple_llama.reinforcement_learning.rlhf.reference import ref_source
from simple_llama.reinforcement_learning.rlhf.run import step, training_run
from simple_llama.reinforcement_learning.rlhf.run.evaluate import evaluate
from simple_llama.reinforcement_learning.rlhf.run.statistics import effective_count, preferred
from simple_llama.reinforcement_learning.rlhf.run.step import NotFinite, optimizer_step
from simple_llama.reinforcement_learning.rlhf.run.training_run import TrainingRun
from tiny_job import TinyJob, make_job, write_pairs, write_rankings

SAVES = {"save_interval": 2, "keep_states": 9}


@pytest.fixture
def job(tmp_path) -> TinyJob:
    return make_job(tmp_path)


def run_job(job: TinyJob, ranks: Ranks, **settings):
    """Precompute and train with the job's settings, changed by `settings`; gives the exported path."""
    config = DPOConfig(**{**job.settings, **settings})
    inputs = load_inputs(config, ranks)
    precompute(config, inputs, ranks)
    return train(config, inputs, ranks)


@pytest.fixture(scope="module")
def done(tmp_path_factory, ranks) -> TinyJob:
    """A job whose run `tiny` is done, with a state and an export of steps 2, 4 and 6; tests leave that run as it is."""
    job = make_job(tmp_path_factory.mktemp("done"))
    run_job(job, ranks, **SAVES)
    return job


def copied_run(job: TinyJob, name: str) -> Path:
    """A copy of the run `tiny` under another name; gives its checkpoints' folder."""
    shutil.copytree(job.folder / "runs" / "tiny", job.folder / "runs" / name)
    return Path(shutil.copytree(job.folder / "checkpoints" / "tiny", job.folder / "checkpoints" / name))


def exported(job: TinyJob) -> Path:
    """The export of the end of the run `tiny`."""
    return Path(json.loads((job.folder / "runs" / "tiny" / "finished.json").read_text())["weights"])


def test_whole_run_starts_at_ln_2_learns_and_leaves_its_records(done):
    """fp32: margin 0 and loss ln 2 to 1e-6 at step 0; the training loss falls; one line a step; all files there."""
    job, path = done, exported(done)
    first = job.lines()[0]
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_rewards/accuracies"] == 0.5 and first["eval_rewards/margins"] == 0
    losses = job.curve("loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0] - 0.01
    assert [line["step"] for line in job.lines() if "loss" in line] == [1, 2, 3, 4, 5, 6]
    for line in job.lines():
        if "loss" in line:
            assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)
            assert line["logps/chosen"] < 0 and line["logps/rejected"] < 0 and 0 < line["perf/mfu"] < 1.5
    warnings = [json.loads(line) for line in (job.folder / "runs" / "tiny" / "warnings.jsonl").read_text().splitlines()]
    assert (3, "held_out_small") in [(line["step"], line["name"]) for line in warnings]  # whatever 3 pairs say
    names = {file.name for file in (job.folder / "runs" / "tiny").iterdir()}
    assert {"config.json", "ds_config.json", "environment.json", "metrics.jsonl", "samples.jsonl", "train.log"} <= names
    found = load_weights(path)
    assert found.metadata["step"] == 6 and found.metadata["dpo_config"]["beta"] == 0.5
    assert found.state_dict.keys() == load_weights(job.folder / "start.pth").state_dict.keys()
    assert path.name.startswith("dpo_2E_") and path.name.endswith("L_512MSQ.pth")


def test_a_run_ends_with_a_report_and_says_where(done, ranks):
    """finished.json has the final metrics, the page and the time; the log's last line names the page and how to talk to
    the result. A page that cannot be written is said, and the run is done all the same."""
    job, path = done, exported(done)
    folder = job.folder / "runs" / "tiny"
    finished = json.loads((folder / "finished.json").read_text())
    assert (
        finished["metrics"].items()
        >= {name: job.curve(name)[-1] for name in ("loss", "eval_loss", "grad_norm")}.items()
    )
    assert (finished["step"], finished["weights"]) == (6, str(path)) and finished["seconds"] > 0
    assert finished["report"] == str(folder / "report.html")
    assert "Held-out accuracy" in (folder / "report.html").read_text()
    texts = json.loads((folder / "report.json").read_text())["pairs"].values()  # of the pairs at both ends
    records = [json.loads(line) for line in (job.folder / "pairs.jsonl").read_text().splitlines()]
    said = {(record["Accepted"][0], record["Rejected"][0]) for record in records}
    assert len(texts) == 2 and {(text["chosen"], text["rejected"]) for text in texts} <= said
    assert all("say " in text["prompt"] and text["chosen"] not in text["prompt"] for text in texts)
    last = (folder / "train.log").read_text().splitlines()[-1]
    assert f"report: {folder / 'report.html'}; to talk to the result: python launch/chat.py --model_path {path}" in last
    (folder.parent / "again" / "report.html").mkdir(parents=True)
    run_job(job, ranks, run_name="again", epochs=1, n_samples=0, eval_interval=0)
    finished = json.loads((folder.parent / "again" / "finished.json").read_text())
    assert finished["report"] is None and finished["metrics"]["loss"] == job.curve("loss", "again")[-1]


def run_weighted(job, ranks, name, fields, **settings):
    """A run on the job's pairs with more keys in each record: `fields` of its number."""
    rows = [json.loads(line) for line in (job.folder / "pairs.jsonl").read_text().splitlines()]
    path = job.folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({**row, **fields(n)}) + "\n" for n, row in enumerate(rows)))
    return run_job(job, ranks, run_name=name, rlhf_dataset_path=str(path), epochs=1, n_samples=0, **settings)


def test_weights_of_a_run(job, ranks, caplog):
    """Weights of 1 and 3: first losses are ln 2 times their mean, which the curves tell; the store of the unweighted
    run serves. With weights of 2 throughout the first gradient is twice that without. Another weight is another data
    set to a resumed run."""
    run_job(job, ranks, epochs=1, n_samples=0)
    assert not any("pair_weight" in name for line in job.lines() for name in line)
    caplog.clear()
    run_weighted(job, ranks, "mixed", lambda n: {"weight": 3} if n % 2 else {})
    assert "24 of 24 pairs are there" in caplog.text
    for prefix in ("", "eval_"):
        weight = job.curve(f"{prefix}pair_weight", "mixed")[0]
        assert 1 < weight < 3
        assert job.curve(f"{prefix}loss", "mixed")[0] == pytest.approx(math.log(2) * weight, abs=1e-6)
    assert "step-0 held-out loss" in caplog.text
    run_weighted(job, ranks, "twice", lambda n: {"weight": 2})
    assert job.curve("pair_weight", "twice") == [2.0] * 3
    assert job.curve("grad_norm", "twice")[0] == pytest.approx(2 * job.curve("grad_norm")[0], rel=1e-5)
    with pytest.raises(UserError, match="cannot resume: data was"):
        run_weighted(job, ranks, "twice", lambda n: {"weight": 2 + n}, resume=True)


def test_gaps_of_a_run(job, ranks, caplog):
    """Without gaps refused. Gaps of 0 are met by log-ratios of 0: the first loss is 0 and
    the first gradient nearly none. Gaps of 2: the first held-out loss is what log-ratios of 0 give."""
    with pytest.raises(UserError, match="under 'gap' in every record, found none in 24 of 24"):
        run_job(job, ranks, loss_type="rpo_gap")
    run_weighted(job, ranks, "met", lambda n: {"gap": 0}, loss_type="rpo_gap")
    assert job.curve("eval_loss", "met")[0] == pytest.approx(0, abs=1e-6) and job.curve("grad_norm", "met")[0] < 1e-4
    run_weighted(job, ranks, "asked", lambda n: {"gap": 2}, loss_type="rpo_gap")
    s = 1 / (1 + math.exp(-2))
    expected = s * math.log(2 * s) + (1 - s) * math.log(2 * (1 - s))
    assert job.curve("eval_loss", "asked")[0] == pytest.approx(expected, abs=1e-6)
    assert f"expected {expected:.6f}" in caplog.text


def test_a_run_that_reads_sums_over_the_common_length(job, ranks, caplog):
    """LD-DPO on a store that DPO filled: the pass adds those sums, and keeps the others; it begins at ln 2. Another
    alpha needs no pass; with the model in memory the curve is the same."""
    caplog.set_level("INFO", "simple_llama")
    few, plain = {"epochs": 1, "n_samples": 0}, DPOConfig(**job.settings)
    inputs = load_inputs(plain, ranks)
    precompute(plain, inputs, ranks)
    store, keys = ref_source.open_store(plain.ref_cache_dir, inputs.reference_id, ranks), inputs.data.pairs.keys
    before = store.content_digest(keys)
    caplog.clear()
    run_job(job, ranks, run_name="ld", ld_alpha=0.5, **few)
    same = sum(pair.chosen_scored == pair.rejected_scored for pair in inputs.data.pairs)
    assert 0 < same < 24 and f"{same} of 24 pairs are there with their sums over the common length" in caplog.text
    assert f"computed {24 - same} pairs" in caplog.text
    again = ref_source.open_store(plain.ref_cache_dir, inputs.reference_id, ranks)
    assert again.content_digest(keys) == before and not len(again.missing(inputs.data.pairs.entries(True).keys))
    assert job.curve("eval_loss", "ld")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert job.curve("loss", "ld")[0] == pytest.approx(math.log(2), abs=1e-5)
    caplog.clear()
    run_job(job, ranks, run_name="zero", ld_alpha=0.0, **few)
    assert "24 of 24 pairs are there with" in caplog.text and "computed" not in caplog.text
    run_job(job, ranks, run_name="online", ld_alpha=0.5, reference="online", **few)
    assert job.curve("loss", "online") == pytest.approx(job.curve("loss", "ld"), abs=1e-6)
    assert abs(job.curve("loss", "ld")[2] - job.curve("loss", "zero")[2]) > 1e-5


def test_a_run_whose_pairs_are_weighted_by_the_policy(job, ranks):
    """WPO: at the start ln 2 times weights that are of the policy, so that no constant is foretold."""
    run_job(job, ranks, weighting="wpo", epochs=1, n_samples=0)
    inputs = load_inputs(DPOConfig(**job.settings), ranks)
    batch = PairBatch.pack(list(inputs.data.validation))
    sums_B6 = pair_logps(inputs.build_reference("cpu"), batch, Asked(squares=True))
    weights_B = ((sums_B6[:, :2] - sums_B6[:, 4:]) / batch.counts_B2).sum(1).exp()
    assert job.curve("eval_loss")[0] == pytest.approx(math.log(2) * weights_B.mean().item(), rel=1e-5)
    assert job.curve("eval_rewards/margins")[0] == 0
    assert abs(job.curve("loss")[0] - math.log(2)) > 1e-3


def test_reference_in_memory_equals_the_store(done, ranks):
    """reference=online: the frozen model's numbers, so the same losses and weights."""
    run_job(done, ranks, reference="online", run_name="online")
    assert done.curve("loss", "online") == pytest.approx(done.curve("loss"), abs=1e-6)
    for name, tensor in done.weights("online").items():
        torch.testing.assert_close(tensor, done.weights()[name], atol=2e-6, rtol=0)


def test_micro_batches_do_not_change_the_step(done, ranks):
    """8 pairs a step as 4 x 2, 2 x 4, 1 x 8, and as many as have 60 rows: same losses to 1e-5, same gradient norms to
    1e-4, same held-out losses to 1e-5."""
    for batch, accum, rows in ((4, 2, 0), (8, 1, 0), (8, 1, 60)):
        name = f"b{batch}-{rows}"
        sizes = {"batch_size": batch, "grad_accum_steps": accum, "rows_per_micro_batch": rows}
        run_job(done, ranks, run_name=name, **sizes)
        assert done.curve("eval_loss", name) == pytest.approx(done.curve("eval_loss"), abs=1e-5)
        assert done.curve("loss", name) == pytest.approx(done.curve("loss"), abs=1e-5)
        assert done.curve("grad_norm", name) == pytest.approx(done.curve("grad_norm"), rel=1e-4)


def test_resume_in_the_middle_of_an_epoch_is_exact(done, ranks):
    """Saved after step 2 of 3 in epoch 1: a run taken up there has the same curve and, bit for bit, weights. Its
    warnings of steps that are made anew go."""
    for state in (copied_run(done, "middle") / "state").iterdir():
        if state.name != "step_00000002":
            shutil.rmtree(state)
    warnings = done.folder / "runs" / "middle" / "warnings.jsonl"
    lines = [json.dumps({"step": step, "level": "notice", "name": f"of {step}", "text": ""}) for step in (1, 3)]
    warnings.write_text("".join(line + "\n" for line in lines))
    run_job(done, ranks, run_name="middle", resume=True, **SAVES)
    assert '"of 1"' in warnings.read_text() and '"of 3"' not in warnings.read_text()
    assert done.curve("loss", "middle") == done.curve("loss")
    assert done.curve("eval_loss", "middle") == done.curve("eval_loss")
    assert [line["step"] for line in done.lines("middle")] == [line["step"] for line in done.lines()]
    for name, tensor in done.weights("middle").items():
        assert torch.equal(tensor, done.weights()[name]), name


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_stop_in_an_evaluation_is_made_good(job, done, ranks, monkeypatch, stop_at):
    """Stopped in the evaluation of step 0, of step 2 (where a checkpoint is due too) or of step 3 (an epoch's end): the
    resumed run makes it, and has the curve, samples and weights of a run never stopped. Killed before its next save
    and resumed once more, it still has every line once."""
    calls = []

    def evaluate_asked_to_stop(*args):
        calls.append(1)
        if len(calls) == stop_at:
            stopping.request("SIGTERM")
        return evaluate(*args)

    monkeypatch.setattr(training_run, "evaluate", evaluate_asked_to_stop)
    with pytest.raises(stopping.Stopped):
        run_job(job, ranks, save_interval=2)
    stopping.install()
    stopping.uninstall()
    folder, logs = job.folder / "checkpoints" / "tiny", job.folder / "runs" / "tiny"
    facts = newest_state(folder).facts
    assert facts.unfinished and facts.step == (0, 2, 3)[stop_at - 1] and not (folder / "lock").exists()
    shutil.copytree(folder, job.folder / "as stopped")
    for _ in range(2):
        run_job(job, ranks, save_interval=2, resume=True)
        lines = [{name: value for name, value in line.items() if "perf/" not in name} for line in job.lines()]
        whole = [{name: value for name, value in line.items() if "perf/" not in name} for line in done.lines()]
        assert lines == whole
        assert (logs / "samples.jsonl").read_text() == (done.folder / "runs" / "tiny" / "samples.jsonl").read_text()
        assert all(torch.equal(tensor, done.weights()[name]) for name, tensor in job.weights().items())
        assert not newest_state(folder).facts.unfinished
        assert {path.name for path in folder.glob("*.pth")} == {
            path.name for path in (done.folder / "checkpoints" / "tiny").glob("*.pth")
        }
        shutil.rmtree(folder)
        shutil.copytree(job.folder / "as stopped", folder)


def test_resume_refuses_another_reference_and_other_settings(done, ranks, tmp_path):
    """A trained policy must not become the reference: resuming with the exported model as start is refused."""
    with pytest.raises(UserError, match="cannot resume: reference"):
        run_job(done, ranks, resume=True, model_path=str(exported(done)), ref_cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="cannot resume: beta was 0.5, is now 0.1"):
        run_job(done, ranks, resume=True, beta=0.1)
    write_pairs(tmp_path / "pairs.jsonl", range(25))
    with pytest.raises(UserError, match="cannot resume: data"):
        run_job(done, ranks, resume=True, rlhf_dataset_path=str(tmp_path / "pairs.jsonl"))


def test_a_run_from_before_ascii_text_goes_on_with_its_tokens(job, ranks):
    """A tokenizer without the bytes of an apostrophe, which stands in every prompt: the run's config.json knows of no
    such setting, and its data are found unchanged. Spelled in ASCII they are others."""
    path = job.folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    known = {token: number for token, number in saved["model"]["vocab"].items() if token not in ("\u00e2", "\u0122")}
    path.write_text(json.dumps({**saved, "model": {**saved["model"], "vocab": known}}))
    pairs = job.folder / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace('"User": ["', '"User": ["it\u2019s '))
    before = load_inputs(DPOConfig(**{**job.settings, "ascii_text": False}), ranks)
    folder = job.folder / "checkpoints" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(job.settings))
    again = [f"--ckpt_dir={folder.parent}", "--run_name=tiny", "--resume"]
    now, spelled = (load_inputs(parse_config([*again, *flags]), ranks) for flags in ([], ["--ascii_text"]))
    assert now.data_digest == before.data_digest != spelled.data_digest
    assert "became <UNK>" in now.data.report and "in ASCII (pairs: 24" in spelled.data.report


def test_another_model_is_refused_before_its_log_probs_are_asked_for(done, ranks):
    """No store of the exported model is there; who is told to fill one would compute the wrong model's."""
    config = DPOConfig(**{**done.settings, "resume": True, "model_path": str(exported(done))})
    with pytest.raises(UserError, match="cannot resume: reference was"):
        train(config, load_inputs(config, ranks), ranks)


def test_damaged_state_is_passed_over(done, ranks, caplog):
    """One byte of the newest state flipped: the one before is used, and the damage is named."""
    newest = copied_run(done, "damaged") / "state" / "step_00000006" / "rank_00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    run_job(done, ranks, run_name="damaged", resume=True, **SAVES)
    assert "step_00000006 is not used: rank_00000.safetensors is damaged" in caplog.text
    assert all(torch.equal(tensor, done.weights()[name]) for name, tensor in done.weights("damaged").items())


def test_a_run_of_the_same_name_is_not_overwritten(done, ranks):
    with pytest.raises(UserError, match="--resume to continue it, or another --run_name"):
        run_job(done, ranks)


def test_only_the_newest_states_are_kept(job, ranks):
    run_job(job, ranks, save_interval=1, keep_states=2)
    states = sorted(path.name for path in (job.folder / "checkpoints" / "tiny" / "state").iterdir())
    assert states == ["step_00000005", "step_00000006"]
    assert (job.folder / "checkpoints" / "tiny" / "latest").read_text() == "step_00000006\n"


def test_not_a_number_stops_before_the_weights_change(job, ranks):
    """A NaN weight makes every loss NaN: the step and the pairs are named, nothing is saved."""
    config = DPOConfig(**job.settings)
    inputs = load_inputs(config, ranks)
    precompute(config, inputs, ranks)
    run = TrainingRun(config, inputs, ranks, "stopped", lambda: None)
    run.check_start()
    run.engine.model.norm.weight.data[0] = math.nan
    message = r"step 4: the loss of 8 pairs is not finite: .*pairs\.jsonl:\d+.* no chec"
    with pytest.raises(NotFinite, match=message), run.naming_pairs(3):
        optimizer_step(run.engine, run.portions(3), run.reference.logps, 1e-3, run.interval.sums, ranks.device)
    run.writer.close()
    assert not list((job.folder / "checkpoints").glob("tiny/*"))


def test_audit_stops_a_store_of_another_model(job, ranks):
    """A store whose numbers are off (as by a model of the same name): the audit says so before step 1."""
    config = DPOConfig(**job.settings)
    inputs = load_inputs(config, ranks)
    precompute(config, inputs, ranks)
    run = TrainingRun(config, inputs, ranks, "stopped", lambda: None)
    honest = run.reference.logps
    run.reference = replace(run.reference, logps=lambda batch: honest(batch) - 0.1)
    with pytest.raises(UserError, match=r"step-0 audit: 24 of 24 pairs drawn .*pairs\.jsonl:\d+ \(chosen -"):
        run.check_start()
    run.writer.close()


def test_missing_pairs_are_named_with_the_command(job, ranks):
    config = DPOConfig(**job.settings)
    with pytest.raises(UserError, match="precompute_ref"):
        train(config, load_inputs(config, ranks), ranks)


def test_second_pass_computes_nothing_and_new_pairs_only(job, ranks):
    """24 pairs, then none, then 10 more."""
    config = DPOConfig(**job.settings)
    assert precompute(config, load_inputs(config, ranks), ranks) == 24
    assert precompute(config, load_inputs(config, ranks), ranks) == 0
    write_pairs(job.folder / "pairs.jsonl", range(34))
    assert precompute(config, load_inputs(config, ranks), ranks) == 10


def test_settings_of_a_sweep_share_one_store(job, ranks):
    """lr, seed, epochs, batch size, paths and run name do not enter the reference's name."""
    config = DPOConfig(**job.settings)
    precompute(config, load_inputs(config, ranks), ranks)
    moved = job.folder / "elsewhere.pth"
    shutil.copy(job.folder / "start.pth", moved)
    changes = {"max_lr": 2e-3, "seed": 1, "epochs": 9, "batch_size": 5, "run_name": "x", "model_path": str(moved)}
    other = DPOConfig(**{**job.settings, **changes})
    assert precompute(other, load_inputs(other, ranks), ranks) == 0


def test_swapped_labels_drive_the_margin_the_other_way(tmp_path, ranks):
    """The same pairs with the sides swapped: what was the chosen answer loses against what was rejected."""
    job = make_job(tmp_path / "swapped")
    path = job.folder / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["Accepted"], row["Rejected"] = row["Rejected"], row["Accepted"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    straight = make_job(tmp_path / "straight")
    for one in (straight, job):
        run_job(one, ranks, val_share=0.0, epochs=4)
    assert straight.curve("rewards/margins")[-1] > 0.05 and job.curve("rewards/margins")[-1] > 0.05
    a, b = (torch.cat([t.flatten() for t in one.weights().values()]) for one in (straight, job))
    start = torch.cat([t.flatten() for t in load_weights(straight.folder / "start.pth").state_dict.values()])
    assert torch.cosine_similarity(a - start, b - start, dim=0) < -0.2


def test_eight_pairs_are_learnt_by_heart(tmp_path, ranks):
    job = make_job(tmp_path, pairs=8)
    run_job(job, ranks, val_share=0.0, epochs=12, grad_accum_steps=4, n_samples=0)
    assert job.curve("rewards/accuracies")[-1] == 1.0 and job.curve("loss")[-1] < 0.3


def test_lora_only_trains_the_adapters(tmp_path, ranks):
    """trainable=lora moves lora_a / lora_b and nothing else; a checkpoint without adapters is refused."""
    job = make_job(tmp_path / "lora", use_lora=True, lora_rank=4)
    exported = load_weights(run_job(job, ranks, trainable="lora")).state_dict
    start = load_weights(job.folder / "start.pth").state_dict
    moved = {name for name in start if not torch.equal(start[name], exported[name])}
    assert moved and all("_lora_layer." in name for name in moved)
    with pytest.raises(UserError, match="LoRA"):
        run_job(make_job(tmp_path / "plain"), ranks, trainable="lora")


@pytest.mark.parametrize("loss", [("hinge", 1.0), ("ipo", 1.0), ("robust", math.log(2)), ("sigmoid_norm", math.log(2))])
def test_other_losses_start_where_their_papers_say(job, ranks, loss):
    """hinge: 1; ipo: 1 / (4 beta^2) = 1 at beta 0.5; robust and sigmoid_norm: ln 2."""
    name, expected = loss
    run_job(job, ranks, loss_type=name, epochs=1)
    assert job.curve("loss")[0] == pytest.approx(expected, abs=1e-5)


def test_a_loss_without_a_reference_asks_for_none(job, ranks, caplog):
    """SimPO, stopped and resumed: no store, no pass, no log-ratios; its own beta of 2 stands in config.json and counts
    in the state. The margin that it is after grows. Another beta is another run."""
    config = parse_config([f"--{name}={value}" for name, value in job.settings.items()] + ["--loss_type=simpo"])
    inputs = load_inputs(config, ranks)
    precompute_and_train(replace(config, epochs=1), inputs, ranks)
    assert not (job.folder / "ref_cache").exists()
    assert "step 0: simpo reads no reference" in caplog.text and "audit" not in caplog.text
    (told,) = re.findall(r"step 1: loss (\S+) on 8 pairs, foretold (\S+) by sums of each chat alone", caplog.text)
    assert [float(text) for text in told] == pytest.approx([job.curve("loss")[0]] * 2, abs=2e-6)
    assert "loss: simpo (beta 2.0, gamma 1.0, nll_weight 0.0)" in caplog.text
    kept = json.loads((job.folder / "runs" / "tiny" / "config.json").read_text())
    assert (kept["beta"], kept["gamma"], kept["label_smoothing"], kept["f_divergence"]) == (2.0, 1.0, None, None)
    first, *_, last = [line for line in job.lines() if "eval_loss" in line]
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"] != 0
    assert not any("log_ratio" in name for line in job.lines() for name in line)
    with pytest.raises(UserError, match="cannot resume: beta was 2.0, is now 1.0"):
        train(replace(config, epochs=1, beta=1.0, resume=True), inputs, ranks)
    train(replace(config, epochs=1, beta=None, resume=True), inputs, ranks)


def test_first_loss_is_foretold_from_the_store(job, ranks, caplog, monkeypatch):
    """A likelihood beside DPO: 0.8 ln 2 and what the store's sums say, which are the policy's at step 0. Another value
    is refused."""
    run_job(job, ranks, loss_type="sft,sigmoid:0.8", epochs=1)
    first = job.lines()[0]
    likelihood = -first["eval_rewards/chosen"]  # sft stands first: log pi of the mean token
    assert likelihood > 1 and first["eval_loss"] == pytest.approx(0.8 * math.log(2) + likelihood, rel=1e-5)
    (told,) = re.findall(r"step-0 held-out loss (\S+), expected (\S+)", caplog.text)
    assert [float(text) for text in told] == pytest.approx([first["eval_loss"]] * 2, abs=1e-5)
    right = PreferenceLoss.foretold
    monkeypatch.setattr(PreferenceLoss, "foretold", lambda *args, **named: right(*args, **named) + 0.01)
    with pytest.raises(UserError, match="step 0: the held-out loss is"):
        run_job(job, ranks, loss_type="sft,sigmoid:0.8", run_name="other")


def test_a_fault_in_packing_stops_the_first_step(job, ranks, monkeypatch):
    """Each token predicted by the row before the right one: store and policy agree, chats alone do not, with a
    reference and without."""
    right = PairBatch.pack.__func__

    def one_early(cls, pairs):
        batch = right(cls, pairs)
        return replace(batch, rows_N=batch.rows_N - 1)

    monkeypatch.setattr(PairBatch, "pack", classmethod(one_early))
    for loss_type in ("sigmoid", "simpo"):
        with pytest.raises(UserError, match=r"step 1: the log-probs of \d pairs are not those .*pairs\.jsonl:\d+ \(ch"):
            run_job(job, ranks, loss_type=loss_type, run_name=loss_type, batch_size=4)
    assert not list((job.folder / "checkpoints").glob("*/dpo_*"))


def test_another_loss_than_foretold_stops_the_first_step(job, ranks, monkeypatch):
    """Token counts of the other side, where the loss reads them; and weights of a micro-batch that make no mean."""
    right = policy.scores_of

    def swapped(*args):
        scores = right(*args)
        assert scores.counts_B2 is not None
        return replace(scores, counts_B2=scores.counts_B2.flip(1))

    with monkeypatch.context() as patch:
        patch.setattr(policy, "scores_of", swapped)
        run_job(job, ranks, epochs=1)
        with pytest.raises(
            UserError, match=r"step 1: the loss of \d pairs is not what it must be .*pairs\.jsonl:\d+ \("
        ):
            run_job(job, ranks, loss_type="orpo", run_name="orpo")
    parts = step.portions
    monkeypatch.setattr(
        step, "portions", lambda *args: (part._replace(weight=2 * part.weight) for part in parts(*args))
    )
    with pytest.raises(UserError, match=r"step 1: the weighted loss is 1\.38629, expected 0\.693147"):
        run_job(job, ranks, run_name="twice")


def test_what_dropout_leaves_is_compared(job, ranks, caplog):
    """Sums under dropout are not the reference's; that they cannot be foretold is said, and the run goes on."""
    run_job(job, ranks, dropout=0.1, epochs=1)
    assert "step 1: its log-probs cannot be foretold, only what the loss makes of them: dropout" in caplog.text
    assert "foretold 0." not in caplog.text


def test_coupled_pairs_are_those_of_the_step(job, ranks, caplog):
    """AOT, 8 pairs a step as 2 x 4 and 8 x 1: the same losses, gradients and held-out losses (1e-5, of norms 1e-4);
    what it costs is said. With dropout it is refused."""
    for batch, accum in ((2, 4), (8, 1)):
        settings = {"batch_size": batch, "grad_accum_steps": accum, "run_name": f"b{batch}", "max_lr": 1e-2}
        run_job(job, ranks, loss_type="aot_unpaired", **settings)
    assert "couples the pairs of a step: a pass without gradient before each, about a third" in caplog.text
    assert job.curve("loss", "b8")[-1] < math.log(2) - 0.01
    for name in ("loss", "eval_loss"):
        assert job.curve(name, "b8") == pytest.approx(job.curve(name, "b2"), abs=1e-5)
    assert job.curve("grad_norm", "b8") == pytest.approx(job.curve("grad_norm", "b2"), rel=1e-4)
    with pytest.raises(UserError, match=r"dropout: expected 0 with a loss that couples pairs \(aot .*, found 0\.1"):
        run_job(job, ranks, loss_type="aot", dropout=0.1, run_name="dropped")


# === records with several answers ===


@pytest.fixture
def ranked(tmp_path) -> TinyJob:
    """16 records of four answers, two of them of equal score, which are five pairs each; and four pairs."""
    job = make_job(tmp_path, pairs=4)
    pairs = (tmp_path / "pairs.jsonl").read_text()
    write_rankings(tmp_path / "pairs.jsonl", range(10, 26))
    with open(tmp_path / "pairs.jsonl", "a") as file:
        file.write(pairs)
    return job


def test_a_run_of_rankings(ranked, ranks, caplog):
    """Steps count records; four entries a record serve all pairs that can be made of them. Whatever counts alike, it
    begins at ln 2; taken up in the middle, it ends with the same bits."""
    caplog.set_level("INFO", "simple_llama")
    run_job(ranked, ranks, n_samples=0, **SAVES)
    assert "kept 84 of 84 pairs; 80 of them compare answers of 16 ranked records" in caplog.text
    assert "computed 84 pairs" in caplog.text and "step 1: loss 0.693147 on" in caplog.text
    config = DPOConfig(**ranked.settings)
    inputs = load_inputs(config, ranks)
    train = inputs.data.train
    assert max(line["step"] for line in ranked.lines()) == 2 * -(-len(train.units) // 8) < 2 * -(-len(train) // 8)
    assert len(ref_source.open_store(config.ref_cache_dir, inputs.reference_id, ranks)) == 4 * 16 + 4
    with np.load(ranked.folder / "runs" / "tiny" / "held_out.npz") as last:
        rewards_N2, prompts_N = last["rewards_N2"], inputs.data.validation.prompts
    worth = effective_count(preferred(rewards_N2[:, 0] - rewards_N2[:, 1]), prompts_N)
    assert prompts_N.max() + 1 <= worth <= len(prompts_N) and ranked.curve("eval_effective_pairs")[-1] == worth
    for state in (copied_run(ranked, "middle") / "state").iterdir():
        if state.name != "step_00000002":
            shutil.rmtree(state)
    with pytest.raises(UserError, match='cannot resume: group_weight was "pair"'):
        run_job(ranked, ranks, run_name="middle", resume=True, group_weight="prompt", **SAVES)
    run_job(ranked, ranks, run_name="middle", resume=True, n_samples=0, **SAVES)
    assert all(torch.equal(tensor, ranked.weights()[name]) for name, tensor in ranked.weights("middle").items())
    caplog.clear()
    few = {"n_samples": 0, "epochs": 1}
    run_job(ranked, ranks, run_name="prompt", group_weight="prompt", **few)
    run_job(ranked, ranks, run_name="ranks", loss_type="plackett_luce", pairs="adjacent", **few)
    assert "computed" not in caplog.text and "84 of 84 pairs are there" in caplog.text
    assert ranked.curve("loss", "prompt")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(ranked.curve("grad_norm", "prompt")[0] - ranked.curve("grad_norm")[0]) > 1e-2
    # of three scores log 3! for two pairs, of two answers log 2
    assert math.log(2) < ranked.curve("loss", "ranks")[0] <= math.log(6) / 2 + 1e-6


def test_prompts_that_meet_are_computed_together(job, ranks):
    """Four prompts of six pairs each: the same losses, fewer rows."""
    rows = [json.loads(line) for line in (job.folder / "pairs.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "User": [f"say {n % 4}"]}) + "\n" for n, row in enumerate(rows))
    (job.folder / "pairs.jsonl").write_text(text)
    for name, together in (("apart", False), ("together", True)):
        run_job(job, ranks, run_name=name, group_prompts=together, n_samples=0, epochs=1, batch_size=8, val_share=0)
    assert job.curve("loss", "together") == pytest.approx(job.curve("loss", "apart"), abs=1e-5)
    assert job.curve("grad_norm", "together") == pytest.approx(job.curve("grad_norm", "apart"), rel=1e-4)
