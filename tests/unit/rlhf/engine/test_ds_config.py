"""The DeepSpeed JSON: what it may not say, what is added to it, and that the shipped ones are accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import (
    ds_config_here,
    full_ds_config,
    model_dtype,
    read_ds_config,
    zero_stage,
)
from simple_llama.reinforcement_learning.rlhf.engine.ds_keys import _ALLOWED

BF16 = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 2},
}
SHIPPED = {
    "zero2_bf16.json": (torch.bfloat16, 2),
    "zero2_fp32.json": (torch.float32, 2),
    "zero2_offload.json": (torch.bfloat16, 2),
    "zero3_bf16.json": (torch.bfloat16, 3),
}


def config_with(folder: Path, settings: Any, **changes: Any) -> DPOConfig:
    """A DPOConfig whose deepspeed_config is a file that holds `settings`."""
    path = folder / "ds.json"
    path.write_text(json.dumps(settings))
    return DPOConfig(deepspeed_config=str(path), **changes)


def refusal(folder: Path, settings: Any) -> str:
    """What is said about `settings`, behind the file's name."""
    with pytest.raises(UserError) as error:
        read_ds_config(config_with(folder, settings))
    assert str(error.value).startswith(f"{folder}/ds.json: ")
    return str(error.value).removeprefix(f"{folder}/ds.json: ")


