"""Writes a model, or what a run has trained so far, in another form or dtype: launch/export.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import check_free, read_json
from simple_llama.common.settings import CountOrNone, PathText, Settings, TextOrFile, with_texts
from simple_llama.interop.adapted_start import AdaptedStart, base_of
from simple_llama.interop.hf_config import config_json
from simple_llama.interop.hf_export import ExportForm, TrainedOver, write_folder
from simple_llama.interop.hf_names import LLAMA, check_mappable
from simple_llama.interop.open_start import open_start, open_start_of
from simple_llama.interop.own_checkpoints import MergedLoRA, UntiedHead, training_config
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import check_weights, save_weights
from simple_llama.reinforcement_learning.rlhf.average import MeanWeights, last_epochs
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import (
    SavedState,
    StateWeights,
    newest_state,
    read_state,
)
from simple_llama.reinforcement_learning.rlhf.export_tokenizer import (
    TEMPLATE_DIGEST_KEY,
    Asked,
    Trained,
    metadata_of,
    tokenizer_of,
)
from simple_llama.reinforcement_learning.rlhf.inputs import TOKENIZER_KEY
from simple_llama.reinforcement_learning.rlhf.run.exports import may_be_a_runs
from simple_llama.reinforcement_learning.rlhf.run.run_folder import environment
from simple_llama.reinforcement_learning.rlhf.run.saves import start_digest

_PTH = ".pth"
_OF_A_RUN = ("run", "step", "epochs", "loss", "dpo_config", "reference", "start")  # metadata that stays true
_OF_A_MEAN = ("run", "dpo_config", "reference", "start")  # and this, of several of its exports
_OF_A_CONVERSION = (TOKENIZER_KEY, TEMPLATE_DIGEST_KEY)  # and this, of a .pth


@dataclass(frozen=True)
class ExportConfig(Settings):
    """What is written, from what."""

    # === Files ===
    source: PathText  # a .pth, a Hugging Face folder, a .gguf file, a run's checkpoint folder or one of its states
    output: PathText  # what to make: a SimpleLLaMA checkpoint where it ends with .pth, otherwise a Hugging Face folder

    # === Form ===
    dtype: Literal["source", "float32", "bfloat16"] = "source"  # of the tensors; source: as the model came, or fp32
    average: Annotated[
        CountOrNone, Doc("the mean of what a run exported at the ends of its last so many epochs; 0: its newest state")
    ] = 0

    # === What the source does not say ===
    model_path: str = ""  # the model that a run started from; empty: where the run found it
    tokenize_path: str = ""  # tokenizer to go with a folder; empty: the run's, the model's own, or the shipped one
    system_prompt: Annotated[
        str, TextOrFile(), Doc("that of its chats that have none, or @FILE with it; empty: the run's, or the default")
    ] = ""


class _Source(NamedTuple):
    """What is to be written."""

    start: StartModel
    trained: Mapping[str, torch.Tensor]  # by our names, over those of `start`; empty where that is all
    metadata: dict[str, Any]
    is_state: bool = False  # whether it is a run's start model with what a state says
    older: tuple[StartModel, ...] = ()  # beside `start`, whose mean is to be written

    @property
    def tokenizer(self) -> Trained:
        """What is known of the tokenizer that it was trained with, where none came with the weights themselves."""
        apart = self.is_state or isinstance(base_of(self.start), StartFile)
        return Trained.of(self.metadata if apart else {})


def export_model(config: ExportConfig) -> str:
    """Writes `config.output`, whole or not at all; gives the line to show.

    Raises UserError where something lies there already, for a source that is none, and for a model that the wanted
    form cannot say.
    """
    config, output = with_texts(config, {}), Path(config.output)
    check_free(output)
    if may_be_a_runs(output):
        raise UserError(
            f"{output}: expected a name that the run in {output.parent} gives to none of its exports, which it may "
            "replace or delete, found dpo_...; choose another --output"
        )
    source = _open_source(config)
    _check_used(config, source, output)
    dtype = None if config.dtype == "source" else getattr(torch, config.dtype)
    asked = Asked(config.tokenize_path, config.system_prompt)
    if isinstance(base := base_of(source.start), StartFile):
        written = _from_own(base, source, output, dtype, asked)
    elif output.suffix == _PTH:
        written = _to_own(source, output, dtype)
    else:
        tokenizer = tokenizer_of(asked, source.tokenizer, base)
        source.start.export(output, source.trained, source.metadata, dtype, tokenizer)
        written = ""
    return f"wrote {output} from {source.metadata['source']}{written}"


def _open_source(config: ExportConfig) -> _Source:
    """The model at `config.source`, or the start model of the run there with what it has trained."""
    path = Path(config.source)
    if config.average:
        return _averaged(path, config.average)
    saved = _state_at(path)
    if saved is None:
        start = open_start(path)
        base = base_of(start)
        check_weights(start.load(), start.export_dtype)
        metadata = _kept(start.export_metadata(start.path), _OF_A_RUN)
        if isinstance(base, StartFile):
            metadata |= _kept(base.metadata, (*(_OF_A_RUN if start is base else ()), *_OF_A_CONVERSION))
        return _Source(start, {}, {**metadata, **_about(start.path.name)})
    run = saved.folder.parent.parent
    settings = _settings_of(run)
    start = open_start_of(settings, _start_path(config, settings, run))
    if isinstance(start, AdaptedStart):
        start = start.whole()
    if start_digest(saved.facts.course) != start.digest:
        raise UserError(f"{start.path}: not the model that the run {run.name} started from; give that as --model_path")
    metadata = {
        **_about(f"step {saved.facts.step} of the run {run.name}"),
        "run": run.name,
        "step": saved.facts.step,
        "dpo_config": settings,
        "reference": saved.facts.course["reference"],
        "start": start.digest,
    }
    base = base_of(start)
    if not isinstance(base, StartFile) or TOKENIZER_KEY in base.metadata:
        metadata[TOKENIZER_KEY] = saved.facts.course["reference"]["tokenizer"]
    return _Source(start, StateWeights(saved), metadata, is_state=True)


def _averaged(run: Path, count: int) -> _Source:
    """The mean of what a run exported at its last epochs' ends."""
    if not run.is_dir():
        raise UserError(f"average: expected the checkpoint folder of a run as --source, found {run}")
    (start, *older), metadata = last_epochs(run, count)
    steps = ", ".join(str(one["step"]) for one in reversed(metadata))
    kept = _kept(metadata[0], (*_OF_A_MEAN, *_OF_A_CONVERSION))
    about = _about(f"the mean of steps {steps} of the run {kept.get('run', run.name)}")
    if isinstance(base_of(start), StartFile):
        return _Source(start, {}, {**kept, **about}, older=tuple(older))
    return _Source(base_of(start), MeanWeights([_merged(one) for one in (start, *older)]), {**kept, **about})


