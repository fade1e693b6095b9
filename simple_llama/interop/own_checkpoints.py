"""SimpleLLaMA checkpoints as Hugging Face's LlamaForCausalLM, and other models as SimpleLLaMA checkpoints.

The first needs LoRA merged, and the tokenizer and chat format written out as transformers reads them; the second a
TrainingConfig that says the architecture. Shapes: G key heads, D width, R rank of an update, O numbers that it makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.common.files import json_bytes
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.dataset.tokenizer import SPECIAL_IDS
from simple_llama.interop.hf_tokenizer import PLAIN_CLASS, load_hf_tokenizer
from simple_llama.pretraining.architecture import LORA_MARK, Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.named_tensors import NamedTensors

_BEHIND_NORMS = frozenset("qkv")  # projections of latent attention to which no update can be added
_PLAIN = {  # linear layers that are one target, by the target
    "attention.out": "attention.o",
    "attention.wo": "attention.o",
    **{f"ffwd.{name}": f"ffwd.{name}" for name in ("w1", "w2", "w3")},
}
_QKV = "attention.qkv_linear.weight"
_HEAD, _EMBEDDINGS = "final_linear.weight", "embeddings.weight"
_MULTIPLE_OF = 256  # of the feed-forward width, where a model has no other: TrainingConfig's default
_TOKEN_IDS = {  # in generation_config.json
    "bos_token_id": SPECIAL_IDS["<SOS>"],
    "eos_token_id": SPECIAL_IDS["<EOA>"],
    "pad_token_id": SPECIAL_IDS["<PAD>"],
}
_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set system = "@" %}{% set turns = messages %}{% endif %}
{{- '<SOT>' + system + '<EOT>' }}
{%- for turn in turns %}
{%- if turn['role'] == 'user' %}{{ '\\n\\n<SOU>' + turn['content'] + '<EOU>' }}
{%- elif turn['role'] == 'assistant' %}{{ '\\n<SOA>' + turn['content'] + '<EOA>' }}
{%- else %}{{ raise_exception('expected the roles system (first), user and assistant') }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n<SOA>' }}{% endif %}"""


class MergedLoRA(NamedTensors):
    """A model's tensors with its low-rank updates added to the layers they stand beside: the same function.

    A tensor that has an update (`updated`) is made, in fp32, when it is asked for.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], architecture: Architecture):
        """UserError for updates of latent attention, some of which stand behind a norm."""
        check_mergeable(architecture)
        self._tensors, self._before = tensors, architecture
        self.architecture = replace(architecture, lora=None)
        self._names = dict.fromkeys(name for name in tensors if LORA_MARK not in name)

    def _make(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if name.endswith(_QKV):
            return self._with_updates(tensor, name.removesuffix("qkv_linear.weight"))
        place = _place_of(name)
        update = self._update(*place) if place else None
        return tensor if update is None else tensor.float() + update

    @property
    def updated(self) -> list[str]:
        """Names of the tensors that have an update."""
        targets = set(self._before.lora.targets) if self._before.lora else set()
        return [
            name
            for name in self._names
            if (name.endswith(_QKV) and targets & set("qkv")) or ((place := _place_of(name)) and place[1] in targets)
        ]

    def _with_updates(self, qkv: torch.Tensor, attention: str) -> torch.Tensor:
        """The rows of queries, keys and values, which stand key head by key head."""
        architecture = self._before
        key, value = architecture.key_width, architecture.value_width
        queries = architecture.heads // architecture.key_heads * key
        rows = {"q": slice(0, queries), "k": slice(queries, queries + key), "v": slice(queries + key, None)}
        updates = {name: update for name in rows if (update := self._update(attention, name)) is not None}
        if not updates:
            return qkv
        merged = qkv.to(torch.float32, copy=True).unflatten(0, (architecture.key_heads, queries + key + value))
        for name, update_OD in updates.items():
            merged[:, rows[name]] += update_OD.unflatten(0, (architecture.key_heads, -1))
        return merged.flatten(0, 1)

    def _update(self, place: str, name: str) -> torch.Tensor | None:
        """(O, D): scale * (a b)^T in fp32; None where the layer has no update."""
        lora = self._before.lora
        if lora is None or name not in lora.targets:
            return None
        a_DR, b_RO = (self._tensors[f"{place}{name}{LORA_MARK}lora_{half}"].float() for half in "ab")
        # in fp64: beside an export in a thread, training may have fp32 products computed in bf16 (`bf16_valued_gemms`)
        return (lora.scale * (a_DR.double() @ b_RO.double())).float().T


def check_mergeable(architecture: Architecture) -> None:
    """UserError for updates of latent attention that stand behind a norm: there is no matrix to add them to."""
    if architecture.latent and architecture.lora and not _BEHIND_NORMS.isdisjoint(architecture.lora.targets):
        raise UserError(
            "lora: expected updates of multi-head attention, found such of MLA, which cannot be merged (q, k and v of "
            "it stand behind norms; o, w1, w2 and w3 can be)"
        )


def _place_of(name: str) -> tuple[str, str] | None:
    """(what the names of its update begin with, its target) of a layer's weight that is one target; None for others."""
    parts = name.rsplit(".", 3)
    target = _PLAIN.get(".".join(parts[1:3])) if len(parts) == 4 and parts[3] == "weight" else None
    if target is None:
        return None
    room, _, which = target.partition(".")
    return f"{parts[0]}.{room}.", which


