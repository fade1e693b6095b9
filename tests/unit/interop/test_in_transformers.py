"""Exports in transformers itself, where it is installed: they load, compute our logits, chat and answer as ours do.

For transformers 4.45 and 5, in environments of their own; pytest, hypothesis and tyro are needed beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from families import CONFIGS, VOCAB, weights
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.chat_format import Chat, SimpleLLaMAChat
from simple_llama.inference.generate import generate
from simple_llama.interop.hf_config import config_json, read_hf_config
from simple_llama.interop.hf_export import ExportForm, write_folder
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.interop.hf_names import from_hf, shapes_in
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import build_model, load_weights, save_weights
from simple_llama.reinforcement_learning.rlhf.export import ExportConfig, export_model
from tiny_hf import make_hf_folder
from tiny_job import make_job

transformers: Any = pytest.importorskip("transformers", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("default")  # transformers has warnings of its own
NEW_TOKENS = 12


def in_transformers(folder: Path, ids: Sequence[int]) -> tuple[torch.Tensor, list[int], Any]:
    """(logits of the ids, what greedy generation adds, the model) in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    given = torch.tensor([list(ids)])
    with torch.no_grad():
        found = model(given).logits[0]
        made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False)
    return found, made[0, len(ids) :].tolist(), model


def ours(start: StartModel) -> LLaMaTransformer:
    """The start model in fp32."""
    with start.reading() as loaded:
        return build_model(loaded, torch.float32, "cpu").eval()


def same(model: LLaMaTransformer, ids: Sequence[int], theirs: torch.Tensor) -> bool:
    """Whether logits agree but for rounding."""
    with torch.no_grad():
        return torch.allclose(model(torch.tensor([list(ids)]))[0], theirs, rtol=3e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_exported_folder(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Grouped keys and a tied head; the same files, in the dtype that config.json says. transformers reads the chat
    template from the same folder."""
    start = HFFolder(make_hf_folder(tmp_path / "start"))
    out = tmp_path / "out"
    start.export(out, {}, {"step": 1}, dtype)
    messages = [{"role": "user", "content": "the cat"}]
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "start", out))
    text, expected = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for tokenizer in (after, before)
    )
    assert text == expected == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    ids = after(text)["input_ids"]
    model = ours(HFFolder(out))
    logits, answer, theirs = in_transformers(out, ids)
    assert theirs.config.torch_dtype == (dtype or torch.float32)
    assert same(model, ids, logits)
    assert answer == list(generate(model, ids, NEW_TOKENS, frozenset()))[: len(answer)]


@pytest.mark.parametrize("family", CONFIGS)
def test_an_exported_folder_of_each_family(tmp_path: Path, family: str) -> None:
    """config.json in both spellings, weights in several files; positions beyond those that RoPE was stretched from."""
    found = read_hf_config(CONFIGS[family], family)
    if found.raw["model_type"] not in transformers.CONFIG_MAPPING:
        pytest.skip("a family of later versions")
    architecture, dtype = found.architecture, torch.float32
    state_dict = from_hf(weights(family, shapes_in(architecture)), architecture)
    size = sum(tensor.nbytes for tensor in state_dict.values())
    form = ExportForm(architecture, found.names, config_json(architecture, dtype, found.raw), dtype, {})
    write_folder(tmp_path / "out", state_dict, form, {}, most_shard_bytes=size // 2)
    ids = [number % VOCAB for number in range(300)]
    model = ours(HFFolder(tmp_path / "out"))
    logits, answer, _ = in_transformers(tmp_path / "out", ids)
    assert same(model, ids, logits)
    assert answer == list(generate(model, ids, NEW_TOKENS, frozenset()))[: len(answer)]


@pytest.mark.parametrize("lora", [False, True])
def test_a_simplellama_checkpoint_as_a_folder(tmp_path: Path, lora: bool) -> None:
    """Logits of the checkpoint, ids of its chats by the template, and an answer that ends with <EOA>."""
    job = make_job(tmp_path, use_lora=lora, lora_rank=4)
    loaded = load_weights(job.folder / "start.pth")
    updated = {name: tensor + 0.05 * ("lora_b" in name) for name, tensor in loaded.state_dict.items()}
    save_weights(job.folder / "start.pth", updated, loaded.config, {})
    start, out = StartFile(job.folder / "start.pth"), tmp_path / "out"
    tokenizer = str(job.folder / "tokenizer.json")
    export_model(ExportConfig(str(start.path), str(out), tokenize_path=tokenizer, system_prompt="Be kind."))
    chat = SimpleLLaMAChat(load_tokenizer(tokenizer), "Be kind.")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "runs"}]
    messages += [{"role": "user", "content": "a dog"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = list(chat.encode_prompt(Chat("Be kind.", ["the cat", "a dog"], ["runs"])))
    assert theirs(text, add_special_tokens=False) == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    model = ours(start)
    logits, answer, made = in_transformers(out, ids)
    assert same(model, ids, logits) and made.generation_config.eos_token_id == 7
    mine = list(generate(model, ids, NEW_TOKENS, chat.stop_ids))
    assert mine == [token for token in answer if token != 7]