def changed(settings: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted path."""
    copy = json.loads(json.dumps(settings))
    *sections, name = path.split(".")
    at = copy
    for section in sections:
        at = at.setdefault(section, {})
    at[name] = value
    return copy


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("train_batch_size", 128, "batch_size, grad_accum_steps and the number of ranks"),
        ("train_micro_batch_size_per_gpu", 16, "batch_size"),
        ("gradient_accumulation_steps", "auto", "grad_accum_steps"),
        ("gradient_clipping", 1.0, "max_grad_norm"),
        ("optimizer", {"type": "AdamW"}, "max_lr, beta1, beta2 and weight_decay"),
        ("scheduler", {}, "schedule, warmup_iterations, max_lr and min_lr"),
        ("activation_checkpointing", {}, "activation_checkpointing"),
        ("steps_per_print", 10, "log_interval"),
        ("tensorboard", {"enabled": False}, "log_dir"),
    ],
)
def test_a_key_that_repeats_a_setting_is_refused_by_name(tmp_path: Path, key: str, value: Any, ours: str) -> None:
    """Even an empty one, or one of the same value: the message names both."""
    expected = f"{key}: this number lives in DPOConfig ({ours}); delete it from the JSON"
    assert refusal(tmp_path, {**BF16, key: value}) == expected


@pytest.mark.parametrize("key", ["fp16", "torch_autocast", "autotuning", "flops_profiler"])
def test_what_is_off_may_say_so(tmp_path: Path, key: str) -> None:
    """Sections that would change a step or the run: refused where enabled, read where written down as off."""
    on = refusal(tmp_path, {**BF16, key: {"enabled": True}})
    assert on.startswith(f"{key}.enabled: expected false, found True (") and len(on) > 60 + len(key)
    off = {**BF16, key: {"enabled": False}}
    assert read_ds_config(config_with(tmp_path, off)) == off


# (path, value, words of the reason): what was seen to change the numbers, to end the process, or to end in a traceback.
REFUSED = [
    ("bf16.bf16_master_weights_and_grads", True, "would be bf16, which loses nearly every update"),
    ("bf16.bf16_optimizer_states", True, "would be bf16, which loses nearly every update"),
    ("bf16.check_grad_overflow", False, "a gradient that is not finite would go into the weights"),
    ("torch_autocast.dtype", "float16", "bf16.enabled alone says what the model computes in"),
    ("gradient_allreduce_op", "sum", "a sum is the mean times the number of ranks"),
    ("prescale_gradients", True, "moves the division by the number of ranks"),
    ("gradient_predivide_factor", 2.0, "moves the division by the number of ranks"),
    ("autotuning.fast", True, "DeepSpeed ends the process after a few steps, with status 0"),
    ("sparse_gradients", False, "DeepSpeed 0.19.8 has no such part any more"),
    ("progressive_layer_drop", {"enabled": False}, "DeepSpeed 0.19.8 has no such part any more"),
    ("elasticity", {"enabled": False}, "DeepSpeed 0.19.8 has no such part any more"),
    ("eigenvalue", {"enabled": False}, "DeepSpeed 0.19.8 has no such part any more"),
    ("compression_training", {}, "DeepSpeed 0.19.8 has no such part any more"),
    ("amp", {"enabled": False}, "DeepSpeed 0.19.8 has no such part any more"),
    ("data_efficiency", {"enabled": True}, "drops tokens, or draws the data by a schedule of its own"),
    ("tensor_parallel", {"autotp_size": 2}, "where ZeRO alone divides the work"),
    ("communication_data_type", "fp16", "fp16 overflows"),
    ("data_types.grad_accum_dtype", "bf16", "loses small gradients"),
    ("data_types.param_dtype", "fp32", "bf16.enabled alone says"),
    ("load_universal_checkpoint", True, "neither written nor read here"),
    ("zero_optimization.zenflow", {"topk_ratio": 0.1}, "AdamW would update most weights late"),
    ("zero_optimization.zero_quantized_gradients", True, "numbers of 4 or 8 bits"),
    ("zero_optimization.round_robin_gradients", True, "the gradients came out wrong on two ranks"),
    ("zero_optimization.zero_quantized_weights", False, "it is off: leave it out"),
    ("wandb", {"enabled": False}, "it is off: leave it out"),
    ("zero_optimization.cpu_offload", True, 'an old spelling of "offload_optimizer"'),
]


@pytest.mark.parametrize(("path", "value", "why"), REFUSED, ids=[path for path, _, _ in REFUSED])
def test_a_key_that_would_change_the_numbers_is_refused_with_the_reason(
    tmp_path: Path, path: str, value: Any, why: str
) -> None:
    message = refusal(tmp_path, changed(BF16, path, value))
    assert message.startswith((f"{path}: expected ", f"key '{path}' is refused: ")) and why in message


NEVER = "was never tried here; ds_configs/README.md lists the keys that were"
ZERO, OFFLOAD = "zero_optimization", "zero_optimization.offload_optimizer"
WHOLE = "expected a whole number of at least 1 and at most 2,147,483,647, found"
OTHERS = [
    ("zero_optimisation", {}, f"key 'zero_optimisation' {NEVER}; did you mean {ZERO}?"),
    (f"{ZERO}.overlap_com", True, f"{ZERO}: key 'overlap_com' {NEVER}; did you mean {ZERO}.overlap_comm?"),
    ("overlap_comm", True, f"key 'overlap_comm' {NEVER}; did you mean {ZERO}.overlap_comm?"),
    ("zero_allow_untested_optimizer", True, f"key 'zero_allow_untested_optimizer' {NEVER}"),
    (f"{ZERO}.leaf_module", {}, f"{ZERO}: key 'leaf_module' {NEVER}"),
    (f"{OFFLOAD}.nvme_path", "/tmp", f"{OFFLOAD}: key 'nvme_path' {NEVER}"),
    (f"{ZERO}.sub_group_size", 5, f"{ZERO}.sub_group_size: only ZeRO stage 3 reads it, and stage is 2; delete it"),
    (
        f"{ZERO}.allgather_bucket_size",
        3,
        f"{ZERO}.allgather_bucket_size: expected an even number of at least 2, found 3",
    ),
    (f"{ZERO}.reduce_bucket_size", 2**31, f"{ZERO}.reduce_bucket_size: {WHOLE} 2147483648"),
    (f"{ZERO}.reduce_bucket_size", True, f"{ZERO}.reduce_bucket_size: {WHOLE} True"),
    (OFFLOAD, {}, f'{OFFLOAD}.device: expected "cpu", found none'),
    (f"{OFFLOAD}.device", "nvme", f"{OFFLOAD}.device: expected \"cpu\", found 'nvme'"),
    (
        f"{OFFLOAD}.device",
        "cpu",
        "zero_force_ds_cpu_optimizer: expected false with offload_optimizer (DeepSpeed's own CPU Adam would be "
        "compiled at run time), found true, the default",
    ),
]


@pytest.mark.parametrize(("path", "value", "said"), OTHERS)
def test_other_keys_are_told_from_those_that_were_tried(tmp_path: Path, path: str, value: Any, said: str) -> None:
    """Unknown names, names of DeepSpeed's that nobody has tried, impossible values, and keys without their company."""
    assert refusal(tmp_path, changed(BF16, path, value)) == said


def test_a_long_key_or_value_makes_no_long_message(tmp_path: Path) -> None:
    for path in ("x" * 100_000, f"zero_optimization.{'x' * 100_000}", f"autotuning.{'x' * 100_000}"):
        assert len(refusal(tmp_path, changed(BF16, path, 1))) < 500
    long = changed(BF16, "zero_optimization.offload_optimizer.device", "x" * 100_000)
    assert len(refusal(tmp_path, long)) < 500


def test_the_table_of_the_readme_is_that_of_the_code() -> None:
    """ds_configs/README.md has a row for each admitted key: name, values, stage, meaning; and no other row."""
    text = Path(root_path("ds_configs", "README.md")).read_text()
    rows = text.partition("| key | values | stage | meaning here |\n|---|---|---|---|\n")[2].partition("\n\n")[0]
    expected = [
        f"| `{path}` | {key.expected} | {key.stage or 'both'} | {key.meaning} |" for path, key in _ALLOWED.items()
    ]
    assert rows.splitlines() == expected


@pytest.mark.parametrize("section", [{}, {"data_types": {}}])
def test_bf16_without_fp32_accumulation_is_refused(tmp_path: Path, section: dict) -> None:
    """DeepSpeed's default is bf16 sums, so silence is refused as well; in fp32 the default is right."""
    bf16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, **section}
    message = refusal(tmp_path, bf16)
    assert message.startswith('data_types.grad_accum_dtype: expected "fp32" with bf16') and message.endswith("None")
    fp32 = {"zero_optimization": {"stage": 2}, **section}
    assert read_ds_config(config_with(tmp_path, fp32)) == fp32


