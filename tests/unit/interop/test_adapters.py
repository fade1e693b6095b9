"""Adapters: fresh ones, their forms on disk, and a start model with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from simple_llama.common.errors import UserError
from simple_llama.interop.adapted_start import AdaptedStart, adapted, reference_of, with_adapters
from simple_llama.interop.adapters import AdapterConfig, adapter_shapes, fresh_adapters
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.interop.open_start import open_start, start_metadata
from simple_llama.pretraining.architecture import LORA_TARGETS, LoRA
from simple_llama.pretraining.layers import adapters_off
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import build_model, load_lora_adapters, load_weights
from tiny_hf import make_hf_folder
from tiny_job import MLA, make_job

CONFIG = AdapterConfig(lora_rank=3, lora_alpha=5.0)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Hugging Face's form: grouped keys, a tied head, rows of queries and keys in another order."""
    return make_hf_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SimpleLLaMA checkpoint."""
    return make_job(tmp_path_factory.mktemp("pth")).folder / "start.pth"


def model_of(start: StartModel) -> LLaMaTransformer:
    """In fp32."""
    with start.reading() as loaded:
        return build_model(loaded, torch.float32, "cpu").eval()


def logits(model: LLaMaTransformer) -> torch.Tensor:
    """Of some tokens."""
    with torch.no_grad():
        return model(TOKENS)


def trained(start: AdaptedStart) -> dict[str, torch.Tensor]:
    """Adapters none of whose numbers are zero."""
    torch.manual_seed(3)
    return {name: 0.1 * torch.randn(tensor.shape) for name, tensor in start.adapters.tensors.items()}


def with_trained(start: AdaptedStart) -> LLaMaTransformer:
    """Its model with those."""
    model = model_of(start)
    model.load_state_dict(trained(start), strict=False)
    return model


def fresh(start: StartModel, **changes: Any) -> AdaptedStart:
    """A start with fresh adapters."""
    found = adapted(start, replace(CONFIG, **changes))
    assert isinstance(found, AdaptedStart)
    return found


# === Fresh ===


def test_fresh_adapters_are_as_pefts_and_the_same_wherever_they_are_made(folder: Path) -> None:
    """B zero, A within 1 / sqrt(inputs), of a tensor's name and the seed alone: no global random numbers are used, none
    are the same, and each time they are asked for they are the same."""
    shape = HFFolder(folder).architecture
    before = torch.get_rng_state()
    found = fresh_adapters(shape, CONFIG).tensors
    first = {name: found[name] for name in found}
    assert torch.equal(before, torch.get_rng_state())
    again, other = (fresh_adapters(shape, replace(CONFIG, lora_seed=seed)).tensors for seed in (0, 1))
    halves = [name for name in first if name.endswith("lora_a")]
    assert len(first) == 2 * len(halves) == 2 * 7 * shape.layers
    assert not any(first[name].any() for name in first if name not in halves)
    for name in reversed(halves):
        bound = first[name].shape[0] ** -0.5
        assert bound * 0.8 < first[name].abs().max() <= bound and torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert len({float(first[name].sum()) for name in halves}) == len(halves)


def test_a_start_with_fresh_adapters_is_its_base(folder: Path, pth: Path) -> None:
    """Logits to the bit, with them on and off; the reference is the base, by its digest and its model."""
    for base in (HFFolder(folder), StartFile(pth)):
        start = fresh(base)
        model = model_of(start)
        assert sum("lora" in name for name, _ in model.named_parameters()) == 2 * 7 * base.architecture.layers
        assert torch.equal(logits(model), logits(model_of(base)))
        with adapters_off(model):
            assert torch.equal(logits(model), logits(model_of(base)))
        assert reference_of(start) is base and start.digest == base.digest


def test_adapters_off_is_the_base(folder: Path) -> None:
    """To the bit, where they are not zero; and they are on again after that."""
    base = HFFolder(folder)
    model = with_trained(fresh(base))
    on = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), logits(model_of(base)))
    assert torch.equal(logits(model), on) and not torch.allclose(on, logits(model_of(base)))


def test_scales_by_hand() -> None:
    """16 / 4, and 16 / sqrt(4)."""
    assert LoRA(4, 16, ("q",)).scale == 4 and LoRA(4, 16, ("q",), rank_stabilized=True).scale == 8


# === Merged ===


@pytest.mark.parametrize("stabilized", [False, True])
def test_a_merged_export_is_the_model_with_its_adapters_on(
    folder: Path, pth: Path, tmp_path: Path, stabilized: bool
) -> None:
    """All seven targets, weights in fp32: logits to 1e-6 of the largest, computed in fp64, where the order of sums does
    not show. What has no update is as it was, to the bit."""
    for number, base in enumerate((HFFolder(folder), StartFile(pth))):
        start = fresh(base, lora_rslora=stabilized)
        out = tmp_path / f"out{number}{base.export_suffix}"
        start.export(out, trained(start), {"step": 1})
        exported = open_start(out)
        expected = logits(with_trained(start).double())
        assert exported.architecture == base.architecture
        difference = (logits(model_of(exported).double()) - expected).abs().max()
        assert difference <= 1e-6 * expected.abs().max()
        before, after = base.load().state_dict, exported.load().state_dict
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert {name for name in before if name.endswith(("norm1.weight", "embeddings.weight"))} <= same
        assert not any(name.startswith("decoder_blocks.") and "norm" not in name for name in same)


def test_some_targets_alone_change_some_weights(folder: Path) -> None:
    """Updates of w2 and o: their tensors and no others."""
    start = fresh(HFFolder(folder), lora_targets="w2,o")
    merged = start.merged(trained(start))
    assert merged.updated == [
        f"decoder_blocks.{layer}.{name}.weight" for layer in range(2) for name in ("attention.out", "ffwd.w2")
    ]


def test_latent_attention_takes_those_that_can_be_merged(tmp_path: Path) -> None:
    """o and the feed-forward; q, k and v stand behind norms."""
    base = StartFile(make_job(tmp_path, n_heads=4, **MLA).folder / "start.pth")
    with pytest.raises(UserError, match="found such of MLA, which cannot be merged"):
        fresh(base)
    start = fresh(base, lora_targets="o,w1,w2,w3")
    start.export(tmp_path / "out.pth", trained(start), {})
    found = logits(model_of(StartFile(tmp_path / "out.pth")).double())
    expected = logits(with_trained(start).double())
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# === Forms on disk ===


@pytest.mark.parametrize("stabilized", [False, True])
def test_pefts_form_comes_back(folder: Path, tmp_path: Path, stabilized: bool) -> None:
    """The same numbers, scale and digest, alone with the base that the folder names or beside one that is given. What
    stands there is what peft reads: A (R, I), B (O, R), the rows of queries and keys in their family's order."""
    start = fresh(HFFolder(folder), lora_rslora=stabilized, export="adapters")
    out = tmp_path / "adapters"
    start.export(out, trained(start), {"run": "tiny", "step": 6})
    found = open_start(out)
    assert isinstance(found, AdaptedStart) and found.path == out and found.base.path == folder
    assert found.adapters.lora == start.adapters.lora
    assert {name: tensor.tolist() for name, tensor in found.adapters.tensors.items()} == {
        name: tensor.tolist() for name, tensor in trained(start).items()
    }
    assert torch.equal(logits(model_of(found)), logits(with_trained(start)))
    assert start_metadata(out) == found.export_metadata(out) == {"run": "tiny", "step": 6}
    assert with_adapters(HFFolder(folder), out).digest == found.digest != found.base.digest
    config, theirs = json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["peft_type"]) == (3, 5, stabilized, "LORA")
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    prefix = "base_model.model.model.layers.1"
    ours = trained(start)["decoder_blocks.1.attention.k_lora_layer.lora_b"].T  # two heads of 8
    order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(theirs[f"{prefix}.self_attn.k_proj.lora_B.weight"], ours[order])
    assert theirs[f"{prefix}.mlp.down_proj.lora_A.weight"].shape == (3, 48)


