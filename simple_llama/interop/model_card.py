"""The README.md of an exported model: what a run's metadata says, for people. No path of a machine goes into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from simple_llama.common.path_lists import brief_paths

_FRONT = """---
library_name: {library}
pipeline_tag: text-generation
"""
_TAGS = """tags:
- dpo
"""
_SETTINGS = {  # of a run, by what they are called here
    "loss_type": "loss",
    "beta": "beta",
    "epochs": "epochs",
    "max_lr": "learning rate, at most",
    "batch_size": "pairs a micro-batch on each rank",
    "grad_accum_steps": "micro-batches a step",
    "pairs_a_step": "pairs a step on each rank",
    "rows_per_micro_batch": "tokens of a micro-batch, at most",
    "max_seq_len": "tokens of a chat, at most",
    "seed": "seed",
}
_PACKAGES = ("torch", "deepspeed", "simple-llama-dpo", "git")


def model_card(name: str, metadata: Mapping[str, Any], library: str = "transformers") -> str:
    """The card of a run's export, or of a conversion, whose metadata has `source` alone.

    Args:
        name: of the folder.
        metadata: as `Saves` makes it; what is missing is left out.
        library: that loads it.
    """
    settings = metadata.get("dpo_config") or {}
    if settings.get("rows_per_micro_batch"):  # then these two say only what a step has
        pairs = settings.get("batch_size", 0) * settings.get("grad_accum_steps", 0)
        settings = {**settings, "batch_size": 0, "grad_accum_steps": 0, "pairs_a_step": pairs}
    facts = {
        "start model": _last(settings.get("model_path") or metadata.get("source")),
        "made from": metadata.get("source") if settings else None,
        "adapters": _adapters(settings),
        "run": metadata.get("run"),
        "optimizer steps": metadata.get("step"),
        "epochs done": _short(metadata.get("epochs")),
        "held-out loss at this step": _short(metadata.get("loss")),
        "preference data": brief_paths(str(settings.get("rlhf_dataset_path") or "")) or None,
        **{words: _short(settings.get(key) or None) for key, words in _SETTINGS.items()},  # 0: what the model has
        **{package: (metadata.get("environment") or {}).get(package) for package in _PACKAGES},
    }
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value is not None]
    tags = ""
    if settings:
        tags = _TAGS
        about = (
            "Tuned by Direct Preference Optimization (Rafailov et al., arXiv:2305.18290) on pairs of a preferred and a "
            "rejected answer."
        )
    else:
        about = "Another form of the same model."
    return "\n".join(
        [
            f"{_FRONT.format(library=library)}{tags}---\n# {_cell(name)}\n",
            f"{about} The license is that of the start model.\n",
            "| | |",
            "|---|---|",
            *rows,
            "\nAll settings are in `simple_llama_run.json`.\n",
        ]
    )


def _adapters(settings: Mapping[str, Any]) -> str | None:
    """The LoRA adapters that the run trained, where it did."""
    rank, alpha = settings.get("lora_rank"), settings.get("lora_alpha")
    if not rank:
        return None
    root = "sqrt(rank)" if settings.get("lora_rslora") else "rank"
    return f"LoRA, rank {rank}, alpha {_short(alpha)} (scale alpha / {root}), on {settings.get('lora_targets')}"


def _last(path: Any) -> str | None:
    """The last part of a path."""
    return PurePath(str(path)).name if path else None


def _short(value: Any) -> Any:
    """A number with the digits that people read."""
    return f"{value:.6g}" if isinstance(value, float) else value


def _cell(value: Any) -> str:
    """Text that cannot leave its place in the page."""
    text = str(value).replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
    return " ".join(text.split())
