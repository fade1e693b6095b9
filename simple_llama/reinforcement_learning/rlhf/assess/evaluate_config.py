"""The settings of launch/evaluate.py. What a model was trained with is taken from it, so that it need not be given."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.path_lists import same_paths
from simple_llama.common.paths import package_path, root_path
from simple_llama.common.settings import Bounds, Count, CountOrNone, PathText, Settings, parse_settings, peek_settings
from simple_llama.finetune.chat_config import ChatConfig
from simple_llama.inference.generate import NextToken
from simple_llama.interop.open_start import start_metadata
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import DataConfig
from simple_llama.reinforcement_learning.rlhf.dpo_config import CommandConfig
from simple_llama.reinforcement_learning.rlhf.inputs import InputsConfig
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import BETA
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import StoreConfig
from simple_llama.reinforcement_learning.rlhf.run.run_folder import FolderConfig, without_moved

_MOST_MODELS = 16
_BETA = 0.5  # of a model that says nothing of one


@dataclass(frozen=True)
class ModelsConfig(Settings):
    """Which models."""

    # === Models ===
    models: Annotated[
        str,
        Doc(
            "what to evaluate: .pth files, folders of runs or of Hugging Face models, .gguf files, adapters that name "
            "their base, commas between them; empty: the start model alone"
        ),
    ] = ""
    model_path: Annotated[
        str, Doc("the model that they are compared with; empty: the one that the first model's run started from")
    ] = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the models to evaluate."""
        return tuple(path for path in (one.strip() for one in self.models.split(",")) if path)

    def check_rules(self) -> None:
        """UserError for a model that stands twice, or too many."""
        paths = self.paths
        if len(paths) > _MOST_MODELS or len(set(paths)) < len(paths):
            raise UserError(f"models: expected up to {_MOST_MODELS} different paths, found {self.models!r}")


@dataclass(frozen=True)
class AnswersConfig(NextToken):
    """What the models are asked to write, and who judges it."""

    # === Answers ===
    generate: CountOrNone = 0  # different prompts of the pairs that each model answers; 0: none
    max_new_tokens: Annotated[int, Bounds(1, 65536)] = 128  # tokens of an answer, at most
    judge: Annotated[
        str, Doc("command that says which of two answers is better (docs/evaluate.md); run without a shell")
    ] = ""
    judge_timeout_s: Annotated[
        float, Bounds(1.0, 1e6), Doc("seconds without an answer after which the judge counts as hung")
    ] = 600.0

    def check_rules(self) -> None:
        """UserError for a judge without effect."""
        if self.judge and not self.generate:
            raise UserError("judge: expected --generate N beside it, found 0: there is nothing to judge")


@dataclass(frozen=True)
class EvaluateConfig(CommandConfig, AnswersConfig, StoreConfig, DataConfig, ChatConfig, ModelsConfig):
    """Settings of an evaluation: defaults < those of the first model's run < --config FILE.json < flags."""

    # === Evaluation ===
    share: Annotated[
        Literal["auto", "held_out", "all"],
        Doc(
            "which pairs: all, or those that training holds out (val_share, seed); auto: held_out of the data that the "
            "first model was trained on, and all of any other"
        ),
    ] = "auto"
    tokenize_path: Annotated[
        PathText, Doc("tokenizer JSON; left at its default, a Hugging Face or GGUF model has its own")
    ] = package_path("dataset", "bpe_8k.json")
    deepspeed_config: Annotated[PathText, Doc("DeepSpeed JSON; what counts here is the dtype in it")] = package_path(
        "ds_configs", "zero2_bf16.json"
    )
    batch_size: Count = 16  # pairs that a rank computes at once
    rows_per_micro_batch: Annotated[
        CountOrNone, Doc("most packed tokens that a rank computes at once, in place of pairs; 0: batch_size pairs")
    ] = 0
    beta: Annotated[
        float | None,
        BETA,
        Doc("what rewards and losses multiply log-ratios by; unset: each model's own, 0.5 of others"),
    ] = None
    output: Annotated[
        str, Doc("folder for report.html and report.json; empty: evaluations/ with date and time")
    ] = ""  # fmt: skip

    def inputs_of(self, path: str, max_seq_len: int = 0) -> InputsConfig:
        """What a training run would have for the model at `path`."""
        mine = {field.name: getattr(self, field.name) for field in fields(InputsConfig) if hasattr(self, field.name)}
        return InputsConfig(**{**mine, "model_path": path, "max_seq_len": max_seq_len or self.max_seq_len})