@pytest.mark.parametrize("stage", [0, 1, 4, -1])
def test_other_zero_stages_are_refused(tmp_path: Path, stage: int) -> None:
    """0 by number and by silence, and numbers that are no stage."""
    expected = "zero_optimization.stage: expected 2 or 3, found "
    assert refusal(tmp_path, {**BF16, "zero_optimization": {"stage": stage}}) == f"{expected}{stage}"
    without = {key: value for key, value in BF16.items() if key != "zero_optimization"}
    assert refusal(tmp_path, without) == f"{expected}0"
    assert refusal(tmp_path, {**BF16, "zero_optimization": {}}) == f"{expected}0"


@pytest.mark.parametrize("stage", [2, 3])
def test_the_users_settings_come_back_as_they_are(tmp_path: Path, stage: int) -> None:
    """Nothing is added or lost on reading, whatever else stands there."""
    settings = {**BF16, "zero_optimization": {"stage": stage, "overlap_comm": True}, "wall_clock_breakdown": False}
    assert read_ds_config(config_with(tmp_path, settings)) == settings
    assert zero_stage(settings) == stage


def test_no_json_object_is_refused(tmp_path: Path) -> None:
    """A list, text that is no JSON, and a file that is not there."""
    assert refusal(tmp_path, ["bf16"]) == "expected a JSON object, found list"
    config = config_with(tmp_path, {})
    Path(config.deepspeed_config).write_text("{bf16}")
    with pytest.raises(UserError, match="ds.json, line 1, column 2: not JSON"):
        read_ds_config(config)
    with pytest.raises(UserError, match="none.json"):
        read_ds_config(DPOConfig(deepspeed_config=str(tmp_path / "none.json")))


