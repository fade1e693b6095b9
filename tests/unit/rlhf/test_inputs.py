"""Which tokenizer and chat format a run takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.paths import package_path
from simple_llama.common.settings import parse_settings
from simple_llama.finetune.chat_format import SimpleLLaMAChat
from simple_llama.finetune.jinja_chat import JinjaChat
from simple_llama.reinforcement_learning.rlhf import inputs as inputs_of_run
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, load_inputs
from tiny_hf import TinyHFJob, make_hf_job
from tiny_job import TinyJob, make_job


@pytest.fixture(scope="module")
def hf_job(tmp_path_factory: pytest.TempPathFactory) -> TinyHFJob:
    """A job whose model has a tokenizer and a template."""
    return make_hf_job(tmp_path_factory.mktemp("hf"))


def inputs(job: TinyJob, ranks: Ranks, **changes: Any) -> Inputs:
    """What a run of the job reads."""
    return load_inputs(DPOConfig(**{**job.settings, **changes}), ranks)


def first_prompt(found: Inputs) -> str:
    """The prompt of the first training pair."""
    return found.chat.tokenizer.decode(found.data.train[0].prompt_ids.tolist(), skip_special_tokens=False)


def test_a_model_with_a_tokenizer_uses_it(hf_job: TinyHFJob, ranks: Ranks) -> None:
    """Its template, no system message, and the template's digest in the name of the reference."""
    found = inputs(hf_job, ranks)
    assert isinstance(found.chat, JinjaChat)
    assert first_prompt(found).startswith("<|im_start|>user\n")
    assert found.reference_id["numerics"]["chat_template"] == found.chat.identity["chat_template"]


def test_a_system_prompt_that_was_given(hf_job: TinyHFJob, ranks: Ranks) -> None:
    """It stands for CUSTOM; pairs are others, the reference is the same: keys of pairs hold their tokens."""
    plain, told = inputs(hf_job, ranks), inputs(hf_job, ranks, system_prompt="Be kind.")
    assert first_prompt(told).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")
    assert plain.reference_id == told.reference_id and plain.data_digest != told.data_digest


def test_a_token_without_a_row_is_left_out(hf_job: TinyHFJob, ranks: Ranks, tmp_path: Path) -> None:
    """Old Llama 2 folders name a <pad> behind the model's last row: they start, as a model and as a tokenizer, and no
    text gets an id beyond the 300 rows."""
    shutil.copytree(hf_job.model, tmp_path / "old")
    (tmp_path / "old" / "added_tokens.json").write_text('{"<pad>": 300}')
    for changes in ({"model_path": str(tmp_path / "old")}, {"tokenize_path": str(tmp_path / "old")}):
        found = inputs(hf_job, ranks, **changes)
        assert max(found.chat.tokenizer.encode("a<pad>b").ids) < 300