_FROM_RUN = ("batch_size", "rows_per_micro_batch", "deepspeed_config", "tokenize_path", "ref_cache_dir", "model_path")


def parse_evaluate(argv: Sequence[str] | None = None, description: str | None = None) -> EvaluateConfig:
    """Settings from a command line (default: this process's), on top of what the first model's run was given.

    UserError where a model is not there, or no start model is named, by the command line or by that run.
    """
    asked = peek_settings(ModelsConfig, argv)
    if missing := [path for path in asked.paths if not os.path.lexists(path)]:
        run = Path(FolderConfig.ckpt_dir) / missing[0]
        hint = f"a run of that name has its checkpoints in {run}" if run.is_dir() else "names are not looked up"
        raise UserError(f"models: expected a model at {missing[0]}, found nothing there; {hint}")
    about = start_metadata(asked.paths[0]) if asked.paths else {}
    own = without_moved(EvaluateConfig, _settings_of(about))
    own = _with_data_asked(own, peek_settings(DataConfig, argv))
    config = parse_settings(EvaluateConfig, argv, description, own, f"{asked.models}: settings")
    if not config.model_path:
        named = f"{config.paths[0]}, which says of no run that made it" if config.paths else "no model"
        raise UserError(
            "model_path: expected the start model, which the models are compared with, found none with "
            f"{named}; give --model_path, the model that training started from"
        )
    if not os.path.lexists(config.model_path):
        raise UserError(
            f"model_path: expected the start model at {config.model_path}, found nothing there; give --model_path, the "
            "model that training started from"
        )
    return config


def _with_data_asked(own: dict[str, Any], asked: DataConfig) -> dict[str, Any]:
    """A run's settings without what it held out, where a command line names other data or holds out otherwise."""
    path = asked.rlhf_dataset_path
    other = path != DataConfig().rlhf_dataset_path and not same_paths(path, str(own.get("rlhf_dataset_path", "")))
    dropped = {"val_share"} if asked.validation_path else set()
    if asked.val_share is not None or (other and not asked.validation_path):
        dropped = {"validation_path"}
    return {name: value for name, value in own.items() if name not in dropped}


def trained_on(config: EvaluateConfig) -> str:
    """The data that the first model's run was given; empty where it does not say."""
    settings = _settings_of(start_metadata(config.paths[0])) if config.paths else {}
    return str(settings.get("rlhf_dataset_path", ""))


def beta_of(config: EvaluateConfig, path: str) -> float:
    """What the rewards of the model at `path` multiply log-ratios by: asked for, or what it was trained with."""
    if config.beta is not None:
        return config.beta
    found = start_metadata(path).get("dpo_config")
    beta = found.get("beta") if isinstance(found, Mapping) else None
    return float(beta) if isinstance(beta, int | float) and BETA.hold(beta) else _BETA


def _settings_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's export says of its settings, as far as an evaluation has them."""
    found = about.get("dpo_config")
    if not isinstance(found, dict):
        return {}
    names = {*_FROM_RUN, *(field.name for kind in (DataConfig, ChatConfig) for field in fields(kind))}
    return {name: found[name] for name in names if found.get(name) is not None}


def default_folder(stamp: str) -> Path:
    """Where a report goes that was given no place."""
    return Path(root_path("evaluations", stamp))
