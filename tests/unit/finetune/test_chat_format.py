"""Which system prompt a chat format stands for, in words."""

from __future__ import annotations

from tokenizers import Tokenizer, models

from simple_llama.finetune.chat_format import SimpleLLaMAChat, about_system
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT

UPSTREAM = "models that the original SimpleLLaMA tuned have seen another: give theirs with --system_prompt"


def test_the_system_prompt_in_use_is_said_whole() -> None:
    """With its line breaks spelled. That upstream's models know another one is said of the default alone: a person who
    gives one has chosen."""
    tokenizer = Tokenizer(models.BPE())
    assert about_system(SimpleLLaMAChat(tokenizer)) == f'"CUSTOM" stands for {DEFAULT_SYSTEM_PROMPT!r}; {UPSTREAM}'
    assert about_system(SimpleLLaMAChat(tokenizer, "Be\nkind.")) == "\"CUSTOM\" stands for 'Be\\nkind.'"
    assert about_system(SimpleLLaMAChat(tokenizer, None)).startswith('no system message for "CUSTOM"')
