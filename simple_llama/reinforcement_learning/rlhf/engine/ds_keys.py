"""Which keys of a DeepSpeed JSON are admitted, with which values, and why others are not (DeepSpeed 0.19.8).

DeepSpeed has some 200 settings, and several of them change what a step computes without a word. So only what was tried
is admitted: tests/unit/rlhf/engine/test_ds_keys.py makes each key and value of _ALLOWED train on two ranks and holds
gradient norm, clip, master weights and moments against a plain loop. ds_configs/README.md has this table for users.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown

_WHERE = "ds_configs/README.md lists the keys that were"
_MOST_COMPARED = 80  # characters of a key, to find one like it


class _Count(NamedTuple):
    """Whole numbers that a key may be, written with or without an exponent (5e8)."""

    low: int
    high: int = 2**63 - 1
    even: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value of a JSON file is one of them."""
        whole = type(value) in (int, float) and self.low <= value <= self.high and value == int(value)
        return whole and not (self.even and value % 2)

    def __str__(self) -> str:
        top = "" if self.high == 2**63 - 1 else f" and at most {self.high:,}"
        return f"{'an even' if self.even else 'a whole'} number of at least {self.low}{top}"


class _Key(NamedTuple):
    """An admitted key: its values, what it does here, and the one ZeRO stage that reads it (0: both)."""

    values: tuple[Any, ...] | _Count
    meaning: str
    stage: int = 0

    def holds(self, value: Any) -> bool:
        """Whether a value of a JSON file is admitted."""
        if isinstance(self.values, _Count):
            return self.values.holds(value)
        return any(type(value) is type(one) and value == one for one in self.values)

    @property
    def expected(self) -> str:
        """Its values in words."""
        if isinstance(self.values, _Count):
            return str(self.values)
        return " or ".join(json.dumps(value) for value in self.values)


_SWITCH = (True, False)
_OFF = (False,)
_PINNED = _Key(_SWITCH, "page-locked host memory, for faster copies")

_TOP = {
    "bf16.enabled": _Key(
        _SWITCH,
        "the model computes in bf16; master weights, moments and update are fp32. Without it everything is fp32",
    ),
    "bf16.check_grad_overflow": _Key((True,), "a step whose gradient is not finite changes no weights (the default)"),
    "data_types.grad_accum_dtype": _Key(
        ("fp32",),
        "micro-batches add up in fp32. Needed with bf16: DeepSpeed's default is the model's dtype, and bf16 loses "
        "small gradients",
    ),
    "communication_data_type": _Key(
        ("fp32", "bf16"),
        "gradients of the ranks are summed in this dtype (default: the model's). bf16 halves the bytes of a reduction, "
        "and rounds its sum by up to 2^-8",
    ),
    "zero_force_ds_cpu_optimizer": _Key(
        _OFF,
        "allows torch's AdamW in host memory, which `offload_optimizer` needs; DeepSpeed's own CPU Adam would be "
        "compiled at run time",
    ),
}
_ZERO = {
    "stage": _Key((2, 3), "2: optimizer state and gradients are divided over the ranks; 3: the weights as well"),
    "overlap_comm": _Key(_SWITCH, "reduces a full bucket while the backward pass goes on; uses two buckets"),
    "contiguous_gradients": _Key(
        _SWITCH, "gradients are copied into the bucket as they come, which keeps memory unfragmented"
    ),
    "reduce_scatter": _Key(_SWITCH, "a rank keeps only the averaged gradients of its own partition"),
    "reduce_bucket_size": _Key(
        _Count(1, 2**31 - 1), "parameters reduced at once; a bucket has this many values of the model's dtype"
    ),
    "offload_optimizer.device": _Key(("cpu",), "masters, moments and the AdamW step are in host memory"),
    "offload_optimizer.pin_memory": _PINNED,
    "allgather_bucket_size": _Key(
        _Count(2, even=True),
        "parameters sent at once when the updated weights go back to all ranks, where torch cannot gather them all "
        "into one tensor",
        stage=2,
    ),
    "allgather_partitions": _Key((True,), "the default, which nothing reads any more", stage=2),
    "use_multi_rank_bucket_allreduce": _Key(
        _SWITCH, "one all-reduce of a bucket, in the place of one reduction for each rank's part of it", stage=2
    ),
    "round_robin_gradients": _Key(_OFF, "the default: parameters are divided in the model's order", stage=2),
    "offload_param.device": _Key(("cpu",), "a rank's part of the computing weights is in host memory", stage=3),
    "offload_param.pin_memory": _PINNED._replace(stage=3),
    "sub_group_size": _Key(_Count(1), "parameters that AdamW updates at once", stage=3),
    "stage3_prefetch_bucket_size": _Key(_Count(0), "parameters gathered ahead of their use", stage=3),
    "stage3_param_persistence_threshold": _Key(
        _Count(0), "parameters smaller than this are never divided (norms, biases)", stage=3
    ),
    "stage3_model_persistence_threshold": _Key(_Count(0), "how many parameters may stay undivided so", stage=3),
    "stage3_max_live_parameters": _Key(_Count(0), "how many gathered parameters may stay on the device", stage=3),
    "stage3_max_reuse_distance": _Key(
        _Count(0), "a gathered parameter stays there if it is used again within so many parameters", stage=3
    ),
}
# What is off by default and may say so.
_DEFAULTS = {
    "autotuning.enabled": _Key(_OFF, "off"),
    "flops_profiler.enabled": _Key(_OFF, "off"),
    "fp16.enabled": _Key(_OFF, "off"),
    "torch_autocast.enabled": _Key(_OFF, "off"),
    "wall_clock_breakdown": _Key(_OFF, "off"),
    "prescale_gradients": _Key(_OFF, "off"),
    "gradient_predivide_factor": _Key((1, 1.0), "off"),
    "gradient_allreduce_op": _Key(("mean",), "as the weights of micro-batches assume"),
}
_ALLOWED: dict[str, _Key] = {**_TOP, **{f"zero_optimization.{name}": key for name, key in _ZERO.items()}, **_DEFAULTS}
_SECTIONS = {path.rpartition(".")[0] for path in _ALLOWED if "." in path}

