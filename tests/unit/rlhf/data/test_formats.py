"""Formats of records: docs/data.md's samples, TRL's ids, how a format is recognised, what is dropped and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from chat_templates import NO_SYSTEM, TEMPLATES, own, tokenizers_of_each_kind
from format_samples import TRL, Sample, chat, message, page_samples, tokenizer_kind
from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.dataset.json_records import Record
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT
from simple_llama.finetune.jinja_chat import JinjaChat
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Dropped
from simple_llama.reinforcement_learning.rlhf.data.convert import PrepareConfig, prepare
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.readers import READERS, Formats
from simple_llama.reinforcement_learning.rlhf.data.reading import ReadingConfig
from simple_llama.reinforcement_learning.rlhf.data.record_checks import ReadOptions

SAMPLES = page_samples()
OPTIONS: dict[str, dict[str, Any]] = {"PKU-SafeRLHF": {"prefer": "safe"}}  # that a format needs
GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "trl_ids.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return load_tokenizer(root_path("simple_llama", "dataset", "bpe_8k.json"))


def written(folder: Path, *records: Any, name: str = "pairs.jsonl") -> Path:
    """A .jsonl file of the records."""
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def load(path: Path, tokenizer: Tokenizer, **reading: Any) -> RLDatasetLoader:
    """A loader without a validation share."""
    return RLDatasetLoader(path, tokenizer, 512, val_share=0.0, seed=0, reading=ReadingConfig(**reading))


def read(record: dict[str, Any], **options: Any) -> Any:
    """What a single record says, by the format that it shows."""
    found = Record("a.jsonl", 1, record)
    name = Formats(options.pop("data_format", "auto")).of(found)
    return READERS[name].read(found, ReadOptions(**options))


# === docs/data.md ===


def test_the_page_has_a_sample_of_each_format() -> None:
    """And a line of its table."""
    assert list(dict.fromkeys(sample.name for sample in SAMPLES)) == list(READERS)
    rows = [line.split("`")[1] for line in Path(root_path("docs", "data.md")).read_text().split("\n") if "| `" in line]
    assert rows == list(READERS)


@pytest.mark.parametrize("sample", SAMPLES, ids=[f"{n} {sample.name}" for n, sample in enumerate(SAMPLES)])
def test_samples_become_what_the_page_says(tmp_path: Path, tokenizer: Tokenizer, sample: Sample) -> None:
    """By the converter, and in the loader straight and converted: the same tokens, gaps, weights."""
    options = OPTIONS.get(sample.name, {})
    path, output = written(tmp_path, sample.record), tmp_path / "own.jsonl"
    report = prepare(PrepareConfig((str(path),), str(output), **options))
    assert json.loads(output.read_text()) == sample.becomes
    assert report.endswith(f"; read as {sample.name}") == (sample.name != "Template")
    straight, converted = load(path, tokenizer, **options), load(output, tokenizer)
    assert straight.pairs.digest == converted.pairs.digest
    assert straight.report.endswith(f"; read as {sample.name}") == (sample.name != "Template")
    assert [said.text for said in straight.conversations(straight.train)] == [
        said.text for said in converted.conversations(converted.train)
    ]


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.arrow"])
def test_samples_from_tables(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    """A table of each sample gives the same pairs: keys that others of the file have are null, and not there."""
    for number, sample in enumerate(SAMPLES):
        if sample.name == "Alpaca":
            continue  # its history of lists of lists is read below
        options, folder = OPTIONS.get(sample.name, {}), tmp_path / str(number)
        folder.mkdir()
        table = pa.Table.from_pylist([sample.record, sample.record], pa.Table.from_pylist([sample.record]).schema)
        if name.endswith("parquet"):
            pq.write_table(table, folder / name)
        else:
            with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        found = load(folder / name, tokenizer, **options)
        expected = load(written(folder, sample.record), tokenizer, **options)
        assert found.pairs.digest == expected.pairs.digest
        assert "duplicate" in found.report


# === TRL ===


@pytest.mark.parametrize("name", GOLDEN)
def test_message_lists_have_the_ids_of_trl(tmp_path: Path, name: str) -> None:
    """TRL's whole chats begin with ours, which end with the token that ends the answer; what it writes behind is no
    more than white space, and the same with `score_tail`. The prompt is TRL's, but where its answers are several
    messages, or start earlier; and with Qwen3's template, whose whole chats have a think block more than its prompts,
    which is scored there."""
    tokenizer = tokenizers_of_each_kind()[tokenizer_kind(name)]
    form, to_the_end = (JinjaChat(own(TEMPLATES[name], tokenizer), score_tail=tail) for tail in (False, True))
    for record, ids in zip(TRL, GOLDEN[name], strict=True):
        if ids is None:
            assert name in NO_SYSTEM
            continue
        prompt, *answers = ids
        loader = RLDatasetLoader(written(tmp_path, record), form, 512, val_share=0.0, seed=0)
        [pair] = loader.train
        for side, scored, answer in zip(pair.wholes, (pair.chosen_scored, pair.rejected_scored), answers, strict=True):
            whole = prompt + answer
            assert side.tolist() == whole[: len(side)]
            assert not tokenizer.decode(whole[len(side) :], skip_special_tokens=False).replace("<0x0A>", "").strip()
            sides = (record["chosen"][:-1], record["rejected"][:-1])
            is_last = sides == ([], []) or ("prompt" not in record and sides[0] == sides[1])
            assert (len(side) - scored == len(prompt)) == (is_last and name != "Qwen3")
        [pair] = RLDatasetLoader(tmp_path / "pairs.jsonl", to_the_end, 512, val_share=0.0, seed=0).train
        assert [side.tolist() for side in pair.wholes] == [prompt + answer for answer in answers]


def test_strings_without_a_prompt_are_read_as_trl_does() -> None:
    """What both begin with, less a space in front of the difference."""
    record = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    said = read(record, data_format="TRL", guess_prompt=True)
    assert (said.users, said.chosen, said.rejected) == (("The sky is",), (" blue.",), (" green.",))
    with pytest.raises(
        UserError, match=r"a.jsonl:1: expected transcripts .* --data_format TRL .* --data_format HH-RLHF"
    ):
        read(record)


def test_system_messages(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """That of the list, else the record's own `system`, else the default; a blank string is none."""
    answers = {"chosen": [message("assistant", "b")], "rejected": [message("assistant", "c")]}
    records: list[dict[str, Any]] = [
        {"prompt": chat("a", system="S"), "system": "T", **answers},
        {"prompt": chat("a"), "system": "T", **answers},
        {"prompt": chat("a"), "system": " ", **answers},
        {"prompt": chat("a"), **answers},
    ]
    assert [read(record).system for record in records] == ["S", "T", DEFAULT_SYSTEM_PROMPT, DEFAULT_SYSTEM_PROMPT]
    assert read(records[3], default_system=None).system is None


