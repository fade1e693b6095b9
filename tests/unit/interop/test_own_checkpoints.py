"""SimpleLLaMA checkpoints as LlamaForCausalLM and back: the same function, and chats of the same ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from simple_llama.common.errors import UserError
from simple_llama.common.paths import package_path
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.chat_format import Chat, SimpleLLaMAChat
from simple_llama.interop.own_checkpoints import MergedLoRA, UntiedHead, tokenizer_for_others, training_config
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.rotary import LinearScaling

SIZES: dict[str, Any] = {"n_embd": 24, "n_heads": 4, "n_layers": 2, "multiple_of": 8, "max_seq_len": 64}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def random_model(architecture: Architecture) -> LLaMaTransformer:
    """Every parameter random, norms and both halves of updates too."""
    model = LLaMaTransformer(architecture)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Products(TorchDispatchMode):
    """Notes what matrix products within are of."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.dtypes += [arg.dtype for arg in args]
        return func(*args, **(kwargs or {}))


def logits(model: LLaMaTransformer) -> torch.Tensor:
    """In fp64, where the order of sums does not show."""
    with torch.no_grad():
        return model.double()(TOKENS)


@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("o",), ("q", "k", "v", "o")])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_merged_updates_are_the_same_function(targets: tuple[str, ...], key_heads: int) -> None:
    """Logits of the model without LoRA, its projections with the updates added, are those with LoRA; only tensors that
    have an update are other tensors."""
    config = TrainingConfig(**SIZES, batch_size=1, tokens_per_update=64, use_lora=True, lora_rank=3, lora_alpha=5)
    switches = {f"{name}_lora": name in targets for name in "qkvo"}
    architecture = replace(Architecture.of(replace(config, **switches), 11), key_heads=key_heads)
    model = random_model(architecture)
    merged = MergedLoRA(model.state_dict(), architecture)
    plain = LLaMaTransformer(merged.architecture)
    plain.load_state_dict(dict(merged), strict=True)
    assert torch.allclose(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    same = {name for name in merged if torch.equal(merged[name].float(), model.state_dict()[name].float())}
    changed = {name.partition("attention.")[2] for name in merged if name not in same}
    assert changed == {"out.weight" for name in targets if name == "o"} | {
        "qkv_linear.weight" for name in targets if name != "o"
    }


def test_merging_does_not_round_where_training_may() -> None:
    """Beside an export in a thread, the head of a step may have all fp32 products of the process computed in bf16 (on
    CPUs with AMX): the updates are products of fp64, which that leaves alone."""
    config = TrainingConfig(**SIZES, batch_size=1, tokens_per_update=64, use_lora=True, lora_rank=3, lora_alpha=5)
    architecture = Architecture.of(config, 11)
    merged = MergedLoRA(random_model(architecture).state_dict(), architecture)
    with Products() as products:
        assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert products.dtypes and {*products.dtypes} == {torch.float64}


def test_updates_of_latent_attention_are_refused() -> None:
    """Its keys and values stand behind a norm, so there is no matrix to add to. Without updates all stays as it is."""
    config = TrainingConfig(n_embd=32, n_heads=4, n_layers=1, multiple_of=8, max_seq_len=64, batch_size=1,
                            tokens_per_update=64, use_mla=True, kv_lora_rank=12, qk_nope_head_dim=6,
                            qk_rope_head_dim=4, v_head_dim=8)  # fmt: skip
    latent = LLaMaTransformer(Architecture.of(config, 11))
    same = MergedLoRA(latent.state_dict(), latent.architecture)
    assert all(torch.equal(same[name], tensor) for name, tensor in latent.state_dict().items())
    with pytest.raises(UserError, match="found such of MLA, which cannot be merged"):
        MergedLoRA({}, Architecture.of(replace(config, use_lora=True), 11))


def test_an_untied_head_computes_the_same() -> None:
    """The head is a copy of the embeddings."""
    tied = random_model(replace(Architecture.of(TrainingConfig(**SIZES), 11), tied_head=True))
    plain = LLaMaTransformer(replace(tied.architecture, tied_head=False))
    untied = UntiedHead(tied.state_dict())
    assert len(untied) == len(list(untied)) == len(tied.state_dict()) + 1
    plain.load_state_dict(dict(untied), strict=True)
    assert torch.equal(logits(plain), logits(tied))


@pytest.mark.parametrize(
    ("hidden", "multiple_of"),
    [(256, 256), (64, 1), (65, 5), (66, 3), (72, 9), (130, 130)],
)
def test_configs_that_say_an_architecture(hidden: int, multiple_of: int) -> None:
    """Width 24: 4 * 24 * 2 / 3 = 64, rounded up to a multiple of m: 5 gives 65, 3 gives 66, 9 gives 72, 130 itself; of
    several the smallest, but 256 before all."""
    ours = replace(Architecture.of(TrainingConfig(**SIZES), 11), hidden_width=hidden, eps=1e-6, theta=5e5)
    config = training_config(ours)
    assert config.multiple_of == multiple_of and type(config.theta) is int
    assert Architecture.of(config, 11) == ours


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"key_heads": 2}, r"key_heads 2 \(expected 4\)"),
        ({"hidden_width": 60}, r"hidden_width 60 \(expected 256\)"),
        ({"rope_width": 8, "value_width": 8}, r"rope_width 8 \(expected 6\), value_width 8 \(expected 6\)"),
        ({"qkv_bias": True}, r"qkv_bias True"),
        ({"qk_norm": True}, r"qk_norm True"),
        ({"rope_scaling": LinearScaling(2.0)}, r"rope_scaling LinearScaling"),
        ({"tied_head": True}, r"tied_head True"),
        ({"heads": 5, "key_heads": 5}, r"n_embd: expected a multiple of n_heads = 5"),
    ],
)
def test_architectures_that_no_config_says(changes: dict[str, Any], said: str) -> None:
    """Named, with what a SimpleLLaMA checkpoint of these sizes has. A width of 60 is below the 64 to be rounded up."""
    ours = replace(Architecture.of(TrainingConfig(**SIZES), 11), **changes)
    with pytest.raises(UserError, match=said):
        training_config(ours)


