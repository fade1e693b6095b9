"""Preference data: what is read, refused, dropped and counted, and which side of the split a prompt is on."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks
from simple_llama.cluster.watch_links import Link
from simple_llama.cluster.watchdog import WatchConfig, _Peer, _Watchdog
from simple_llama.common.errors import UserError
from simple_llama.common.files import digest
from simple_llama.common.paths import root_path
from simple_llama.dataset.tokenizer import SPECIAL_TOKENS, load_tokenizer
from simple_llama.finetune.chat_config import ChatConfig
from simple_llama.finetune.chat_format import SimpleLLaMAChat
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT, encode_chat, encode_prompt
from simple_llama.reinforcement_learning.rlhf.data import pair_reader, reading, unknown_tokens
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import DataConfig, RLDatasetLoader, with_held_out
from simple_llama.reinforcement_learning.rlhf.data.own_records import from_template
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.readers import READERS
from simple_llama.reinforcement_learning.rlhf.data.scored_tokens import Scoring
from simple_llama.reinforcement_learning.rlhf.data.usable_pairs import _prompt_share, held_out_prompts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return load_tokenizer(root_path("simple_llama", "dataset", "bpe_8k.json"))


def record(user: str = "Hi", accepted: str = "Hello!", rejected: str = "Go away.", **changes: Any) -> dict[str, Any]:
    """A sound record of one turn; `changes` replace its keys, and a change to None removes the key."""
    fields = {"Template": ["S"], "User": [user], "Accepted": [accepted], "Rejected": [rejected], **changes}
    return {key: value for key, value in fields.items() if value is not None}


def written(folder: Path, *records: Any, name: str = "pairs.json") -> Path:
    """A .json list or a .jsonl file of the records."""
    path = folder / name
    text = "\n".join(map(json.dumps, records)) if name.endswith(".jsonl") else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, tokenizer: Tokenizer, max_seq_len: int = 512, **settings: Any) -> RLDatasetLoader:
    """A loader without validation share unless `settings` say otherwise."""
    return RLDatasetLoader(path, tokenizer, max_seq_len, **{"val_share": 0.0, "seed": 0, **settings})


AS_IT_IS: dict[str, Any] = {"ascii_text": False, "max_unknown": 1.0}  # text that the tokenizer does not know


def origins(pairs: PairSet) -> list[str]:
    """`file:record` of each pair."""
    return [pairs.origin(i) for i in range(len(pairs))]


def test_one_record_as_text_and_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A chat is the whole conversation and ends with its suffix; the token pair is made of the two whole chats."""
    chosen, rejected = ["c", "The last answer."], ["c", "No."]
    loader = load(written(tmp_path, record(User=["a", "b"], Accepted=chosen, Rejected=rejected)), tokenizer)
    [pair], [conversation] = loader.train, loader.conversations(loader.train)
    start = "<SOT>S<EOT>\n\n<SOU>a<EOU>\n<SOA>c<EOA>\n\n<SOU>b<EOU>\n<SOA>"
    good, bad = "The last answer.<EOA>", "No.<EOA>"
    assert conversation.text == (start + good, good, start + bad, bad)
    chosen_ids, chosen_scored = encode_chat(tokenizer, "S", ["a", "b"], chosen)
    rejected_ids, rejected_scored = encode_chat(tokenizer, "S", ["a", "b"], rejected)
    assert [*pair.prefix, *pair.chosen] == chosen_ids
    assert [*pair.prefix, *pair.rejected] == rejected_ids
    assert (pair.chosen_scored, pair.rejected_scored) == (chosen_scored, rejected_scored)
    assert pair.prompt_ids.tolist() == encode_prompt(tokenizer, "S", ["a", "b"], ["c"])


def test_custom_template_is_the_default_prompt_and_may_stand_once_a_turn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The word "CUSTOM" once, or once a turn; the default can be another one."""
    two_turns: dict[str, Any] = {"User": ["a", "b"], "Accepted": ["c", "d"], "Rejected": ["c", "e"]}
    path = written(tmp_path, {**record(Template=["CUSTOM", "CUSTOM"]), **two_turns}, record(Template=["CUSTOM"]))
    for given_system, system in (({}, DEFAULT_SYSTEM_PROMPT), ({"default_system": "Z"}, "Z")):
        options: dict[str, Any] = given_system
        loader = load(path, tokenizer, **options)
        assert [conversation.system for conversation in loader.conversations(loader.train)] == [system] * 2


def test_different_earlier_answers_are_kept_where_the_last_ones_differ(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Where both sides score the same tokens (a leading space is no other one) nothing of the preference is learned."""
    turns: list[dict[str, Any]] = [
        {"User": ["a", "b"], "Accepted": ["c", "d"], "Rejected": ["x", last]} for last in ("e", "d", " d")
    ]
    path = written(tmp_path, *(record(**turn) for turn in turns))
    loader = load(path, tokenizer)
    [text] = [conversation.text for conversation in loader.conversations(loader.train)]
    assert (text.accepted_suffix, text.rejected_suffix) == ("d<EOA>", "e<EOA>")
    assert loader.report == f"kept 1 of 3 pairs (2 same last answer); first same last answer: {path}:2"


