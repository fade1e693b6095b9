"""`python -m simple_llama.pretraining.weights FILE`: what a file holds, and whether it is sound."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from simple_llama.pretraining import weights
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.describe import main
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import save_weights, weights_digest

CONFIG = TrainingConfig(n_embd=8, n_heads=2, n_layers=1, multiple_of=8, max_seq_len=16)


@pytest.fixture
def state_dict() -> dict[str, torch.Tensor]:
    """Weights of a model with 10 tokens: 160 in embeddings and head, 24 in norms, 256 in attention, 576 in the rest."""
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in LLaMaTransformer(Architecture.of(CONFIG, 10)).state_dict().items()}


@pytest.fixture
def path(tmp_path: Path, state_dict: dict[str, torch.Tensor]) -> Path:
    """A sound file."""
    metadata = {"run": "a", "step": 7, "loss": 0.5, "reference": {"weights": "abc"}, "\x1b[2J": None}
    save_weights(tmp_path / "model.pth", state_dict, CONFIG, metadata)
    return tmp_path / "model.pth"


def test_a_sound_file(
    path: Path,
    state_dict: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `python -m` runs it: names, shapes, digest, where it comes from; status 0."""
    monkeypatch.setattr(sys, "argv", ["weights.py", str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(weights.__file__, run_name="__main__")
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.splitlines()[-1].split() == ["result", "sound"]
    for said in (
        "1,016 in 10 tensors, float32 10",
        weights_digest(state_dict),
        "vocab_size 10, max_seq_len 16, width 8, layers 1, heads 2",
        "checksum",
        "step         7",
        "loss         0.5",
        "reference    weights abc",
        "decoder_blocks.0.ffwd.w2.weight (8, 24) float32",
    ):
        assert said in shown, said
    assert "\x1b" not in shown


def test_as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same for programs."""
    assert main([str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == [] and facts["metadata"]["step"] == 7 and facts["architecture"]["heads"] == 2
    assert {"name": "norm.weight", "shape": [8], "dtype": "float32", "not_finite": 0} in facts["tensors"]


def test_what_is_not_finite_is_counted(
    path: Path, state_dict: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two numbers of one tensor."""
    state_dict["norm.weight"][:2] = torch.tensor([torch.nan, torch.inf])
    save_weights(path, state_dict, CONFIG, {})
    assert main([str(path)]) == 2
    said = capsys.readouterr().out
    assert "norm.weight (8,) float32, 2 numbers inf or nan" in said
    assert "not sound: expected finite weights in torch.float32, found inf or nan in norm.weight" in said
    assert "without metadata" in said


def test_a_file_that_differs_from_its_config(
    path: Path, state_dict: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """A tensor is missing, a head is impossible."""
    del state_dict["norm.weight"]
    save_weights(path, state_dict, CONFIG, {})
    assert main([str(path)]) == 2
    assert "missing norm.weight" in capsys.readouterr().out
    config = TrainingConfig.__new__(TrainingConfig)
    config.__dict__.update(CONFIG.__dict__, n_heads=3)
    save_weights(path, state_dict, config, {})
    assert main([str(path)]) == 2
    assert "cannot be built from its config" in capsys.readouterr().out


def test_a_flipped_bit_of_a_weight(
    path: Path, state_dict: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """It loads, and no number is strange; only the checksum tells."""
    content = bytearray(path.read_bytes())
    at = content.index(state_dict["final_linear.weight"].numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert main([str(path)]) == 2
    assert "not sound: 'archive/data/" in (said := capsys.readouterr().out) and "checksum that it should" in said


def test_a_file_without_checksums(
    path: Path, state_dict: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """torch can be told not to compute them."""
    torch.serialization.set_crc32_options(False)
    try:
        save_weights(path, state_dict, CONFIG, {})
    finally:
        torch.serialization.set_crc32_options(True)
    assert main([str(path)]) == 0
    assert "entries in 'archive/', 0 with a checksum" in capsys.readouterr().out


def test_the_old_format(path: Path, state_dict: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """It has none either."""
    torch.save({"model_state_dict": state_dict, "config": CONFIG}, path, _use_new_zipfile_serialization=False)
    assert main([str(path)]) == 0
    assert "before zip files" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4"])
def test_no_weights_file(path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 2."""
    path.write_bytes(content)
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"not sound: {path}: expected a SimpleLLaMA checkpoint") and said.count("\n") == 1


def test_adapters_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Upstream's file of adapters is sound where both halves of each are there, finite and of the config's rank."""
    config = TrainingConfig(n_embd=8, n_heads=2, n_layers=1, multiple_of=8, use_lora=True, lora_rank=2, q_lora=True)
    place, path = "decoder_blocks.0.attention.q_lora_layer.lora_", tmp_path / "adapters.pth"
    halves = {f"{place}a": torch.ones(8, 2), f"{place}b": torch.zeros(2, 8)}
    save_weights(path, halves, config, {"run": "a"}, adapters=True)
    assert main([str(path)]) == 0
    said = capsys.readouterr().out
    assert "LoRA adapters alone, rank 2, alpha" in said and said.splitlines()[-1].split() == ["result", "sound"]
    for broken, words in (
        ({f"{place}a": halves[f"{place}a"]}, "expected halves (I, 2) and (2, O), found (8, 2) and ()"),
        ({**halves, f"{place}b": torch.zeros(3, 8)}, "found (8, 2) and (3, 8)"),
        ({**halves, f"{place}b": torch.full((2, 8), torch.nan)}, "found inf or nan in"),
    ):
        save_weights(path, broken, config, {}, adapters=True)
        assert main([str(path)]) == 2
        assert words in capsys.readouterr().out