def test_upstreams_file_comes_back(pth: Path, tmp_path: Path) -> None:
    """`lora_adapters` with the names of the state dict, and a config that says them; other targets are refused."""
    start = fresh(StartFile(pth), lora_targets="q,k,v,o", export="adapters")
    out = tmp_path / "lora.pth"
    metadata = {"step": 6, "dpo_config": {"model_path": str(pth)}}
    start.export(out, trained(start), metadata)
    held = load_lora_adapters(out)
    assert held and held.tensors.keys() == trained(start).keys() and held.metadata == metadata
    assert (held.config.use_lora, held.config.lora_rank, held.config.lora_alpha, held.config.k_lora) == (
        True,
        3,
        5,
        True,
    )
    for found in (open_start(out), with_adapters(StartFile(pth), out)):
        assert isinstance(found, AdaptedStart)
        assert torch.equal(logits(model_of(found)), logits(with_trained(start)))
        assert found.export_metadata(out) == start_metadata(out) == metadata
    with pytest.raises(UserError, match="give that as --model_path and this as --adapter_path"):
        load_weights(out)
    with pytest.raises(UserError, match="found w1, w2, w3 too"):
        fresh(StartFile(pth), export="adapters")


def test_a_stabilized_scale_stands_in_upstreams_file_as_its_alpha(pth: Path, tmp_path: Path) -> None:
    """It has no other scale than alpha / rank."""
    start = fresh(StartFile(pth), lora_rank=4, lora_targets="q", lora_rslora=True, export="adapters")
    start.export(tmp_path / "lora.pth", trained(start), {})
    found = with_adapters(StartFile(pth), tmp_path / "lora.pth")
    assert found.adapters.lora.scale == start.adapters.lora.scale == 2.5 and found.adapters.lora.alpha == 10


