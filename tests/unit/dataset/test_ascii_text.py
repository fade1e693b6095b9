"""Text in ASCII: what stands for a character, and which characters a tokenizer needs it for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from simple_llama.dataset.ascii_text import Spelling, _ascii_form, ascii_text

FORMS = {
    "typographic marks": ("\u2018a\u2019 \u201cb\u201d c\u2026 d\u2013e \u2022", "'a' \"b\" c... d-e *"),
    "accents, in one character or two": ("\u00e9 e\u0301 \u00c5 \u00f1", "e e A n"),
    "letters that the decomposition leaves": ("\u00df \u00e6 \u0152 \u00f8 \u0142", "ss ae OE o l"),
    "a ligature and a wide letter": ("\ufb01 \uff23", "fi C"),
    "fractions and powers keep their value": ("1\u00bd 10\u00b2", "11/2 10^2"),
    "spaces and line breaks": ("a\u00a0b\u2028c", "a b\nc"),
    "what is not seen": ("a\u200bb\ufeff\u00ad\ufe0f", "ab"),
    "a dash between words": ("a\u2014b a \u2014 b", "a - b a - b"),
    "a dash at a line's ends": ("\u2014 a\nb\u2014\nc \u2014", "- a\nb-\nc -"),
    "plain text": ("plain\n", "plain\n"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    """Every character here has one."""
    text, expected = FORMS[name]
    assert ascii_text(text) == (expected, 0)


def test_what_has_no_form_is_counted() -> None:
    """Letters of other scripts, with marks that are not accents of ASCII letters; half a surrogate pair."""
    assert ascii_text("\u4f60a\u2603 \u00bc\u0915\u093f") == ("a 1/4", 4)
    assert ascii_text("\ud800") == ("", 1)
    assert _ascii_form("\u33a1") == "m2" and _ascii_form("\u3395") is None  # square metres; microlitres, in Greek


@given(st.text())
def test_any_text_becomes_ascii_once(text: str) -> None:
    """No character makes it fail, and ASCII is left as it is."""
    spelled, _ = ascii_text(text)
    assert spelled.isascii() and ascii_text(spelled) == (spelled, 0)


def tokenizer_of(known: str) -> Tokenizer:
    """A tokenizer of single characters; <UNK> is 0."""
    return Tokenizer(models.BPE({"<UNK>": 0, **{c: n for n, c in enumerate(known, 1)}}, [], unk_token="<UNK>"))


def test_only_what_a_tokenizer_does_not_know_is_spelled() -> None:
    """This one knows the accent and the long dash, and lacks the apostrophe and the snowman, which has no form."""
    spelling = Spelling(tokenizer_of("abcdefghi '\u00e9\u2014"), 0)
    assert spelling.spell("\u00e9\u2014a") == ("\u00e9\u2014a", 0)
    assert spelling.spell("\u2019\u00e9\u2019\u2014 \u2603") == ("'\u00e9'\u2014 \u2603", 2)


def test_a_tokenizer_without_an_unknown_token_changes_nothing() -> None:
    """It knows all bytes."""
    assert Spelling(tokenizer_of("a"), None).spell("\u2019") == ("\u2019", 0)


@pytest.mark.parametrize("text", ["\u0301", "\u200b \ufe0f"])
def test_a_message_does_not_vanish(text: str) -> None:
    """Where nothing that is seen would be left, the text stays."""
    assert Spelling(tokenizer_of("a"), 0).spell(text) == (text, 0)
