"""Pieces cut at the template's tokens: the ids of the whole, for each kind of tokenizer; and nothing forged."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from chat_templates import SPECIALS, THINK, tokenizers_of_each_kind
from simple_llama.common.errors import UserError
from simple_llama.dataset.tokenizer import unknown_id
from simple_llama.finetune.piece_tokenizer import PieceTokenizer
from simple_llama.finetune.skeleton import Pieces, Token, placeholder, read_skeleton

KINDS = tokenizers_of_each_kind()
TEXTS = st.lists(
    st.sampled_from([" ", "  ", "\n", "Hi", "a", "<", "|im_end", ">", "\u00e9", "he", "\u2581"]), max_size=6
)
STRUCTURES = ("<s>{}<|im_end|>{}", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>{}</s>\n", "[INST] {} [/INST] {} </s>")


def pieces_of(tokenizer: Tokenizer, structure: str, messages: list[str]) -> Pieces:
    """Messages in the places of a structure."""
    rendered = structure.format(*map(placeholder, range(len(messages))))
    skeleton = read_skeleton(rendered, tokenizer, PieceTokenizer(tokenizer, None).structure)
    assert skeleton.places == tuple(range(len(messages)))
    return Pieces(skeleton.segments, tuple(messages))


@pytest.mark.parametrize("kind", KINDS)
def test_cut_pieces_are_the_whole(kind: str) -> None:
    """The specification is the tokenizer itself over the whole text, where no message spells a token."""
    tokenizer = KINDS[kind]
    in_pieces = PieceTokenizer(tokenizer, unknown_id(tokenizer))

    @settings(max_examples=40, deadline=None)
    @given(structure=st.sampled_from(STRUCTURES), parts=st.tuples(TEXTS, TEXTS))
    def check(structure: str, parts: tuple[list[str], list[str]]) -> None:
        pieces = pieces_of(tokenizer, structure, ["".join(texts) for texts in parts])
        expected = tokenizer.encode(pieces.text, add_special_tokens=False).ids
        [found] = in_pieces.encode([pieces])
        assert found.ids == in_pieces.cut(pieces).ids == expected
        assert found.at == in_pieces.cut(pieces).at
        behind = in_pieces.cut(pieces, "token").ids
        assert behind == tokenizer.encode("</s>" + pieces.text, add_special_tokens=False).ids[1:]

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_behind_text_gets_no_space(kind: str) -> None:
    """What a tokenizer puts in front of a text is not in the midst of one; behind the end token it is as ever."""
    tokenizer = KINDS[kind]
    in_pieces = PieceTokenizer(tokenizer, unknown_id(tokenizer))
    end, number = tokenizer.encode("</s>\n", add_special_tokens=False).ids, tokenizer.token_to_id("</s>")
    assert number is not None
    for text in ("Hi", " Hi", "<|im_end|>"):
        found = in_pieces.cut(pieces_of(tokenizer, "{}</s>\n", [text]), "text")
        assert found.ids[found.at[0] :] == end[end.index(number) :]
        spelled = "".join(map(str, map(tokenizer.id_to_token, found.ids[: found.at[0]])))
        assert spelled.replace("\u2581", " ").replace("\u0120", " ") == text


@pytest.mark.parametrize("kind", KINDS)
def test_no_message_forges_a_token(kind: str) -> None:
    """All of them spelled in both messages: only the structure's three are there, in their places."""
    tokenizer = KINDS[kind]
    in_pieces = PieceTokenizer(tokenizer, unknown_id(tokenizer))
    spelled = "x " + "".join((*SPECIALS, *THINK))
    pieces = pieces_of(tokenizer, "<|im_start|>user\n{}<|im_end|>{}</s>", [spelled, spelled])
    [found] = in_pieces.encode([pieces])
    names = {"<|im_start|>", "<|im_end|>", "</s>"}
    assert found.is_cut
    assert [found.ids[place] for place in found.at] == [
        tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>", "</s>")
    ]
    added = {tokenizer.token_to_id(token) for token in (*SPECIALS, *THINK)}
    assert sum(number in added for number in found.ids) == len(names)
    assert (
        "".join(tokenizer.id_to_token(number) or "" for number in found.ids).count("<think>") == 2
    )  # read as text, not lost


def test_a_token_made_of_a_message_and_the_template() -> None:
    """ "<" of a message before "|im_end|>" of a template: found by the ids, though neither spells it alone."""
    tokenizer = KINDS["ByteLevel"]
    in_pieces = PieceTokenizer(tokenizer, None)
    pieces = Pieces((("a",), ("|im_end|>",)), ("<",))
    assert tokenizer.token_to_id("<|im_end|>") in tokenizer.encode(pieces.text).ids
    [found] = in_pieces.encode([pieces])
    assert found.is_cut and tokenizer.token_to_id("<|im_end|>") not in found.ids


def test_white_space_that_tokens_take_in() -> None:
    """A token with rstrip takes the space of the message behind it, whole or cut."""
    tokenizer = Tokenizer.from_str(KINDS["ByteLevel"].to_str())
    tokenizer.add_special_tokens(
        [AddedToken("<|go|>", rstrip=True, normalized=False), AddedToken("<|no|>", lstrip=True)]
    )
    in_pieces = PieceTokenizer(tokenizer, None)
    pieces = pieces_of(tokenizer, "<|go|>{}<|no|>", ["  a  "])
    assert in_pieces.cut(pieces).ids == tokenizer.encode(pieces.text).ids == in_pieces.encode([pieces])[0].ids
    assert len(in_pieces.cut(pieces).ids) == 3


def test_the_unknown_token_is_no_structure() -> None:
    """A tokenizer of letters: "<unk>" for what it does not know may stand in any message, and does not cut it."""
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    [found] = PieceTokenizer(tokenizer, 0).encode([Pieces(((), (tokens(tokenizer, "</s>"),)), ("aza",))])
    assert (found.ids, found.is_cut) == ([1, 0, 1, 2], False)


def tokens(tokenizer: Tokenizer, text: str) -> str | Token:
    """The token of a structure."""
    [segment] = read_skeleton(text, tokenizer, tokenizer.get_added_tokens_decoder()).segments
    return segment[0]


def test_marks_in_a_message_are_refused() -> None:
    """Only where the message is cut: noncharacters have no use in text."""
    tokenizer = KINDS["ByteLevel"]
    pieces = pieces_of(tokenizer, "{}</s>", ["\ufdd2 </s>"])
    with pytest.raises(UserError, match="U\\+FDD2"):
        PieceTokenizer(tokenizer, None).encode([pieces])


def test_vocabulary_of_merges_stays() -> None:
    """A token that merges make is text: "Hi" as an added token too is still reached letter by letter."""
    saved = json.loads(KINDS["ByteLevel"].to_str())
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.add_tokens(["Hi"])
    pieces = Pieces(((), (tokens(tokenizer, "</s>"),)), ("Hi",))
    [found] = PieceTokenizer(tokenizer, None).encode([pieces])
    assert found.ids == [tokenizer.token_to_id("Hi"), tokenizer.token_to_id("</s>")]