class UntiedHead(NamedTensors):
    """A model's tensors, the head beside the embeddings, which it is."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._names, self._tensors = dict.fromkeys([*tensors, _HEAD]), tensors

    def _make(self, name: str) -> torch.Tensor:
        return self._tensors[_EMBEDDINGS].clone() if name == _HEAD else self._tensors[name]


def training_config(architecture: Architecture) -> TrainingConfig:
    """The TrainingConfig of an architecture without a tied head. UserError, naming what differs, where none says it."""
    a = architecture
    nearest = int(4 * a.width * (2 / 3))  # what TrainingConfig rounds up
    fitting = (m for m in (_MULTIPLE_OF, *range(1, a.hidden_width + 1)) if -(-nearest // m) * m == a.hidden_width)
    config = TrainingConfig(
        batch_size=1,
        max_seq_len=a.max_seq_len,
        tokens_per_update=a.max_seq_len,
        n_embd=a.width,
        n_heads=a.heads,
        n_layers=a.layers,
        multiple_of=next(fitting, _MULTIPLE_OF),
        eps=a.eps,
        theta=int(a.theta) if a.theta == int(a.theta) else a.theta,  # pyright: ignore[reportArgumentType] - as floats go
    )
    try:
        said = Architecture.of(config, a.vocab_size)
    except UserError as error:
        raise UserError(f"a SimpleLLaMA checkpoint cannot be this model: {error}") from error
    differing = {field.name: (getattr(said, field.name), getattr(a, field.name)) for field in fields(a)}
    words = [f"{name} {there} (expected {ours})" for name, (ours, there) in differing.items() if ours != there]
    if words:
        raise UserError(f"a SimpleLLaMA checkpoint cannot say what this model has: {', '.join(words)}")
    return config


def tokenizer_for_others(tokenizer: Tokenizer, default_system: str, max_seq_len: int, source: Path) -> OwnTokenizer:
    """SimpleLLaMA's, whose files let transformers tokenize and chat as SimpleLLaMA does: the tokenizer, its settings
    with the chat format as a template, the settings of generation.

    Args:
        default_system: the system message of a chat that has none.
        source: of the tokenizer, for errors.
    """
    settings = {
        **PLAIN_CLASS,
        "bos_token": "<SOS>",
        "eos_token": "<EOA>",
        "pad_token": "<PAD>",
        "unk_token": "<UNK>",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE.replace("@", _in_jinja(default_system)),
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json_bytes(settings),
        "generation_config.json": json_bytes({**_TOKEN_IDS, "do_sample": False}),
    }
    return load_hf_tokenizer(files, source)


def _in_jinja(text: str) -> str:
    """Text as it stands between the double quotes of a string in a template."""
    return text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
