"""launch/evaluate.py in one process, on a run of the tiny job: its numbers against those computed directly."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT
from simple_llama.pretraining.weights import load_weights, save_weights
from simple_llama.reinforcement_learning.rlhf.assess import answers, assess, evaluate_config, scoring
from simple_llama.reinforcement_learning.rlhf.assess.evaluate_config import EvaluateConfig, parse_evaluate
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.export import ExportConfig, export_model
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import pair_logps
from tiny_job import TinyJob, make_job, make_tuned

JUDGE = """
import json, sys
for line in sys.stdin:
    one = json.loads(line)
    print(json.dumps({"id": one["id"], "better": "a" if one["a"] > one["b"] else "b"}))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """A start model, and `tuned.pth`."""
    job = make_job(tmp_path_factory.mktemp("evaluate"))
    make_tuned(job)
    return job


@pytest.fixture(scope="module")
def report(job: TinyJob, ranks: Ranks) -> Iterator[dict[str, Any]]:
    """An evaluation with all there is: report.json."""
    (job.folder / "judge.py").write_text(JUDGE)
    judge = f"{shlex.quote(sys.executable)} {shlex.quote(str(job.folder / 'judge.py'))}"
    asked = ["--generate=3", "--max_new_tokens=5", f"--judge={judge}", "--share=all"]
    assess.assess(config_of(job, *asked, f"--output={job.folder / 'all'}"), ranks)
    yield json.loads((job.folder / "all" / "report.json").read_text())


def config_of(job: TinyJob, *flags: str) -> EvaluateConfig:
    """What the command line makes of the tuned model and these flags."""
    return parse_evaluate([f"--models={job.folder / 'tuned.pth'}", "--device=cpu", *flags])


def test_settings_come_from_the_run(job: TinyJob) -> None:
    """The model says with which data, tokenizer, beta and start model it was trained; flags go before that."""
    config = config_of(job, "--beta=0.125")
    assert (config.model_path, config.beta) == (job.settings["model_path"], 0.125)
    tuned, start = job.folder / "tuned.pth", job.folder / "start.pth"
    assert [evaluate_config.beta_of(config, str(path)) for path in (tuned, start)] == [0.125, 0.125]
    assert [evaluate_config.beta_of(config_of(job), str(path)) for path in (tuned, start)] == [0.25, 0.5]
    assert config.inputs_of("x").val_share == 0.15
    assert evaluate_config.trained_on(config) == job.settings["rlhf_dataset_path"]
    with pytest.raises(UserError, match=r"start\.pth, which says of no run that made it; give --model_path"):
        parse_evaluate([f"--models={job.folder / 'start.pth'}"])
    with pytest.raises(UserError, match="models: expected a model at gone.pth, found nothing there"):
        parse_evaluate([f"--models={job.folder / 'start.pth'},gone.pth"])
    (job.folder / "runs" / "first").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="has its checkpoints in .*runs/first$"):
        patch.setattr(evaluate_config.FolderConfig, "ckpt_dir", str(job.folder / "runs"))
        parse_evaluate(["--models=first"])
    with pytest.raises(UserError, match="with no model; give --model_path"):
        parse_evaluate([])
    with pytest.raises(UserError, match="expected the start model at nowhere, found nothing there"):
        config_of(job, "--model_path=nowhere")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"judge": "x"}, "judge: expected --generate N"),
        ({"top_p": 0.5}, "temperature above 0"),
        ({"models": "a, a"}, "models: expected up to 16 different"),
    ]
    for settings, words in wrong:
        with pytest.raises(UserError, match=words):
            EvaluateConfig(**settings)


def test_the_pairs_are_those_that_training_held_out(job: TinyJob, ranks: Ranks) -> None:
    """auto: held out of the run's own data, all of any other; a share of which nothing is held out is refused."""
    config = config_of(job)
    inputs = load_inputs(config.inputs_of(config.model_path), ranks)
    pairs, words = scoring.pairs_asked(config, inputs)
    assert pairs.keys.tobytes() == inputs.data.validation.keys.tobytes() and "3 held-out pairs" in words
    everything, words = scoring.pairs_asked(config_of(job, "--share=all"), inputs)
    assert len(everything) == 24 and "trained on" in words
    other = config_of(job, f"--rlhf_dataset_path={job.folder / 'other.jsonl'}")
    assert len(scoring.pairs_asked(other, inputs)[0]) == 24
    none = load_inputs(config_of(job, "--val_share=0").inputs_of(config.model_path), ranks)
    with pytest.raises(UserError, match="share: expected held-out pairs"):
        scoring.pairs_asked(config, none)