def test_another_bos_token_makes_other_pairs(hf_job: TinyHFJob, ranks: Ranks, tmp_path: Path) -> None:
    """Two starts of one template that writes bos_token: no pair of the one has the name of one of the other's, so
    neither finds the other's log-probs in the store that they share."""
    names = []
    for bos in ("<|endoftext|>", "<|im_end|>"):
        folder = tmp_path / bos.strip("<|>")
        shutil.copytree(hf_job.model, folder)
        said = json.loads((folder / "tokenizer_config.json").read_text())
        said |= {"bos_token": bos, "chat_template": "{{ bos_token }}" + said["chat_template"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        found = inputs(hf_job, ranks, tokenize_path=str(folder))
        assert first_prompt(found).startswith(bos + "<|im_start|>user")
        names.append((found.reference_id, {key.tobytes() for key in found.data.pairs.keys}))
    assert names[0][0] == names[1][0] and names[0][1].isdisjoint(names[1][1])


def test_a_given_tokenizer_goes_before_the_model_s(hf_job: TinyHFJob, ranks: Ranks, tmp_path: Path) -> None:
    """A folder with another template, or the tokenizer.json in it. The default of another checkout is no such path."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf_job.model / name, tmp_path / name)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    said["chat_template"] = "{{ '<|im_start|>' }}" + said["chat_template"].replace("<|im_start|>", "")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert first_prompt(inputs(hf_job, ranks, tokenize_path=str(path))).startswith("<|im_start|>user\nsay")
        assert first_prompt(inputs(hf_job, ranks, tokenize_path=str(path))).count("<|im_start|>") == 1
    moved = tmp_path / "old" / "simple_llama" / "dataset" / "bpe_8k.json"
    moved.parent.mkdir(parents=True)
    shutil.copy(package_path("dataset", "bpe_8k.json"), moved)
    assert inputs(hf_job, ranks, tokenize_path=str(moved)).reference_id == inputs(hf_job, ranks).reference_id


def test_an_end_token_is_masked_or_scored_with_what_follows_it() -> None:
    """Not both."""
    with pytest.raises(UserError, match="mask_end_token: expected no score_tail beside it"):
        DPOConfig(mask_end_token=True, score_tail=True)


def test_score_tail_scores_what_stands_behind_the_end(hf_job: TinyHFJob, ranks: Ranks) -> None:
    """One more token a side, the line break: TRL's way."""
    plain, tail = inputs(hf_job, ranks), inputs(hf_job, ranks, score_tail=True)
    assert (tail.data.train.keys["counts"] - plain.data.train.keys["counts"] == 1).all()


def test_ranks_agree_on_what_ends_an_answer(hf_job: TinyHFJob, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """generation_config.json is in no digest; ranks that stop at other tokens would wait for each other in ZeRO-3."""
    compared: dict[str, Any] = {}
    monkeypatch.setattr(inputs_of_run, "require_same", lambda what, value, ranks: compared.update({what: value}))
    inputs(hf_job, ranks)
    assert compared["what ends an answer (token ids)"] == [2]


def test_simple_llama_has_its_own_format(ranks: Ranks, tmp_path: Path) -> None:
    """And no settings of templates."""
    job = make_job(tmp_path)
    assert isinstance(inputs(job, ranks).chat, SimpleLLaMAChat)
    for changes in ({"score_tail": True}, {"chat_template_kwargs": '{"a": 1}'}):
        with pytest.raises(UserError, match="would have no effect"):
            inputs(job, ranks, **changes)


def test_what_lies_beside_simple_llama_s_tokenizer_does_not_count(ranks: Ranks, tmp_path: Path) -> None:
    """A `.pth` was always trained in SimpleLLaMA's format: such a run resumes, and finds its store."""
    job = make_job(tmp_path)
    before = inputs(job, ranks)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    found = inputs(job, ranks)
    assert isinstance(found.chat, SimpleLLaMAChat)
    assert (found.reference_id, found.data_digest) == (before.reference_id, before.data_digest)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "found no JSON"),
        ("[1]", "expected a JSON object of names"),
        ('{"a b": 1}', "expected a JSON object of names"),
        ('{"messages": []}', "names that a chat does not give itself, found messages"),
        ('{"bos_token": ""}', "found bos_token"),
        ('{"date_string": 3}', "date_string: expected a text"),
    ],
)
def test_variables_of_templates(text: str, words: str) -> None:
    """A JSON object of what nobody else gives."""
    with pytest.raises(UserError, match=words):
        DPOConfig(chat_template_kwargs=text)


def test_a_chat_that_cannot_be_said_is_named(hf_job: TinyHFJob, ranks: Ranks, tmp_path: Path) -> None:
    """The file and the record, counted from 1: the second has a system message, and the template no place for it."""
    said = json.loads((hf_job.model / "tokenizer_config.json").read_text())
    job = make_hf_job(tmp_path)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    (job.model / "tokenizer_config.json").write_text(
        json.dumps({**said, "chat_template": refusal + said["chat_template"]})
    )
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    record = json.loads(lines[1])
    record["Template"] = ["S"]
    (tmp_path / "pairs.jsonl").write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]))
    with pytest.raises(UserError, match=r"pairs.jsonl:2: .*no place for one \(none\)"):
        inputs(job, ranks)


def test_a_system_prompt_in_a_file(tmp_path: Path) -> None:
    """@FILE is read once, at the command line: the setting is its text, so a resume does not need the file."""
    path = tmp_path / "prompt.txt"
    path.write_bytes("\u00e9 one\n two\n".encode())
    assert parse_config([f"--system_prompt=@{path}"]).system_prompt == "\u00e9 one\n two"
    assert parse_settings(DPOConfig, [], None, {"system_prompt": "@kept"}, "a run").system_prompt == "@kept"
    assert parse_config(["--system_prompt=a@b"]).system_prompt == "a@b"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"system_prompt": f"@{path}"}))
    assert parse_config([f"--config={config}"]).system_prompt == "\u00e9 one\n two"
    with pytest.raises(
        UserError, match="system_prompt: cannot read .*No such file.*a text there that itself begins with @"
    ):
        parse_config([f"--system_prompt=@{tmp_path / 'none'}"])
    path.write_text("@home")
    assert parse_config([f"--system_prompt=@{path}"]).system_prompt == "@home"
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="expected UTF-8 text"):
        parse_config([f"--system_prompt=@{path}"])
