"""Writes a model, or what a run has trained so far, in another form or dtype: launch/export.py."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import read_json
from simple_llama.common.paths import package_path
from simple_llama.common.settings import PathText, Settings, TextOrFile, with_texts
from simple_llama.dataset.tokenizer import load_tokenizer, token_count
from simple_llama.finetune.format_llm_prompt import DEFAULT_SYSTEM_PROMPT
from simple_llama.interop.hf_config import config_json
from simple_llama.interop.hf_export import ExportForm, write_folder
from simple_llama.interop.hf_names import LLAMA
from simple_llama.interop.hf_tokenizer import tokenizer_at
from simple_llama.interop.open_start import open_start
from simple_llama.interop.own_checkpoints import (
    TOKEN_IDS,
    MergedLoRA,
    UntiedHead,
    tokenizer_files,
    training_config,
)
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import check_weights, save_weights
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import (
    SavedState,
    StateWeights,
    newest_state,
    read_state,
)
from simple_llama.reinforcement_learning.rlhf.inputs import is_shipped
from simple_llama.reinforcement_learning.rlhf.run.run_folder import environment

_PTH = ".pth"


@dataclass(frozen=True)
class ExportConfig(Settings):
    """What is written, from what."""

    # === Files ===
    source: PathText  # a .pth, a Hugging Face folder, a .gguf file, a run's checkpoint folder or one of its states
    output: PathText  # what to make: a SimpleLLaMA checkpoint where it ends with .pth, otherwise a Hugging Face folder

    # === Form ===
    dtype: Literal["source", "float32", "bfloat16"] = "source"  # of the tensors; source: as the model came, or fp32

    # === What the source does not say ===
    model_path: str = ""  # the model that a run started from; empty: where the run found it
    tokenize_path: str = ""  # tokenizer to go with a folder; empty: the run's, the model's own, or the shipped one
    system_prompt: Annotated[
        str, TextOrFile(), Doc("that of its chats that have none, or @FILE with it; empty: the run's, or the default")
    ] = ""


class _Source(NamedTuple):
    """What is to be written."""

    start: StartModel
    trained: Mapping[str, torch.Tensor]  # by our names; empty where no run is
    metadata: dict[str, Any]
    settings: Mapping[str, Any]  # of the run; empty where none is


def export_model(config: ExportConfig) -> str:
    """Writes `config.output`, whole or not at all; gives the line to show.

    Raises UserError where something lies there already, for a source that is none, and for a model that the wanted
    form cannot say.
    """
    config, output = with_texts(config, {}), Path(config.output)
    if os.path.lexists(output):
        raise UserError(f"{output}: expected nothing there yet; choose another --output, or move it away")
    source = _open_source(config)
    _check_used(config, source, output)
    dtype = None if config.dtype == "source" else getattr(torch, config.dtype)
    if isinstance(source.start, StartFile):
        written = _from_own(config, source.start, source, output, dtype)
    elif output.suffix == _PTH:
        written = _to_own(source, output, dtype)
    else:
        tokenizer = _given_tokenizer(config, source)
        source.start.export(output, source.trained, source.metadata, dtype, tokenizer)
        written = ""
    return f"wrote {output} from {source.metadata['source']}{written}"


def _open_source(config: ExportConfig) -> _Source:
    """The model at `config.source`, or the start model of the run there with what it has trained."""
    path = Path(config.source)
    saved = _state_at(path)
    if saved is None:
        start = open_start(path)
        check_weights(start.load(), start.export_dtype)
        return _Source(start, {}, {"source": start.path.name, "environment": environment()}, {})
    run = saved.folder.parent.parent
    settings = _settings_of(run)
    start = open_start(_start_path(config, settings, run))
    if saved.facts.course["reference"]["weights"] != start.digest:
        raise UserError(f"{start.path}: not the model that the run {run.name} started from; give that as --model_path")
    metadata = {
        "source": f"step {saved.facts.step} of the run {run.name}",
        "run": run.name,
        "step": saved.facts.step,
        "dpo_config": settings,
        "reference": saved.facts.course["reference"],
        "environment": environment(),
    }
    return _Source(start, StateWeights(saved), metadata, settings)


def _check_used(config: ExportConfig, source: _Source, output: Path) -> None:
    """UserError for a setting that has no effect on what is written."""
    folder = output.suffix != _PTH
    used = {
        "model_path": ("run" in source.metadata, "a state or the folder of a run"),
        "tokenize_path": (folder, "a folder as output"),
        "system_prompt": (folder and isinstance(source.start, StartFile), "a SimpleLLaMA checkpoint, and a folder"),
    }
    for name, (has_effect, wanted) in used.items():
        if getattr(config, name) and not has_effect:
            raise UserError(f"{name}: expected {wanted}, found {config.source}, where it has no effect; leave it out")


def _state_at(path: Path) -> SavedState | None:
    """The state in a folder, or the newest one of the run there; None for what is neither."""
    if (path / "state.json").exists():
        try:
            return read_state(path.absolute())
        except UserError as error:
            raise UserError(f"{path}: expected a whole state, found: {error}") from error
    return newest_state(path.absolute()) if (path / "state").is_dir() else None


def _settings_of(run: Path) -> dict[str, Any]:
    """The settings that a run keeps beside its states; none where it keeps none, as earlier versions did."""
    path = run / "config.json"
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object of settings, found {type(found).__name__}")
    return found


def _start_path(config: ExportConfig, settings: Mapping[str, Any], run: Path) -> str:
    """Where the start model of a run lies."""
    path = config.model_path or settings.get("model_path")
    if not isinstance(path, str) or not path:
        raise UserError(f"{run}: expected a config.json that says which model the run started from; give --model_path")
    return path


def _from_own(config: ExportConfig, start: StartFile, source: _Source, output: Path, dtype: torch.dtype | None) -> str:
    """A SimpleLLaMA checkpoint, LoRA merged, as one or as a LlamaForCausalLM with its tokenizer and chat template."""
    merged = MergedLoRA(start.merged(source.trained), start.architecture)
    dtype = dtype or torch.float32
    if output.suffix == _PTH:
        own = copy(start.config)
        own.use_lora = False
        save_weights(output, {name: merged[name].to(dtype) for name in merged}, own, source.metadata)
    else:
        architecture = merged.architecture
        settings = config_json(architecture, dtype, TOKEN_IDS)
        form = ExportForm(architecture, LLAMA, settings, dtype, _tokenizer_files(config, source, architecture))
        write_folder(output, merged, form, source.metadata)
    return ", LoRA merged" if start.architecture.lora else ""


def _given_tokenizer(config: ExportConfig, source: _Source) -> Mapping[str, bytes] | None:
    """The files of a tokenizer that is not what came with the model; None where that is the one."""
    path = config.tokenize_path or source.settings.get("tokenize_path")
    if not path or is_shipped(Path(path)):
        return None
    own = tokenizer_at(path)
    return own.files if own else _tokenizer_files(config, source, source.start.architecture)


def _tokenizer_files(config: ExportConfig, source: _Source, architecture: Architecture) -> dict[str, bytes]:
    """The tokenizer and chat format of a SimpleLLaMA checkpoint."""
    found = source.settings.get
    path = config.tokenize_path or found("tokenize_path") or package_path("dataset", "bpe_8k.json")
    tokenizer = load_tokenizer(path)
    if token_count(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"{path}: {token_count(tokenizer)} tokens, but the model knows {architecture.vocab_size}; give the "
            "tokenizer that it was trained with as --tokenize_path"
        )
    system = config.system_prompt or found("system_prompt") or DEFAULT_SYSTEM_PROMPT
    return tokenizer_files(tokenizer, system, architecture.max_seq_len)


def _to_own(source: _Source, output: Path, dtype: torch.dtype | None) -> str:
    """Another model as a SimpleLLaMA checkpoint, where its TrainingConfig can say it."""
    start = source.start
    untied = replace(start.architecture, tied_head=False)
    try:
        own = training_config(untied)
    except UserError as error:
        raise UserError(f"{start.path}: {error}; leave out the .pth for a Hugging Face folder") from error
    both: Any = (source.trained, start.load().state_dict)
    tensors: Mapping[str, torch.Tensor] = ChainMap(*both)
    if start.architecture.tied_head:
        tensors = UntiedHead(tensors)
    save_weights(output, {name: tensors[name].to(dtype or torch.float32) for name in tensors}, own, source.metadata)
    return ", the head a copy of the embeddings" if start.architecture.tied_head else ""
