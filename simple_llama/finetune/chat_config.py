"""Settings of chats: what a system message is, what a template reads, what is scored; and the format that they make."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import listed, shown
from simple_llama.common.settings import Settings, TextOrFile
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.chat_format import ChatFormat, SimpleLLaMAChat
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT
from simple_llama.finetune.jinja_chat import JinjaChat
from simple_llama.finetune.templates import GIVEN_BY_CHATS


@dataclass(frozen=True)
class ChatConfig(Settings):
    """How conversations become tokens."""

    # === Chat ===
    system_prompt: Annotated[
        str,
        TextOrFile(),
        Doc(
            'what "CUSTOM" in a record\'s Template stands for: the prompt that the SFT used, or @FILE with it (so '
            "also one that itself begins with @); left at its default, a model with a chat template of its own gets no "
            "system message"
        ),
    ] = DEFAULT_SYSTEM_PROMPT
    chat_template_kwargs: Annotated[
        str, Doc('JSON object of what a model\'s own chat template reads, as {"enable_thinking": false}; date_string')
    ] = ""
    score_tail: bool = False  # also score what a model's own chat template writes behind the end of an answer, as TRL

    def check_rules(self) -> None:
        """`chat_template_kwargs` is a JSON object."""
        self.template_variables()

    def template_variables(self) -> dict[str, Any]:
        """What `chat_template_kwargs` says. UserError where it is no JSON object of names."""
        try:
            found = json.loads(self.chat_template_kwargs or "{}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"chat_template_kwargs: expected a JSON object, found no JSON: {error}") from None
        if not isinstance(found, dict) or not all(name.isidentifier() for name in found):
            raise UserError(f"chat_template_kwargs: expected a JSON object of names, found {shown(found)}")
        if ours := [name for name in found if name in GIVEN_BY_CHATS or name.endswith("_token")]:
            raise UserError(
                f"chat_template_kwargs: expected names that a chat does not give itself, found {listed(ours)}"
            )
        date = found.get("date_string", "")
        if not isinstance(date, str):
            raise UserError(f"chat_template_kwargs: date_string: expected a text, found {shown(date)}")
        return found


def own_chat(own: OwnTokenizer, config: ChatConfig) -> ChatFormat:
    """The format of a model that came with its tokenizer: its template's. UserError where there is none to use."""
    if own.template is None:
        raise UserError(
            f"{own.source}: expected a chat template (chat_template.jinja, or chat_template in tokenizer_config.json), "
            "found none; a model that was tuned to chat has one: put it there"
        )
    system = None if config.system_prompt == DEFAULT_SYSTEM_PROMPT else config.system_prompt
    return JinjaChat(own, system, config.template_variables(), score_tail=config.score_tail)


def simple_llama_chat(tokenizer_path: str, config: ChatConfig) -> ChatFormat:
    """SimpleLLaMA's format. UserError for settings that only other formats have."""
    if config.chat_template_kwargs or config.score_tail:
        raise UserError(
            "chat_template_kwargs, score_tail: expected a model with a chat template of its own, found one that has "
            "SimpleLLaMA's chat format, where they would have no effect; leave them out"
        )
    return SimpleLLaMAChat(load_tokenizer(tokenizer_path), config.system_prompt)
