"""Whole runs that train adapters, or some layers: what they start as, train, save, export and go on from."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.interop.adapted_start import AdaptedStart
from simple_llama.interop.open_start import open_start
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import build_model, load_weights
from simple_llama.reinforcement_learning.rlhf import dry_run
from simple_llama.reinforcement_learning.rlhf.apply_dpo import precompute_and_train
from simple_llama.reinforcement_learning.rlhf.assess.assess import assess
from simple_llama.reinforcement_learning.rlhf.assess.evaluate_config import parse_evaluate
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.export import ExportConfig, export_model
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.talk import talk
from tiny_hf import TinyHFJob, make_hf_job
from tiny_job import TinyJob, make_job

FAST: dict[str, Any] = {"max_lr": 1e-2, "n_samples": 0}
LORA: dict[str, Any] = {**FAST, "lora_rank": 4, "lora_alpha": 8.0}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyHFJob:
    """A Hugging Face model: grouped keys, a tied head."""
    return make_hf_job(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def fresh(job: TinyHFJob, ranks: Ranks) -> Path:
    """The last export of a run with fresh adapters, a state after each two of its six steps."""
    return run_job(job, ranks, run_name="fresh", save_interval=2, keep_states=9)


@pytest.fixture(scope="module")
def small(job: TinyHFJob, ranks: Ranks) -> tuple[Path, Path]:
    """(the merged model, the last adapters) of a run that exports adapters."""
    merged = run_job(job, ranks, run_name="small", export="adapters")
    return merged, merged.with_name(merged.name.removesuffix("_merged"))


def run_job(job: TinyJob, ranks: Ranks, **settings: Any) -> Path:
    """A whole run; gives its last export."""
    config = DPOConfig(**{**job.settings, **(LORA if settings.get("lora_rank", 4) else FAST), **settings})
    return precompute_and_train(config, load_inputs(config, ranks), ranks)


def model_at(path: Path) -> LLaMaTransformer:
    """In fp32."""
    with open_start(path).reading() as loaded:
        return build_model(loaded, torch.float32, "cpu").eval()


def tensors_at(path: Path) -> dict[str, torch.Tensor]:
    """By our names."""
    return dict(open_start(path).load().state_dict)


def state_of(job: TinyJob, run: str, step: int) -> dict[str, torch.Tensor]:
    """All that a state holds."""
    folder = job.folder / "checkpoints" / run / "state" / f"step_{step:08d}"
    with safe_open(folder / "rank_00000.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def test_fresh_adapters_start_as_the_reference_and_alone_are_trained(job: TinyHFJob, ranks: Ranks, fresh: Path) -> None:
    """Margin 0 and loss ln 2 to the bit at step 0, and the loss falls. States hold adapters alone: 14 a layer. The
    export is a whole model whose embeddings and norms are the start's. The store is that of full tuning."""
    first = job.lines("fresh")[0]
    assert first["eval_rewards/margins"] == 0 and first["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    losses = job.curve("loss", "fresh")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7) and losses[-1] < losses[0] - 0.01
    names = {name.partition("|")[0] for name in state_of(job, "fresh", 6)}
    assert len(names) == 2 * 7 * 2 and all("_lora_layer." in name for name in names)
    before, after = tensors_at(job.model), tensors_at(fresh)
    assert open_start(fresh).architecture == open_start(job.model).architecture
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "norm" in name or name == "embeddings.weight"}
    full = load_inputs(DPOConfig(**job.settings), ranks)  # type: ignore[arg-type]
    [store] = (job.folder / "ref_cache").iterdir()
    assert json.loads((store / "reference.json").read_text()) == full.reference_id


