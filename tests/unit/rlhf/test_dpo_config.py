"""Settings: documented names and defaults, defaults < file < flags, and mistakes with a message each."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import fields

import pytest

from house import RLHF, modules, takers
from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.common.settings import _settings_from_dict
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from tiny_job import ROOT


def test_documented_defaults():
    """Names and values that users and older notes rely on."""
    rl = ("simple_llama", "reinforcement_learning")
    expected = {
        "model_path": root_path("simple_llama", "finetune", "full_sft", "sft_checkpoints"),
        "tokenize_path": root_path("simple_llama", "dataset", "bpe_8k.json"),
        "rlhf_dataset_path": root_path(*rl, "rl_dataset"),
        "ckpt_dir": root_path(*rl, "rlhf", "rlhf_checkpoints"),
        "batch_size": 16,
        "grad_accum_steps": 8,
        "beta": 0.5,
        "epochs": 3,
        "warmup_iterations": 50,
        "max_lr": 5e-7,
        "min_lr": 1e-7,
        "dropout": 0.0,
    }
    assert {name: getattr(parse_config([]), name) for name in expected} == expected


def test_defaults_then_file_then_flags(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"beta": 0.1, "epochs": 2, "max_lr": 1}))
    config = parse_config(["--config", str(path), "--epochs", "5", "--local_rank=3", "--resume"])
    assert (config.beta, config.epochs, config.max_lr, config.batch_size) == (0.1, 5, 1.0, 16)
    assert config.resume and isinstance(config.max_lr, float)


def test_a_run_to_resume_gives_its_settings(tmp_path):
    """Its config.json < file < flags; the newest run of the checkpoint folder, or the one that is named."""
    for seconds, (name, beta) in enumerate({"a": 0.25, "b": 0.125}.items()):
        run = tmp_path / "ckpt" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"beta": beta, "epochs": 7, "max_lr": 1e-3, "resume": False}))
        (run / "latest").write_text("step_00000001\n")
        os.utime(run / "latest", (seconds, seconds))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"epochs": 2, "min_lr": 1e-4, "resume": True}))
    folder = f"--ckpt_dir={tmp_path / 'ckpt'}"
    found = parse_config(["--config", str(path), folder, "--batch_size=3"])
    assert (found.run_name, found.beta, found.epochs, found.batch_size, found.min_lr) == ("b", 0.125, 2, 3, 1e-4)
    found = parse_config([folder, "--resume", "--run-name", "a", "--epochs=9", "--min_lr=1e-4"])
    assert (found.run_name, found.beta, found.epochs, found.max_lr, found.resume) == ("a", 0.25, 9, 1e-3, True)
    assert parse_config([folder, "--run_name=a", "--no-resume"]).beta == 0.5


def test_a_run_from_before_a_setting_goes_on_without_it(tmp_path):
    """It kept its text as it was, whatever the tokenizer knew of it. A run that has the setting, a new run, and one
    that asks for it have what they say."""
    (tmp_path / "a").mkdir()
    kept = tmp_path / "a" / "config.json"
    kept.write_text("{}")
    resumed = [f"--ckpt_dir={tmp_path}", "--run_name=a", "--resume"]
    before = parse_config(resumed)
    assert (before.ascii_text, before.max_unknown) == (False, 1.0)
    assert parse_config([*resumed, "--ascii_text"]).ascii_text
    kept.write_text(json.dumps({"ascii_text": True, "max_unknown": 0.2}))
    assert (parse_config(resumed).ascii_text, parse_config(resumed).max_unknown) == (True, 0.2)
    assert parse_config([]).ascii_text and not parse_config(["--no_ascii_text"]).ascii_text


def test_profile_steps_in_a_file_and_as_flags(tmp_path, capsys):
    """Two numbers behind the flag, a list in the file; flags win."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"profile_steps": [3, 5]}))
    assert parse_config(["--config", str(path)]).profile_steps == (3, 5)
    assert parse_config(["--config", str(path), "--profile_steps", "1", "10"]).profile_steps == (1, 10)
    assert parse_config(["--profile-steps", "7", "7", "--reduce_once"]).profile_steps == (7, 7)
    with pytest.raises(SystemExit):
        parse_config(["--profile_steps", "5", "4"])
    assert "profile_steps: expected 0 0" in capsys.readouterr().err


