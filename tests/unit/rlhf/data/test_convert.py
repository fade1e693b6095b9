"""Conversion of HH-RLHF and PKU-SafeRLHF records: literal output, stated rules, counts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.format_llm_prompt import format_chat
from simple_llama.reinforcement_learning.rlhf.data.convert import PrepareConfig, prepare
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader


def hh(chosen: str, rejected: str) -> dict[str, str]:
    """An HH-RLHF record; H: and A: at the start of a line stand for the markers."""
    spelled = [text.replace("H:", "\n\nHuman:").replace("A:", "\n\nAssistant:") for text in (chosen, rejected)]
    return {"chosen": spelled[0], "rejected": spelled[1]}


def pku(better: int = 0, safer: int = 1, safe: tuple[bool, bool] = (False, True), **changes: Any) -> dict[str, Any]:
    """A PKU-SafeRLHF record: answer 0 is more helpful, answer 1 safer."""
    return {
        "prompt": "How?",
        "response_0": "Like this.",
        "response_1": "I would not.",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": better,
        "safer_response_id": safer,
        **changes,
    }


def source(folder: Path, *records: Any, name: str = "raw.jsonl") -> str:
    """A .jsonl file of the records."""
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


def converted(folder: Path, *records: Any, **settings: Any) -> tuple[list[dict[str, Any]], str]:
    """The pairs that are written for the records, and the report without its file name and the format."""
    output = folder / "out.jsonl"
    output.unlink(missing_ok=True)
    report = prepare(PrepareConfig(inputs=(source(folder, *records),), output=str(output), **settings))
    report, _, found = report.split(": ", 1)[1].partition("; read as ")
    assert found == ("PKU-SafeRLHF" if "response_0" in records[0] else "HH-RLHF")
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]], report


def test_hh_record_of_two_turns(tmp_path: Path) -> None:
    """Different earlier answers to the same Human turns are kept as they are; white space around a message goes."""
    pairs, report = converted(tmp_path, hh("H: Hi A: Hello. H: Why? A: Because.", "H: Hi A: Hey. H: Why?  A: No.\n"))
    assert pairs == [
        {
            "Template": ["CUSTOM"],
            "User": ["Hi", "Why?"],
            "Accepted": ["Hello.", "Because."],
            "Rejected": ["Hey.", "No."],
        }
    ]
    assert report == "kept 1 of 1 pairs"


def test_weights_and_gaps_go_along(tmp_path: Path) -> None:
    """As they are; a weight of 1 need not be said. Categories too: of PKU-SafeRLHF the harms of either answer."""
    [pair], _ = converted(tmp_path, {**hh("H: a A: b", "H: a A: c"), "weight": 0.5, "gap": -2, "category": "x"})
    assert (pair["weight"], pair["gap"], pair["category"]) == (0.5, -2.0, "x")
    harms = [{"Theft": True, "Insult": False}, {"Theft": True, "Fraud": True}]
    record = pku(weight=1, response_0_harm_category=harms[0], response_1_harm_category=harms[1])
    [pair], _ = converted(tmp_path, record, prefer="safety")
    assert ("weight" in pair, "gap" in pair, pair["category"]) == (False, False, ["Fraud", "Theft"])


def test_hh_transcript_may_start_without_a_blank_line(tmp_path: Path) -> None:
    """As in copies whose texts were stripped."""
    bare, usual = "Human: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c\n\n"
    pairs, _ = converted(tmp_path, {"chosen": bare, "rejected": usual})
    assert (pairs[0]["User"], pairs[0]["Accepted"], pairs[0]["Rejected"]) == (["a"], ["b"], ["c"])


def test_hh_marker_counts_only_at_the_start_of_a_paragraph(tmp_path: Path) -> None:
    """ "Human:" in a line, after one line feed or after another marker is text."""
    chosen = "\n\nHuman: My Human: tag\nHuman: here\n\nAssistant: Human: yes\n\nThen Assistant: no"
    pairs, _ = converted(tmp_path, {"chosen": chosen, "rejected": chosen + "!"})
    assert pairs[0]["User"] == ["My Human: tag\nHuman: here"]
    assert pairs[0]["Accepted"] == ["Human: yes\n\nThen Assistant: no"]


# records without a usable pair, and the reason that is counted
DROPPED = {
    "ends with Human": (hh("H: Hi A: Yes. H: Why?", "H: Hi A: No."), "without a reply"),
    "no turns": ({"chosen": "Hello", "rejected": "Hi"}, "not starting with a Human turn"),
    "Assistant first": (hh("A: Hi", "A: Ho"), "not starting with a Human turn"),
    "two Humans": (hh("H: a H: b A: c", "H: a H: b A: d"), "with turns that do not alternate"),
    "two Assistants": (hh("H: a A: b A: c", "H: a A: b A: d"), "with turns that do not alternate"),
    "other question": (hh("H: a A: b", "H: x A: c"), "with different Human turns"),
    "more turns": (hh("H: a A: b H: c A: d", "H: a A: b"), "with different Human turns"),
    "empty reply": (hh("H: a A:", "H: a A: b"), "with an empty answer"),
    "empty earlier reply": (hh("H: a A: H: b A: c", "H: a A: H: b A: d"), "with an empty answer"),
    "empty question": (hh("H: A: b", "H: A: c"), "with an empty user message"),
    "same answers": (hh("H: a A: b", "H: a A:  b "), "with identical answers"),
    "same last reply": (hh("H: a A: b H: c A: d", "H: a A: x H: c A: d"), "with the same last answer"),
    "a reply that nobody sees": (hh("H: a A: \u200b\ufeff", "H: a A: c"), "with an empty answer"),
    "a question that nobody sees": (hh("H: \0 A: b", "H: \0 A: c"), "with an empty user message"),
    "half a surrogate pair": (hh("H: a A: b\ud800", "H: a A: c"), "with half of a surrogate pair"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_hh_records_without_a_pair_are_dropped_and_counted(tmp_path: Path, case: str) -> None:
    """The good record beside it is kept, and the report names the bad one."""
    bad, reason = DROPPED[case]
    pairs, report = converted(tmp_path, hh("H: q A: yes", "H: q A: no"), bad)
    assert [pair["User"] for pair in pairs] == [["q"]]
    assert report == f"kept 1 of 2 pairs (1 {reason}); first {reason}: {tmp_path}/raw.jsonl:2"


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_hh_transcripts_with_other_line_ends(tmp_path: Path, ends: str) -> None:
    """Read as if they had line feeds, also within a message, and counted."""
    chosen, rejected = (f"\n\nHuman: Name a\ntree\n\nAssistant: {answer}\n\n" for answer in ("An\noak.", "A brick."))
    record = {"chosen": chosen.replace("\n", ends), "rejected": rejected.replace("\n", ends)}
    pairs, report = converted(tmp_path, record, hh("H: a A: b", "H: a A: c"))
    assert (pairs[0]["User"], pairs[0]["Accepted"], pairs[0]["Rejected"]) == (
        ["Name a\ntree"],
        ["An\noak."],
        ["A brick."],
    )
    assert report == "kept 2 of 2 pairs; read CR LF as LF in 1 records"


def test_hh_turns_that_were_not_recognised_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A space before the marker: kept as text, and counted, with the first record; so is a record dropped of six."""
    hidden = hh("H: Name a tree A: An oak.", "H: Name a tree A: An oak.\n\n Human: and a bird\n\n Assistant: A brick.")
    sound = [hh(f"H: {n} A: b", f"H: {n} A: c") for n in range(4)]
    pairs, report = converted(tmp_path, sound[0], hidden, *sound[1:], hh("H: a A: b", "H: a A: b"))
    assert pairs[1]["Rejected"] == ["An oak.\n\n Human: and a bird\n\n Assistant: A brick."]
    assert report.startswith("kept 5 of 6 pairs (1 with identical answers)")
    said = [
        (record.levelname, record.getMessage().removeprefix(f"{tmp_path}/out.jsonl: ")) for record in caplog.records
    ]
    assert said == [
        (
            "WARNING",
            '16.7% of the pairs are left out, most of them as "with identical answers" (first: '
            f"{tmp_path}/raw.jsonl:6); look at how the data was made",
        ),
        (
            "WARNING",
            'answers hold a line that starts like a turn, "Human:" or "Assistant:", and are trained on as text '
            f"(pairs: 1, first: {tmp_path}/raw.jsonl:2); where a turn is meant, mend the record",
        ),
    ]