_GONE = "DeepSpeed 0.19.8 has no such part any more and ends at its name, also where it is off; delete it"
_OWN_STATES = "DeepSpeed's checkpoints are neither written nor read here; states and exports are this project's own"
_OWN_TIMES = "it waits for the device in each step; perf/... in the curves and --profile_steps show where time goes"
_OWN_CURVES = "curves are TensorBoard's and metrics.jsonl, in log_dir"
_SPLIT = "it was never tried here, where ZeRO alone divides the work among ranks"
_OTHER_DTYPE = "bf16.enabled alone says what the model computes in"
_LOSSY = "it sends numbers of 4 or 8 bits in the place of the weights or gradients that are computed"
_BF16_STATE = (
    "master weights and moments would be bf16, which loses nearly every update at the default rates: masters, moments "
    "and sums are fp32 here"
)
_DIVISION = "it moves the division by the number of ranks, which DeepSpeed does not support with reduce_scatter"
# Why a key, or anything in a section, is not as _ALLOWED has it.
_REASONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        ),
        _GONE,
    ),
    "fp16": "half precision needs a scaled loss, and gradients that overflow are skipped; take bf16, or neither (fp32)",
    "torch_autocast": f"{_OTHER_DTYPE}; in float16 the gradient, its norm and its clip would be 65,536 times too large",
    "bf16.bf16_master_weights_and_grads": _BF16_STATE,
    "bf16.bf16_optimizer_states": _BF16_STATE,
    "bf16.check_grad_overflow": "a gradient that is not finite would go into the weights",
    "data_types.grad_accum_dtype": "a sum of micro-batches in fewer bits loses small gradients",
    "data_types.param_dtype": _OTHER_DTYPE,
    "data_types.buffer_dtype": _OTHER_DTYPE,
    "data_types.keep_in_fp32_modules": _OTHER_DTYPE,
    "communication_data_type": "fp16 overflows where gradients are large",
    "gradient_allreduce_op": "a sum is the mean times the number of ranks, and the weights of micro-batches, the norm "
    "and the clip assume the mean",
    "prescale_gradients": _DIVISION,
    "gradient_predivide_factor": _DIVISION,
    "managed_gradient_accumulation": "the end of an optimizer step is told to DeepSpeed here, micro-batch by "
    "micro-batch",
    "autotuning": "DeepSpeed ends the process after a few steps, with status 0 and nothing saved",
    "data_efficiency": "it drops tokens, or draws the data by a schedule of its own",
    "tensor_parallel": _SPLIT,
    "expert_parallel": _SPLIT,
    "pipeline": _SPLIT,
    "hybrid_engine": _SPLIT,
    "weight_quantization": _LOSSY,
    "checkpoint": _OWN_STATES,
    "load_universal_checkpoint": _OWN_STATES,
    "comms_logger": "it waits for the device after each collective; perf/comm_mb and perf/comm_time_s say the same",
    "flops_profiler": _OWN_TIMES,
    "wall_clock_breakdown": _OWN_TIMES,
    "memory_breakdown": _OWN_TIMES,
    "csv_monitor": _OWN_CURVES,
    "comet": _OWN_CURVES,
    "wandb": _OWN_CURVES,
    "compile": "compiled layers gained nothing where this was measured, and were compiled anew for new lengths",
    "zero_force_ds_cpu_optimizer": "true is DeepSpeed's own CPU Adam, which is compiled at run time",
    "zero_optimization.zenflow": "AdamW would update most weights late, from gradients of several steps",
    "zero_optimization.zero_quantized_weights": _LOSSY,
    "zero_optimization.zero_quantized_nontrainable_weights": _LOSSY,
    "zero_optimization.zero_quantized_gradients": _LOSSY,
    "zero_optimization.round_robin_gradients": "with it the gradients came out wrong on two ranks: a norm of 5.06 for "
    "one of 6.40",
    "zero_optimization.compute_grad_norm": "each step's gradient norm is clipped by and shown",
    "zero_optimization.load_from_fp32_weights": _OWN_STATES,
    "zero_optimization.elastic_checkpoint": _OWN_STATES,
    "zero_optimization.pipeline_loading_checkpoint": _OWN_STATES,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _OWN_STATES,
    "zero_optimization.allgather_partitions": "nothing reads it any more",
    "zero_optimization.cpu_offload": 'an old spelling of "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'an old spelling of "offload_param": {"device": "cpu"}',
}