def test_a_resumed_run_ends_as_one_that_never_stopped(job: TinyHFJob, ranks: Ranks, fresh: Path) -> None:
    """From step 2, to the bit. Other adapters are another run."""
    checkpoints = job.folder / "checkpoints"
    shutil.copytree(checkpoints / "fresh", checkpoints / "again")
    for step in (3, 4, 6):
        shutil.rmtree(checkpoints / "again" / "state" / f"step_{step:08d}")
    run_job(job, ranks, run_name="again", save_interval=2, keep_states=9, resume=True)
    assert job.curve("loss", "again") == job.curve("loss", "fresh")[2:]
    found, expected = state_of(job, "again", 6), state_of(job, "fresh", 6)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for change in (
        {"lora_alpha": 4.0},
        {"lora_targets": "q"},
        {"lora_seed": 1},
        {"lora_rslora": True},
        {"lora_rank": 0},
    ):
        with pytest.raises(UserError, match="cannot resume: adapters was"):
            run_job(job, ranks, run_name="again", resume=True, **change)


def test_an_online_reference_is_the_policy_without_its_adapters(job: TinyHFJob, ranks: Ranks, fresh: Path) -> None:
    """No second model is built, and every loss is the store's."""
    run_job(job, ranks, run_name="online", reference="online", activation_checkpointing=True)
    assert job.curve("loss", "online") == pytest.approx(job.curve("loss", "fresh"), abs=1e-6)
    assert job.curve("eval_loss", "online")[-1] == pytest.approx(job.curve("eval_loss", "fresh")[-1], abs=1e-6)


def test_adapters_are_exported_and_the_merged_model_once(
    job: TinyHFJob, ranks: Ranks, fresh: Path, small: tuple[Path, Path]
) -> None:
    """peft's form each epoch, the whole model at the end: the same function, and that of the run that exports whole
    models. launch/export.py makes the whole model of a state and of adapters."""
    merged, alone = small
    folder = job.folder / "checkpoints" / "small"
    names = sorted(path.name for path in folder.glob("dpo_*"))
    assert len(names) == 3 and sum(name.endswith("_merged") for name in names) == 1 and merged.name == names[-1]
    pairs = load_inputs(DPOConfig(**job.settings), ranks).data.pairs  # type: ignore[arg-type]
    batch = PairBatch.pack([pairs[i] for i in range(4)])
    expected = pair_logps(model_at(fresh), batch)
    adapters = open_start(alone)
    assert isinstance(adapters, AdaptedStart) and alone.name == names[1]
    assert adapters.export_metadata(adapters.path)["step"] == 6
    for number, path in enumerate((folder, adapters.path)):
        export_model(ExportConfig(str(path), str(job.folder / f"made{number}")))
    for path in (merged, adapters.path, job.folder / "made0", job.folder / "made1"):
        assert torch.allclose(pair_logps(model_at(path), batch), expected, rtol=0, atol=2e-5), path
    again = run_job(job, ranks, run_name="small", export="adapters", resume=True)
    assert again == merged and sorted(path.name for path in folder.glob("dpo_*")) == names


def test_a_mean_of_adapters_is_that_of_the_models(job: TinyHFJob, small: tuple[Path, Path]) -> None:
    """Of W + B A of both epochs, not W + mean(B) mean(A); the merged model beside the last adapters is no third one."""
    folder, out = job.folder / "checkpoints" / "small", job.folder / "mean"
    said = export_model(ExportConfig(str(folder), str(out), average=2))
    assert said == f"wrote {out} from the mean of steps 3, 6 of the run small"
    epochs = [open_start(path) for path in sorted(folder.glob("dpo_*")) if path != small[0]]
    (first, second), mean = [one.merged({}) for one in epochs if isinstance(one, AdaptedStart)], tensors_at(out)
    assert set(mean) == set(first) == set(second)
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((first[name].double() + second[name]) / 2).float()), name
    with pytest.raises(UserError, match="expected 3 exports of ends of epochs"):
        export_model(ExportConfig(str(folder), str(out) + "3", average=3))


def test_evaluate_and_chat_take_adapters(
    job: TinyHFJob, ranks: Ranks, small: tuple[Path, Path], tmp_path: Path
) -> None:
    """What they say of adapters over their base is what they say of the merged model."""
    merged, alone = small
    config = parse_evaluate([f"--models={alone},{merged}", f"--output={tmp_path / 'report'}", "--device=cpu"])
    assert config.model_path == str(job.model) and config.val_share == 0.15
    assess(config, ranks)
    models = json.loads((tmp_path / "report" / "report.json").read_text())["models"]
    first, second = (models[path.name] for path in small[::-1])
    assert first["margin"][0] == pytest.approx(second["margin"][0], abs=1e-4) and abs(first["margin"][0]) > 1e-3
    few = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", "8"]
    beside = ["--model_path", str(job.model), "--adapter_path", str(alone)]
    answers = [said("the cat\n", [*way, *few]) for way in (["--model_path", str(alone)], beside)]
    assert answers[0] == answers[1] == said("the cat\n", ["--model_path", str(merged), *few]) != ""