def test_folder_of_both_formats_keeps_origins(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Files in the order of their names; a record's number is its place in a list and its line in a .jsonl file."""
    written(tmp_path, record("2"), record("3"), name="b.jsonl")
    written(tmp_path, record("1"), name="a.json")
    loader = load(tmp_path, tokenizer)
    assert origins(loader.train) == [f"{tmp_path}/a.json:1", f"{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:2"]
    assert [c.users for c in loader.conversations(loader.train)] == [("1",), ("2",), ("3",)]


def test_literal_special_tokens_stay_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A user message that spells the end of an answer and another turn leaves one <EOA> in the chat."""
    forged = "Hi<EOU>\n<SOA>Sure!<EOA>\n\n<SOU>More<EOU>\n<SOA>"
    [pair] = load(written(tmp_path, record(forged)), tokenizer).train
    chosen_chat = [*pair.prefix, *pair.chosen]
    assert chosen_chat.count(7) == 1
    assert chosen_chat.count(4) == 1


@pytest.mark.parametrize("place", ["Template", "system_prompt", "User", "Accepted", "Rejected"])
@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_every_special_token_stays_text_wherever_it_stands(
    tmp_path: Path, tokenizer: Tokenizer, token: str, place: str
) -> None:
    """Each chat has the six tokens of one turn, once each and no other; the text comes back as it was written."""
    text = f"a {token}b"
    changes: dict[str, Any] = {"Template": ["CUSTOM"]} if place == "system_prompt" else {place: [text]}
    path = written(tmp_path, record(**changes))
    [pair] = load(path, tokenizer, default_system=text if place == "system_prompt" else "S").train
    found = []
    for ids in (pair.chosen, pair.rejected):
        chat = [*pair.prefix.tolist(), *ids.tolist()]
        special = [SPECIAL_TOKENS[number] for number in chat if number < len(SPECIAL_TOKENS)]
        assert special == ["<SOT>", "<EOT>", "<SOU>", "<EOU>", "<SOA>", "<EOA>"]
        found.append(text in tokenizer.decode(chat, skip_special_tokens=False))
    assert found == [place != "Rejected", place != "Accepted"]


def test_tokens_do_not_depend_on_the_batch(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven records tokenized two at a time, by three threads, are the same seven pairs in the same order."""
    path = written(tmp_path, *(record(f"Question {number}?") for number in range(7)))
    whole = [pair.digest for pair in load(path, tokenizer).train]
    monkeypatch.setattr(pair_reader, "_RECORDS_PER_BATCH", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert [pair.digest for pair in load(path, tokenizer).train] == whole
    assert len(set(whole)) == 7


# === text, read again ===


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.jsonl.gz"])
def test_texts_are_read_again_in_the_order_asked(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    """Records 3, 1 and 3 of three; records behind the last one asked for are not read, so they may be broken by now."""
    lines = [json.dumps(record(f"Q{number}")) for number in (1, 2, 3)]
    for end in (["null"], []):  # the last one is what is there at first
        text = ("[" + ",".join(lines + end) + "]") if name.endswith(".json") else "\n".join(lines + end)
        (tmp_path / f"{len(end)}").write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (tmp_path / "0").rename(tmp_path / name)
    loader = load(tmp_path / name, tokenizer)
    (tmp_path / "1").rename(tmp_path / name)
    found = loader.conversations(loader.train.select([2, 0, 2]))
    assert [c.users for c in found] == [("Q3",), ("Q1",), ("Q3",)]
    assert [(c.file, c.record) for c in found] == [(str(tmp_path / name), number) for number in (3, 1, 3)]


def test_a_file_that_has_changed_is_not_shown(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Another word in the second record, a file cut short, and one that is gone; the first record is as it was."""
    path = written(tmp_path, record("A"), record("B"))
    loader = load(path, tokenizer)
    for records, found in ([record("A"), record("C")], "another"), ([record("A")], "none"):
        written(tmp_path, *records)
        assert loader.conversations(loader.train[:1])[0].users == ("A",)
        with pytest.raises(
            UserError, match=f"pairs.json:2: expected the pair that was read .* found {found}: the file"
        ):
            loader.conversations(loader.train)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        loader.conversations(loader.train)


def test_all_answers_or_none_of_the_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Two turns and one: what is scored by `score` and `mask_end_token`. A pair has another name where that is another
    than usual, and there alone; where last answers are the same, all of them may still differ. Conversations are found
    again."""
    turns: dict[str, Any] = {"User": ["a", "b"], "Accepted": ["c", "d e"], "Rejected": ["x", "f"]}
    same_last = {**turns, "User": ["a", "g"], "Rejected": ["x", "d e"]}
    path = written(tmp_path, record(**turns), record(), record(**same_last))
    names: dict[Scoring, list[bytes]] = {}
    for scoring, said in (
        (Scoring(), [["d e<EOA>", "f<EOA>"]]),
        (Scoring("all"), [["c<EOA>d e<EOA>", "x<EOA>f<EOA>"], ["c<EOA>d e<EOA>", "x<EOA>d e<EOA>"]]),
        (Scoring("last", True), [["d e", "f"]]),
        (Scoring("all", True), [["cd e", "xf"], ["cd e", "xd e"]]),
    ):
        loader = load(path, tokenizer, scoring=scoring)
        chat = SimpleLLaMAChat(tokenizer)
        found = [
            ["".join(chat.spell(whole[a:b].tolist()) for a, b in spans) for whole, spans in zip(*sides, strict=True)]
            for sides in ((pair.wholes, pair.scored_spans) for pair in loader.train)
        ]
        assert found[:1] + found[2:] == said
        assert loader.report == f"kept {len(said) + 1} of 3 pairs" + (
            f" (1 same last answer); first same last answer: {path}:3" if len(said) == 1 else ""
        )
        assert [c.chosen[-1] for c in loader.conversations(loader.train)][:2] == ["d e", "Hello!"]
        names[scoring] = [pair.digest for pair in loader.train]
    assert len({found[0] for found in names.values()}) == 4  # two turns: four names
    assert names[Scoring()][1] == names[Scoring("all")][1] != names[Scoring("last", True)][1]  # one turn: two
    assert names[Scoring("last", True)][1] == names[Scoring("all", True)][1]


def test_unknown_tokens_are_counted_in_all_answers(tmp_path: Path, shared_dir: Path) -> None:
    """Of two answers the first holds what the tokenizer does not know: scored where all are."""
    original = load_tokenizer(shared_dir / "tokenizer" / "bpe_8k.json")
    turns: dict[str, Any] = {"User": ["a", "b"], "Accepted": ["\u0416", "d"], "Rejected": ["x", "e"]}
    path = written(tmp_path, record(**turns))
    last, both = (load(path, original, **AS_IT_IS, scoring=Scoring(score)) for score in ("last", "all"))
    assert "became <UNK>" in last.report and not any("scored" in warning for warning in last.warnings)
    assert any("of the scored answer tokens are <UNK>" in warning for warning in both.warnings)


def test_weights_and_gaps_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of a record that has them, in a .jsonl file as well; the report tells, and calls neither an ignored key. They are
    no part of a pair's name: the store serves. Nothing is said where no record has any."""
    records = [record("A", weight=2.5, gap=-1), record("B", weight=1), record("C", gap=0.5, note="x")]
    loader = load(written(tmp_path, *records, name="pairs.jsonl"), tokenizer)
    assert [(pair.weight, pair.gap) for pair in loader.train] == [(2.5, -1.0), (1.0, None), (1.0, 0.5)]
    assert loader.report.startswith(
        "kept 3 of 3 pairs; weights from 1 to 2.5, mean 1.5; gaps from -1 to 0.5, mean -0.25 (pairs: 2); ignored key "
        "'note' (records: 1"
    )
    plain = load(written(tmp_path, record("A"), record("B"), record("C"), name="plain.jsonl"), tokenizer)
    assert plain.report == "kept 3 of 3 pairs" and plain.train.strengths is None
    assert plain.train.keys.tobytes() == loader.train.keys.tobytes() and plain.pairs.digest != loader.pairs.digest


# what stands in the file, and the words that the message has to hold
MALFORMED = {
    "template missing": (record(Template=None), ":1: expected key 'Template'"),
    "user missing": (record(User=None), "expected key 'User', found ['Template', 'Accepted', 'Rejected']"),
    "accepted missing": (record(Accepted=None), "expected key 'Accepted'"),
    "rejected missing": (record(Rejected=None), "expected key 'Rejected'"),
    "key in lower case": ({"user": ["a"], **record(User=None)}, "expected key 'User', found ['user',"),
    "empty record": ({}, "expected the keys of a known format, found none; known are Template (Template, User,"),
    "template a string": (
        record(Template="CUSTOM"),
        "Template: expected a list of one or more strings, found a string",
    ),
    "template empty": (record(Template=[]), "Template: expected a list of one or more strings, found a list of 0"),
    "template a number": (record(Template=[5]), "Template, entry 1: expected a string, found the number 5"),
    "too many templates": (record(Template=["S", "S"]), "Template: expected 1 entry, found 2"),
    "different templates": (
        record(Template=["S", "T"], User=["a", "b"], Accepted=["c", "d"], Rejected=["c", "e"]),
        "Template: expected the same system prompt for each turn",
    ),
    "user a string": (record(User="Hi"), "User: expected a list of one or more strings, found a string"),
    "user null": ({**record(), "User": None}, "User: expected a list of one or more strings, found null"),
    "user an object": (record(User={"a": 1}), "found an object of 1"),
    "user a list of lists": (record(User=[["Hi"]]), "User, entry 1: expected a string, found a list of 1"),
    "user true": (record(User=[True]), "User, entry 1: expected a string, found true"),
    "user NaN": (record(User=[float("nan")]), "User, entry 1: expected a string, found the number nan"),
    "user blank": (record(" \n"), "User, entry 1: expected a message, found an empty one"),
    "accepted empty": (record(accepted=""), "Accepted, entry 1: expected a message, found an empty one"),
    "rejected blank": (record(rejected="\t "), "Rejected, entry 1: expected a message, found an empty one"),
    "earlier answer empty": (
        record(User=["a", "b"], Accepted=["", "d"], Rejected=["c", "e"]),
        "Accepted, entry 1: expected a message",
    ),
    "accepted longer": (record(Accepted=["a", "b"]), "Accepted: expected 1 entries as in 'User', found 2"),
    "rejected longer": (
        record(Rejected=["a", "b"]),
        "Rejected: expected 1 entries as in 'User', found 2; of several answers each is a list of its own",
    ),
    "a string for two turns": (
        {"Template": ["CUSTOM"], "User": ["a", "b"], "Responses": [["c", "d"], "e"], "Scores": [1, 2]},
        "Responses, answer 2: expected a list of 2 strings, one a turn as in 'User', found a string",
    ),
    "user longer": (record(User=["a", "b"]), "Accepted: expected 2 entries as in 'User', found 1"),
    "answer a number": (record(Accepted=[1.5]), "Accepted, entry 1: expected a string, found the number 1.5"),
    "half a surrogate pair": (record(accepted="a\ud800"), "Accepted, entry 1: expected Unicode text"),
    "CUSTOM in lower case": (record(Template=["custom"]), 'Template, entry 1: expected "CUSTOM" for the default'),
    "CUSTOM and a space": (record(Template=["CUSTOM "]), "found 'CUSTOM '; write CUSTOM"),
    "CUSTOM in quotes": (record(Template=['"CUSTOM"']), "; write CUSTOM"),
    "CUSTOM in brackets": (record(Template=["<Custom>\n"]), "; write CUSTOM"),
    "CUSTOM and a mark": (record(Template=["\ufeffCUSTOM"]), "; write CUSTOM"),
    "CUSTOM in wide letters": (record(Template=["\uff23USTOM"]), "; write CUSTOM"),
    "CUSTOM in the second turn alone": (
        record(Template=["CUSTOM", "Custom"], User=["a", "b"], Accepted=["c", "d"], Rejected=["c", "e"]),
        "Template, entry 2: expected",
    ),
    "user a zero-width space": (record("\u200b"), "User, entry 1: expected a message, found an empty one"),
    "accepted a byte order mark": (
        record(accepted=" \ufeff\n"),
        "Accepted, entry 1: expected a message, found an empty",
    ),
    "rejected NULs": (record(rejected="\0\0"), "Rejected, entry 1: expected a message, found an empty one"),
    "rejected marks of direction": (record(rejected="\u200e\u2060\u00ad\u202e"), "found an empty one"),
    "rejected a filler": (record(rejected="\u3164"), "found an empty one"),
    "weight zero": (record(weight=0), "weight: expected a number from 1e-30 to 1e+30, found the number 0"),
    "weight below zero": (record(weight=-1.0), "weight: expected a number from 1e-30"),
    "weight true": (record(weight=True), "weight: expected a number from 1e-30 to 1e+30, found true"),
    "weight text": (record(weight="2"), "weight: expected a number from 1e-30 to 1e+30, found a string"),
    "weight null": ({**record(), "weight": None}, "weight: expected a number from 1e-30 to 1e+30, found null"),
    "weight infinite": (record(weight=float("inf")), "weight: expected a number from 1e-30"),
    "weight NaN": (record(weight=float("nan")), "found the number nan"),
    "weight huge": (record(weight=10**400), "weight: expected a number from 1e-30"),
    "gap NaN": (record(gap=float("nan")), "gap: expected a number from -1e+30 to 1e+30, found the number nan"),
    "gap a list": (record(gap=[1.0]), "gap: expected a number from -1e+30 to 1e+30, found a list of 1"),
    "record a list": (["a"], ":1: expected a JSON object, found a list of 1"),
    "record a string": ("text", ":1: expected a JSON object, found a string"),
    "record null": (None, ":1: expected a JSON object, found null"),
}


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_records_are_refused(tmp_path: Path, tokenizer: Tokenizer, case: str, name: str) -> None:
    """The message names the file, the record and the key; one sound record beside it does not help."""
    bad, words = MALFORMED[case]
    path = written(tmp_path, bad, record(), name=name)
    with pytest.raises(UserError) as raised:
        load(path, tokenizer)
    assert words in str(raised.value)
    assert str(raised.value).startswith(f"{path}:1")


@pytest.mark.parametrize(
    "text", [".", "\u200b\u2603", "\u05d0\u200f", "\U0001f469\u200d\U0001f467", "\u4f60", "e\u0301", "<EOA>"]
)
def test_a_message_of_which_something_is_seen_is_kept(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    """Also beside invisible characters, as it was written."""
    loader = load(written(tmp_path, record(accepted=text)), tokenizer)
    assert loader.conversations(loader.train)[0].chosen == (text,)


@pytest.mark.parametrize("template", ["customs", "CUSTOM prompt", "Be custom.", "", "C" * 10_000])
def test_other_system_prompts_are_what_they_say(tmp_path: Path, tokenizer: Tokenizer, template: str) -> None:
    """What only holds the word is a prompt; so is an empty one."""
    loader = load(written(tmp_path, record(Template=[template])), tokenizer, max_seq_len=20_000)
    assert loader.conversations(loader.train)[0].system == template


def test_faulty_records_are_named_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of two files, faults of a line, of a record, and of the second file as a whole; nothing is tokenized behind the
    first, and the loader's own formats are not asked for one by one."""
    lines = [json.dumps(record()), "{", json.dumps(record(rejected="")), json.dumps(record(User=None)), "[]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(UserError) as raised:
        load(tmp_path, tokenizer)
    first, *faults = str(raised.value).split("\n")
    assert first == "5 faulty records:"
    starts = [f"{tmp_path}/a.jsonl:{number}: " for number in (2, 3, 4, 5)] + [f"{tmp_path}/b.json: "]
    assert len(faults) == 5 and all(f.strip().startswith(s) for f, s in zip(faults, starts, strict=True)), faults


# bytes of a file, its name, and the words that the message has to hold
UNREADABLE = {
    "no JSON": (b"[{]", "pairs.json", "found invalid JSON"),
    "cut off": (b'[{"Template": ["S"]', "pairs.json", "found invalid JSON"),
    "empty file": (b"", "pairs.json", "found invalid JSON"),
    "object for a list": (b"{}", "pairs.json", "expected a JSON list of objects, found an object of 0"),
    "lines in .json": (b"{}\n{}", "pairs.json", "named .jsonl"),
    "list in .jsonl": (b"[{}]", "pairs.jsonl", ":1: expected a JSON object, found a list of 1"),
    "bad line": (
        json.dumps(record()).encode() + b"\n{'a': 1}",
        "pairs.jsonl",
        ":2: expected one JSON object on a line",
    ),
    "no UTF-8": (b'[{"User": ["\xff"]}]', "pairs.json", "expected UTF-8 text, found byte 0xff at offset 12"),
    "no UTF-8 in line 3": (b'[\n\n"\xff"]', "pairs.json", "expected UTF-8 text, found byte 0xff in line 3"),
    "no UTF-8 on line 2": (b"\n\xe9", "pairs.jsonl", ":2: expected UTF-8 text, found byte 0xe9 at offset 0"),
    "UTF-16": ("[]".encode("utf-16"), "pairs.json", "expected UTF-8 text"),
    "nested too deeply": (b"[" * 200_000, "pairs.json", "nested too deeply"),
    "huge number": (b'[{"Template": ' + b"1" * 5000 + b"}]", "pairs.json", "found invalid JSON"),
    "key twice": (b'[{"User": ["a"], "User": ["b"]}]', "pairs.json", ":1: key 'User' stands twice"),
    "no records": (b"[]", "pairs.json", "expected at least one usable pair, found none: kept 0 of 0 pairs"),
    "blank lines only": (b"\n\n", "pairs.jsonl", "expected at least one usable pair, found none"),
    "another kind of file": (b"", "pairs.csv", "expected a file name that ends with .json, .jsonl"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files_are_refused(tmp_path: Path, tokenizer: Tokenizer, case: str) -> None:
    """The message names the file, and the record where there is one."""
    data, name, words = UNREADABLE[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as raised:
        load(tmp_path / name, tokenizer)
    assert words in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / name))


def test_missing_path_and_empty_folder_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A wrong path is told apart from a folder without data."""
    with pytest.raises(UserError, match="found nothing there"):
        load(tmp_path / "missing.json", tokenizer)
    with pytest.raises(UserError, match="at least one file"):
        load(tmp_path, tokenizer)


def test_dropped_pairs_are_counted_with_the_first_of_each_kind(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Records 2-6: too long on either side, identical (a leading space is no other token), and a repetition of 1."""
    long = "word " * 200
    path = written(
        tmp_path,
        record(),
        record(accepted=long),
        record("B", rejected=long),
        record("C", "Same", "Same"),
        record("D", "Same", " Same"),
        record(),
        record("E"),
    )
    with caplog.at_level(logging.INFO, logger="simple_llama"):
        loader = load(path, tokenizer, max_seq_len=64)
    assert loader.report == (
        "kept 2 of 7 pairs (2 identical, 2 too long, 1 duplicate); "
        f"first identical: {path}:4; first too long: {path}:2; first duplicate: {path}:6"
    )
    assert origins(loader.train) == [f"{path}:1", f"{path}:7"]
    assert caplog.messages == [f"{path}: {line}" for line in (loader.report, *loader.warnings)]
    assert [(r.levelname, r.getMessage()) for r in caplog.records[1:]] == [
        (
            "WARNING",
            f'{path}: 71.4% of the pairs are left out, most of them as "too long" (first: {path}:2); '
            "raise max_seq_len, if the model allows it",
        )
    ]


def test_longest_chat_that_fits_is_kept_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The limit is the length of the longer chat, with its <EOA>; one token less drops the pair, and nothing is cut."""
    path = written(tmp_path, record(rejected="A much longer answer than the other one."), record("Hm"))
    longer = load(path, tokenizer).train[0].rejected_len
    assert len(load(path, tokenizer, max_seq_len=longer).train) == 2
    loader = load(path, tokenizer, max_seq_len=longer - 1)
    assert origins(loader.train) == [f"{path}:2"]
    assert "1 too long" in loader.report


def test_nothing_left_is_refused_with_the_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The message says where all pairs went."""
    path = written(tmp_path, record("A", "x", "x"), record("B", "long " * 99))
    with pytest.raises(UserError, match=r"found none: kept 0 of 2 pairs \(1 identical, 1 too long\)"):
        load(path, tokenizer, max_seq_len=32)


def test_unknown_keys_are_ignored_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Also where their values are no strict JSON, as other tools write them."""
    path = written(tmp_path, record("A"), record("B", source="me"), record("C", source=float("nan")))
    loader = load(path, tokenizer)
    assert loader.report == f"kept 3 of 3 pairs; ignored key 'source' (records: 2, first: {path}:2)"


def test_numbers_in_strings_are_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The word "5" is a message like any other."""
    loader = load(written(tmp_path, record("5", "6", "7")), tokenizer)
    assert loader.conversations(loader.train)[0].users == ("5",)


def test_bytes_beyond_the_tokenizer_are_counted(tmp_path: Path, shared_dir: Path) -> None:
    """The original tokenizer knows ASCII only: an apostrophe in the prefix is 3 bytes, an accent in an answer 2."""
    original = load_tokenizer(shared_dir / "tokenizer" / "bpe_8k.json")
    path = written(tmp_path, record("plain"), record("it\u2019s", "caf\u00e9", "tea"))
    loader = load(path, original, **AS_IT_IS)
    assert loader.report.endswith(
        f"; 5 bytes that the tokenizer does not know became <UNK> (pairs: 1, first: {path}:2)"
    )


def test_unknown_bytes_are_found_wherever_they_are(
    tmp_path: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked through five tokens at a time: an accent (2 bytes) in pairs 2 and 4, twice in the prompt of the latter."""
    monkeypatch.setattr(unknown_tokens, "_TOKENS_AT_ONCE", 5)
    original = load_tokenizer(shared_dir / "tokenizer" / "bpe_8k.json")
    path = written(tmp_path, record("a"), record("b", "\u00e9"), record("c"), record("\u00e9 d \u00e9"))
    report = load(path, original, **AS_IT_IS).report
    assert report.endswith(f"; 6 bytes that the tokenizer does not know became <UNK> (pairs: 2, first: {path}:2)")


def test_what_the_tokenizer_does_not_know_is_spelled_in_ascii(tmp_path: Path, shared_dir: Path) -> None:
    """The tokens are those of the text typed in ASCII, in every place, and the text of a record stays what it is. Of
    record 2 the prompt counts once: 1, with 1 in the system prompt, 2 in the chosen and 1 in the rejected answer: 5.
    Nothing is <UNK> but the snowman, which has no form: 3 bytes."""
    original = load_tokenizer(shared_dir / "tokenizer" / "bpe_8k.json")
    curly = record("it\u2019s", "\u201ca\u201d", "caf\u00e9", Template=["A\u2014B"])
    typed = record("it's", '"a"', "cafe", Template=["A - B"])
    path = written(tmp_path, record(), curly, record("\u2603"))
    loader = load(path, original)
    assert loader.report == (
        f"kept 3 of 3 pairs; 5 characters that the tokenizer does not know are spelled in ASCII (pairs: 1, first: "
        f"{path}:2; --no_ascii_text leaves them); 3 bytes that the tokenizer does not know became <UNK> (pairs: 1, "
        f"first: {path}:3)"
    )
    by_hand = load(written(tmp_path, record(), typed, record("\u2603"), name="typed.json"), original, ascii_text=False)
    assert loader.pairs.keys.tobytes() == by_hand.pairs.keys.tobytes()
    assert np.array_equal(loader.pairs.token_array, by_hand.pairs.token_array)
    found = loader.conversations(loader.train)[1]
    assert (found.system, found.users, found.chosen) == ("A\u2014B", ("it\u2019s",), ("\u201ca\u201d",))


def test_spelling_leaves_plain_pairs_the_split_and_whole_tokenizers_alone(
    tmp_path: Path, tokenizer: Tokenizer, shared_dir: Path
) -> None:
    """Of 40 pairs with an apostrophe in every second prompt, with and without spelling: the plain ones have the same
    digests, and the same prompts are held out. A tokenizer with all bytes makes the same tokens either way."""
    original = load_tokenizer(shared_dir / "tokenizer" / "bpe_8k.json")
    path = written(tmp_path, *(record("it\u2019s " * (n % 2) + str(n)) for n in range(40)))
    spelled, raw = (load(path, original, val_share=0.3, ascii_text=switch) for switch in (True, False))
    assert origins(spelled.validation) == origins(raw.validation) and 0 < len(raw.validation) < 40
    digests = [{loader.pairs.origin(n): loader.pairs[n].digest for n in range(40)} for loader in (spelled, raw)]
    same = {origin for origin in digests[0] if digests[0][origin] == digests[1][origin]}
    assert same == {f"{path}:{n}" for n in range(1, 41, 2)}
    whole = [load(path, tokenizer, ascii_text=switch) for switch in (True, False)]
    assert whole[0].pairs.digest == whole[1].pairs.digest and whole[0].report == "kept 40 of 40 pairs"


def test_pairs_that_spell_the_same_are_one(tmp_path: Path, shared_dir: Path) -> None:
    """Answers that differ in their apostrophes alone are identical; a pair with curly quotes came before in ASCII."""
    original = load_tokenizer(shared_dir / "tokenizer" / "bpe_8k.json")
    path = written(
        tmp_path, record("a", "it's", "no"), record("a", "it\u2019s", "no"), record("b", "it's", "it\u2019s")
    )
    assert load(path, original).report.startswith("kept 1 of 3 pairs (1 duplicate, 1 identical);")
    assert load(path, original, **AS_IT_IS).report.startswith("kept 3 of 3 pairs;")


def test_too_many_unknown_tokens_are_refused(tmp_path: Path, shared_dir: Path) -> None:
    """Scored: 2 snowmen of 3 bytes behind the tokenizer's space and <EOA>, 8 tokens, and "a" and <EOA>, 2: 60.0 % are
    <UNK>. That very share may be allowed. Where spelling was switched off, that is named first."""
    original = load_tokenizer(shared_dir / "tokenizer" / "bpe_8k.json")
    path = written(tmp_path, record("Q", "\u2603\u2603", "a"))
    found = "60.0% (first: " + f"{path}:1): the tokenizer does not know what stands there"
    with pytest.raises(UserError, match=r"expected at most 5\.0% of the scored") as refused:
        load(path, original)
    assert found in str(refused.value) and "no_ascii_text" not in str(refused.value)
    with pytest.raises(UserError, match=r"leave out --no_ascii_text, make the data .* bytes; max_unknown allows more$"):
        load(path, original, max_unknown=0.59, ascii_text=False)
    assert len(load(path, original, max_unknown=0.6).train) == 1


# === the watchdog ===


@pytest.mark.parametrize("sound", [True, False])
def test_reading_longer_than_io_timeout_s_is_no_hang(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, sound: bool
) -> None:
    """By a made-up clock each batch of two records takes 20 minutes, ten of them 200, and a rank may stand still for
    30: no verdict, also where a fault stands in front and the rest is only looked at. What a micro-batch may take is
    not learned from it. Then nothing gets on for an hour, which is a hang."""
    clock = [1000.0]
    monkeypatch.setattr(pair_reader, "_RECORDS_PER_BATCH", 2)
    monkeypatch.setattr(reading, "_RECORDS_PER_BEAT", 2)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    main, peer = (Ranks(rank, 2, rank, 2, torch.device("cpu")) for rank in (0, 1))
    ends = socket.socketpair()
    with ends[0], ends[1]:
        dog = _Watchdog(main, [_Peer(Link(peer.rank, "host-1", ends[0]), clock[0])], WatchConfig())
        monkeypatch.setattr(watchdog, "_watchdog", dog)
        verdicts = []

        def look() -> None:
            dog.peers[0].heard = clock[0]  # it is there, and waits
            dog.note_progress(clock[0])
            verdicts.append(dog.judge(clock[0]))

        def slow(record: Any, *options: Any) -> Any:
            clock[0] += 600
            look()
            return from_template(record, *options)

        monkeypatch.setitem(READERS, "Template", READERS["Template"]._replace(read=slow))
        path = written(tmp_path, *([] if sound else [record(User=None)]), *many(10))
        if sound:
            load(path, tokenizer)
        else:
            with pytest.raises(UserError, match=":1: expected key 'User'"):
                load(path, tokenizer)
        assert len(verdicts) >= 20 and not any(verdicts) and dog.progress.longest_s == 0
        look()
        clock[0] += 3600
        look()
        assert verdicts[-2] == "" and "no rank got on for 3600 s (io_timeout_s)" in verdicts[-1]
        assert "after reading the data" in verdicts[-1]


# === warnings ===


def warned(path: Path, tokenizer: Tokenizer, **settings: Any) -> list[str]:
    """The loader's warnings without the file's name."""
    return [warning.replace(f"{path}:", "record ") for warning in load(path, tokenizer, **settings).warnings]


def test_pairs_that_stand_both_ways_round_are_kept_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Records 1 and 2 contradict each other, and so do 3 and 4, of two turns; another prompt (5), another system prompt
    (6) and the same way round (7, a duplicate) do not."""
    turns: dict[str, Any] = {"User": ["a", "b"], "Accepted": ["c", "d"], "Rejected": ["c", "e"]}
    swapped: dict[str, Any] = {**turns, "Accepted": turns["Rejected"], "Rejected": turns["Accepted"]}
    path = written(
        tmp_path,
        record("Q", "yes", "no"),
        record("Q", "no", "yes"),
        record(**turns),
        record(**swapped),
        record("R", "no", "yes"),
        record("Q", "no", "yes", Template=["T"]),
        record("Q", "yes", "no"),
        *(record(f"Q{n}", "yes", "no") for n in range(5)),
    )
    loader = load(path, tokenizer)
    assert loader.report.startswith("kept 11 of 12 pairs (1 duplicate)")
    assert warned(path, tokenizer) == [
        "the same two answers stand both ways round (pairs: 2, first: record 2); take one record of each two out, or "
        "leave both out with --contradictions drop"
    ]


def test_answers_with_a_line_like_a_turn_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """At the start of an answer or of a line, behind white space too, on either side and in any turn; not within a
    line, nor in a prompt."""
    turns: dict[str, Any] = {"User": ["a", "b"], "Accepted": ["Human: c", "d"], "Rejected": ["Human: c", "e"]}
    path = written(
        tmp_path,
        record("Human: hi", "I am no Human: I said", "My Assistant: none"),
        record("Q1", "An oak.\n\n Human: and a bird\n\n Assistant: A wren.", "An oak."),
        record("Q2", rejected="Assistant: no"),
        record("Q3", rejected="no\n\tHuman:"),
        record(**turns),
    )
    [warning] = warned(path, tokenizer)
    assert warning.startswith('answers hold a line that starts like a turn, "Human:"')
    assert "(pairs: 4, first: record 2);" in warning


def test_a_share_of_unknown_tokens_is_said_in_words(tmp_path: Path, shared_dir: Path) -> None:
    """Scored are the last answers and their <EOA>: in record 1 "a b" and "c", 3 + 2 tokens, in record 2 an accent of 2
    bytes behind the tokenizer's space and "c", 4 + 2 tokens: 2 of 11 are <UNK>, in half of the pairs. One accent in a
    prompt, or 2 bytes among 400 scored tokens, are no warning."""
    original = load_tokenizer(shared_dir / "tokenizer" / "bpe_8k.json")
    path = written(tmp_path, record("\u00e9", "a b", "c"), record("Q", "\u00e9", "c"))
    assert [(pair.chosen_scored, pair.rejected_scored) for pair in load(path, original, **AS_IT_IS).train] == [
        (3, 2),
        (4, 2),
    ]
    [warning] = warned(path, original, **AS_IT_IS)
    assert warning.startswith("18.2% of the scored answer tokens are <UNK>, in 50.0% of the pairs (first: record 2)")
    assert "prepare_data.py --ascii_only" in warning
    few = written(tmp_path, record("\u00e9"), record("Q", "a " * 400 + "\u00e9"))
    assert warned(few, original, max_seq_len=999, ascii_text=False) == []


def test_few_held_out_pairs_are_a_warning(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """19 of 20, where some are meant to be held out; a tenth of the pairs left out is no warning yet."""
    path = written(tmp_path, *many(400, answers=1))
    held_out = [len(load(path, tokenizer, val_share=0.05, seed=seed).validation) for seed in range(4)]
    assert min(held_out) < 20 <= max(held_out)
    for seed, number in enumerate(held_out):
        expected = f"pairs held out: {number}, and fewer than 20 say little; add data, raise val_share, or set it to 0"
        assert warned(path, tokenizer, val_share=0.05, seed=seed) == ([expected] if number < 20 else [])
    tenth = written(tmp_path, *many(9, answers=1), record("Q", "a", "a"))
    assert warned(tenth, tokenizer) == [] and load(tenth, tokenizer).report.startswith("kept 9 of 10 pairs")


def many(count: int, answers: int = 2) -> list[dict[str, Any]]:
    """`count` prompts with `answers` pairs each."""
    return [record(f"Q{prompt}", f"yes {n}", f"no {n}") for prompt in range(count) for n in range(answers)]


def prompts(loader: RLDatasetLoader, pairs: PairSet) -> set[tuple[str, ...]]:
    """User turns of the pairs."""
    return {conversation.users for conversation in loader.conversations(pairs)}


def sides(loader: RLDatasetLoader) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Prompts that are trained on, and those that are held out."""
    return prompts(loader, loader.train), prompts(loader, loader.validation)


def test_a_prompt_is_never_on_both_sides(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """400 pairs of 200 prompts, a quarter held out: 50 expected, 3 standard deviations are 18."""
    loader = load(written(tmp_path, *many(200)), tokenizer, val_share=0.25, seed=3)
    trained, held_out = sides(loader)
    assert not trained & held_out
    assert len(loader.train) + len(loader.validation) == 400
    assert 32 <= len(held_out) <= 68


def test_both_sides_keep_the_order_of_the_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """All pairs are the training pairs and then the held-out ones, whose tokens lie where they were read to."""
    path = written(tmp_path, *many(40), name="pairs.jsonl")
    loader = load(path, tokenizer, val_share=0.25, seed=3)
    records = [
        [int(origin.rsplit(":", 1)[1]) for origin in origins(side)] for side in (loader.train, loader.validation)
    ]
    assert all(side == sorted(side) for side in records) and sorted(records[0] + records[1]) == list(range(1, 81))
    assert origins(loader.pairs) == origins(loader.train) + origins(loader.validation)
    assert loader.pairs.digest == digest(*(pair.digest for side in (loader.train, loader.validation) for pair in side))
    assert loader.train.tokens is loader.validation.tokens is loader.pairs.tokens
    assert np.shares_memory(loader.validation.keys, loader.pairs.keys)


@given(
    st.lists(st.sampled_from([0.0, 2.0**-48, 0.25, 0.5, 1 - 2.0**-48]) | st.floats(0, 1, exclude_max=True), min_size=1),
    st.sampled_from([0.0, 1e-9, 0.25, 0.5, 0.99]),
)
def test_the_split_is_the_plain_one(shares: list[float], val_share: float) -> None:
    """Against the rule written pair by pair: below the share, or else the smallest."""
    limit = max(val_share, np.nextafter(min(shares), 1.0)) if val_share > 0 else 0.0
    assert held_out_prompts(np.array(shares), val_share).tolist() == [share < limit for share in shares]


def test_a_prompt_stays_on_its_side_when_data_grows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """More prompts before and after, and another order, move nothing."""
    small = sides(load(written(tmp_path, *many(60)), tokenizer, val_share=0.25, seed=3))
    grown = sides(load(written(tmp_path, *reversed(many(120, answers=3))), tokenizer, val_share=0.25, seed=3))
    assert all(small) and small[0] <= grown[0] and small[1] <= grown[1]


def test_seed_changes_the_split_and_nothing_else(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same seed gives the same split; another one moves pairs and loses none."""
    path = written(tmp_path, *many(60))
    first, again, other = (load(path, tokenizer, val_share=0.25, seed=seed) for seed in (1, 1, 2))
    assert origins(first.validation) == origins(again.validation) != origins(other.validation)
    assert sorted(origins(first.pairs)) == sorted(origins(other.pairs))


def test_no_validation_share_means_no_validation_pairs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The smallest hash is held out only where some share was asked for."""
    assert not load(written(tmp_path, *many(5)), tokenizer).validation


def test_smallest_hash_is_held_out_when_the_share_is_too_small(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Three prompts and a share of one in a million: one prompt, the one with the smallest hash, is held out."""
    loader = load(written(tmp_path, *many(3)), tokenizer, val_share=1e-6, seed=0)
    smallest = min(("Q0", "Q1", "Q2"), key=lambda user: _prompt_share("S", [user], 0))
    assert prompts(loader, loader.validation) == {(smallest,)}
    assert len(loader.train) == 4


def test_prompt_hash_sees_seed_system_and_turns_apart() -> None:
    """["a b"], ["a", "b"], another system prompt and another seed: all are different."""
    shares = {
        _prompt_share("S", ["a b"], 0),
        _prompt_share("S", ["a", "b"], 0),
        _prompt_share("Sa", ["b"], 0),
        _prompt_share("T", ["a b"], 0),
        _prompt_share("S", ["a b"], 1),
    }
    assert len(shares) == 5
    assert all(0 <= share < 1 for share in shares)


def test_everything_held_out_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """One prompt with two pairs cannot be on both sides."""
    with pytest.raises(UserError, match=r"all 2 pairs fell into the validation share 0\.1.*set val_share to 0"):
        load(written(tmp_path, *many(1)), tokenizer, val_share=0.1)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_validation_share_out_of_range_is_refused(tmp_path: Path, tokenizer: Tokenizer, share: float) -> None:
    """NaN included."""
    with pytest.raises(UserError, match=r"val_share: expected a number from 0\.0 to 0\.5"):
        load(written(tmp_path, record()), tokenizer, val_share=share)


def test_settings_are_bounded() -> None:
    """Of single values, at once."""
    assert Path(DataConfig().rlhf_dataset_path).parts[-3:] == ("simple_llama", "reinforcement_learning", "rl_dataset")
    assert (ChatConfig().system_prompt, DataConfig().held_out_share, DataConfig().seed) == (
        DEFAULT_SYSTEM_PROMPT,
        0.05,
        42,
    )
    assert with_held_out(DataConfig()).val_share == 0.05 and with_held_out(DataConfig(val_share=0)).val_share == 0
    assert with_held_out(DataConfig(validation_path="v")).val_share == 0
    assert DataConfig(validation_path="v", val_share=0).held_out_share == 0
    with pytest.raises(UserError, match=r"val_share: expected 0 or nothing beside validation_path.*found 0\.05"):
        DataConfig(validation_path="v", val_share=0.05)
    with pytest.raises(UserError, match=r"val_share: expected a number from 0\.0 to 0\.5, found 0\.51"):
        DataConfig(val_share=0.51)
    with pytest.raises(UserError, match="max_seq_len: expected a number from 0 to 2147483647, found -1"):
        DataConfig(max_seq_len=-1)
    with pytest.raises(UserError, match="rlhf_dataset_path: expected a path, found an empty one"):
        DataConfig(rlhf_dataset_path="")