def _about(source: str) -> dict[str, Any]:
    """Metadata of whatever is written here. Without a `file` a run might take it for an export of its own."""
    return {"source": source, "file": "", "environment": environment()}


def _kept(metadata: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """What the metadata of an export says that is true of another form of it; nothing of others'."""
    found = {key: metadata[key] for key in keys if key in metadata}
    try:
        json.dumps(found)
    except (TypeError, ValueError):  # another program's
        return {}
    return found


def _check_used(config: ExportConfig, source: _Source, output: Path) -> None:
    """UserError for a setting that has no effect on what is written."""
    folder = output.suffix != _PTH
    used = {
        "model_path": (source.is_state, "a state or the folder of a run"),
        "tokenize_path": (folder, "a folder as output"),
        "system_prompt": (folder, "a SimpleLLaMA checkpoint, and a folder as output"),
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


def _from_own(start: StartFile, source: _Source, output: Path, dtype: torch.dtype | None, asked: Asked) -> str:
    """A SimpleLLaMA checkpoint, LoRA merged, as one or as a LlamaForCausalLM with its tokenizer and chat template.

    Args: start: the source's, without adapters that stand beside it.
    """
    if isinstance(source.start, AdaptedStart):
        merged = source.start.merged(source.trained)
    else:
        merged = MergedLoRA(start.merged(source.trained), start.architecture)
    architecture = merged.architecture
    tensors = MeanWeights([merged, *map(_merged, source.older)]) if source.older else merged
    dtype = dtype or torch.float32
    if output.suffix == _PTH:
        own = copy(start.config)
        own.use_lora = False
        save_weights(output, {name: tensors[name].to(dtype) for name in tensors}, own, source.metadata)
    else:
        check_mappable(architecture)
        tokenizer = tokenizer_of(asked, source.tokenizer, start)
        assert tokenizer is not None  # a .pth holds none
        settings = config_json(architecture, dtype, tokenizer.token_ids)
        form = ExportForm(architecture, LLAMA, settings, dtype, tokenizer.files)
        write_folder(output, tensors, form, source.metadata)
    return ", LoRA merged" if source.start.architecture.lora else ""


def _merged(start: StartModel) -> MergedLoRA:
    """A model's tensors, LoRA merged: the mean of products is not the product of means."""
    return MergedLoRA(start.load().state_dict, start.architecture)


def _to_own(source: _Source, output: Path, dtype: torch.dtype | None) -> str:
    """Another model as a SimpleLLaMA checkpoint, where its TrainingConfig can say it."""
    start = base_of(source.start)
    untied = replace(start.architecture, tied_head=False)
    try:
        own = training_config(untied)
    except UserError as error:
        raise UserError(f"{start.path}: {error}; leave out the .pth for a Hugging Face folder") from error
    if isinstance(source.start, AdaptedStart):
        tensors: Mapping[str, torch.Tensor] = source.start.merged(source.trained)
    else:
        tensors = TrainedOver(source.trained, start.load().state_dict)
    if start.architecture.tied_head:
        tensors = UntiedHead(tensors)
    metadata = dict(source.metadata)
    if start.own_tokenizer and not source.is_state:
        metadata |= metadata_of(start.own_tokenizer)
    save_weights(output, {name: tensors[name].to(dtype or torch.float32) for name in tensors}, own, metadata)
    head = ", the head a copy of the embeddings" if start.architecture.tied_head else ""
    return head + source.tokenizer.where_it_lies(start)