def said(lines: str, args: list[str]) -> str:
    """What a model answers over a pipe."""
    out = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        patch.setattr(sys, "stdin", io.StringIO(lines))
        talk(args)
    return out.getvalue()


def test_a_run_goes_on_from_adapters(job: TinyHFJob, ranks: Ranks, small: tuple[Path, Path]) -> None:
    """The reference is the model as it starts, so that margins are 0 at step 0, or by the flag the base: then the
    policy is ahead at once, as far as the run that made the adapters said."""
    ended = job.curve("eval_loss", "small")[-1]
    on: dict[str, Any] = {"adapter_path": str(small[1]), "lora_rank": 0, "epochs": 1}
    run_job(job, ranks, run_name="on", **on)
    assert job.curve("eval_rewards/margins", "on")[0] == 0
    config = DPOConfig(**{**job.settings, **FAST, **on, "reference_without_adapters": True, "run_name": "off"})
    inputs = load_inputs(config, ranks)
    assert inputs.without_adapters and not inputs.starts_as_reference
    precompute_and_train(config, inputs, ranks)
    assert job.curve("eval_loss", "off")[0] == pytest.approx(ended, abs=1e-5)
    precompute_and_train(replace(config, run_name="off2", reference="online"), inputs, ranks)
    assert job.curve("loss", "off2") == pytest.approx(job.curve("loss", "off"), abs=1e-6)
    said = (job.folder / "runs" / "off" / "train.log").read_text()
    assert "the reference is the model without them" in said and "the policy is not the reference" in said
    names = {name.partition("|")[0] for name in state_of(job, "on", 3)}
    assert len(names) == 28 and all("_lora_layer." in name for name in names)


def test_a_simplellama_checkpoint_takes_adapters_too(tmp_path: Path, ranks: Ranks) -> None:
    """Exports are checkpoints without LoRA; adapters alone are upstream's file, from which a run goes on."""
    job = make_job(tmp_path)
    path = run_job(job, ranks, lora_targets="q,k,v,o", export="adapters", epochs=1)
    exported, start = load_weights(path), load_weights(job.folder / "start.pth")
    assert not exported.config.use_lora and exported.state_dict.keys() == start.state_dict.keys()
    [adapters] = [one for one in path.parent.glob("dpo_*.pth") if "merged" not in one.name]
    run_job(job, ranks, run_name="on", adapter_path=str(adapters), lora_rank=0, epochs=1)
    assert job.curve("eval_rewards/margins", "on")[0] == 0


@pytest.mark.parametrize("stabilized", [False, True])
def test_gradients_of_both_halves_are_those_of_autograd(job: TinyHFJob, ranks: Ranks, stabilized: bool) -> None:
    """Against a model without adapters whose weights are W + s (A B)^T, differentiated by autograd: all seven targets,
    fp32 to 1e-5 of each gradient's norm. Nothing else has a gradient."""
    config = DPOConfig(**{**job.settings, **LORA, "lora_rslora": stabilized})
    inputs = load_inputs(config, ranks)
    torch.manual_seed(5)
    with inputs.start.reading() as loaded:
        model = build_model(loaded, torch.float32, "cpu")
        base = {name: tensor.clone() for name, tensor in loaded.state_dict.items() if "lora" not in name}
    halves: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_lora_layer." in name)
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
            halves[name] = parameter.detach().clone().requires_grad_()
    batch = PairBatch.pack([inputs.data.train[i] for i in range(4)])
    ref_B2 = torch.zeros(4, 2)
    DPOPolicy(model, PreferenceLoss.of(config))(batch, ref_B2).loss.backward()
    scale = 8 / (2 if stabilized else 4)
    updated = {name: tensor + _update(name, halves, scale, tensor) for name, tensor in base.items()}
    plain = LLaMaTransformer(replace(inputs.architecture, lora=None))
    policy = DPOPolicy(plain, PreferenceLoss.of(config))
    loss = torch.func.functional_call(
        policy, {f"model.{name}": tensor for name, tensor in updated.items()}, (batch, ref_B2)
    ).loss
    expected = torch.autograd.grad(loss, list(halves.values()))
    for (name, parameter), gradient in zip(
        ((name, p) for name, p in model.named_parameters() if name in halves), expected, strict=True
    ):
        assert parameter.grad is not None and gradient.norm() > 0
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in halves)


