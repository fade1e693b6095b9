"""What the code of commit 7a852ca wrote is read and taken up. tests/golden/make_before.py made tests/golden/before."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.settings import with_absolute_paths
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.weights import load_weights
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import parse_config
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from tiny_job import ROOT

GOLDEN = ROOT / "tests" / "golden" / "before"
# Metrics that lines did not have.
NOT_THEN = {"logps/accuracies", "eval_logps/accuracies", "eval_longer_is_chosen"}
NOT_THEN |= {f"samples/{name}" for name in ("repeated_trigrams", "tokens", "ended", "empty", "unknown")}
NOT_THEN |= {f"samples/{name}" for name in ("kl", "kl_low", "kl_high")}
NOT_THEN |= {f"eval_{name}" for name in ("log_ratio/chosen", "log_ratio/rejected", "margin_length_correlation")}
NOT_THEN |= {"rewards/saturated"}


def without_spaces(texts: list[str]) -> list[str]:
    """What of them is no white space."""
    return ["".join(text.split()) for text in texts]


class Near(NamedTuple):
    """How far the end of a run that is taken up may lie from the recorded one, which two threads of a Zen 5 with bf16
    units made (torch 2.13.0+cpu). In fp32 there today's bits are the same; a CPU with other instructions rounds
    otherwise, and of bf16 attention computes in fp32 since then."""

    relative: float  # of a metric or a stored log-prob sum
    metric: float  # of a metric, where that is more
    weight: float


# A reward is the difference of two sums of up to a hundred nats. From step 2 to the end, weights go some 0.007.
FP32 = Near(1e-5, 1e-5, 1e-6)  # seen without AVX-512: 2e-6 of a reward, 6e-8 of a weight
# Seen without AVX-512: 8e-3 of a gradient's norm, 1.1e-3 of a weight. The norm in step 3 was 7.712 then and is 7.740
# now; of the same weights in fp64 it is 7.755.
BF16 = Near(2e-3, 3e-2, 3e-3)
# name: (flags beside those of its config.json, tolerances)
RUNS: dict[str, tuple[tuple[str, ...], Near]] = {
    "stopped": ((), FP32),  # asked to stop in an evaluation: the state says that it is unfinished, and has no .pth
    "killed": (("--grad_accum_steps=4",), BF16),  # bf16, written by two ranks, each with half of the micro-batches
    "adapters": ((), FP32),  # latent attention, LoRA alone is trained, ipo
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the golden files in another place than they were made in; their paths are relative to it."""
    shutil.copytree(GOLDEN, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    return tmp_path / "moved"


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of a .jsonl file without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def sums_by_pair(store: Path) -> dict[bytes, np.ndarray]:
    """Log-prob sums (chosen, rejected) by the digest of a pair and its scored counts, as its shards have them."""
    found = np.concatenate([np.load(path) for path in store.glob("*.npy")])
    return {record["digest"].tobytes() + record["counts"].tobytes(): record["logps"] for record in found}


@pytest.mark.parametrize("name", RUNS)
def test_settings_come_back_as_they_were(folder: Path, name: str) -> None:
    """`--config` of a run's config.json: every setting that stands there has its value, but what has no effect now."""
    path = folder / "runs" / name / "config.json"
    found = json.loads(json.dumps(asdict(parse_config(["--config", str(path)]))))
    before = json.loads(path.read_text())
    assert before.pop("compile") is False and before.items() <= found.items()


@pytest.mark.parametrize("name", RUNS)
def test_store_is_found_and_its_numbers_are_those_of_today(folder: Path, ranks: Ranks, name: str) -> None:
    """All 24 pairs are found, so the folder has its old name. Computed anew beside it, the store has the same name, the
    same keys, and log-prob sums (some 20 nats) as near as the machine's rounding allows."""
    flags, near = RUNS[name]
    config = parse_config(["--config", f"runs/{name}/config.json", *flags])
    assert precompute(config, load_inputs(config, ranks), ranks) == 0
    anew = parse_config(["--config", f"runs/{name}/config.json", *flags, "--ref_cache_dir=anew"])
    assert precompute(anew, load_inputs(anew, ranks), ranks) == 24
    (made,) = (folder / "anew").iterdir()
    kept = folder / "ref_cache" / made.name
    assert (kept / "reference.json").read_text() == (made / "reference.json").read_text()
    before, now = sums_by_pair(kept), sums_by_pair(made)
    assert len(before) == 24 and before.keys() == now.keys()
    for key, sums in before.items():
        np.testing.assert_allclose(now[key], sums, rtol=near.relative)


@pytest.mark.parametrize("name", RUNS)
def test_run_is_taken_up_and_ends_as_it_did_then(folder: Path, ranks: Ranks, name: str) -> None:
    """Resumed at step 2 of 6 by its name: the lines up to there stay, and what follows is what the code of then made of
    it, in the curve, in the samples' prompts and in the weights. Its settings stand beside its checkpoints from now on,
    and mean the same in every working folder."""
    flags, near = RUNS[name]
    ended = folder / "ended" / name
    places = ("--ckpt_dir=checkpoints", "--log_dir=runs")
    config = parse_config(["--resume", f"--run_name={name}", *places, *flags])
    path = train(config, load_inputs(config, ranks), ranks)
    again = asdict(parse_config(["--resume", f"--run_name={name}", places[0]]))
    absolute = {key: value for key, value in with_absolute_paths(config).items() if key != "ckpt_dir"}
    assert again == {**absolute, "ckpt_dir": "checkpoints"}
    found, then = records(folder / "runs" / name / "metrics.jsonl"), records(ended / "metrics.jsonl")
    kept = len(records(GOLDEN / "runs" / name / "metrics.jsonl"))
    assert not any(NOT_THEN & line.keys() for line in found[:kept])
    now = [{key: value for key, value in line.items() if key not in NOT_THEN} for line in found]
    assert [list(line) for line in now] == [list(line) for line in then]
    assert now[:kept] == then[:kept] and now[kept]["step"] == (2 if name == "stopped" else 3)
    for line, expected in zip(now[kept:], then[kept:], strict=True):
        assert line == pytest.approx(expected, rel=near.relative, abs=near.metric), line["step"]
    samples, expected = records(folder / "runs" / name / "samples.jsonl"), records(ended / "samples.jsonl")
    # then with a space after each special token, which the format has not
    assert [(line["step"], without_spaces(line["prompts"])) for line in samples] == [
        (line["step"], without_spaces(line["prompts"])) for line in expected
    ]
    (file,) = ended.glob("dpo_*.pth")
    found, weights = load_weights(path).state_dict, load_weights(file).state_dict
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(found[key], tensor, atol=near.weight, rtol=0)


def test_weights_files_are_read(folder: Path) -> None:
    """The start models and what a run exported: tensors by name, TrainingConfig by its module, metadata."""
    start = load_weights(folder / "start.pth")
    assert isinstance(start.config, TrainingConfig) and start.config.n_embd == 8 and not start.config.use_mla
    assert start.state_dict["decoder_blocks.0.attention.qkv_linear.weight"].shape == (24, 8) and start.metadata == {}
    (path,) = (folder / "checkpoints" / "killed").glob("dpo_*.pth")
    exported = load_weights(path)
    assert exported.state_dict.keys() == start.state_dict.keys() and exported.config == start.config
    metadata = exported.metadata
    assert (metadata["run"], metadata["step"], metadata["epochs"]) == ("killed", 2, pytest.approx(2 / 3))
    assert metadata["environment"]["git"].startswith("7a852ca") and metadata["dpo_config"]["beta"] == 0.5
    assert path.name == f"dpo_0.6667E_{metadata['loss']:.4f}L_64MSQ.pth"
    latent = load_weights(folder / "latent.pth")
    assert latent.config.use_mla and latent.config.use_lora and latent.config.lora_rank == 2
