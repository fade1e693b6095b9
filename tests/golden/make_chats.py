"""Writes chats.json: how transformers renders the chats of chat_templates.py by its templates.

    PYTHONPATH=.:tests python tests/golden/make_chats.py

Needs transformers. 5.23.0 and 4.45.2 write the same.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

from chat_templates import CHATS, NAMED, NO_SYSTEM, TEMPLATES, tokenizers_of_each_kind

DATE = "01 Jan 2025"


def main() -> None:
    """A text for each template, chat, and end: the whole chat, and the prompt of its last answer."""
    found: dict[str, list[list[str]]] = {}
    for name, template in TEMPLATES.items():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers_of_each_kind()["ByteLevel"], chat_template=template, **NAMED
        )
        found[name] = [
            [
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked, date_string=DATE)
                for messages, asked in ((chat, False), (chat[:-1], True))
            ]
            for chat in CHATS
            if not (name in NO_SYSTEM and chat[0]["role"] == "system")
        ]
    path = Path(__file__).with_name("chats.json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