CHATS = [
    Chat(None, ["Say 1."], []),
    Chat('Be "brief".\nAnd {{ kind }}.', ["hello  there", "and\n\nnow?"], [" first\n"]),
    Chat(None, ["\u2019 caf\u00e9", "b", "c"], ["one", ""]),
    Chat("", ["x"], []),
]


@pytest.mark.parametrize("default", ["You are kind.", 'A "b" \\ c\n\u2019 \U0001f600 \x07 {{ x }} {% y %} @'])
def test_chats_have_the_same_ids_in_transformers(default: str) -> None:
    """The template's text, tokenized at once as transformers does, gives the ids of our format; whole chats and those
    that are to be answered."""
    ours = SimpleLLaMAChat(load_tokenizer(package_path("dataset", "bpe_8k.json")), default)
    files = tokenizer_for_others(ours.tokenizer, default, 64, Path("ours")).files
    settings = json.loads(files["tokenizer_config.json"])
    theirs = Tokenizer.from_str(files["tokenizer.json"].decode())
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(settings["chat_template"])
    for chat in CHATS:
        meant = chat if chat.system is not None else chat._replace(system=default)
        for answers, ask in ((chat.assistants, True), ([*chat.assistants, "an answer"], False)):
            text = template.render(messages=messages(chat, answers), add_generation_prompt=ask)
            whole = meant._replace(assistants=answers)
            expected = ours.encode_prompt(whole) if ask else ours.encode([whole])[0].ids
            assert theirs.encode(text, add_special_tokens=False).ids == list(expected)
            assert text == ours.show(whole)


def messages(chat: Chat, answers: Sequence[str]) -> list[dict[str, str]]:
    """As transformers takes them."""
    found = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    for turn, user in enumerate(chat.users):
        found.append({"role": "user", "content": user})
        found += [{"role": "assistant", "content": answer} for answer in answers[turn : turn + 1]]
    return found


def test_files_tell_what_ends_an_answer(tmp_path: Path) -> None:
    """<EOA> is id 7; <PAD> 2; no merges are lost."""
    tokenizer = load_tokenizer(package_path("dataset", "bpe_8k.json"))
    own = tokenizer_for_others(tokenizer, "x", 64, Path("ours"))
    files = own.files
    assert own.token_ids == {"bos_token_id": 0, "eos_token_id": 7, "pad_token_id": 2}
    generation, settings = (json.loads(files[name]) for name in ("generation_config.json", "tokenizer_config.json"))
    assert (generation["eos_token_id"], generation["pad_token_id"], settings["model_max_length"]) == (7, 2, 64)
    assert settings["eos_token"] == "<EOA>" and settings["model_input_names"] == ["input_ids", "attention_mask"]
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == tokenizer.to_str()