def test_numbers_are_those_of_the_models(job: TinyJob, report: dict[str, Any], ranks: Ranks) -> None:
    """Margins from both models' log-probs, computed here; loss and accuracy of these."""
    config = config_of(job)
    sums = []
    for path in (config.model_path, config.paths[0]):
        inputs = load_inputs(config.inputs_of(path), ranks)
        model = inputs.build_reference("cpu")
        sums.append(pair_logps(model, PairBatch.pack(list(inputs.data.pairs))).double().numpy())
    ratios = sums[1] - sums[0]
    margins = ratios[:, 0] - ratios[:, 1]
    found = report["models"]["tuned.pth"]
    assert report["pairs"] == 24 and len(report["verdict"]) >= 4
    assert found["margin"][0] == pytest.approx(margins.mean(), abs=1e-4)
    assert found["accuracy"][0] == pytest.approx(np.mean(margins > 0))
    assert found["loss"][0] == pytest.approx(np.mean([math.log1p(math.exp(-0.25 * d)) for d in margins]), abs=1e-4)
    assert len(report["examples"]["tuned.pth"]["gain"]) == 5
    first = report["examples"]["tuned.pth"]["gain"][0]
    assert first["after"][0] - first["before"][0] - first["after"][1] + first["before"][1] == pytest.approx(
        margins.max(), abs=1e-3
    )


def test_answers_of_both_forms(job: TinyJob, report: dict[str, Any], ranks: Ranks) -> None:
    """Both models in the form of training and of upstream's server; each prompt once; the judge saw all."""
    assert [(form, sorted(models)) for form, models in report["language"].items()] == [
        ("training", ["start", "tuned.pth"]),
        ("serving", ["start", "tuned.pth"]),
    ]
    assert all(
        len(set(report["asked"])) == 3 == len(report["answers"]["start"][form]["texts"]) for form in report["language"]
    )
    judged = report["judge"]["tuned.pth"]
    assert judged["won"] + judged["tied"] + judged["lost"] == 3 and judged["flipped"] == 0
    inputs = load_inputs(config_of(job).inputs_of(str(job.folder / "start.pth")), ranks)
    questions = answers.questions_of(inputs.data, inputs.data.pairs, inputs.chat, 2, True)
    whole = f"<SOT>{DEFAULT_SYSTEM_PROMPT}<EOT>\n\n\n<SOU>{questions.texts[1]}<EOU>\n<SOA>"
    assert inputs.chat.tokenizer.decode(list(questions.forms["serving"][1]), skip_special_tokens=False).replace(
        " ", ""
    ) == whole.replace(" ", "")