def test_a_prompt_as_a_string_beside_lists() -> None:
    """In front of answers alone, or in the chats already; another one is refused."""
    answers = {"chosen": [message("assistant", "b")], "rejected": [message("assistant", "c")]}
    whole = {"chosen": chat("a ", "b"), "rejected": chat("a ", "c")}
    assert read({"prompt": "a", **answers}).users == ("a",)
    assert read({"prompt": "a", **whole}).users == ("a ",)
    with pytest.raises(UserError, match="prompt: expected the text of a user message in chosen, found another"):
        read({"prompt": "x", **whole})
    assert read({"prompt": chat("a "), **whole}).users == ("a ",)


def test_a_prompt_that_is_a_transcript() -> None:
    """Up to the last "Assistant:", as some copies of HH-RLHF have it."""
    prompt = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    said = read({"prompt": prompt, "chosen": " So.", "rejected": " No."})
    assert (said.users, said.chosen, said.rejected) == (("Hi", "Why?"), ("Yes?", "So."), ("Yes?", "No."))


def test_gaps() -> None:
    """Scores before a margin, a gap of the record's own before both."""
    strings = {"prompt": "a", "chosen": "b", "rejected": "c"}
    scores = {"score_chosen": 3, "score_rejected": 4.5}
    assert read({**strings, **scores, "margin": 9}).gap == -1.5
    assert read({**strings, "margin": 9}).gap == 9
    assert read({**strings, **scores, "gap": 2, "weight": 3}).gap == 2


