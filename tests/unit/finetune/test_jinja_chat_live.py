"""Where transformers is installed: its `apply_chat_template`, text and ids, beside ours and beside what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chat_templates import CHATS, NAMED, NO_SYSTEM, TEMPLATES, own, tokenizers_of_each_kind
from simple_llama.finetune.chat_format import Chat
from simple_llama.finetune.jinja_chat import JinjaChat

transformers = pytest.importorskip("transformers")
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "chats.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", tokenizers_of_each_kind())
@pytest.mark.parametrize("name", TEMPLATES)
def test_apply_chat_template(name: str, kind: str) -> None:
    """Whole chats: the same ids; prompts: the same ids at their beginning."""
    tokenizer = tokenizers_of_each_kind()[kind]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATES[name], **NAMED)
    date = {"date_string": "01 Jan 2025"} if "date_string" in TEMPLATES[name] else {}
    ours = JinjaChat(own(TEMPLATES[name], tokenizers_of_each_kind()[kind]), given=date, score_tail=True)
    kept = [chat for chat in CHATS if not (name in NO_SYSTEM and chat[0]["role"] == "system")]
    for messages, (whole, prompt) in zip(kept, GOLDEN[name], strict=True):
        assert theirs.apply_chat_template(messages, tokenize=False, **date) == whole
        assert theirs.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True, **date) == prompt
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        said = {role: [m["content"] for m in messages if m["role"] == role] for role in ("user", "assistant")}
        [found] = ours.encode([Chat(system, said["user"], said["assistant"])])
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False, **date)
        assert list(found.ids[: len(asked)]) == asked
        if not any("apart" in note for note in found.notes):
            assert list(found.ids) == theirs.apply_chat_template(messages, return_dict=False, **date)
