"""Conversations as they are tokenized: spelled in ASCII where the tokenizer knows no better."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simple_llama.dataset.ascii_text import Spelling
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation


@dataclass
class Speller:
    """Spells conversations and counts what it changed."""

    spelling: Spelling
    characters: int = 0  # of a pair's texts; what both of its chats have counts once
    pairs: int = 0
    first: str = ""  # file:record

    def spelled(self, said: Conversation) -> Conversation:
        """The conversation with its texts as they are to be tokenized."""
        texts = {said.system or "", *said.users, *said.chosen, *said.rejected}
        if all(map(str.isascii, texts)):
            return said
        forms = {text: self.spelling.spell(text) for text in texts}
        changed = sum(number for _, number in forms.values())
        if not changed:
            return said
        self.characters += changed
        self.pairs += 1
        self.first = self.first or f"{said.file}:{said.record}"
        users, chosen, rejected = (
            tuple(forms[text][0] for text in side) for side in (said.users, said.chosen, said.rejected)
        )
        system = None if said.system is None else forms[said.system][0]
        return replace(said, system=system, users=users, chosen=chosen, rejected=rejected)
