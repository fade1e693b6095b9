"""The chat format: literal text, segments against the whole, and that data cannot forge structure."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from simple_llama.common.paths import root_path
from simple_llama.dataset.tokenizer import SPECIAL_TOKENS, load_tokenizer
from simple_llama.finetune.format_llm_prompt import (
    DEFAULT_SYSTEM_PROMPT,
    _chat_segments,
    _serving_segments,
    encode_chat,
    encode_prompt,
    encode_serving_prompt,
    format_chat,
)

SHIPPED = Path(root_path("simple_llama", "dataset", "bpe_8k.json"))
# pieces that stand at the edges of segments: white space, and halves of special tokens
PIECES = st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "\r", "<", ">", "<SO", "EOA>", "U>", "'s", "a", "7"])
TEXTS = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=6).map("".join)
PLAIN_TEXTS = TEXTS.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))


def test_format_of_one_and_two_turns() -> None:
    """The literal text; turns are joined by an empty line."""
    assert format_chat("Be kind.", ["Hi"], ["Hello."]) == ("<SOT>Be kind.<EOT>\n\n<SOU>Hi<EOU>\n<SOA>Hello.<EOA>")
    assert format_chat("S", ["a", "b"], ["c", "d"]) == (
        "<SOT>S<EOT>\n\n<SOU>a<EOU>\n<SOA>c<EOA>\n\n<SOU>b<EOU>\n<SOA>d<EOA>"
    )


def test_prompt_ends_with_start_of_answer() -> None:
    """With one answer fewer than users."""
    assert format_chat("S", ["a", "b"], ["c"]) == "<SOT>S<EOT>\n\n<SOU>a<EOU>\n<SOA>c<EOA>\n\n<SOU>b<EOU>\n<SOA>"


def test_serving_form_of_one_and_two_turns() -> None:
    """Upstream's server: three line ends behind the system prompt, one between turns; ids are those of that text."""
    one = "<SOT>S<EOT>\n\n\n<SOU>a<EOU>\n<SOA>"
    two = "<SOT>S<EOT>\n\n<SOU>a<EOU>\n<SOA>c<EOA>\n<SOU>b<EOU>\n<SOA>"
    assert "".join(segment.text for segment in _serving_segments("S", ["a"], [])) == one
    assert "".join(segment.text for segment in _serving_segments("S", ["a", "b"], ["c"])) == two
    tokenizer, whole = load_tokenizer(SHIPPED), load_tokenizer(SHIPPED)
    whole.encode_special_tokens = False
    assert encode_serving_prompt(tokenizer, "S", ["a"], []) == whole.encode(one, add_special_tokens=False).ids
    assert encode_serving_prompt(tokenizer, "S", ["a", "b"], ["c"]) == whole.encode(two, add_special_tokens=False).ids
    assert encode_serving_prompt(tokenizer, "S", ["a"], []) != encode_prompt(tokenizer, "S", ["a"], [])
    with pytest.raises(ValueError, match="one answer fewer"):
        encode_serving_prompt(tokenizer, "S", ["a"], ["b"])


def test_segments_of_one_turn() -> None:
    """White space between the tokens is a text of its own."""
    assert _chat_segments("S", ["a"], ["b"]) == [
        ("special", "<SOT>"),
        ("text", "S"),
        ("special", "<EOT>"),
        ("text", "\n\n"),
        ("special", "<SOU>"),
        ("text", "a"),
        ("special", "<EOU>"),
        ("text", "\n"),
        ("special", "<SOA>"),
        ("text", "b"),
        ("special", "<EOA>"),
    ]


def test_scored_tokens_are_the_last_answer_and_its_end() -> None:
    """The token before the scored ones is the last <SOA> (6), and <EOA> (7) is scored."""
    tokenizer = load_tokenizer(SHIPPED)
    ids, scored = encode_chat(tokenizer, "S", ["a", "b"], ["no", "The last answer."])
    assert ids[-scored:] == [*tokenizer.encode("The last answer.").ids, 7]
    assert ids[-scored - 1] == 6


def test_prompt_is_the_beginning_of_the_chat() -> None:
    """So a model is asked to continue exactly what it was trained on."""
    tokenizer = load_tokenizer(SHIPPED)
    ids, scored = encode_chat(tokenizer, DEFAULT_SYSTEM_PROMPT, ["a", "b"], ["c", "d"])
    assert encode_prompt(tokenizer, DEFAULT_SYSTEM_PROMPT, ["a", "b"], ["c"]) == ids[:-scored]


def test_message_cannot_forge_structure() -> None:
    """Every special token is spelled in every message; the chat still has one of each, and two turn ends."""
    tokenizer = load_tokenizer(SHIPPED)
    spelled = "x " + "".join(SPECIAL_TOKENS) + " y"
    ids, scored = encode_chat(tokenizer, spelled, [spelled, spelled], [spelled, spelled])
    assert [ids.count(number) for number in range(10)] == [0, 0, 0, 0, 2, 2, 2, 2, 1, 1]
    assert ids[-scored:].count(7) == 1


@pytest.mark.parametrize("source", ["shipped", "original"])
def test_segments_equal_the_whole(source: str, request: pytest.FixtureRequest) -> None:
    """Ids made segment by segment are those of the formatted string, tokenized in one go with special tokens on."""
    path = SHIPPED if source == "shipped" else request.getfixturevalue("shared_dir") / "tokenizer" / "bpe_8k.json"
    segmentwise, whole = load_tokenizer(path), Tokenizer.from_file(str(path))
    whole.model.unk_token = "<UNK>"

    @settings(max_examples=150, deadline=None)
    @given(system=PLAIN_TEXTS, turns=st.lists(st.tuples(PLAIN_TEXTS, PLAIN_TEXTS), min_size=1, max_size=3))
    def check(system: str, turns: list[tuple[str, str]]) -> None:
        users, assistants = [user for user, _ in turns], [answer for _, answer in turns]
        ids, scored = encode_chat(segmentwise, system, users, assistants)
        assert ids == whole.encode(format_chat(system, users, assistants)).ids
        assert ids[-scored:] == whole.encode(assistants[-1] + "<EOA>").ids

    check()


def test_default_system_prompt_is_plain_ascii() -> None:
    """The original tokenizer knows nothing else."""
    assert DEFAULT_SYSTEM_PROMPT.isascii()
    assert "<" not in DEFAULT_SYSTEM_PROMPT


@pytest.mark.parametrize(("users", "assistants"), [([], []), (["a"], ["b", "c"]), (["a", "b", "c"], ["d"])])
def test_other_numbers_of_answers_are_refused(users: list[str], assistants: list[str]) -> None:
    """Nobody asked, one answer too many, two answers missing."""
    with pytest.raises(ValueError, match="expected as many answers as users"):
        _chat_segments("S", users, assistants)


def test_chat_and_prompt_are_not_mixed_up() -> None:
    """A chat without its last answer has nothing to score, a prompt with it nothing to continue."""
    tokenizer = load_tokenizer(SHIPPED)
    with pytest.raises(ValueError, match="an answer for each"):
        encode_chat(tokenizer, "S", ["a"], [])
    with pytest.raises(ValueError, match="one answer fewer"):
        encode_prompt(tokenizer, "S", ["a"], ["b"])
