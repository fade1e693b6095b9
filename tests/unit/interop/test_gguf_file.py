"""A GGUF file as the start of a run: the model of the folder that it was converted from, held, dequantized."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.interop import gguf_container
from simple_llama.interop.gguf_file import GGUFFile
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.interop.hf_names import to_hf
from simple_llama.interop.open_start import open_start
from simple_llama.pretraining.rotary import LinearScaling, Llama3Scaling
from simple_llama.pretraining.start_model import StartChanged
from simple_llama.pretraining.weights import build_model, check_weights, weights_digest
from tiny_gguf import converted, make_gguf
from tiny_hf import ARCHITECTURE, make_hf_folder, random_weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The tiny model's file."""
    return make_gguf(tmp_path / "model.gguf")


def divisors(factor: float, width: int = 8, theta: float = 10000.0) -> torch.Tensor:
    """`rope_freqs.weight` as llama.cpp's converter computes it: wave lengths against 8192 / 4 and 8192 / 1 tokens."""
    found = []
    for pair in range(0, width, 2):
        wave = 2 * math.pi * theta ** (pair / width)
        smooth = (8192 / wave - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if wave < 8192 / 4 else factor if wave > 8192 else between)
    return torch.tensor(found)


def test_the_model_is_that_of_the_folder(tmp_path: Path, path: Path) -> None:
    """The same architecture, numerics, tensors and tokenizer as the Hugging Face folder that it was converted from."""
    start, folder = open_start(path), HFFolder(make_hf_folder(tmp_path / "hf"))
    assert isinstance(start, GGUFFile) and start.path == path
    assert start.architecture == ARCHITECTURE and start.numerics == folder.numerics
    assert start.names == folder.names and start.digest == folder.digest == weights_digest(random_weights())
    assert start.export_suffix == "" and start.export_dtype == torch.float32
    assert start.own_tokenizer and folder.own_tokenizer
    assert start.own_tokenizer.named == folder.own_tokenizer.named
    assert start.own_tokenizer.stop_ids == folder.own_tokenizer.stop_ids == {2}
    assert start.own_tokenizer.template == folder.own_tokenizer.template
    with start.reading() as loaded:
        model = build_model(loaded, torch.float32, "cpu")
    assert model.head_weight is model.embeddings.weight
    assert torch.equal(model.embeddings.weight, random_weights()["embeddings.weight"])