def test_a_second_time_everything_comes_from_the_store(
    job: TinyJob, report: dict[str, Any], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is built, the numbers are the same, and a report is never written over another."""
    monkeypatch.setattr("simple_llama.reinforcement_learning.rlhf.inputs.build_model", None)
    assess.assess(config_of(job, "--share=all", f"--output={job.folder / 'again'}"), ranks)
    again = json.loads((job.folder / "again" / "report.json").read_text())
    assert report["made_by"]["doubts"] == []
    assert again["models"] == report["models"] and again["baselines"] == report["baselines"]
    with pytest.raises(UserError, match=r"report\.html: expected no report there yet"):
        assess.assess(config_of(job, f"--output={job.folder / 'again'}"), ranks)


def test_another_start_model_is_said(job: TinyJob, ranks: Ranks) -> None:
    """A model whose run began with other weights: its rewards are not those of its training."""
    start = load_weights(job.folder / "start.pth")
    metadata = {"reference": {"weights": "0" * 32}, "dpo_config": {}}
    save_weights(job.folder / "stranger.pth", start.state_dict, start.config, metadata)
    flags = ["--device=cpu", "--share=all", f"--output={job.folder / 'stranger'}"]
    places = ("model_path", "tokenize_path", "rlhf_dataset_path", "ref_cache_dir", "deepspeed_config")
    given = [f"--{name}={job.settings[name]}" for name in places]
    assess.assess(parse_evaluate([f"--models={job.folder / 'stranger.pth'}", *given, *flags]), ranks)
    [doubt] = json.loads((job.folder / "stranger" / "report.json").read_text())["made_by"]["doubts"]
    assert "stranger.pth was not trained from" in doubt and "0" * 32 in doubt
    page = (job.folder / "stranger" / "report.html").read_text()
    assert "<b>alarm</b>" in page and "shows no change in preference" in page


def test_the_page_is_one_file(job: TinyJob, report: dict[str, Any]) -> None:
    """Verdict first, all sections, no network, and what it takes to do it again."""
    page = (job.folder / "all" / "report.html").read_text()
    assert "http://www.w3.org" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "<script" not in page and "src=" not in page
    places = [
        page.index(text)
        for text in ("verdict", "<h2>Pairs", "<h2>Judge", "<h2>Answers", "largest gain", "To do it again")
    ]
    assert places == sorted(places)
    assert report["made_by"]["models"]["tuned.pth"]["weights"] in page
    assert report["made_by"]["data"]["digest"] in page


def test_names_and_categories(job: TinyJob, tmp_path: Path, ranks: Ranks) -> None:
    """Models by the shortest ends of their paths that differ; a record's category, or its file."""
    config = EvaluateConfig(models="a/x.pth,b/x.pth", model_path="s")
    assert list(assess._named(config)) == ["start", "a/x.pth", "b/x.pth"]
    inputs = load_inputs(config_of(job).inputs_of(str(job.folder / "start.pth")), ranks)
    assert set(scoring.categories(inputs.data.pairs)) == {"pairs.jsonl"}
    rows = [json.loads(line) for line in (job.folder / "pairs.jsonl").read_text().splitlines()]
    rows[0]["category"], rows[1]["category"] = "harm", ["b", "a"]
    path = tmp_path / "named.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = load_inputs(
        config_of(job, f"--rlhf_dataset_path={path}", "--val_share=0").inputs_of(str(job.folder / "start.pth")), ranks
    )
    assert scoring.categories(named.data.pairs)[:3] == ["harm", "a + b", "(none)"]


def test_the_harms_of_safety_records_are_categories(job: TinyJob, tmp_path: Path, ranks: Ranks) -> None:
    """Those of either answer, sorted; none where both are harmless. A faulty record that was dropped stays out."""
    rows = []
    for n, (first, second) in enumerate([(True, True), (False, False), (False, True)]):
        safe = {"is_response_0_safe": True, "is_response_1_safe": not second}
        harms = {"response_0_harm_category": {"Theft": first}, "response_1_harm_category": {"Fraud": second}}
        labels = {"better_response_id": 0, "safer_response_id": 0}
        rows.append({"prompt": f"say {n}", "response_0": "the cat", "response_1": "a dog", **safe, **harms, **labels})
    path = tmp_path / "pku.jsonl"
    path.write_text("".join(line + "\n" for line in ["{", *map(json.dumps, rows)]))
    flags = (f"--rlhf_dataset_path={path}", "--val_share=0", "--prefer=both", "--on_bad_record=drop")
    inputs = load_inputs(config_of(job, *flags).inputs_of(str(job.folder / "start.pth")), ranks)
    assert scoring.categories(inputs.data.pairs) == ["Fraud + Theft", "(none)", "Fraud"]


def test_an_export_in_the_other_form_has_the_same_pairs(job: TinyJob, ranks: Ranks) -> None:
    """A Hugging Face folder has its system prompt in its chat template, so that other prompts would be held out; the
    pairs are the same, in another order."""
    tokenizer = str(job.settings["tokenize_path"])
    folder = str(job.folder / "hf")
    export_model(ExportConfig(source=str(job.folder / "tuned.pth"), output=folder, tokenize_path=tokenizer))
    config = config_of(job)
    first = load_inputs(config.inputs_of(config.model_path), ranks)
    other = load_inputs(
        replace(config.inputs_of(folder, first.max_seq_len), tokenize_path=EvaluateConfig.tokenize_path), ranks
    )
    assert other.data.pairs.keys.tobytes() != first.data.pairs.keys.tobytes()
    scoring.check_same_pairs(other, first)