def test_pku_labels_decide(tmp_path: Path) -> None:
    """Answer 0 is better and unsafe, answer 1 safer: helpfulness takes 0 (if unsafe answers are kept), safety 1."""
    safe_first = {"Template": ["CUSTOM"], "User": ["How?"], "Accepted": ["I would not."], "Rejected": ["Like this."]}
    assert converted(tmp_path, pku(), prefer="safety") == ([safe_first], "kept 1 of 1 pairs")
    [helpful], _ = converted(tmp_path, pku(), prefer="helpfulness", keep_unsafe=True)
    assert (helpful["Accepted"], helpful["Rejected"]) == (["Like this."], ["I would not."])


def test_pku_pairs_with_an_unsafe_preferred_answer_are_dropped(tmp_path: Path) -> None:
    """Both unsafe (record 2): dropped whichever label decides, kept on request."""
    records = (pku(), pku(safe=(False, False)))
    _, report = converted(tmp_path, *records, prefer="safety")
    reason = "with an unsafe preferred answer"
    assert report == f"kept 1 of 2 pairs (1 {reason}); first {reason}: {tmp_path}/raw.jsonl:2"
    assert len(converted(tmp_path, *records, prefer="safety", keep_unsafe=True)[0]) == 2


def test_pku_pairs_on_which_both_labels_agree(tmp_path: Path) -> None:
    """Answer 1 is better and safer in record 1; in record 2 answer 0 is better. `helpful` and `safe` are the labels."""
    agree, disagree = pku(better=1), pku(prompt="Why?", safe=(True, True))
    pairs, report = converted(tmp_path, agree, disagree, prefer="both")
    assert [pair["Accepted"] for pair in pairs] == [["I would not."]]
    assert report.startswith("kept 1 of 2 pairs (1 whose more helpful answer is not the safer one)")
    for name, old in (("helpful", "helpfulness"), ("safe", "safety")):
        assert converted(tmp_path, disagree, prefer=name) == converted(tmp_path, disagree, prefer=old)