def test_a_sliding_window_is_read_and_kept(tmp_path: Path) -> None:
    """Where the metadata has one the model is a Mistral: sequences end at the window, and the export says it. 0: none.
    Without `head_count_kv` there are as many key heads as heads, 4, whose rows the matrices lack."""
    start = GGUFFile(make_gguf(tmp_path / "m.gguf", {"llama.attention.sliding_window": 64}))
    assert start.architecture == replace(ARCHITECTURE, max_seq_len=64) and start.slides
    start.export(tmp_path / "out", {}, {})
    out = HFFolder(tmp_path / "out")
    assert out.config.raw["model_type"] == "mistral" and out.config.raw["sliding_window"] == 64
    assert (out.architecture, out.digest) == (start.architecture, start.digest)
    none = GGUFFile(make_gguf(tmp_path / "n.gguf", {"llama.attention.sliding_window": 0}))
    assert none.architecture == ARCHITECTURE and not none.slides
    fewer = {"llama.attention.sliding_window": 64, "llama.attention.head_count_kv": None}
    with pytest.raises(UserError, match=r"blk.0.attn_k.weight \(16, 32\) instead of \(32, 32\)"):
        GGUFFile(make_gguf(tmp_path / "f.gguf", fewer))
    with pytest.raises(UserError, match=r"llama.attention.sliding_window: expected a whole number, found 6.5"):
        GGUFFile(make_gguf(tmp_path / "w.gguf", {"llama.attention.sliding_window": 6.5}))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantized_tensors_are_dequantized_piece_by_piece(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values as gguf gives them for the whole tensor; 300 rows of 32 numbers are four pieces and a rest here."""
    import gguf

    monkeypatch.setattr(gguf_container, "_PIECE", 2048)
    embeddings = random_weights()["embeddings.weight"]
    start = GGUFFile(make_gguf(tmp_path / "model.gguf", types={"token_embd.weight": kind}))
    quantized = gguf.GGMLQuantizationType[kind]
    expected = gguf.dequantize(gguf.quantize(embeddings.numpy(), quantized), quantized)
    with start.reading() as loaded:
        found = loaded.state_dict["embeddings.weight"]
    assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(expected))
    assert (found - embeddings).abs().max() < 0.2 and not torch.equal(found, embeddings)


def test_a_head_and_biases_of_its_own(tmp_path: Path) -> None:
    """What the tensors say beside the metadata: an untied head, biases of attention, whose rows move as weights do."""
    torch.manual_seed(3)
    hf = to_hf(random_weights(), ARCHITECTURE)
    more = {"lm_head.weight": torch.randn(300, 32)}
    for layer in range(2):
        for name, width in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            more[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.randn(width)
    start = GGUFFile(make_gguf(tmp_path / "model.gguf", tensors=converted({**hf, **more})))
    found = start.architecture
    assert not found.tied_head and found.qkv_bias and found.out_bias and not found.ffwd_bias
    with start.reading() as loaded:
        tensors = to_hf(loaded.state_dict, found)
    assert tensors.keys() == {**hf, **more}.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in more.items())


@pytest.mark.parametrize(
    ("changes", "tensors", "expected"),
    [
        ({}, {}, None),
        ({"llama.rope.scaling.type": "none"}, {}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, {}, LinearScaling(2.0)),
        ({"llama.rope.scale_linear": 4.0}, {}, LinearScaling(4.0)),
        ({}, {"rope_freqs.weight": divisors(8.0)}, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ({}, {"rope_freqs.weight": divisors(32.0)}, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
    ],
    ids=["none", "none, said", "linear", "linear, of older files", "Llama 3.1's", "Llama 3.2's"],
)
def test_stretched_frequencies_are_read(tmp_path: Path, changes: Any, tensors: Any, expected: Any) -> None:
    """Theta 1,000,000 spreads the four pairs over waves of 6 to 200,000 tokens: fast, between and slow ones."""
    if "rope_freqs.weight" in tensors:
        changes = {"llama.rope.freq_base": 1e6}
        tensors = {"rope_freqs.weight": divisors(expected.factor, theta=1e6)}
    start = GGUFFile(make_gguf(tmp_path / "model.gguf", changes, tensors))
    assert start.architecture.rope_scaling == expected


def test_numbers_are_the_decimals_that_were_meant(tmp_path: Path) -> None:
    """fp32 has no 1e-6: the file's 9.999999974752427e-07 is the 1e-06 of config.json."""
    start = GGUFFile(make_gguf(tmp_path / "model.gguf", {"llama.attention.layer_norm_rms_epsilon": 1e-6}))
    assert start.architecture.eps == 1e-6 and start.numerics["eps"] == "1e-06"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "phi3"}, "general.architecture: expected llama, found 'phi3'"),
        ({"general.type": "adapter"}, "general.type: expected model, found 'adapter'"),
        ({"split.count": 3}, "split.count: expected the whole model, found one of 3 files"),
        ({"llama.expert_count": 8}, "llama.expert_count: expected 0, found 8"),
        ({"llama.logit_scale": 2.0}, "expected keys that are known, found llama.logit_scale"),
        ({"llama.block_count": None}, "expected llama.block_count, found none"),
        ({"llama.block_count": 3}, "expected the tensors that the metadata describes, found missing blk.2."),
        ({"llama.block_count": 1}, "found unexpected blk.1."),
        ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv: expected a whole number"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count: expected a whole number from 1 on, found 0"),
        ({"llama.attention.head_count_kv": 3}, "key_heads: expected a divisor of heads"),
        ({"llama.feed_forward_length": 64}, "wrong shapes: blk.0.ffn_gate.weight (48, 32) instead of (64, 32)"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count: expected 8, the width of a head, found 4"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: expected none or linear, found 'yarn'"),
        ({"llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.factor: expected a rope.scaling.type"),
        ({"llama.rope.freq_base": 10000}, "llama.rope.freq_base: expected a number, found 10000"),
        ({"llama.vocab_size": 301}, "llama.vocab_size: expected 300, the rows of token_embd.weight, found 301"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "rms_norm_eps: expected a positive number"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Keys that would change the mathematics, and metadata that does not fit the tensors."""
    path = make_gguf(tmp_path / "model.gguf", changes)
    with pytest.raises(UserError) as error:
        GGUFFile(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"output_norm.weight": None}, "found missing output_norm.weight"),
        ({"more.weight": torch.ones(32)}, "found unexpected more.weight"),
        ({"token_embd.weight": None}, "expected a matrix token_embd.weight, found none"),
        ({"token_embd.weight": torch.ones(32)}, "expected a matrix token_embd.weight, found (32,)"),
        ({"rope_freqs.weight": divisors(8.0) * 1.01}, "rope_freqs.weight: expected the divisors of Llama 3's scaling"),
        ({"rope_freqs.weight": torch.full((4,), torch.nan)}, "rope_freqs.weight: expected the divisors"),
        ({"rope_freqs.weight": torch.ones(5)}, "rope_freqs.weight: expected the divisors"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(tmp_path: Path, tensors: Any, words: str) -> None:
    """Missing, surplus, of another shape; frequencies stretched in a way that cannot be written out."""
    with pytest.raises(UserError) as error:
        GGUFFile(make_gguf(tmp_path / "model.gguf", tensors=tensors))
    assert words in str(error.value)


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    """As for any other model, before training."""
    start = GGUFFile(make_gguf(tmp_path / "model.gguf", tensors={"output_norm.weight": torch.full((32,), torch.inf)}))
    with pytest.raises(UserError, match=r"norm\.weight"):
        check_weights(start.load(), torch.float32)


def test_a_file_that_changes_is_refused(path: Path) -> None:
    """Deleted or replaced it is still held; overwritten in place or cut it is refused."""
    start = GGUFFile(path)
    content = path.read_bytes()
    path.unlink()
    with start.reading() as loaded:
        assert weights_digest(loaded.state_dict) == start.digest
    path.write_bytes(content)
    start = GGUFFile(path)
    with path.open("r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(64))
    with pytest.raises(StartChanged, match="differs"), start.reading() as loaded:
        weights_digest(loaded.state_dict)
    with path.open("r+b") as file:
        file.truncate(len(content) - 1000)
    with pytest.raises(StartChanged, match="bytes, now"):
        start.load()


def test_an_export_is_a_hugging_face_folder(tmp_path: Path, path: Path) -> None:
    """Trained tensors and the file's own, tokenizer, template and ids: read back they are what was written."""
    start, trained = GGUFFile(path), random_weights(9)
    del trained["norm.weight"]
    start.export(tmp_path / "out", trained, {"step": 3})
    assert start.export_metadata(tmp_path / "out") == {"step": 3}
    out = open_start(tmp_path / "out")
    assert isinstance(out, HFFolder) and out.architecture == ARCHITECTURE and out.numerics == start.numerics
    assert out.digest == weights_digest({**random_weights(9), "norm.weight": random_weights()["norm.weight"]})
    assert out.config.raw["bos_token_id"] == 1 and out.config.raw["eos_token_id"] == 2
    assert out.own_tokenizer and start.own_tokenizer
    assert out.own_tokenizer.tokenizer.to_str() == start.own_tokenizer.tokenizer.to_str()
    assert out.own_tokenizer.template == start.own_tokenizer.template
    assert out.own_tokenizer.named == start.own_tokenizer.named and out.own_tokenizer.stop_ids == {2}
    named = {"bos_token": "<|endoftext|>"}
    start.export(tmp_path / "given", {}, {}, tokenizer=replace(out.own_tokenizer, named=named, files={}))
    given = json.loads((tmp_path / "given" / "config.json").read_text())
    assert (given["bos_token_id"], given["eos_token_id"], given["pad_token_id"]) == (0, 2, None)
    start.export(tmp_path / "half", {}, {}, torch.bfloat16)
    assert HFFolder(tmp_path / "half").export_dtype == torch.bfloat16


def test_a_file_without_a_tokenizer_is_a_model_without_one(tmp_path: Path) -> None:
    """Its exports have none either."""
    start = GGUFFile(make_gguf(tmp_path / "model.gguf", tokenizer={}))
    assert start.own_tokenizer is None
    start.export(tmp_path / "out", {}, {})
    assert not (tmp_path / "out" / "tokenizer.json").exists() and HFFolder(tmp_path / "out").digest == start.digest


def test_without_the_package_the_message_says_how_to_install_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"expected the package gguf.*pip install '\.\[gguf\]'"):
        open_start(path)
