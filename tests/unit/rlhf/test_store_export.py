"""The exported data set has the sums over the tokens that TRL scores, and such sums come back only where they are the
model's; benchmarks/trl_from_store.py asks TRL itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf import store_export, store_import
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.store_export import PairsExportConfig
from tiny_hf import make_hf_job
from tiny_job import TinyJob, make_job

RECORDS = [
    {"Template": ["CUSTOM"], "User": ["say 0"], "Accepted": ["the cat"], "Rejected": ["a dog"]},
    {"Template": ["be old"], "User": ["say 1"], "Accepted": ["a bird sings"], "Rejected": ["a tree"]},
    {"Template": ["CUSTOM"], "User": ["a", "b"], "Accepted": ["the", "mat"], "Rejected": ["the", "red"]},
]


def with_records(job: TinyJob) -> TinyJob:
    """The job with the three records above: a plain one, one with a system message, and one of two turns."""
    (job.folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return job


def settings_of(job: TinyJob, **changes: Any) -> dict[str, Any]:
    """Settings of the pass; no pair is held out."""
    return {**job.settings, "val_share": 0.0, **changes}


def exported(job: TinyJob, ranks: Ranks, name: str, **settings: Any) -> Path:
    """What the command writes."""
    output = job.folder / name
    store_export._export(PairsExportConfig(**settings_of(job, output=str(output), **settings)), ranks)
    return output


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain_sum(model: torch.nn.Module, ids: list[int], start: int) -> float:
    """The log-prob sum of a chat from a token on: the model on it alone, log_softmax, gather."""
    with torch.no_grad():
        logps = model(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)
    return sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids)))


def written(messages: list[dict[str, str]]) -> str:
    """A chat as the tiny model's template writes it (ChatML); a line break stands behind each end token."""
    return "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)


def test_sums_are_over_what_trl_scores(tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """Each chat whole as TRL makes it, scored from behind the generation prompt to the line break behind <|im_end|>:
    the model on it alone gives the columns to 1e-4. All pairs differ from ours by that line break, which is said."""
    caplog.set_level("INFO", "simple_llama")
    job = with_records(make_hf_job(tmp_path))
    rows = rows_of(exported(job, ranks, "out.jsonl"))
    assert "TRL scores other tokens of 3 of 3 pairs" in caplog.text and "computed 3 pairs" in caplog.text
    inputs = load_inputs(PairsExportConfig(**settings_of(job)), ranks)
    model, tokenizer = inputs.build_reference("cpu"), inputs.chat.tokenizer
    for row in rows:
        prompt = tokenizer.encode(written(row["prompt"]) + "<|im_start|>assistant\n", add_special_tokens=False).ids
        for side in ("chosen", "rejected"):
            whole = tokenizer.encode(written(row["prompt"] + row[side]), add_special_tokens=False).ids
            assert whole[: len(prompt)] == prompt
            assert row[f"ref_{side}_logps"] == pytest.approx(plain_sum(model, whole, len(prompt)), abs=1e-4)


def test_rows_are_in_trls_form(tmp_path: Path, ranks: Ranks) -> None:
    """An explicit prompt of all messages up to the answers, the system's among them; one message each side."""
    rows = rows_of(exported(with_records(make_hf_job(tmp_path)), ranks, "out.jsonl", score_tail=True))
    said = [[(one["role"], one["content"]) for one in row["prompt"]] for row in rows]
    assert said == [
        [("user", "say 0")],
        [("system", "be old"), ("user", "say 1")],
        [("user", "a"), ("assistant", "the"), ("user", "b")],
    ]
    assert rows[2]["chosen"] == [{"role": "assistant", "content": "mat"}]
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "a dog"}]
    assert {row["split"] for row in rows} == {"train"} and len(rows[0]) == 6


