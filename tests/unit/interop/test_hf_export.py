"""Folders in Hugging Face's form: whole or absent, and nobody else's are touched. Without transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from simple_llama.common import files
from simple_llama.common.errors import UserError
from simple_llama.interop import hf_export
from simple_llama.interop.hf_export import (
    RUN_FILE,
    ExportForm,
    delete_aside,
    delete_export,
    export_metadata,
    holds_export_alone,
    write_folder,
)
from simple_llama.interop.hf_names import LLAMA, from_hf
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer

GROUPED = Architecture(
    vocab_size=11,
    max_seq_len=64,
    width=16,
    layers=2,
    heads=4,
    key_heads=2,
    rope_width=4,
    value_width=4,
    hidden_width=24,
)
FORM = ExportForm(GROUPED, LLAMA, {"model_type": "llama"}, torch.float32, {"tokenizer.json": b"{}"})
RUN = {"run": "tiny", "file": "out", "step": 3, "loss": 0.5}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Every parameter random, norms too."""
    model = LLaMaTransformer(GROUPED)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.state_dict()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors package."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers 4 refuses a file without it
        found |= load_file(path)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_holds_the_model(tmp_path: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Mapped back, the tensors are ours, rounded once; config and files are as given, no other is there."""
    path = tmp_path / "out"
    write_folder(path, weights, replace(FORM, dtype=dtype), RUN)
    back = from_hf(tensors_in(path), GROUPED)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name].to(dtype)) for name in weights)
    assert json.loads((path / "config.json").read_text()) == {"model_type": "llama"}
    assert (path / "tokenizer.json").read_bytes() == b"{}"
    names = {"config.json", "tokenizer.json", "model.safetensors", "README.md", RUN_FILE}
    assert {file.name for file in path.iterdir()} == names
    assert export_metadata(path) == RUN and [file.name for file in tmp_path.iterdir()] == ["out"]


def test_shards_hold_as_many_tensors_as_fit(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """At most 2,000 bytes a file: the embeddings, 11 * 16 * 4 = 704, then a layer's queries of 1,024, as its keys and
    values of 512 do not fit any more; a tensor of 24 * 16 * 4 = 1,536 nearly fills one alone."""
    path = tmp_path / "out"
    write_folder(path, weights, FORM, RUN, most_shard_bytes=2000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in path.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in weights.values())
    where = index["weight_map"]
    first = [name for name, file in where.items() if file == files[0]]
    assert sorted(first) == ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    for name, file in where.items():
        assert name in load_file(path / file)
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(path / file).values()) <= 2000
    assert all(torch.equal(tensor, weights[name]) for name, tensor in from_hf(tensors_in(path), GROUPED).items())
    write_folder(tmp_path / "large", weights, FORM, RUN, most_shard_bytes=1)  # a tensor that is larger than a file
    assert len(tensors_in(tmp_path / "large")) == len(where) == len(list((tmp_path / "large").glob("*.safetensors")))


class OneAtATime(Mapping[str, torch.Tensor]):
    """A state dict that is read as it is asked for, and looks on."""

    def __init__(self, tensors: dict[str, torch.Tensor], look: Callable[[], object] = lambda: None):
        self.tensors, self.asked, self.look = tensors, [], look

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        self.look()
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_each_tensor_is_asked_for_once(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A lazy state dict is read once over, however many files there are."""
    lazy = OneAtATime(weights)
    write_folder(tmp_path / "out", lazy, FORM, RUN, most_shard_bytes=2000)
    assert sorted(lazy.asked) == sorted(weights)


def test_what_a_killed_write_leaves_is_known(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A copy of the folder at each tensor, as a kill there would leave it under a name that nobody reads: it is deleted
    whole."""
    left = []

    def copy() -> None:
        [temp] = tmp_path.glob(".out.*.tmp")
        left.append(shutil.copytree(temp, tmp_path / "copies" / f"{len(left)}"))

    write_folder(tmp_path / "out", OneAtATime(weights, copy), FORM, RUN, most_shard_bytes=2000)
    assert len(left) == len(weights) and all(holds_export_alone(folder) for folder in left)
    for folder in left:
        delete_aside(folder)
    assert list((tmp_path / "copies").iterdir()) == []


def test_nothing_stays_of_an_export_that_fails(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number beyond fp16, a start model that changed, a full disk, metadata that JSON has not."""
    path = tmp_path / "out"
    large = {**weights, "norm.weight": torch.full((16,), 1e5)}
    with pytest.raises(UserError, match=r"model.norm.weight has numbers that are not finite in torch.float16"):
        write_folder(path, large, replace(FORM, dtype=torch.float16), RUN)

    def changed() -> None:
        raise UserError("changed")

    with pytest.raises(UserError, match="changed"):
        write_folder(path, OneAtATime(weights, changed), FORM, RUN)
    with pytest.raises(TypeError):
        write_folder(path, weights, FORM, {"run": object()})
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(hf_export, "_write_shard", lambda *args: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match=r"cannot write .*out: No space left on device; free space"):
        write_folder(path, weights, FORM, RUN)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_replaced_and_nothing_else(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """An export of the name goes; a file, a person's folder, an export with a note in it are refused and stay."""
    path = tmp_path / "out"
    write_folder(path, weights, FORM, RUN)
    write_folder(path, {name: -tensor for name, tensor in weights.items()}, FORM, {**RUN, "step": 4})
    assert export_metadata(path)["step"] == 4 and [file.name for file in tmp_path.iterdir()] == ["out"]
    assert torch.equal(tensors_in(path)["model.norm.weight"], -weights["norm.weight"])
    (path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(path)
    for name in ("out", "file", "link"):
        with pytest.raises(UserError, match="cannot rename"):
            write_folder(tmp_path / name, weights, FORM, RUN)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link", "out"]
    assert export_metadata(path)["step"] == 4 and not holds_export_alone(path)


def test_an_export_lies_there_until_the_next_one_is_on_the_disk(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each fsync of a file the old one is whole; where the new one cannot get the name, the old one gets it back."""
    path, seen, fsync = tmp_path / "out", [], files._fsync
    write_folder(path, weights, FORM, RUN)

    def look(file: Path) -> None:
        seen.append((file.name, export_metadata(path).get("step")))
        fsync(file)

    monkeypatch.setattr(files, "_fsync", look)
    write_folder(path, weights, FORM, {**RUN, "step": 4})
    steps = dict(seen)
    assert steps.pop(tmp_path.name) == 4 and steps.keys() > {"model.safetensors", "config.json", RUN_FILE}
    assert {steps[name] for name in steps if not name.endswith(".tmp")} == {3}
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(files, "publish_folder", lambda *args: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="No space left"):
        write_folder(path, weights, FORM, {**RUN, "step": 5})
    assert export_metadata(path)["step"] == 4 and [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("settings", "template", "expected"),
    [
        (
            '{"tokenizer_class": "TokenizersBackend", "x": 1}',
            None,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_input_names": ["input_ids", "attention_mask"],
                "x": 1,
            },
        ),
        ('{"x": 1}', b"{{ 2 }}", {"x": 1, "chat_template": "{{ 2 }}"}),
        ('{"x":1, "chat_template": "{{ 3 }}"}', b"{{ 2 }}", None),
        ('{"x":1, "tokenizer_class": "LlamaTokenizer"}', None, None),
        ("[1]", b"{{ 2 }}", None),
        ("{", None, None),
        ("{}", b"\xff", None),
    ],
)
def test_tokenizers_of_version_5_load_in_4(
    tmp_path: Path, weights: dict[str, torch.Tensor], settings: str, template: bytes | None, expected: dict | None
) -> None:
    """The class by its older name, the template in the older place; a file that needs neither stays byte for byte."""
    files = {"tokenizer_config.json": settings.encode(), **({"chat_template.jinja": template} if template else {})}
    write_folder(tmp_path / "out", weights, replace(FORM, files=files), RUN)
    written = (tmp_path / "out" / "tokenizer_config.json").read_bytes()
    assert written == files["tokenizer_config.json"] if expected is None else json.loads(written) == expected
    assert template is None or (tmp_path / "out" / "chat_template.jinja").read_bytes() == template


def test_exports_are_told_from_other_folders(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """No link, no folder of other origin, none that lost a file, none with facts of another kind."""
    path = tmp_path / "out"
    write_folder(path, weights, FORM, RUN)
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "other").mkdir()
    for name in ("link", "other", "none"):
        assert export_metadata(tmp_path / name) == {} and not holds_export_alone(tmp_path / name)
    (path / "model.safetensors").unlink()
    assert export_metadata(path) == {} and holds_export_alone(path)
    about: dict[str, Any] = {"format": 1, "files": [], "metadata": RUN}
    for key, value in {"format": 2, "files": "config.json", "metadata": None}.items():
        (path / RUN_FILE).write_text(json.dumps({**about, key: value}))
        assert not holds_export_alone(path)
    (path / RUN_FILE).unlink()
    os.mkfifo(path / RUN_FILE)
    assert export_metadata(path) == {}


def test_what_is_deleted_is_an_export(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """One with a person's file stays, one without its name too; of a killed write the temp folder goes."""
    for name in ("whole", "noted", "stranger"):
        write_folder(tmp_path / name, weights, FORM, RUN)
    (tmp_path / "noted" / "notes.txt").write_text("mine")
    (tmp_path / "stranger" / RUN_FILE).unlink()
    for name in ("whole", "noted", "stranger", "none"):
        delete_export(tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["noted", "stranger"]
    assert len(tensors_in(tmp_path / "noted")) == len(tensors_in(tmp_path / "stranger")) > 0
    for number, kept in enumerate([["a", RUN_FILE], [RUN_FILE], []]):
        temp = tmp_path / f".out.1.{number}.tmp"
        temp.mkdir()
        for name in kept:
            (temp / name).write_text(
                json.dumps({"format": 1, "files": ["a", "b"], "metadata": {}}) if "a" in kept else "{"
            )
        delete_aside(temp)
        assert not temp.exists()


@pytest.mark.parametrize("name", ["../kept.txt", "{folder}/kept.txt", "..", ""])
def test_nothing_beside_an_export_is_deleted(tmp_path: Path, name: str) -> None:
    """A folder that names what lies elsewhere, as somebody else may have made it, is no export."""
    kept, folder = tmp_path / "kept.txt", tmp_path / "dpo"
    kept.write_text("kept")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    files = ["config.json", name.format(folder=tmp_path)]
    (folder / RUN_FILE).write_text(json.dumps({"format": 1, "files": files, "metadata": {"step": 1}}))
    assert not holds_export_alone(folder)
    delete_export(folder)
    delete_aside(folder)
    assert kept.read_text() == "kept"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", RUN_FILE]


def test_the_card_says_what_the_run_was(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Names of files without their folders, numbers as people read them, and no markup from a name."""
    settings = {
        "model_path": "/a/b/SmolLM2",
        "rlhf_dataset_path": "/c/pairs.jsonl",
        "loss_type": "sigmoid",
        "beta": 0.1,
    }
    run = {**RUN, "run": "x | <b>y", "epochs": 1 / 3, "dpo_config": settings, "environment": {"torch": "2.13"}}
    write_folder(tmp_path / "out", weights, FORM, run)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n---\n# out\n" in card
    for row in ("start model | SmolLM2", "run | x / (b)y", "epochs done | 0.333333", "preference data | pairs.jsonl",
                "beta | 0.1", "optimizer steps | 3", "torch | 2.13"):  # fmt: skip
        assert f"| {row} |" in card
    assert "/a/b" not in card and "/c" not in card and "adapters" not in card and "made from" not in card


def test_the_card_of_a_mean_of_adapters(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """What the weights were made from, and which adapters the run had."""
    settings = {"model_path": "a", "lora_rank": 8, "lora_alpha": 16.0, "lora_targets": "q,v", "lora_rslora": True}
    write_folder(
        tmp_path / "out", weights, FORM, {"source": "the mean of steps 2, 4 of the run a", "dpo_config": settings}
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| made from | the mean of steps 2, 4 of the run a |" in card
    assert "| adapters | LoRA, rank 8, alpha 16 (scale alpha / sqrt(rank)), on q,v |" in card