def check_keys(source: str, found: dict[str, Any], section: str = "") -> None:
    """Raises UserError for the first key or value of a DeepSpeed JSON that is not admitted, saying why.

    Args:
        source: the file's name.
        section: dotted name of the section that `found` is; empty: the whole file.
    """
    for name, value in found.items():
        path = f"{section}.{name}" if section else name
        if path in _ALLOWED:
            if not _ALLOWED[path].holds(value):
                reason = _REASONS.get(path) or _REASONS.get(section)
                why = f" ({reason})" if reason else ""
                raise UserError(f"{source}: {path}: expected {_ALLOWED[path].expected}, found {shown(value)}{why}")
        elif path in _SECTIONS:
            if not isinstance(value, dict):
                raise UserError(f"{source}: {path}: expected a JSON object, found {shown(value)}")
            check_keys(source, value, path)
        elif reason := _REASONS.get(path) or _REASONS.get(section):
            off = value is False or (isinstance(value, dict) and value.get("enabled") is False)
            advice = "it is off: leave it out" if off and reason != _GONE else reason
            raise UserError(f"{source}: key {shown(path)} is refused: {advice}")
        else:
            place = f"{source}: {section}" if section else source
            raise UserError(f"{place}: key {shown(name)} was never tried here; {_WHERE}{_meant(name, section)}")


def check_stage(source: str, zero: dict[str, Any]) -> None:
    """Raises UserError for a key that only the other ZeRO stage reads. `zero`: the section, its keys checked."""
    for name, key in _ZERO.items():
        section, _, last = name.rpartition(".")
        if key.stage not in (0, zero["stage"]) and last in (zero.get(section, {}) if section else zero):
            raise UserError(
                f"{source}: zero_optimization.{name}: only ZeRO stage {key.stage} reads it, and stage is "
                f"{zero['stage']}; delete it"
            )


def _meant(name: str, section: str) -> str:
    """A question about the admitted key that is spelled most like an unknown one: in its section, then anywhere."""
    inside = f"{section}." if section else ""
    near = {path.removeprefix(inside).partition(".")[0] for path in _ALLOWED if path.startswith(inside)}
    if found := _closest(name, near):
        return f"; did you mean {inside}{found}?"
    last = {path.rpartition(".")[2]: path for path in _ALLOWED}
    found = _closest(name, last)
    return f"; did you mean {last[found]}?" if found else ""


def _closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is spelled most like this one, if any is."""
    return next(iter(difflib.get_close_matches(name[:_MOST_COMPARED], sorted(known), n=1, cutoff=0.8)), None)
