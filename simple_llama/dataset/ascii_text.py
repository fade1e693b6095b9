"""Text in ASCII, for tokenizers that know no other characters.

Typographic marks become what people type, letters lose their accents (Unicode's decomposition NFKD), and what cannot be
seen goes. Other characters have no form in ASCII: whoever asks decides what becomes of them.
"""

from __future__ import annotations

import re
import unicodedata

from tokenizers import Tokenizer

# what the decomposition does not turn into ASCII, or into something that reads otherwise: 10^2 is not 102
_FORMS = {
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
    **dict.fromkeys("\u2022\u00b7\u2027\u2219", "*"),
    **dict.fromkeys("\u2028\u2029", "\n"),
    "\u2044": "/",  # in fractions of one character
    "\u00d7": "x",
    "\u00f7": "/",
    "\u00b9": "^1",
    "\u00b2": "^2",
    "\u00b3": "^3",
    "\u00df": "ss",
    "\u00c6": "AE",
    "\u00e6": "ae",
    "\u0152": "OE",
    "\u0153": "oe",
    "\u00d8": "O",
    "\u00f8": "o",
    "\u0110": "D",
    "\u0111": "d",
    "\u0141": "L",
    "\u0142": "l",
    "\u0131": "i",
}
_LONG_DASH = "\u2014"
_BETWEEN_WORDS = re.compile(f"(?<=\\S) ?{_LONG_DASH} ?(?=\\S)")
_BEYOND_ASCII = re.compile("[^\\x00-\\x7f]")
_SELECTORS = range(0xFE00, 0xFE10)  # choose the form of the character before them


def _ascii_form(character: str) -> str | None:
    """What stands for a character in ASCII: "" for an accent behind its letter and for what is not seen; None where
    nothing does."""
    spelled = ""
    for part in unicodedata.normalize("NFKD", _FORMS.get(character, character)):
        form = part if part.isascii() else _FORMS.get(part)
        if form is None:
            unseen = unicodedata.combining(part) or unicodedata.category(part) == "Cf" or ord(part) in _SELECTORS
            if not unseen:
                return None
        spelled += form or ""
    return spelled


def ascii_text(text: str) -> tuple[str, int]:
    """`text` in ASCII, and how many characters had no ASCII form and are gone."""
    if text.isascii():
        return text, 0
    forms = [_ascii_form(character) for character in _BETWEEN_WORDS.sub(" - ", text)]
    return "".join(form or "" for form in forms), forms.count(None)


class Spelling:
    """Spells in ASCII what a tokenizer would turn into its unknown token. Nothing changes that it knows, nor what has
    no ASCII form."""

    def __init__(self, tokenizer: Tokenizer, unknown_id: int | None) -> None:
        """Args: unknown_id: of the unknown token; None: the tokenizer knows all bytes."""
        self._tokenizer, self._unknown_id = tokenizer, unknown_id
        self.is_used = unknown_id is not None
        self._forms: dict[int, str] = {}  # by code, of the characters beyond ASCII that were met

    def spell(self, text: str) -> tuple[str, int]:
        """(the text as it is to be tokenized, how many of its characters changed). Text of which nothing would be left
        stays as it is."""
        if self._unknown_id is None or text.isascii():
            return text, 0
        changed = sum(self._form(character) != character for character in _BEYOND_ASCII.findall(text))
        if not changed:
            return text, 0
        spaced = _BETWEEN_WORDS.sub(" - ", text) if self._form(_LONG_DASH) != _LONG_DASH else text
        spelled = spaced.translate(self._forms)
        return (spelled, changed) if spelled.strip() else (text, 0)

    def _form(self, character: str) -> str:
        """What is written for a character beyond ASCII."""
        code = ord(character)
        if code not in self._forms:
            unknown = self._unknown_id in self._tokenizer.encode(character, add_special_tokens=False).ids
            form = _ascii_form(character) if unknown else None
            self._forms[code] = character if form is None else form
        return self._forms[code]
