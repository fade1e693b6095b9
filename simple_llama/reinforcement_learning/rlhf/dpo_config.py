"""Every setting of Direct Preference Optimization, with its default. The comment behind a field is its help text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

import tyro

from simple_llama.common.errors import UserError
from simple_llama.common.files import brief, read_json, shown
from simple_llama.common.paths import root_path
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT


@dataclass(frozen=True)
class DPOConfig:
    """Settings of a DPO run: defaults < --config FILE.json < flags. Batch sizes, rates and clip live only here."""

    # === Paths ===
    model_path: str = root_path("simple_llama", "finetune", "full_sft", "sft_checkpoints")  # SFT checkpoint: a .pth file, or a folder whose newest .pth is taken
    tokenize_path: str = root_path("simple_llama", "dataset", "bpe_8k.json")  # tokenizer JSON
    rlhf_dataset_path: str = root_path("simple_llama", "reinforcement_learning", "rl_dataset")  # preference pairs: a .json/.jsonl file, or a folder of them
    ckpt_dir: str = root_path("simple_llama", "reinforcement_learning", "rlhf", "rlhf_checkpoints")  # checkpoints go to <ckpt_dir>/<run_name>
    ref_cache_dir: str = root_path("ref_cache")  # reference log-probs, shared by all runs
    log_dir: str = root_path("runs")  # TensorBoard curves and the run's records go to <log_dir>/<run_name>
    deepspeed_config: str = root_path("ds_configs", "zero2_bf16.json")  # DeepSpeed JSON: ZeRO stage, dtype, buckets
    run_name: str = ""  # empty: the date and time; with --resume: the newest run

    # === Data ===
    max_seq_len: int = 0  # tokens; longer chats are dropped, both sides of the pair; 0: the model's own limit
    system_prompt: str = DEFAULT_SYSTEM_PROMPT  # what "CUSTOM" in a record's Template stands for: the prompt that the SFT used
    val_share: float = 0.05  # share of prompts held out for evaluation, in [0, 0.5]
    seed: int = 42  # of the shuffle and the validation split

    # === Batch ===
    batch_size: int = 16  # pairs per micro-batch per rank
    grad_accum_steps: int = 8  # micro-batches per optimizer step
    reduce_once: bool = False  # ranks exchange gradients once an optimizer step, not each micro-batch: less traffic, 4 more bytes a parameter on each rank

    # === Loss ===
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"  # preference loss
    beta: float = 0.5  # strength of the pull towards the reference
    label_smoothing: float = 0.0  # assumed share of swapped labels, in [0, 0.5); sigmoid only
    reference: Literal["store", "online"] = "store"  # online keeps the frozen model in memory (the baseline of the store)

    # === Optimizer ===
    epochs: int = 3  # passes over the pairs
    warmup_iterations: int = 50  # optimizer steps from 0 to max_lr
    max_lr: float = 5e-7  # peak learning rate
    min_lr: float = 1e-7  # learning rate at the end of the cosine
    weight_decay: float = 0.0  # AdamW decay of matrices; norms, biases and embeddings have none
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    max_grad_norm: float = 1.0  # clip of the global gradient norm; 0: no clip
    dropout: float = 0.0  # of the policy while training; anything above 0 makes the step-0 loss differ from ln 2
    trainable: Literal["all", "lora"] = "all"  # lora: only the adapters of a checkpoint that has them
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, about a third slower
    compile: bool = False  # compile the decoder layers (torch.compile; on a CPU it needs g++): faster steps after a slower start; ZeRO-2; references are kept apart from uncompiled ones

    # === Intervals ===
    log_interval: int = 1  # optimizer steps between lines of metrics
    eval_interval: int = 50  # optimizer steps between evaluations, beside those at the start and each epoch's end; 0: only these
    save_interval: int = 0  # optimizer steps between checkpoints, beside those at each epoch's end; 0: only these
    keep_states: int = 2  # resumable states kept, newest first
    n_samples: int = 4  # validation prompts that are answered at each evaluation; 0: none
    sample_tokens: int = 64  # tokens of a sample answer, at most
    ref_flush_pairs: int = 512  # pairs per shard of the reference store; a killed pass loses at most these per rank

    # === Run ===
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    start_timeout_s: float = 35.0  # seconds that a rank waits for the others to come at the start
    peer_timeout_s: float = 20.0  # seconds that another rank's process may be silent before all end (hung or stopped, host down, link cut)
    step_timeout_s: float = 60.0  # seconds without a finished micro-batch or sample on any rank before all end (hang); at least 4 times the longest so far
    io_timeout_s: float = 1800.0  # the same while data is read and checkpoints are written
    profile_steps: tuple[int, int] = (0, 0)  # first and last optimizer step that are traced (at most 10) into <log_dir>/<run_name>/profile; 0 0: none
    resume: bool = False  # continue the run `run_name` (or the newest) from its last state
    dry_run: bool = False  # print what would be done, and end
    debug: bool = False  # show tracebacks of errors that have a message

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if isinstance(field.default, str)):
            check_text(name, getattr(self, name))
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name}: expected a number from {low} to {high}, found {shown(value)}")
        for name in ("beta", "max_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}: expected a finite number above 0, found {getattr(self, name)!r}")
        if self.min_lr > self.max_lr:
            raise UserError(f"min_lr: expected at most max_lr ({self.max_lr}), found {self.min_lr}")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise UserError(
                f"label_smoothing: expected 0 with loss_type {self.loss_type!r}, which ignores it, "
                f"found {self.label_smoothing}"
            )
        if self.reduce_once and self.grad_accum_steps == 1:
            raise UserError("reduce_once: expected grad_accum_steps above 1, found 1, where it changes nothing")
        check_profile_steps(self.profile_steps)
        name = self.run_name
        if "/" in name or name in (".", "..") or not name.isprintable() or len(name.encode()) > LONGEST_RUN_NAME:
            raise UserError(
                f"run_name: expected a plain name without '/' of at most {LONGEST_RUN_NAME} bytes, found {shown(name)}"
            )


PATHS = ("model_path", "tokenize_path", "rlhf_dataset_path", "ckpt_dir", "ref_cache_dir", "log_dir", "deepspeed_config")
LONGEST_RUN_NAME = 200  # bytes; a file system takes 255, and temp names are longer than the name
MOST_PROFILED = 10  # optimizer steps; a trace has some hundred bytes an operation
WHOLE = 2**31 - 1
RANGES: dict[str, tuple[float, float]] = {
    "max_seq_len": (0, WHOLE),
    "val_share": (0.0, 0.5),
    "seed": (0, WHOLE),
    "batch_size": (1, WHOLE),
    "grad_accum_steps": (1, WHOLE),
    "label_smoothing": (0.0, 0.4999),
    "epochs": (1, WHOLE),
    "warmup_iterations": (0, WHOLE),
    "min_lr": (0.0, 1.0),
    "max_lr": (0.0, 1.0),
    "start_timeout_s": (1.0, 1e6),
    "peer_timeout_s": (5.0, 1e6),
    "step_timeout_s": (1.0, 1e6),
    "io_timeout_s": (1.0, 1e6),
    "weight_decay": (0.0, 10.0),
    "beta1": (0.0, 0.99999),
    "beta2": (0.0, 0.999999),
    "max_grad_norm": (0.0, 1e9),
    "dropout": (0.0, 0.9),
    "log_interval": (1, WHOLE),
    "eval_interval": (0, WHOLE),
    "save_interval": (0, WHOLE),
    "keep_states": (1, WHOLE),
    "n_samples": (0, 64),
    "sample_tokens": (1, 65536),
    "ref_flush_pairs": (1, WHOLE),
}


def check_text(name: str, text: str) -> None:
    """Raises UserError for text that no file can be named by, or that no file can hold."""
    if not text and name in PATHS:
        raise UserError(f"{name}: expected a path, found an empty one")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name}: expected Unicode text without NUL, found {shown(text)}")


def check_profile_steps(steps: tuple[int, int]) -> None:
    """Raises UserError unless `steps` is (0, 0), or a first and a last step that are not too many."""
    first, last = steps
    if steps != (0, 0) and not 1 <= first <= last <= min(first + MOST_PROFILED - 1, WHOLE):
        raise UserError(
            f"profile_steps: expected 0 0, or a first step from 1 and a last one from it, at most {MOST_PROFILED} steps, "
            f"found {shown(first)} {shown(last)}"
        )


def parse_config(argv: Sequence[str] | None = None, description: str | None = None) -> DPOConfig:
    """Settings from a command line (default: this process's): defaults < `--config FILE.json` < flags.

    `--local_rank=N`, which DeepSpeed's launcher appends, is left out: ranks come from the environment.
    Raises UserError for a bad value; ends the process with status 2 (tyro's way) for an unknown flag.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    files, args = take_option(args, "--config")
    _, args = take_option(args, "--local_rank")
    if len(files) > 1:
        raise UserError(f"--config: expected one file, found {len(files)}")
    base = config_from_file(files[0]) if files else DPOConfig()
    return tyro.cli(DPOConfig, args=args, default=base, description=description)


def take_option(args: list[str], name: str) -> tuple[list[str], list[str]]:
    """Splits `name VALUE`, `name=VALUE` (also spelled with hyphens) out of `args`: (the values, all other arguments)."""
    values, rest, waiting = [], [], iter(args)
    for arg in waiting:
        flag, equals, value = arg.partition("=")
        if flag.replace("-", "_") != name.replace("-", "_"):
            rest.append(arg)
        elif equals:
            values.append(value)
        else:
            found = next(waiting, None)
            if found is None:
                raise UserError(f"{name}: expected a value behind it, found the end of the command line")
            values.append(found)
    return values, rest


def config_from_file(path: str) -> DPOConfig:
    """Reads a JSON object of settings; an unknown key or a value of another type is a UserError."""
    return config_from_dict(read_json(path), path)


def config_from_dict(found: Any, source: str) -> DPOConfig:
    """Builds the settings from a plain dict; `source` names it in errors."""
    if not isinstance(found, dict):
        raise UserError(f"{source}: expected a JSON object of settings, found {type(found).__name__}")
    known, hints = {field.name: field for field in fields(DPOConfig)}, get_type_hints(DPOConfig)
    for name, value in found.items():
        if name not in known:
            raise UserError(f"{source}: unknown setting {shown(name)}; known are {', '.join(known)}")
        default = known[name].default
        if isinstance(default, tuple):
            if not (isinstance(value, list) and [type(number) for number in value] == [type(number) for number in default]):
                raise UserError(f"{source}: {name}: expected a list of {len(default)} whole numbers, found {brief(value)}")
            continue
        fits = isinstance(value, bool) == isinstance(default, bool) and (
            isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
        )
        if not fits:
            raise UserError(f"{source}: {name}: expected {type(default).__name__}, found {brief(value)}")
        allowed = get_args(hints[name])  # of a Literal
        if allowed and value not in allowed:
            raise UserError(f"{source}: {name}: expected one of {', '.join(allowed)}, found {shown(value)}")
    settings: dict[str, Any] = dict(found)
    for name, value in found.items():
        if isinstance(known[name].default, float):
            settings[name] = as_float(f"{source}: {name}", value)
        if isinstance(known[name].default, tuple):
            settings[name] = tuple(value)
    return DPOConfig(**settings)


def as_float(place: str, value: float) -> float:
    """A number of a JSON file as a float; UserError for a whole number beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{place}: expected a number that a float can hold, found {shown(value)}") from None
