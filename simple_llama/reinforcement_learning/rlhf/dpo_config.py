"""Every setting of a command: what its owners declare, together, with the few that are the command's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from simple_llama.cluster.watchdog import WatchConfig
from simple_llama.common.settings import parse_settings, peek_settings
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import with_held_out
from simple_llama.reinforcement_learning.rlhf.foretell.fit import ForetellConfig
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import resolved
from simple_llama.reinforcement_learning.rlhf.run.run_folder import FolderConfig, settings_to_resume
from simple_llama.reinforcement_learning.rlhf.run.schedule import with_warmup
from simple_llama.reinforcement_learning.rlhf.run.training_run import RunConfig


@dataclass(frozen=True)
class CommandConfig(WatchConfig):
    """Of every command."""

    # === Command ===
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    debug: bool = False  # show tracebacks of errors that have a message


@dataclass(frozen=True)
class DPOConfig(ForetellConfig, CommandConfig, RunConfig):
    """Settings of a DPO run: defaults < with --resume the run's own < --config FILE.json < flags.

    Each stands with its owner, with its bounds: data/dataset_loader.py has DataConfig, objective/preference_loss.py has
    LossConfig, and so on; docs/settings.md lists them all. A function takes its owner's class, not this one.
    """


def parse_config(argv: Sequence[str] | None = None, description: str | None = None) -> DPOConfig:
    """Settings from a command line (default: this process's); see `parse_settings`. A run to resume gives its own, the
    loss its defaults."""
    folders = peek_settings(FolderConfig, argv)
    own, source = settings_to_resume(folders, DPOConfig) if folders.resume else ({}, "")
    return with_held_out(with_warmup(resolved(parse_settings(DPOConfig, argv, description, own, source))))
