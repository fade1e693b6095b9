"""Ids of rendered chats in which no message can spell a token that the template alone may put in.

Where no message does, the rendering is tokenized at once: the ids are those of transformers by construction. Else it is
cut at the template's own tokens, and what stands between them is tokenized as text behind a special token, as the
tokenizer would do: by a copy of it that knows no added token but marks, one for each way to take in white space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.finetune.skeleton import Pieces, Token

_MARKS = "\ufdd2\ufdd3\ufdd4\ufdd5"  # noncharacters: no text has a use for them


class PieceIds(NamedTuple):
    """Ids of a rendering, and where among them the template's own tokens stand."""

    ids: list[int]
    at: list[int]
    is_cut: bool  # some message spells an added token


class PieceTokenizer:
    """Tokenizes pieces; `structure` are the tokens that templates alone put in, by id."""

    def __init__(self, tokenizer: Tokenizer, unknown_id: int | None):
        """Args: unknown_id: of the token for what the tokenizer does not know, which any text may hold."""
        self.tokenizer = tokenizer
        added: Mapping[int, AddedToken] = tokenizer.get_added_tokens_decoder()
        self.structure = {number: token for number, token in added.items() if number != unknown_id}
        self._spelled = re.compile("|".join(re.escape(token.content) for token in added.values()) or "(?!)")
        self._starts = {token.content[:2] for token in added.values()}  # few, where tokens may be a thousand
        self._text_tokenizers: dict[bool, Tokenizer] = {}  # made when a message first spells a token

    def encode(self, batch: Sequence[Pieces]) -> list[PieceIds]:
        """Ids of each."""
        whole = [pieces for pieces in batch if not any(map(self._spells, pieces.messages))]
        encodings = iter(self.tokenizer.encode_batch_fast([p.text for p in whole], add_special_tokens=False))
        left, found = iter(whole), []
        waiting = next(left, None)
        for pieces in batch:
            ids = None
            if pieces is waiting:
                ids, waiting = next(encodings).ids, next(left, None)
            found.append(self._checked(pieces, ids))
        return found

    def _spells(self, message: str) -> bool:
        """Whether a message spells an added token."""
        return any(start in message for start in self._starts) and bool(self._spelled.search(message))

    def _checked(self, pieces: Pieces, ids: list[int] | None) -> PieceIds:
        """These ids, where their added tokens are the template's; else those of the pieces cut apart."""
        if ids is not None:
            at = [place for place, number in enumerate(ids) if number in self.structure]
            expected = [part.id for segment in pieces.segments for part in segment if isinstance(part, Token)]
            if [ids[place] for place in at] == expected:
                return PieceIds(ids, at, False)
        return self.cut(pieces)

    def cut(self, pieces: Pieces, behind: Literal["nothing", "token", "text"] = "nothing") -> PieceIds:
        """Ids of pieces, each stretch between the template's tokens as text.

        Args:
            behind: what the first stretch goes on from; behind text a tokenizer puts no space of its own in front.
        """
        behind_a_token = behind == "token"
        tokens = [part for segment in pieces.segments for part in segment if isinstance(part, Token)]
        texts = [_marked(pieces.segments[0])]
        for message, segment in zip(pieces.messages, pieces.segments[1:], strict=True):
            texts += [message, _marked(segment)]
        marked = _MARKS[0] * behind_a_token + "".join(texts)
        if sum(map(marked.count, _MARKS)) != len(tokens) + behind_a_token:
            raise UserError("expected text, found one of the noncharacters U+FDD2 to U+FDD5; take it out")
        tokenizer = self._of_text()
        marks = {tokenizer.token_to_id(mark) for mark in _MARKS}
        ids = []
        if behind == "text" and (first := next((n for n, character in enumerate(marked, 1) if character in _MARKS), 0)):
            ids = self._of_text(spaced=False).encode(marked[:first], add_special_tokens=False).ids
            marked, behind_a_token = marked[first - 1 :], True
        ids += tokenizer.encode(marked, add_special_tokens=False).ids[behind_a_token:]
        at = [place for place, number in enumerate(ids) if number in marks]
        assert len(at) == len(tokens)
        for place, token in zip(at, tokens, strict=True):
            ids[place] = token.id
        return PieceIds(ids, at, True)

    def _of_text(self, spaced: bool = True) -> Tokenizer:
        """The tokenizer without its added tokens: their spellings are texts like others, and marks are the tokens.

        Args:
            spaced: puts a space in front of a text where the tokenizer does.
        """
        if spaced not in self._text_tokenizers:
            saved = json.loads(self.tokenizer.to_str())
            if not spaced:
                saved = _without_space(saved)
            _hide(saved["model"], {token.content for token in self.structure.values()})
            saved["added_tokens"] = []
            saved["post_processor"] = None
            made = Tokenizer.from_str(json.dumps(saved))
            made.add_special_tokens(
                [
                    AddedToken(mark, lstrip=bool(number & 1), rstrip=bool(number & 2), normalized=False, special=True)
                    for number, mark in enumerate(_MARKS)
                ]
            )
            self._text_tokenizers[spaced] = made
        return self._text_tokenizers[spaced]


def _marked(segment: Sequence[str | Token]) -> str:
    """A segment with marks in the tokens' places."""
    return "".join(part if isinstance(part, str) else _MARKS[part.lstrip + 2 * part.rstrip] for part in segment)


def _without_space(part: Any) -> Any:
    """A saved tokenizer, or a part of one, that puts no space in front of a text."""
    if isinstance(part, list):
        return [_without_space(one) for one in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    steps = ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")
    return {
        name: never[name] if name in never else _without_space(value) if name in steps else value
        for name, value in part.items()
    }


def _hide(model: dict[str, Any], contents: set[str]) -> None:
    """Renames a vocabulary's entries that a text could otherwise reach; what merges make is text, and stays."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pieces with their scores
        model["vocab"] = [[f"\ufdd6{n}" if one[0] in contents else one[0], one[1]] for n, one in enumerate(vocab)]
        return
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model.get("merges", [])]
    hidden = contents - {"".join(merge) for merge in merges} - {part for merge in merges for part in merge}
    model["vocab"] = {f"\ufdd6{number}" if text in hidden else text: number for text, number in vocab.items()}
