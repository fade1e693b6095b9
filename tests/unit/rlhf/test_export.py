"""launch/export.py: any checkpoint, folder or state in another form or dtype, with what it says of itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.interop.hf_export import export_metadata
from simple_llama.interop.open_start import open_start
from simple_llama.pretraining.weights import build_model, load_weights, save_weights
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import StateWeights, newest_state
from simple_llama.reinforcement_learning.rlhf.export import ExportConfig, export_model
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from tiny_hf import make_hf_folder
from tiny_job import MLA, TinyJob, make_job

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
IDS = torch.tensor([[8, 21, 22, 6, 30]])


def logits(path: Path) -> torch.Tensor:
    """Of the model at `path`, in fp32."""
    with open_start(path).reading() as loaded, torch.no_grad():
        return build_model(loaded, torch.float32, "cpu")(IDS)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """A start model with updates that are not zero."""
    job = make_job(tmp_path_factory.mktemp("lora"), use_lora=True, lora_rank=4, o_lora=True)
    loaded = load_weights(job.folder / "start.pth")
    weights = {name: tensor + 0.02 * ("lora_b" in name) for name, tensor in loaded.state_dict.items()}
    save_weights(job.folder / "start.pth", weights, loaded.config, {})
    return job


@pytest.fixture(scope="module")
def run(lora: TinyJob, ranks: Ranks) -> Path:
    """The checkpoint folder of a run of two steps that trained the updates alone, saved after the second."""
    few: dict[str, Any] = {"epochs": 1, "grad_accum_steps": 6, "eval_interval": 0, "n_samples": 0, "val_share": 0.0}
    config = DPOConfig(**{**lora.settings, **few, "reference": "online", "trainable": "lora"})
    return train(config, load_inputs(config, ranks), ranks).parent


def test_a_checkpoint_as_a_folder_and_back(lora: TinyJob, tmp_path: Path) -> None:
    """LoRA is merged, so logits are equal but for the order of sums; there and back the tensors are bit for bit."""
    start, folder, back = lora.folder / "start.pth", tmp_path / "hf", tmp_path / "back.pth"
    tokenizer = str(lora.folder / "tokenizer.json")
    (tmp_path / "system.txt").write_text("Be kind.\n")
    system = f"@{tmp_path / 'system.txt'}"
    said = export_model(ExportConfig(str(start), str(folder), tokenize_path=tokenizer, system_prompt=system))
    assert said == f"wrote {folder} from start.pth, LoRA merged"
    assert torch.allclose(logits(folder), logits(start), atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"], config["dtype"]) == ("llama", 7, "float32")
    assert '"Be kind."' in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert export_metadata(folder)["source"] == "start.pth"
    assert "| start model | start.pth |" in (folder / "README.md").read_text()
    export_model(ExportConfig(str(folder), str(back)))
    export_model(ExportConfig(str(start), str(tmp_path / "merged.pth")))
    merged, there = load_weights(tmp_path / "merged.pth"), load_weights(back)
    assert not merged.config.use_lora and merged.architecture == there.architecture
    assert merged.state_dict.keys() == there.state_dict.keys()
    assert all(torch.equal(tensor, there.state_dict[name]) for name, tensor in merged.state_dict.items())


def test_a_state_is_exported_as_its_run_did(run: Path, tmp_path: Path) -> None:
    """The newest state of a run, by the run's folder or its own: the tensors of the run's own export, LoRA merged, in
    the dtype that is asked for. What was not trained comes from the start model."""
    [exported] = run.glob("*.pth")
    whole, out = tmp_path / "whole.pth", tmp_path / "bf16"
    export_model(ExportConfig(str(exported), str(whole)))
    said = export_model(ExportConfig(str(run / "state" / "step_00000002"), str(out), dtype="bfloat16"))
    assert said == f"wrote {out} from step 2 of the run tiny, LoRA merged"
    export_model(ExportConfig(str(run), str(tmp_path / "again.pth")))
    expected, found = (load_weights(path).state_dict for path in (whole, tmp_path / "again.pth"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["model.norm.weight"], expected["norm.weight"].bfloat16())
    about = export_metadata(out)
    assert (about["run"], about["step"], about["dpo_config"]["trainable"]) == ("tiny", 2, "lora")
    assert about["file"] == ""  # what a person makes is not the run's to delete


def test_a_state_that_goes_while_it_is_read(run: Path, tmp_path: Path) -> None:
    """A live run deletes old states: the message names the state, not the disk that is written to."""
    shutil.copytree(run, tmp_path / "live")
    saved = newest_state(tmp_path / "live")
    weights = StateWeights(saved)
    shutil.rmtree(saved.folder)
    name = next(iter(weights))
    assert name in weights and "other" not in weights  # without a look at the disk
    with pytest.raises(
        UserError, match="rank_00000.safetensors: expected a whole state, found: .*; a run that goes on"
    ):
        _ = weights[name]


def test_a_folder_keeps_what_it_is(tmp_path: Path) -> None:
    """Another dtype and nothing else: tokenizer and settings byte for byte, and the keys of config.json."""
    source, out = make_hf_folder(tmp_path / "in"), tmp_path / "out"
    with (source / "tokenizer.json").open("a") as file:
        file.write("\n \n")
    export_model(ExportConfig(str(source), str(out), dtype="bfloat16"))
    there, here = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert here["dtype"] == "bfloat16"
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in FILES)
    assert all(
        here[key] == value for key, value in there.items() if key not in ("dtype", "torch_dtype", "rope_scaling")
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name].bfloat16()) for name, tensor in after.items())


def test_what_cannot_be_written_is_refused(lora: TinyJob, run: Path, tmp_path: Path) -> None:
    """One message each, and nothing written."""
    job = make_job(tmp_path / "mla", n_heads=4, **MLA)
    other = make_job(tmp_path / "other", n_layers=1)
    moved, damaged = tmp_path / "moved", tmp_path / "damaged"
    for copy in (moved, damaged):
        shutil.copytree(run / "state", copy / "state")
    next((damaged / "state").glob("*/rank_*")).write_bytes(b"")
    start, folder, out = str(lora.folder / "start.pth"), str(make_hf_folder(tmp_path / "hf")), str(tmp_path / "out")
    cases: list[tuple[ExportConfig, str]] = [
        (ExportConfig(start, start), "start.pth: expected nothing there yet"),
        (ExportConfig(start, str(run / "dpo_mine")), "dpo_mine: expected a name that the run in .*tiny gives to none"),
        (ExportConfig(str(tmp_path / "none"), out), "expected a .pth file"),
        (ExportConfig(str(job.folder / "start.pth"), out), "found MLA or LoRA"),
        (ExportConfig(start, out), "bpe_8k.json: 8192 tokens, but the model knows"),
        (ExportConfig(folder, out + ".pth"), r"cannot say what this model has: key_heads .*; leave out the .pth"),
        (ExportConfig(str(moved), out), "moved: expected a config.json that says which model"),
        (ExportConfig(str(moved), out, model_path=str(other.folder / "start.pth")), "not the model that the run"),
        (ExportConfig(str(damaged), out, model_path=start), "found no complete one"),
        (ExportConfig(str(next((damaged / "state").iterdir())), out, model_path=start), "a whole state, found: rank_0"),
        (ExportConfig(start, out + ".pth", tokenize_path=start), "tokenize_path: expected a folder as output"),
        (ExportConfig(start, out + ".pth", system_prompt="Hi"), "system_prompt: expected a SimpleLLaMA checkpoint"),
        (ExportConfig(folder, out, model_path=start), "model_path: expected a state or the folder of a run"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for config, said in cases:
        with pytest.raises(UserError, match=said):
            export_model(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def epochs_of(start: Path, run: Path, shifts: dict[int, float], changed: dict[str, Any] | None = None) -> list[Path]:
    """What a run of this name that started there might have exported: its weights moved by so much at each epoch's end,
    and in the middle of the first epoch."""
    run.mkdir(parents=True, exist_ok=True)
    model, paths = open_start(start), []
    weights = dict(model.load().state_dict)
    for step, shift in shifts.items():
        path = run / f"dpo_{step / 2:g}E_16MSQ{model.export_suffix}"
        about = {"run": "tiny", "file": path.name, "step": step, "epochs": step / 2, "reference": {"weights": "ab"}}
        about |= changed or {}
        model.export(path, {name: tensor + shift for name, tensor in weights.items()}, about)
        paths.append(path)
    return paths


def test_the_mean_of_the_last_epochs(lora: TinyJob, tmp_path: Path) -> None:
    """Epochs 2 and 3 of three, not the half one: the mean of both, LoRA merged in each, as a .pth and as a folder. Of
    folders in bf16 1 and 1 + 2**-7 are 1 + 2**-8 in fp32."""
    run = tmp_path / "tiny"
    *_, second, third = epochs_of(lora.folder / "start.pth", run, {1: 9.0, 2: 7.0, 4: 0.5, 6: -0.25})
    apart = [load_weights(Path(merged(path, tmp_path))).state_dict for path in (second, third)]
    said = export_model(ExportConfig(str(run), str(tmp_path / "mean.pth"), average=2))
    assert said == f"wrote {tmp_path / 'mean.pth'} from the mean of steps 4, 6 of the run tiny, LoRA merged"
    mean = load_weights(tmp_path / "mean.pth")
    for name, tensor in mean.state_dict.items():
        assert torch.equal(tensor, ((apart[0][name].double() + apart[1][name]) / 2).float()), name
    assert "step" not in mean.metadata and mean.metadata["run"] == "tiny" and mean.metadata["file"] == ""
    tokenizer = str(lora.folder / "tokenizer.json")
    export_model(ExportConfig(str(run), str(tmp_path / "mean"), average=2, tokenize_path=tokenizer))
    assert torch.allclose(logits(tmp_path / "mean"), logits(tmp_path / "mean.pth"), atol=1e-4)
    folder = make_hf_folder(tmp_path / "hf")
    export_model(ExportConfig(str(folder), str(tmp_path / "hf16"), dtype="bfloat16"))
    epochs_of(tmp_path / "hf16", tmp_path / "folders", {2: 0.0, 4: 2.0**-7})
    export_model(ExportConfig(str(tmp_path / "folders"), str(tmp_path / "out"), average=2, dtype="float32"))
    norms = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norms, torch.full_like(norms, 1 + 2.0**-8))


def merged(path: Path, folder: Path) -> str:
    """An export by itself, LoRA merged."""
    out = str(folder / f"merged-{path.name}")
    export_model(ExportConfig(str(path), out))
    return out


def test_no_mean_of_what_is_not_one_runs(lora: TinyJob, tmp_path: Path) -> None:
    """Too few epochs, another run's or another start's file, another shape, and what is no folder."""
    start, run, out = lora.folder / "start.pth", tmp_path / "tiny", str(tmp_path / "out.pth")
    epochs_of(start, run, {1: 0.0, 2: 0.0})
    with pytest.raises(UserError, match=r"average: expected 2 exports of ends of epochs in .*, found dpo_1E_16MSQ.pth"):
        export_model(ExportConfig(str(run), out, average=2))
    with pytest.raises(UserError, match="average: expected the checkpoint folder of a run"):
        export_model(ExportConfig(str(start), out, average=2))
    for changed, words in ({"run": "b"}, "another run: 'tiny', not 'b'"), ({"reference": {}}, "another reference"):
        epochs_of(start, run, {4: 0.0}, changed)
        with pytest.raises(UserError, match=words):
            export_model(ExportConfig(str(run), out, average=2))
    epochs_of(make_job(tmp_path / "other", n_layers=1).folder / "start.pth", run, {4: 0.0})
    with pytest.raises(UserError, match="dpo_1E_16MSQ.pth: expected the architecture of dpo_2E_16MSQ.pth"):
        export_model(ExportConfig(str(run), out, average=2))
    assert not (tmp_path / "out.pth").exists()