def test_a_null_is_a_key_that_is_not_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As in tables, whose rows have all columns; a message's own nulls too."""
    lists = {
        side: [{**message("assistant", text), "tool_calls": None}]
        for side, text in (("chosen", "b"), ("rejected", "c"))
    }
    rows = [{"prompt": chat("a"), **lists, "system": None, "tools": None, "gap": None, "extra": None}]
    assert load(written(tmp_path, *rows), tokenizer).report == "kept 1 of 1 pairs; read as TRL"
    hh = {"prompt": None, "chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}
    assert load(written(tmp_path, hh), tokenizer).report == "kept 1 of 1 pairs; read as HH-RLHF"


# === what else formats have ===


def test_orca_as_argilla_spells_it() -> None:
    """`input` for `question`; an empty system message is none."""
    said = read({"system": "", "input": "a", "chosen": "b", "rejected": "c", "generations": ["b", "c"]})
    assert (said.system, said.users) == (DEFAULT_SYSTEM_PROMPT, ("a",))


def test_ultrafeedback_by_fine_grained_scores() -> None:
    """Where an answer has no overall score; the gap of the best two is 4.5 - 2."""
    answers = [{"response": r, "fine-grained_score": s} for r, s in (("a", 2), ("b", 4.5), ("c", 1))]
    said = read({"instruction": "q", "completions": [{**answers[0], "overall_score": 9}, *answers[1:]]})
    assert [(p.chosen, p.rejected, p.gap) for p in said.pairs][:1] == [(("b",), ("a",), 2.5)]


def test_categories_of_any_format(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """They are no ignored keys; others are, by name."""
    path = written(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c", "category": "x", "id": 7})
    assert load(path, tokenizer).report == f"kept 1 of 1 pairs; ignored key 'id' (records: 1, first: {path}:1); " + (
        "read as TRL"
    )


DROPPED: dict[str, tuple[dict[str, Any], str]] = {
    "other users": ({"chosen": chat("a", "b"), "rejected": chat("x", "c")}, "with different user turns"),
    "other systems": (
        {"chosen": chat("a", "b", system="S"), "rejected": chat("a", "c")},
        "with different system messages",
    ),
    "an assistant first": ({"chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]}, "not starting with a user"),
    "no reply": ({"chosen": chat("a"), "rejected": chat("a", "b")}, "without a reply"),
    "two in a row": (
        {"prompt": chat("a", "b"), "chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]},
        "do not",
    ),
    "a system message later": (
        {"chosen": [*chat("a", "b"), *chat("c", "d", system="S")], "rejected": chat("a", "b")},
        "that do not alternate",
    ),
    "an empty answer": ({"prompt": "a", "chosen": "b", "rejected": " "}, "with an empty answer"),
    "the same answers": ({"question": "a", "chosen": "b", "rejected": "b"}, "with identical answers"),
    "one completion": ({"instruction": "a", "completions": [{"response": "b", "overall_score": 1}]}, "fewer than two"),
    "one score": (
        {"instruction": "a", "completions": [{"response": r, "overall_score": 1} for r in "bc"]},
        "with answers of equal score",
    ),
    "half a surrogate pair": ({"question": "a", "chosen": "b\ud800", "rejected": "b"}, "half of a surrogate pair"),
    "in a system message": ({"system": "\udfff", "question": "a", "chosen": "b", "rejected": "c"}, "half of a surr"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_sound_records_without_a_pair_are_dropped(case: str) -> None:
    """With the reason that is counted."""
    record, reason = DROPPED[case]
    with pytest.raises(Dropped, match=reason):
        said = read(record)
        assert isinstance(said, Conversation) or said.pairs


STRINGS = {"prompt": "a", "chosen": "b", "rejected": "c"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({**STRINGS, "tools": [{"name": "f"}]}, "tools: expected a record without tools, .* found a list of 1"),
    "template variables": ({**STRINGS, "chat_template_kwargs": {"x": 1}}, "expected a record without chat_template_kw"),
    "calls": (
        {"prompt": chat("a"), **{k: [{**message("assistant", ""), "tool_calls": [1]}] for k in ("chosen", "rejected")}},
        "chosen, message 1: expected no tool_calls",
    ),
    "another role": (
        {"chosen": [message("tool", "a")], "rejected": chat("a", "b")},
        "chosen, message 1: role: expected system, user, assistant, found 'tool'",
    ),
    "parts": (
        {"chosen": [{"role": "user", "content": [{"type": "text"}]}], "rejected": chat("a", "b")},
        "chosen, message 1: content: expected a string, found a list of 1",
    ),
    "no content": ({"chosen": [{"role": "user"}], "rejected": chat("a")}, "message 1: content: expected a string"),
    "no messages": (
        {"chosen": [], "rejected": chat("a")},
        "chosen: expected a list of one or more messages, found a l",
    ),
    "a prompt of a number": ({**STRINGS, "prompt": 5}, "prompt: expected a string, found the number 5"),
    "a score of text": ({**STRINGS, "score_chosen": "8", "score_rejected": 1}, "score_chosen: expected a number"),
    "a message from a tool": (
        {"conversations": [{"from": "observation", "value": "x"}], "chosen": {}, "rejected": {}},
        "conversations, message 1: from: expected system, human, gpt, found 'observation'",
    ),
    "an answer from a human": (
        {"conversations": [{"from": "human", "value": "x"}], "rejected": {}, "chosen": {"from": "human", "value": "y"}},
        "chosen: expected a message from gpt, found one from user",
    ),
    "history": (
        {"instruction": "a", "chosen": "b", "rejected": "c", "history": [["x"]]},
        "history, turn 1: expected a list of two strings, a message and its answer, found a list of 1",
    ),
    "a completion of text": ({"instruction": "a", "completions": ["b", "c"]}, "completions, answer 1: expected an obj"),
    "no scores": (
        {"instruction": "a", "completions": [{"response": "b"}, {"response": "c"}]},
        "completions, answer 1: expected key 'overall_score' or 'fine-grained_score' in each, found neither",
    ),
    "two formats": (
        {**STRINGS, "question": "a"},
        "expected a record of one format, found keys of TRL and Orca; .*: --data_format TRL",
    ),
    "no format": ({"text": "a"}, r"expected the keys of a known format, found 'text' \(a string\); known are Template"),
    "no label": (
        {"prompt": "a", "response_0": "b", "response_1": "c"},
        "a PKU-SafeRLHF record; give --prefer helpful, --prefer safe",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_records_that_do_not_fit_are_refused(case: str) -> None:
    """With file, record, key, what was expected and what was found."""
    record, words = REFUSED[case]
    with pytest.raises(UserError, match=f"^a.jsonl:1: .*{words}"):
        read(record)


# === recognising a file ===


def test_a_file_has_one_format(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its first record's; a folder's files may have others. Records of another one are named, with a key."""
    hh = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    with pytest.raises(UserError) as raised:
        load(written(tmp_path, hh, {**STRINGS, "prompt": "x"}, hh, SAMPLES[0].record), tokenizer)
    said = str(raised.value).split("\n")
    assert said[0] == "2 faulty records:"
    assert "pairs.jsonl:2: expected the format HH-RLHF of the records before it, found prompt (a string) as" in said[1]
    assert "pairs.jsonl:4: expected the format HH-RLHF of the records before it, found Template (a list of" in said[2]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, record in (("a.jsonl", hh), ("b.jsonl", {**STRINGS, "prompt": "x"}), ("c.jsonl", SAMPLES[0].record)):
        written(folder, record, name=name)
    loader = load(folder, tokenizer)
    assert loader.report == "kept 3 of 3 pairs; read as HH-RLHF, TRL, Template"
    assert [said.users[0] for said in loader.conversations(loader.train)] == ["a", "x", "Can I freeze rice?"]
    with pytest.raises(UserError, match="expected key 'Template', found"):
        load(folder / "a.jsonl", tokenizer, data_format="Template")


def test_an_option_without_effect_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """`prefer` and `keep_unsafe` are PKU-SafeRLHF's."""
    options: dict[str, Any]
    for options in ({"prefer": "safe"}, {"keep_unsafe": True}):
        with pytest.raises(UserError, match="prefer, keep_unsafe: expected PKU-SafeRLHF records, found none"):
            load(written(tmp_path, STRINGS), tokenizer, **options)


# === on_bad_record ===


def test_faulty_records_may_be_left_out(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """Twelve faulty ones around two sound ones: counted, the first ten named, and the rest read again as before."""
    lines = [
        json.dumps(STRINGS),
        *["{"] * 11,
        json.dumps({**STRINGS, "prompt": 5}),
        json.dumps({**STRINGS, "prompt": "d"}),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="^12 faulty records, the first 10:"):
        load(path, tokenizer)
    loader = load(path, tokenizer, on_bad_record="drop")
    assert loader.report == f"kept 2 of 14 pairs (12 faulty); first faulty: {path}:2; read as TRL"
    first, *named = loader.warnings[0].split("\n")
    assert first == "left out: 12 faulty records, the first 10:"
    assert [line.split(": ")[0] for line in named] == [f"  {path}:{number}" for number in range(2, 12)]
    assert "85.7% of the pairs are left out" in loader.warnings[1] and loader.warnings[0] in caplog.text
    assert [said.users for said in loader.conversations(loader.train)] == [("a",), ("d",)]


def test_a_chat_that_a_template_refuses_may_be_left_out(tmp_path: Path) -> None:
    """Of a template without a place for a system message, those that have none are kept."""
    form = JinjaChat(own(TEMPLATES["Mistral 0.1"], tokenizers_of_each_kind()["ByteLevel"]))
    records = [{**STRINGS, "prompt": text, **({"system": "S"} if text in "bc" else {})} for text in "abcd"]
    path = written(tmp_path, *records)
    with pytest.raises(UserError, match="pairs.jsonl:2: .*expected no system message"):
        RLDatasetLoader(path, form, 512, val_share=0.0, seed=0)
    reading = ReadingConfig(on_bad_record="drop")
    loader = RLDatasetLoader(path, form, 512, val_share=0.0, seed=0, reading=reading)
    assert loader.report.startswith(f"kept 2 of 4 pairs (2 faulty); first faulty: {path}:2")
    assert [said.users for said in loader.conversations(loader.train)] == [("a",), ("d",)]


def test_what_ends_the_start_in_any_case(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A file that cannot be read, a missing option, nothing left."""
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="cut.jsonl.gz: cannot be read"):
        load(tmp_path / "cut.jsonl.gz", tokenizer, on_bad_record="drop")
    pku = next(sample.record for sample in SAMPLES if sample.name == "PKU-SafeRLHF")
    with pytest.raises(UserError, match="^[^\n]*pairs.jsonl:1: a PKU-SafeRLHF record; give --prefer helpful[^\n]*$"):
        load(written(tmp_path, pku, pku), tokenizer, on_bad_record="drop")
    with pytest.raises(
        UserError, match="at least one usable pair, found none: kept 0 of 1 pairs .1 faulty.; first fau"
    ):
        load(written(tmp_path, {"x": 1}), tokenizer, on_bad_record="drop")
