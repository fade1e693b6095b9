"""Answers of the policy to fixed held-out prompts, beside the start model's answers to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from simple_llama.cluster import watchdog
from simple_llama.dataset.tokenizer import SPECIAL_IDS
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import PreferencePair
from simple_llama.reinforcement_learning.rlhf.objective.policy import evaluating


@torch.no_grad()
def generate(model: LLaMaTransformer, prompt_ids: Sequence[int], max_new_tokens: int, stop_id: int) -> list[int]:
    """Greedy continuation of one prompt with a key-value cache; ends before `stop_id` or at the model's length limit.

    Greedy, so that a change of the answer is a change of the policy. Returns the new token ids.
    """
    device = model.final_linear.weight.device
    room = min(max_new_tokens, model.config.max_seq_len - len(prompt_ids))
    answer: list[int] = []
    with evaluating(model):
        cache = model.new_cache(len(prompt_ids) + max(room, 0))
        ahead = torch.tensor(list(prompt_ids), device=device)
        while len(answer) < room:
            watchdog.beat("sample answers")
            token = int(model.decode(ahead, cache).argmax())
            if token == stop_id:
                break
            answer.append(token)
            ahead = torch.tensor([token], device=device)
    return answer


def answers(
    model: LLaMaTransformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Decoded greedy answers to `prompts` (token ids that end with <SOA>)."""
    stop_id = SPECIAL_IDS["<EOA>"]
    return [tokenizer.decode(generate(model, ids, max_new_tokens, stop_id)).strip() for ids in prompts]


def sample_prompts(pairs: Sequence[PreferencePair], count: int) -> list[list[int]]:
    """The first `count` different prompts of `pairs` as token ids that end with <SOA>."""
    prompts: dict[tuple[int, ...], None] = {}
    for pair in pairs:
        if len(prompts) == count:
            break
        prompts[tuple(pair.prompt_ids.tolist())] = None
    return [list(prompt) for prompt in prompts]


def sample_page(prompt: str, before: str, after: str) -> str:
    """Markdown of one prompt with both answers; the text is indented, so that TensorBoard shows it as it is."""

    def block(text: str) -> str:
        return "\n".join("    " + line for line in text.splitlines() or [""])

    return f"**prompt**\n\n{block(prompt)}\n\n**start model**\n\n{block(before)}\n\n**policy**\n\n{block(after)}\n"