def test_the_reference_of_trained_adapters_is_said_never_guessed(folder: Path, tmp_path: Path) -> None:
    """The model as it starts, by a digest of its own; the base by the flag; the base where the adapters are zero."""
    base = HFFolder(folder)
    start = fresh(base, export="adapters")
    start.export(tmp_path / "trained", trained(start), {})
    start.export(tmp_path / "zero", start.adapters.tensors, {})
    as_it_starts = adapted(base, AdapterConfig(), str(tmp_path / "trained"))
    assert reference_of(as_it_starts) is as_it_starts and as_it_starts.digest != base.digest
    without = adapted(base, AdapterConfig(reference_without_adapters=True), str(tmp_path / "trained"))
    assert reference_of(without) is base and without.digest == as_it_starts.digest
    assert isinstance(without, AdaptedStart) and without.about["reference"] == "without them"
    zero = adapted(base, AdapterConfig(), str(tmp_path / "zero"))
    assert reference_of(zero) is base and zero.digest == base.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "expected a LoRA adapter of peft, found one of type 'IA3'"),
        ({"bias": "all"}, "bias: expected none, found 'all'"),
        ({"use_dora": True}, "found use_dora set, which is not read"),
        ({"rank_pattern": {"q_proj": 8}}, "found rank_pattern set"),
        ({"modules_to_save": ["lm_head"]}, "found modules_to_save set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected true, found 'pissa'"),
        ({"r": 0}, "r: expected a whole number"),
        ({"r": 4}, "wrong shapes: base_model"),
        ({"lora_alpha": "16"}, "lora_alpha: expected a positive number"),
        ({"use_rslora": 1}, "use_rslora: expected true or false"),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    folder: Path, tmp_path: Path, change: Mapping[str, Any], message: str
) -> None:
    """By the key that says so: nothing that might change the output is passed over."""
    start = fresh(HFFolder(folder), export="adapters")
    start.export(tmp_path / "out", trained(start), {})
    place = tmp_path / "out" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        open_start(tmp_path / "out")


