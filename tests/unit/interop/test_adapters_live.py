"""Adapters in peft itself, where it is installed: ours load and compute our logits there, and theirs here.

In an environment of its own (peft, transformers); pytest, hypothesis and tyro are needed beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.interop.adapted_start import AdaptedStart, adapted, with_adapters
from simple_llama.interop.adapters import AdapterConfig
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import build_model
from tiny_hf import make_hf_folder

peft: Any = pytest.importorskip("peft", exc_type=ImportError)
transformers: Any = pytest.importorskip("transformers", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("default")  # both have warnings of their own
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(start: StartModel) -> LLaMaTransformer:
    """The start model in fp32."""
    with start.reading() as loaded:
        return build_model(loaded, torch.float32, "cpu").eval()


def in_peft(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of the base with the adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).float()
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(TOKENS).logits


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for rounding."""
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stabilized", [False, True])
def test_ours_in_peft(tmp_path: Path, stabilized: bool) -> None:
    """Trained, non-zero adapters on all seven targets; rows of queries and keys stand in another order there."""
    base = make_hf_folder(tmp_path / "base")
    config = AdapterConfig(lora_rank=3, lora_alpha=5.0, lora_rslora=stabilized, export="adapters")
    start = adapted(HFFolder(base), config)
    assert isinstance(start, AdaptedStart)
    torch.manual_seed(3)
    trained = {name: 0.3 * torch.randn(tensor.shape) for name, tensor in start.adapters.tensors.items()}
    start.export(tmp_path / "adapter", trained, {})
    model = ours(start)
    model.load_state_dict(trained, strict=False)
    with torch.no_grad():
        expected, plain = model(TOKENS), ours(start)(TOKENS)
    assert same(in_peft(base, tmp_path / "adapter"), expected) and not same(plain, expected)


@pytest.mark.parametrize("stabilized", [False, True])
def test_pefts_here(tmp_path: Path, stabilized: bool) -> None:
    """What peft itself writes, every number of it random."""
    base = make_hf_folder(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base).float()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, use_rslora=stabilized, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
        found = ours(with_adapters(HFFolder(base), tmp_path / "adapter"))(TOKENS)
    assert same(found, expected)