def test_a_run_that_scores_the_tail_needs_no_further_pass(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """With `score_tail` ours are the tokens that TRL scores: a second export, in Parquet, finds all of them."""
    caplog.set_level("INFO", "simple_llama")
    job = with_records(make_hf_job(tmp_path))
    rows = rows_of(exported(job, ranks, "out.jsonl", score_tail=True))
    assert "TRL scores other tokens" not in caplog.text
    caplog.clear()
    pytest.importorskip("pyarrow")
    path = exported(job, ranks, "out.parquet", score_tail=True)
    assert "3 of 3 pairs are there" in caplog.text and "computed" not in caplog.text
    from pyarrow import parquet

    assert parquet.read_table(path).to_pylist() == rows


def test_of_our_own_format_the_scored_tokens_are_ours(tmp_path: Path, ranks: Ranks) -> None:
    """SimpleLLaMA's chats: the columns are the store's sums, held-out pairs say so."""
    job = make_job(tmp_path)
    rows = rows_of(exported(job, ranks, "out.jsonl", val_share=0.15))
    inputs = load_inputs(PairsExportConfig(**settings_of(job, val_share=0.15)), ranks)
    model, pair = inputs.build_reference("cpu"), inputs.data.pairs[0]
    for ids, scored, side in zip(
        pair.wholes, (pair.chosen_scored, pair.rejected_scored), ("chosen", "rejected"), strict=True
    ):
        found = plain_sum(model, ids.tolist(), len(ids) - scored)
        assert rows[0][f"ref_{side}_logps"] == pytest.approx(found, abs=1e-4)
    splits = [row["split"] for row in rows]
    assert splits == ["train"] * len(inputs.data.train) + ["held_out"] * len(inputs.data.validation)


def test_nothing_is_overwritten(tmp_path: Path, ranks: Ranks) -> None:
    """A file that is there stays as it was, also one that is no data set; other forms and scored tokens are refused."""
    job = make_hf_job(tmp_path)
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(UserError, match="expected nothing there yet"):
        exported(job, ranks, "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    with pytest.raises(UserError, match=r"ends with \.jsonl or \.parquet, found '.*out\.csv'"):
        exported(job, ranks, "out.csv")
    for settings in ({"score": "all"}, {"mask_end_token": True}):
        with pytest.raises(UserError, match="TRL scores the whole last answer"):
            exported(job, ranks, "other.jsonl", **settings)


def test_a_pair_that_trl_cannot_score_is_left_out(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """With its line break one chat has a token too many for the model's 512: it is named, the others are written."""
    job = with_records(make_hf_job(tmp_path))
    inputs = load_inputs(PairsExportConfig(**settings_of(job)), ranks)
    longest = max(max(len(ids) for ids in pair.wholes) for pair in inputs.data.pairs)
    rows = rows_of(exported(job, ranks, "out.jsonl", max_seq_len=longest))
    assert len(rows) == 2 and "left out 1 pairs that TRL cannot score (the first: " in caplog.text


def with_columns(job: TinyJob, rows: list[dict[str, Any]], shift: float = 0.0) -> None:
    """Writes the columns beside the three records."""
    for record, row in zip(RECORDS, rows, strict=True):
        record = {**record, **{name: row[name] + shift for name in store_export.COLUMNS}}
        with open(job.folder / "columns.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def imported(job: TinyJob, ranks: Ranks, cache: str) -> None:
    """Takes the columns in, as of the job's model, into another cache."""
    here = {"rlhf_dataset_path": str(job.folder / "columns.jsonl"), "ref_cache_dir": str(job.folder / cache)}
    store_import._import(DPOConfig(**settings_of(job, **here)), ranks)


def test_columns_of_the_named_model_come_in(tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """What was exported goes into an empty cache, is audited, and is exported from there again without a pass; a run
    that reads the same file computes its own as ever."""
    caplog.set_level("INFO", "simple_llama")
    job = with_records(make_hf_job(tmp_path))
    rows = rows_of(exported(job, ranks, "out.jsonl"))
    with_columns(job, rows)
    imported(job, ranks, "other_cache")
    assert "audit of the columns: policy and reference differ by at most" in caplog.text
    assert "3 of 3 pairs were missing, and have their columns now" in caplog.text
    caplog.clear()
    again = exported(job, ranks, "again.jsonl", ref_cache_dir=str(tmp_path / "other_cache"))
    assert rows_of(again) == rows and "3 of 3 pairs are there" in caplog.text
    imported(job, ranks, "other_cache")
    assert "0 of 3 pairs were missing" in caplog.text


def test_columns_of_another_model_are_refused(tmp_path: Path, ranks: Ranks) -> None:
    """Sums a nat off: the pairs are named, nothing is stored. A record without columns, or with text: it is named."""
    job = with_records(make_hf_job(tmp_path))
    with_columns(job, rows_of(exported(job, ranks, "out.jsonl")), shift=-1.0)
    with pytest.raises(UserError, match=r"audit of the columns: 3 of 3 pairs drawn .*Nothing was stored"):
        imported(job, ranks, "other_cache")
    assert not [*(tmp_path / "other_cache").rglob("*.npy")]
    for columns in ({}, {"ref_chosen_logps": "-1", "ref_rejected_logps": -2.0}):
        (tmp_path / "columns.jsonl").write_text(json.dumps({**RECORDS[0], **columns}) + "\n")
        with pytest.raises(UserError, match=r"columns\.jsonl:1: expected numbers under ref_chosen_logps and"):
            imported(job, ranks, "other_cache")
