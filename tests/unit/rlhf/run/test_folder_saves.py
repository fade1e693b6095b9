"""Whole runs from a Hugging Face folder: what went in comes out, and a resume makes what is missing."""

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
from simple_llama.interop import hf_folder
from simple_llama.interop.hf_export import export_metadata
from simple_llama.interop.open_start import open_start
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import StateWeights, newest_state
from simple_llama.reinforcement_learning.rlhf.export import ExportConfig, export_model
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from tiny_hf import TinyHFJob, make_hf_job

# 4 steps without anything but training, saves after each of them
QUICK: dict[str, Any] = {"epochs": 2, "grad_accum_steps": 6, "eval_interval": 0, "n_samples": 0, "save_interval": 1}
QUICK |= {"reference": "online", "keep_exports": 1}


def run_job(job: TinyHFJob, ranks: Ranks, **settings: Any) -> Path:
    """Trains; gives the exported folder."""
    config = DPOConfig(**{**job.settings, **QUICK, **settings})
    return train(config, load_inputs(config, ranks), ranks)


def exports(job: TinyHFJob, run: str = "tiny") -> dict[str, int]:
    """Exports of a run, and of which step each is."""
    folder = job.folder / "checkpoints" / run
    return {path.name: export_metadata(path)["step"] for path in sorted(folder.glob("dpo_*"))}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyHFJob:
    """Grouped keys, a tied head, a tokenizer of its own."""
    return make_hf_job(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def last(job: TinyHFJob, ranks: Ranks) -> Path:
    """The last export of a run."""
    return run_job(job, ranks)


def test_what_went_in_comes_out(job: TinyHFJob, last: Path) -> None:
    """Epochs' ends 2 and 4 and the newest of the others stay, as folders; no .pth. The last has the state's weights and
    the start's other files, and may be started from."""
    found = exports(job)
    assert sorted(found.values()) == [2, 3, 4] and found[last.name] == 4
    assert not list(last.parent.glob("*.pth")) and not list(last.parent.glob(".*.tmp"))
    assert last.name.startswith("dpo_2E_") and last.name.endswith("L_512MSQ")
    started = open_start(last)
    weights = StateWeights(newest_state(last.parent))
    assert weights.keys() == set(started.names)
    assert all(torch.equal(started.load().state_dict[name], weights[name]) for name in weights)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (last / name).read_bytes() == (job.model / name).read_bytes()
    about = export_metadata(last)
    assert (about["run"], about["file"], about["epochs"]) == ("tiny", last.name, 2.0)
    finished = json.loads((job.folder / "runs" / "tiny" / "finished.json").read_text())
    assert (finished["step"], finished["weights"]) == (4, str(last))


def test_a_given_tokenizer_goes_into_the_exports(ranks: Ranks, tmp_path: Path) -> None:
    """It and its template are what was trained with; of the model's own none stays. So do exports of the state."""
    job, given = make_hf_job(tmp_path, pairs=12), tmp_path / "given"
    given.mkdir()
    shutil.copy(job.model / "tokenizer.json", given)
    settings = json.loads((job.model / "tokenizer_config.json").read_text())
    settings["chat_template"] += "{# another #}"
    settings["bos_token"] = "<|endoftext|>"  # 0; the model's is 1
    (given / "tokenizer_config.json").write_text(json.dumps(settings))
    last = run_job(job, ranks, tokenize_path=str(given), epochs=1, save_interval=0, val_share=0.0)
    export_model(ExportConfig(str(last.parent), str(tmp_path / "out")))
    export_model(ExportConfig(str(job.model), str(tmp_path / "other"), tokenize_path=str(given)))
    for folder in (last, tmp_path / "out", tmp_path / "other"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (given / name).read_bytes(), folder
        assert not (folder / "generation_config.json").exists() and open_start(folder).own_tokenizer is not None
        config = json.loads((folder / "config.json").read_text())
        assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 2, 2], folder


def test_a_failed_export_is_made_by_the_run_that_resumes(
    job: TinyHFJob, last: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the second folder: the state of step 2 names it. Resumed, the run writes it first, and ends with the
    folders of one that had room, bit for bit."""
    write, written = hf_folder.write_folder, []

    def fill(path: Path, *rest: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise UserError(f"cannot write {path}: No space left on device")
        write(path, *rest)

    monkeypatch.setattr(hf_folder, "write_folder", fill)
    with pytest.raises(UserError, match="No space left"):
        run_job(job, ranks, run_name="full")
    assert list(exports(job, "full").values()) == [1]
    run_job(job, ranks, run_name="full", resume=True)
    assert written[2] == written[1] and exports(job, "full") == exports(job)
    for name in exports(job, "full"):
        mine, other = (job.folder / "checkpoints" / run / name for run in ("full", "tiny"))
        assert (mine / "config.json").read_bytes() == (other / "config.json").read_bytes()
        tensors = load_file(other / "model.safetensors")
        assert all(torch.equal(t, tensors[key]) for key, t in load_file(mine / "model.safetensors").items())