def _update(name: str, halves: dict[str, torch.Tensor], scale: float, like: torch.Tensor) -> torch.Tensor:
    """What the adapters add to a weight: queries, keys and values stand key head by key head (two, of 8 numbers)."""

    def of(target: str) -> torch.Tensor:
        return scale * (halves[f"{target}_lora_layer.lora_a"] @ halves[f"{target}_lora_layer.lora_b"]).T

    place, _, kind = name.removesuffix(".weight").rpartition(".")
    if kind == "qkv_linear":
        q, k, v = (of(f"{place}.{target}") for target in "qkv")
        return torch.cat(
            [torch.cat([q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8]]) for g in (0, 1)]
        )
    if kind in ("out", "w1", "w2", "w3"):
        return of(f"{place}.{'o' if kind == 'out' else kind}")
    return torch.zeros_like(like)


# === Layers ===


def test_the_last_layers_alone_are_trained(tmp_path: Path, job: TinyHFJob, ranks: Ranks) -> None:
    """The last block and the norm behind it; neither embeddings nor head, tied or not. no_embeddings: all but these,
    which a tied head is."""
    for number, one in enumerate((job, make_job(tmp_path))):
        path = run_job(one, ranks, run_name=f"last{number}", trainable="last:1", lora_rank=0, epochs=1)
        before, after = tensors_at(Path(str(one.settings["model_path"]))), tensors_at(path)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if name.startswith(("decoder_blocks.1.", "norm."))}
    one = make_job(tmp_path / "own")
    path = run_job(one, ranks, trainable="no_embeddings", lora_rank=0, epochs=1)
    before, after = load_weights(one.folder / "start.pth").state_dict, load_weights(path).state_dict
    assert [name for name in before if torch.equal(before[name], after[name])] == ["embeddings.weight"]
    with pytest.raises(UserError, match="expected a head of its own for no_embeddings"):
        run_job(job, ranks, trainable="no_embeddings", lora_rank=0)
    with pytest.raises(UserError, match=r"trainable: expected at most last:2"):
        run_job(job, ranks, trainable="last:3", lora_rank=0)
    with pytest.raises(UserError, match="expected all or lora with adapters"):
        run_job(job, ranks, trainable="last:1")
    for wrong in ("last:0", "last:", "first:2", "last:x", ""):
        with pytest.raises(UserError, match="trainable: expected all, lora, last:N"):
            DPOConfig(trainable=wrong)


def test_a_dry_run_counts_what_is_trained(job: TinyHFJob, ranks: Ranks) -> None:
    """Rank 4: q and o of a layer have 4 * 64 numbers, k and v 4 * 48, the other three 4 * 80: 1,856. The last block has
    7,680 in its matrices, with three norms of 32 7,776."""
    for settings, trained in ((LORA, 2 * 1856), ({"trainable": "last:1"}, 7776)):
        config = DPOConfig(**{**job.settings, **settings})
        counted = dry_run._Job(config, load_inputs(config, ranks), ranks)
        assert counted.trained == trained and counted.part.head == 0
        assert counted.saved().state == 12 * trained
        assert counted.saved().export == 4 * 25_120  # the merged model
    alone = DPOConfig(**{**job.settings, **LORA, "export": "adapters"})
    saved = dry_run._Job(alone, load_inputs(alone, ranks), ranks).saved()
    assert (saved.export, saved.merged) == (4 * 2 * 1856, 4 * 25_120)
