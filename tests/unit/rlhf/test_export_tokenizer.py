"""The tokenizer that goes into a folder is the one that the model was trained with, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.paths import package_path
from simple_llama.dataset.tokenizer import tokenizer_digest
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT
from simple_llama.finetune.jinja_chat import template_digest
from simple_llama.interop.open_start import open_start
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.weights import load_weights, save_weights
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.export import ExportConfig, export_model
from simple_llama.reinforcement_learning.rlhf.export_tokenizer import Asked, Trained, tokenizer_of
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from tiny_hf import TEMPLATE, make_hf_folder
from tiny_job import TinyJob, make_job

SHIPPED = package_path("dataset", "bpe_8k.json")
NOTHING = Asked("", "")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """A .pth and SimpleLLaMA's tokenizer of its size."""
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder whose tokenizer has as many tokens, and a template."""
    return make_hf_folder(tmp_path_factory.mktemp("hf"))


def exported(job: TinyJob, path: Path, **metadata: Any) -> Path:
    """The start model as a run's export that says this."""
    loaded = load_weights(job.folder / "start.pth")
    save_weights(path, loaded.state_dict, loaded.config, metadata)
    return path


def prompt_in(folder: Path) -> str:
    """What the template of a folder says where a chat has no system message."""
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    return template.partition('{% set system = "')[2].partition('" %}')[0]


def test_a_runs_export_brings_its_tokenizer_and_prompt(job: TinyJob, tmp_path: Path) -> None:
    """A `.pth` knows them by its metadata; an empty prompt is one. A flag goes before, another form keeps the facts."""
    path = str(job.folder / "tokenizer.json")
    settings = {"tokenize_path": path, "system_prompt": "", "model_path": "/a/sft.pth"}
    facts = {"run": "tiny", "step": 3, "dpo_config": settings, "reference": {"tokenizer": tokenizer_digest(path)}}
    source = exported(job, tmp_path / "dpo.pth", **facts, file="dpo.pth")
    export_model(ExportConfig(str(source), str(tmp_path / "bf16.pth"), dtype="bfloat16"))
    for number, (model, system) in enumerate([("dpo", ""), ("bf16", ""), ("dpo", "Be kind.")]):
        out = tmp_path / f"out{number}"
        export_model(ExportConfig(str(tmp_path / f"{model}.pth"), str(out), system_prompt=system))
        own = open_start(out).own_tokenizer
        assert own is not None and tokenizer_digest(own.tokenizer) == tokenizer_digest(path)
        assert prompt_in(out) == system
        about = json.loads((out / "simple_llama_run.json").read_text())["metadata"]
        assert {name: about[name] for name in facts} == facts and about["file"] == ""
        assert "| start model | sft.pth |" in (out / "README.md").read_text()


def test_a_folder_as_pth_and_back(job: TinyJob, hf: Path, tmp_path: Path) -> None:
    """A .pth holds no tokenizer: which one belongs to it is said, kept as a digest, and demanded where it is a folder
    again; then its files are those that there were."""
    first, middle, back = tmp_path / "first", tmp_path / "middle.pth", tmp_path / "back"
    export_model(ExportConfig(str(job.folder / "start.pth"), str(first), tokenize_path=str(hf)))
    said = export_model(ExportConfig(str(first), str(middle)))
    assert said.endswith(f"; a .pth holds no tokenizer: give {first} with it as --tokenize_path")
    export_model(ExportConfig(str(middle), str(tmp_path / "again.pth")))
    for path, problem in (("", "bpe_8k.json: 8192 tokens, but"), (job.folder / "tokenizer.json", "found another one")):
        with pytest.raises(UserError, match=f"{problem}.*; give the tokenizer that it was trained with as --tok"):
            export_model(ExportConfig(str(tmp_path / "again.pth"), str(back), tokenize_path=str(path)))
    with pytest.raises(UserError, match="system_prompt: expected a SimpleLLaMA checkpoint and its tokenizer"):
        export_model(ExportConfig(str(middle), str(back), tokenize_path=str(hf), system_prompt="Hi"))
    assert not back.exists()
    export_model(ExportConfig(str(tmp_path / "again.pth"), str(back), tokenize_path=str(hf)))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (back / name).read_bytes() == (first / name).read_bytes()
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 2
    alone = tmp_path / "alone.json"  # without a template
    alone.write_bytes((hf / "tokenizer.json").read_bytes())
    export_model(ExportConfig(str(middle), str(tmp_path / "bare"), tokenize_path=str(alone)))
    assert (tmp_path / "bare" / "tokenizer.json").read_bytes() == alone.read_bytes()
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["eos_token_id"] is None