def test_batch_arithmetic_and_clip_come_from_the_settings(tmp_path: Path) -> None:
    """3 pairs x 5 micro-batches x 4 ranks = 60 pairs a step; the user's own keys stay."""
    config = config_with(tmp_path, BF16, batch_size=3, grad_accum_steps=5, max_grad_norm=0.25)
    assert full_ds_config(config, world_size=4) == {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "train_batch_size": 60,
        "gradient_clipping": 0.25,
        "steps_per_print": 2147483647,
    }


def test_what_ranks_are_better_given() -> None:
    """ZeRO-2 on CPUs has small buckets; alone, on any device, neither buckets nor overlap. Several GPUs,
    offloading and ZeRO-3 keep what is set."""

    def here(name: str, world_size: int, device: str, **settings: Any) -> dict[str, Any]:
        """What differs from what is set."""
        config = DPOConfig(deepspeed_config=root_path("ds_configs", name), **settings)
        set_, found = full_ds_config(config, world_size), ds_config_here(config, world_size, device)
        gone = {name: None for name in set_ if name not in found}
        return gone | {
            key: value
            for before, after in ((set_["zero_optimization"], found["zero_optimization"]), (set_, found))
            for key, value in after.items()
            if key != "zero_optimization" and before.get(key) != value
        }

    small = {"reduce_bucket_size": 5_000_000}
    assert here("zero2_bf16.json", 2, "cuda") == {}
    assert here("zero2_bf16.json", 2, "cpu") == small
    alone = {"contiguous_gradients": False, "overlap_comm": False}
    for once in (False, True):
        assert here("zero2_bf16.json", 1, "cuda", reduce_once=once) == alone
        assert here("zero2_bf16.json", 1, "cpu", reduce_once=once) == {**small, **alone}
    assert here("zero2_offload.json", 1, "cuda") == {}
    assert here("zero2_offload.json", 1, "cpu") == small and here("zero3_bf16.json", 1, "cpu") == {}


def test_dtype_of_the_computing_weights() -> None:
    """bf16 only where it is there and on."""
    assert model_dtype(BF16) == torch.bfloat16
    assert model_dtype({"bf16": {"enabled": False}}) == torch.float32
    assert model_dtype({"bf16": {}}) == torch.float32
    assert model_dtype({}) == torch.float32


def test_the_shipped_files_are_accepted() -> None:
    """Each file of ds_configs/ by name, with its dtype and stage; none is missing here."""
    folder = Path(root_path("ds_configs"))
    found = {}
    for path in folder.glob("*.json"):
        settings = full_ds_config(DPOConfig(deepspeed_config=str(path)), world_size=2)
        assert settings["train_batch_size"] == 16 * 8 * 2
        found[path.name] = (model_dtype(settings), zero_stage(settings))
    assert found == SHIPPED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bfloat16": {"enabled": True}}, "bfloat16: expected this section under its other name, bf16"),
        ({"zero_optimization": True}, "zero_optimization: expected a JSON object, found True"),
        ({"data_types": None}, "data_types: expected a JSON object, found None"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage: expected 2 or 3, found 'two'"),
        ({"zero_optimization": {"stage": 2.7}}, "zero_optimization.stage: expected 2 or 3, found 2.7"),
    ],
)
def test_sections_of_another_kind_are_refused(tmp_path: Path, change: dict, words: str) -> None:
    """DeepSpeed's second spelling of bf16, sections that are no objects, and stages that are no whole number."""
    assert refusal(tmp_path, {**BF16, **change}) == words