def test_adapters_of_another_model_are_refused(folder: Path, pth: Path, tmp_path: Path) -> None:
    """A tensor too few, too many, of another shape; a base that is not here; no adapters at all."""
    start = fresh(HFFolder(folder), export="adapters")
    start.export(tmp_path / "out", trained(start), {})
    weights, config = tmp_path / "out" / "adapter_model.safetensors", tmp_path / "out" / "adapter_config.json"
    tensors = load_file(weights)
    first = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for changed, message in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, f"missing {first}"),
        ({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(3, 32)}, "unexpected base_model.model.lm_h"),
        ({**tensors, first: torch.zeros(3, 31)}, "wrong shapes"),
        ({"x": torch.zeros(1)}, "expected adapters of the model that it is to stand beside"),
    ):
        save_file(changed, weights)
        with pytest.raises(UserError, match=message):
            open_start(tmp_path / "out")
    save_file(tensors, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/model"}))
    with pytest.raises(UserError, match=r"whose base is 'org/model', which is not here: give the base as --model_path"):
        open_start(tmp_path / "out")
    assert with_adapters(HFFolder(folder), tmp_path / "out").adapters.lora.rank == 3
    with pytest.raises(UserError, match="expected adapters: a folder with adapter_config.json"):
        with_adapters(HFFolder(folder), folder)
    narrow = fresh(StartFile(pth), lora_targets="k", export="adapters")
    narrow.export(tmp_path / "lora.pth", trained(narrow), {})
    with pytest.raises(UserError, match="wrong shapes|missing|unexpected"):
        with_adapters(HFFolder(folder), tmp_path / "lora.pth")
    with pytest.raises(UserError, match="whose base is not named"):
        open_start(tmp_path / "lora.pth")


def test_settings_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    """Unknown targets; a rank beside adapters that have one; adapters on adapters; what has no effect."""
    base = HFFolder(folder)
    with pytest.raises(UserError, match="lora_rslora: expected lora_rank beside it"):
        AdapterConfig(lora_rslora=True)
    for targets in ("q,x", "q,q", ""):
        with pytest.raises(UserError, match=f"lora_targets: expected some of {','.join(LORA_TARGETS)}"):
            AdapterConfig(lora_targets=targets)
    start = fresh(base, export="adapters")
    start.export(tmp_path / "out", trained(start), {})
    with pytest.raises(UserError, match="lora_rank: expected 0"):
        adapted(base, CONFIG, str(tmp_path / "out"))
    with pytest.raises(UserError, match="lora_rank: expected 0"):
        adapted(open_start(tmp_path / "out"), CONFIG)
    with pytest.raises(UserError, match="adapter_path: expected a model without adapters"):
        adapted(open_start(tmp_path / "out"), AdapterConfig(), str(tmp_path / "out"))
    without: list[dict[str, Any]] = [{"export": "adapters"}, {"reference_without_adapters": True}]
    for changes in without:
        with pytest.raises(UserError, match=f"{next(iter(changes))}: expected adapters beside it"):
            adapted(base, AdapterConfig(**changes))
    own = StartFile(make_job(tmp_path / "own", use_lora=True, lora_rank=2).folder / "start.pth")
    with pytest.raises(UserError, match="expected a model without adapters of its own"):
        adapted(own, CONFIG)


def test_shapes_of_all_targets_by_hand(folder: Path) -> None:
    """Width 32, four heads of 8 on two key heads, 48 hidden numbers, rank 3."""
    shapes = adapter_shapes(HFFolder(folder).architecture, LoRA(3, 1, LORA_TARGETS))
    sizes = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}
    for target, (inputs, outputs) in sizes.items():
        room = "attention" if target in "qkvo" else "ffwd"
        place = f"decoder_blocks.1.{room}.{target}_lora_layer"
        assert (shapes[f"{place}.lora_a"], shapes[f"{place}.lora_b"]) == ((inputs, 3), (3, outputs))