def test_a_run_from_such_a_pth_asks_for_the_tokenizer(job: TinyJob, hf: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Another one of as many tokens is refused; with the folder's the run trains in its chat format."""
    first, middle = tmp_path / "first", tmp_path / "middle.pth"
    export_model(ExportConfig(str(job.folder / "start.pth"), str(first), tokenize_path=str(hf)))
    export_model(ExportConfig(str(first), str(middle)))
    settings: dict[str, Any] = {**job.settings, "model_path": str(middle)}
    with pytest.raises(UserError, match="tokenizer.json: expected the tokenizer of the folder that .*middle.pth was"):
        load_inputs(DPOConfig(**settings), ranks)
    inputs = load_inputs(DPOConfig(**{**settings, "tokenize_path": str(hf)}), ranks)
    assert inputs.reference_id["tokenizer"] == load_weights(middle).metadata["tokenizer_digest"]


def test_a_prompt_that_was_there_is_not_another_one_in_silence(job: TinyJob, tmp_path: Path) -> None:
    """A folder's prompt stands in its template. A .pth made of it knows that it had another than the default."""
    first, middle, back = tmp_path / "first", tmp_path / "middle.pth", tmp_path / "back"
    tokenizer = str(job.folder / "tokenizer.json")
    export_model(ExportConfig(str(job.folder / "start.pth"), str(first), tokenize_path=tokenizer, system_prompt="Hi."))
    export_model(ExportConfig(str(first), str(middle)))
    start = open_start(middle)
    known = Trained.of(load_weights(middle).metadata)._replace(tokenize_path=tokenizer)
    with pytest.raises(UserError, match="expected the chat template that the model was trained with.*system_prompt"):
        tokenizer_of(NOTHING, known, start)
    for asked in (Asked(str(first), ""), Asked("", "Hi.")):
        found = tokenizer_of(asked, known, start)
        assert found is not None and found.template and template_digest(found.template) == known.template
    export_model(ExportConfig(str(middle), str(back), tokenize_path=str(first)))
    assert prompt_in(back) == "Hi."


def test_a_tokenizer_that_nobody_named_has_the_models_size(job: TinyJob, tmp_path: Path) -> None:
    """8,192 tokens are the shipped one's; a model of 8,193 may have been made with any other."""
    config = load_weights(job.folder / "start.pth").config
    for size in (8192, 8193):
        state_dict = LLaMaTransformer(Architecture.of(config, size)).state_dict()
        other = {"dpo_config": [], "reference": torch.ones(1)}  # another program's
        checkpoint = {"model_state_dict": state_dict, "config": config, "metadata": other}
        torch.save(checkpoint, tmp_path / f"{size}.pth")
    found = tokenizer_of(NOTHING, Trained.of({}), StartFile(tmp_path / "8192.pth"))
    assert found is not None and tokenizer_digest(found.tokenizer) == tokenizer_digest(SHIPPED)
    start = StartFile(tmp_path / "8193.pth")
    with pytest.raises(UserError, match="8192 tokens, but the model knows 8193; give the tokenizer"):
        tokenizer_of(NOTHING, Trained.of({}), start)
    assert tokenizer_of(Asked(SHIPPED, ""), Trained.of({}), start) is not None  # rows to spare
    with pytest.raises(UserError, match="8192 tokens, but the model knows 8193"):
        export_model(ExportConfig(str(start.path), str(tmp_path / "out")))


def test_what_changed_since_the_run_is_refused(hf: Path, tmp_path: Path) -> None:
    """The run's own tokenizer or template of another content, or none there; a flag may give another template."""
    start = open_start(hf)
    own = start.own_tokenizer
    assert own is not None
    known = Trained("", DEFAULT_SYSTEM_PROMPT, tokenizer_digest(own.tokenizer), template_digest(TEMPLATE))
    reference = {"tokenizer": known.digest, "numerics": {"chat_template": known.template}}
    assert Trained.of({"dpo_config": {"tokenize_path": SHIPPED}, "reference": reference}) == known
    assert tokenizer_of(NOTHING, known, start) is None  # what came with the model
    other = make_hf_folder(tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert tokenizer_of(Asked(str(other), ""), known, start) is not None
    cases = [
        (known._replace(digest="0" * 32), "expected the tokenizer that the model was trained with .digest 0"),
        (known._replace(template="0" * 32), "expected the chat template that the model was trained with .digest 0"),
        (known._replace(tokenize_path=str(other)), "other: expected the chat template that the model was trained with"),
        (known._replace(tokenize_path="/no/such"), "/no/such: expected the tokenizer that the run was trained with"),
    ]
    for trained, said in cases:
        with pytest.raises(UserError, match=said):
            tokenizer_of(NOTHING, trained, start)
    with pytest.raises(UserError, match="system_prompt: expected a SimpleLLaMA checkpoint"):
        tokenizer_of(Asked("", "Hi"), known, start)
    words = known._replace(tokenize_path="/a/b")
    assert words.where_it_lies(start) == "; a .pth holds no tokenizer: give /a/b with it as --tokenize_path"
    words = known._replace(tokenize_path="/a/b.gguf")
    assert "make a folder of /a/b.gguf too (an --output without .pth), and give that" in words.where_it_lies(start)


def test_what_a_run_makes_of_such_a_model_asks_for_it_too(job: TinyJob, hf: Path, ranks: Ranks, tmp_path: Path) -> None:
    """The `.pth` of a run from such a .pth, and a .pth of a state, be the start a folder or such a .pth: with another
    tokenizer of as many tokens none is trained."""
    first, middle = tmp_path / "first", tmp_path / "middle.pth"
    export_model(ExportConfig(str(job.folder / "start.pth"), str(first), tokenize_path=str(hf)))
    export_model(ExportConfig(str(first), str(middle)))
    few = {"epochs": 1, "grad_accum_steps": 6, "eval_interval": 0, "n_samples": 0, "val_share": 0.0}
    settings: dict[str, Any] = {**job.settings, **few, "reference": "online"}
    made: list[Path] = []
    for start in (first, middle):
        places = {"model_path": str(start), "tokenize_path": str(hf), "ckpt_dir": str(tmp_path / f"of_{start.stem}")}
        config = DPOConfig(**{**settings, **places, "log_dir": str(tmp_path / f"log_{start.stem}")})
        made.append(train(config, load_inputs(config, ranks), ranks))
        export_model(ExportConfig(str(made[-1].parent), str(tmp_path / f"state_of_{start.stem}.pth")))
    for path in (made[1], tmp_path / "state_of_first.pth", tmp_path / "state_of_middle.pth"):
        with pytest.raises(UserError, match=f"expected the tokenizer of the folder that .*{path.name} was made of"):
            load_inputs(DPOConfig(**{**settings, "model_path": str(path)}), ranks)
        load_inputs(DPOConfig(**{**settings, "model_path": str(path), "tokenize_path": str(hf)}), ranks)