def test_every_field_has_a_help_text(capsys):
    """The comment behind a field is what --help says."""
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in fields(DPOConfig):
        assert f"--{field.name.replace('_', '-')}" in shown.replace("_", "-")
    assert "pairs per micro-batch per rank" in shown


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"beta": 0}, ["beta", "above 0"]),
        ({"beta": -1.0}, ["beta", "-1.0"]),
        ({"beta": float("nan")}, ["beta"]),
        ({"beta": float("inf")}, ["beta", "inf"]),
        ({"batch_size": 0}, ["batch_size", "from 1", "found 0"]),
        ({"grad_accum_steps": -2}, ["grad_accum_steps", "found -2"]),
        ({"batch_size": 10**20}, ["batch_size"]),
        ({"epochs": 0}, ["epochs"]),
        ({"eval_interval": -1}, ["eval_interval", "found -1"]),
        ({"val_share": 0.7}, ["val_share", "0.5"]),
        ({"label_smoothing": 0.5}, ["label_smoothing"]),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, ["label_smoothing", "ignores"]),
        ({"min_lr": 1e-3}, ["min_lr", "max_lr"]),
        ({"max_lr": 0.0, "min_lr": 0.0}, ["max_lr"]),
        ({"run_name": "../x"}, ["run_name"]),
        ({"peer_timeout_s": float("inf")}, ["peer_timeout_s", "1000000.0"]),
        ({"profile_steps": [0, 3]}, ["profile_steps", "from 1", "found 0 3"]),
        ({"profile_steps": [3, 2]}, ["profile_steps", "found 3 2"]),
        ({"profile_steps": [-1, -1]}, ["profile_steps", "found -1 -1"]),
        ({"profile_steps": [1, 11]}, ["profile_steps", "at most 10 steps", "found 1 11"]),
        ({"profile_steps": [10**20, 10**20]}, ["profile_steps"]),
        ({"profile_steps": [1]}, ["profile_steps", "a list of 2 whole numbers"]),
        ({"profile_steps": [1, True]}, ["profile_steps", "a list of 2 whole numbers"]),
        ({"profile_steps": [1, 2.0]}, ["profile_steps", "a list of 2 whole numbers"]),
        ({"profile_steps": 3}, ["profile_steps", "a list of 2 whole numbers, found 3"]),
        ({"betta": 0.1}, ["unknown setting 'betta', did you mean 'beta'?"]),
        ({"batch_size": "16"}, ["batch_size", "expected int"]),
        ({"batch_size": True}, ["batch_size", "expected int", "true"]),
        ({"resume": 1}, ["resume", "expected bool"]),
        ({"loss_type": "dpo"}, ["loss_type", "sigmoid, hinge, ipo, robust, sigmoid_norm"]),
        ({"batch_size": None}, ["batch_size", "null"]),
        (["beta"], ["JSON object"]),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(setting, words):
    with pytest.raises(UserError) as error:
        _settings_from_dict(DPOConfig, setting, "my.json")
    for word in words:
        assert word in str(error.value)


def test_unknown_flag_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--betta", "0.1"])
    assert stop.value.code == 2
    assert "betta" in capsys.readouterr().err


def test_missing_and_doubled_config_files(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        parse_config(["--config", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="end of the command line"):
        parse_config(["--config"])
    with pytest.raises(UserError, match="one file, found 2"):
        parse_config(["--config", "a", "--config=b"])


def test_who_takes_the_whole_config():
    """Only a command's entry, the order of the run and what writes the whole config; all else takes a group."""
    found = takers(modules(ROOT), "DPOConfig")
    assert [name.removeprefix(f"{RLHF}.") for name in found if not name.startswith("benchmarks.")] == [
        "apply_dpo.train",
        "apply_dpo.precompute_and_train",
        "command.run_command",
        "command._read_and_do",
        "dry_run.describe",
        "dry_run.__init__",
        "store_import._import",
    ]


def test_each_setting_has_one_owner():
    """A field is declared by one class, and DPOConfig has those of all owners in the order in which data flows."""
    owners = [owner for owner in DPOConfig.__mro__ if dataclasses.is_dataclass(owner)]
    annotated = [name for owner in owners for name in vars(owner).get("__annotations__", {})]
    declared = [name for name in annotated if name != "retired"]  # what an owner had once is no field
    assert len(declared) == len(set(declared)) == len(fields(DPOConfig))
    assert [owner.__name__ for owner in reversed(owners)] == [
        "ModelConfig",
        "ChatConfig",
        "ChatModelConfig",
        "ReadingConfig",
        "DataConfig",
        "PolicyConfig",
        "BatchConfig",
        "OptimizerConfig",
        "EngineConfig",
        "AdapterConfig",
        "InputsConfig",
        "LossConfig",
        "CacheConfig",
        "StoreConfig",
        "ReferenceConfig",
        "ScheduleConfig",
        "FolderConfig",
        "IntervalConfig",
        "TrackerConfig",
        "EvaluationConfig",
        "BestConfig",
        "SavesConfig",
        "ProfileConfig",
        "RunConfig",
        "WatchConfig",
        "CommandConfig",
        "ForetellConfig",
        "DPOConfig",
    ]
