"""Chat templates that do what those of known models do, written anew from their documents; small tokenizers of each
kind with the tokens that they use; and chats."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.dataset.tokenizer import unknown_id

_HEADS = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
_ANSWER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    # a header before each message, which loses the white space at its ends; bos in front of the first
    "Llama 3": "{% for m in messages %}{{ (bos_token if loop.first else '') + " + _HEADS + " + m.content | trim "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}",
    # a system message with the date always
    "Llama 3.2": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set first, rest = messages[0]['content'] | trim, messages[1:] %}
{%- else %}
    {%- set first, rest = '', messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + first + '<|eot_id|>' }}
{%- for m in rest %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    # ChatML with a system message of its own where none is given
    "Qwen2.5": """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    # ChatML; thoughts of earlier answers are taken out, the last answer has a think block, empty where it has none
    "Qwen3": """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set content, thought = m.content, '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
""",
    # ChatML, written in a loop that puts the system message in front of the first turn
    "SmolLM2": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}" + _ANSWER,
    # no system message; [INST] is text
    "Mistral 0.1": "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}",
    # the system message stands in front of the last user message
    "Mistral 0.3": "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if s else messages %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (s + '\n\n' if s and loop.index0 >= turns | length - 2 and (loop.last or loop.index0 == "
    "turns | length - 2) else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}",
    # the system message in the first user message; everything between bos and eos is text
    "Llama 2": "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if s else messages) %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
    "('<<SYS>>\n' + s + '\n<</SYS>>\n\n' if s and loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    # role words are text, each turn ends with eos
    "TinyLlama": "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n"
    "{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}\n{% else %}\n"
    "{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
}
NO_SYSTEM = ("Mistral 0.1",)
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK = ("<think>", "</think>")  # added, not special
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATS: tuple[list[dict[str, str]], ...] = tuple(
    [{"role": role, "content": text} for role, text in chat]
    for chat in (
        [("user", "Hi"), ("assistant", "Hello there.")],
        [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes.")],
        [("user", "a"), ("assistant", "b"), ("user", "line\n\nline"), ("assistant", "1 + 1 = 2!")],
        [("system", "S"), ("user", "a"), ("assistant", "b\n"), ("user", " c "), ("assistant", " two  spaces ")],
        [("user", "\u00e9\u2019"), ("assistant", "\n\nfirst")],
        [("user", "ask"), ("assistant", "last\n\n")],
    )
)


def tokenizers_of_each_kind() -> dict[str, Tokenizer]:
    """ByteLevel, and SentencePiece's way with byte fallback: Metaspace `first` and `always`, Prepend; and Unigram."""
    letters = [chr(code) for code in range(32, 127)] + ["\u2581"]
    pieces = [*letters, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["\u2581a", "\u2581H", "\u2581\u2581", "he", "ll", "\u2581li", "ne", "Hi"]
    fallback = {"<unk>": 0, **{text: number for number, text in enumerate([*SPECIALS, *THINK, *pieces, *words], 1)}}
    merges = [(word[0], word[1:]) if len(word) == 2 else (word[:2], word[2:]) for word in words if len(word) == 2]

    def sentence_piece() -> Tokenizer:
        return Tokenizer(models.BPE(dict(fallback), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))

    found = {
        "ByteLevel": Tokenizer(models.BPE(_byte_vocabulary(), [("H", "i"), ("\u0120", "\u0120"), ("\u010a", "\u010a")]))
    }
    found["ByteLevel"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found["ByteLevel"].decoder = decoders.ByteLevel()
    for scheme in ("first", "always"):
        found[f"Metaspace {scheme}"] = made = sentence_piece()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    found["Prepend"] = made = sentence_piece()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    found["Unigram"] = made = Tokenizer(
        models.Unigram([(text, -5.0 + 4.0 * (len(text) > 1)) for text in fallback], unk_id=0, byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    for tokenizer in found.values():
        add_structure(tokenizer)
    return found


def add_structure(tokenizer: Tokenizer) -> None:
    """The special tokens, and two that are none."""
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in THINK])


def _byte_vocabulary() -> dict[str, int]:
    """The 256 byte characters and three words."""
    return {
        text: n
        for n, text in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "Hi", "\u0120\u0120", "\u010a\u010a"])
    }


def own(template: str, tokenizer: Tokenizer, **changes: Any) -> OwnTokenizer:
    """A tokenizer with a template as a model brings it."""
    values = {
        "tokenizer": tokenizer,
        "template": template,
        "named": NAMED,
        "stop_ids": frozenset(),
        "unknown_id": unknown_id(tokenizer),
        "files": {},
        "source": "model",
    }
    return OwnTokenizer(**{**values, **changes})