def test_pku_identical_and_empty_answers_are_dropped(tmp_path: Path) -> None:
    """White space around an answer does not make it another one."""
    same, empty = pku(response_0="I would not. "), pku(response_0=" ")
    _, report = converted(tmp_path, pku(), same, empty, prefer="safety")
    assert report.startswith("kept 1 of 3 pairs (1 with an empty answer, 1 with identical answers);")


# records, settings, and the words that the message has to hold
REFUSED = {
    "other keys": ([{"question": "a"}], {}, "raw.jsonl:1: expected the keys of a known format, found 'question' (a "),
    "another kind later": ([hh("H: a A: b", "H: a A: c"), {"x": 1}], {}, "raw.jsonl:2: expected key 'chosen' with a"),
    "transcript a list": ([{"chosen": ["a"], "rejected": "b"}], {}, "found 'chosen' (a list of 1), 'rejected' (a str"),
    "one a list": (
        [{"chosen": ["a"], "rejected": "b"}],
        {"data_format": "HH-RLHF"},
        "chosen: expected a string, found",
    ),
    "several": (
        [hh("H: a A: b", "H: a A: c"), {"x": 1}, pku(better=2), {"chosen": "a", "rejected": 1}],
        {},
        "3 faulty records:\n  ",
    ),
    "no preference chosen": (
        [pku(), pku()],
        {},
        "raw.jsonl:1: a PKU-SafeRLHF record; give --prefer helpful, --prefer safe, or --prefer both",
    ),
    "label missing": (
        [{key: value for key, value in pku().items() if key != "safer_response_id"}],
        {"prefer": "safety"},
        "expected key 'safer_response_id' with a whole number",
    ),
    "label true": ([pku(safer_response_id=True)], {"prefer": "safety"}, "expected a whole number, found true"),
    "label 2": ([pku(safer=2)], {"prefer": "safety"}, "safer_response_id: expected 0 or 1, found 2"),
    "safety a number": (
        [pku(is_response_0_safe=0)],
        {"prefer": "safety"},
        "is_response_0_safe: expected true or false, found",
    ),
    "idle prefer": ([hh("H: a A: b", "H: a A: c")], {"prefer": "safety"}, "expected a PKU-SafeRLHF input"),
    "idle keep_unsafe": ([hh("H: a A: b", "H: a A: c")], {"keep_unsafe": True}, "expected a PKU-SafeRLHF input"),
    "TRL's form": (
        [hh("H: a A: b", "H: a A: c"), {"prompt": "a", "chosen": "b", "rejected": "c"}],
        {},
        "raw.jsonl:2: expected the format HH-RLHF of the records before it, found prompt (a string) as TRL has it",
    ),
    "TRL's form, read as transcripts": (
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        {"data_format": "HH-RLHF"},
        "raw.jsonl:1: expected whole transcripts under chosen and rejected (HH-RLHF), found a prompt beside them",
    ),
    "nothing usable": ([hh("H: a A: b", "H: a A: b")], {}, "found none: kept 0 of 1 pairs (1 with identical answers)"),
    "negative limit": ([hh("H: a A: b", "H: a A: c")], {"limit": -1}, "limit: expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_inputs_write_nothing(tmp_path: Path, case: str) -> None:
    """The message says what was expected; there is no output file, nor a part of one."""
    records, settings, words = REFUSED[case]
    with pytest.raises(UserError) as raised:
        converted(tmp_path, *records, **settings)
    assert words in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.jsonl"]


def test_output_name_is_checked(tmp_path: Path) -> None:
    """Before anything is read; nothing is overwritten, and an input is called one, however its path is spelled."""
    file = source(tmp_path, hh("H: a A: b", "H: a A: c"))
    with pytest.raises(UserError, match=r"ends with \.json or \.jsonl"):
        prepare(PrepareConfig(inputs=(file,), output=str(tmp_path / "out.csv")))
    with pytest.raises(UserError, match="another file than the inputs"):
        prepare(PrepareConfig(inputs=(file,), output=f"{tmp_path}/./raw.jsonl"))
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(UserError, match=r"out\.json: expected nothing there yet; choose another --output"):
        prepare(PrepareConfig(inputs=(file,), output=str(tmp_path / "out.json")))
    assert (tmp_path / "out.json").read_text() == "mine"
    with pytest.raises(UserError, match="expected at least one file"):
        prepare(PrepareConfig(inputs=(), output=str(tmp_path / "out.json")))


def test_several_inputs_of_both_kinds_and_a_limit(tmp_path: Path) -> None:
    """Inputs are read in the given order; reading stops at the limit, so the fourth record is not counted."""
    first = source(tmp_path, hh("H: a A: b", "H: a A: c"), hh("H: a A: b", "H: a A: b"), name="1.jsonl")
    second = source(tmp_path, pku(), pku(prompt="Where?"), name="2.jsonl")
    output = tmp_path / "out.json"
    report = prepare(PrepareConfig(inputs=(first, second), output=str(output), prefer="safety", limit=2))
    assert [pair["User"] for pair in json.loads(output.read_text(encoding="utf-8"))] == [["a"], ["How?"]]
    assert report == (
        f"{output}: kept 2 of 3 pairs (1 with identical answers); first with identical answers: {first}:2; "
        "stopped at the limit of 2 pairs; read as HH-RLHF, PKU-SafeRLHF"
    )


def test_a_limit_of_zero_survives_a_first_record_that_is_dropped(tmp_path: Path) -> None:
    """0 pairs after the first record are not the limit reached."""
    pairs, _ = converted(tmp_path, hh("H: a A: b", "H: a A: b"), hh("H: a A: b", "H: a A: c"))
    assert len(pairs) == 1


def test_ascii_only_spells_characters_out_and_counts_the_rest(tmp_path: Path) -> None:
    """The curly apostrophe and the accent have an ASCII form; U+2603 and U+1F600 have none, so one answer is empty."""
    curly, lost = (
        hh("H: it\u2019s A: caf\u00e9\u2026", "H: it\u2019s A: no \u2603"),
        hh("H: a A: b", "H: a A: \U0001f600"),
    )
    pairs, report = converted(tmp_path, curly, lost, ascii_only=True)
    assert (pairs[0]["User"], pairs[0]["Accepted"], pairs[0]["Rejected"]) == (["it's"], ["cafe..."], ["no"])
    assert report.endswith("; removed 2 characters without an ASCII form")
    assert "1 with an empty answer" in report


def test_hh_dev_file(tmp_path: Path, shared_dir: Path) -> None:
    """All 1,500 pairs of the file are accounted for, and the loader takes what is written."""
    raw, output = shared_dir / "data" / "hh_harmless_dev.jsonl.gz", tmp_path / "hh.jsonl"
    report = prepare(PrepareConfig(inputs=(str(raw),), output=str(output)))
    assert report == (
        f"{output}: kept 1,492 of 1,500 pairs (4 with an empty answer, 4 with turns that do not alternate); "
        f"first with an empty answer: {raw}:87; first with turns that do not alternate: {raw}:668; "
        "read as HH-RLHF"
    )
    with gzip.open(raw, "rt", encoding="utf-8") as lines:
        first = json.loads(next(lines))["chosen"]
    pair = json.loads(output.read_text(encoding="utf-8").split("\n", 1)[0])
    turns = zip(pair["User"], pair["Accepted"], strict=True)
    assert "".join(f"\n\nHuman: {user}\n\nAssistant: {answer}" for user, answer in turns) == first


def test_hh_dev_file_in_the_loader(tmp_path: Path, shared_dir: Path) -> None:
    """200 pairs and the original tokenizer: the loader drops those that are too long as whole, formatted strings."""
    raw, output = shared_dir / "data" / "hh_harmless_dev.jsonl.gz", tmp_path / "hh.json"
    prepare(PrepareConfig(inputs=(str(raw),), output=str(output), ascii_only=True, limit=200))
    original = shared_dir / "tokenizer" / "bpe_8k.json"
    whole, too_long = Tokenizer.from_file(str(original)), 0
    for pair in json.loads(output.read_text(encoding="utf-8")):
        chats = [format_chat("Be kind.", pair["User"], pair[side]) for side in ("Accepted", "Rejected")]
        too_long += max(len(whole.encode(chat).ids) for chat in chats) > 512
    loader = RLDatasetLoader(output, load_tokenizer(original), 512, val_share=0.1, seed=42, default_system="Be kind.")
    assert 0 < too_long < 20
    assert loader.report == f"kept {200 - too_long} of 200 pairs ({too_long} too long); first too long: {output}:113"
    assert 10 <= len(loader.validation) <= 30
